"""The last step of `prepare`: what the items' records add up to, in one manifest."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from tinyllama_jax import __version__
from tinyllama_jax.data import durable, items, shards, store
from tinyllama_jax.data.durable import writing
from tinyllama_jax.data.plan import ITEMS, Plan
from tinyllama_jax.data.shards import token_dtype
from tinyllama_jax.errors import DataError


def finalize(frozen: Plan) -> Path:
    """Writes the manifest.  Raises DataError naming the items that are not done."""
    tokenizer = frozen.tokenizer()
    dtype = token_dtype(tokenizer.vocab_size)
    records = [items.finished(frozen, item, dtype) for item in frozen.items]
    missing = [number for number, record in enumerate(records) if record is None]
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        raise DataError(
            f"{frozen.folder}: {len(missing)} of {len(records)} items are not done: {some}; "
            f"tinyllama prepare run --out {frozen.folder} --items {missing[0]}:{missing[-1] + 1}"
        )
    manifest = {
        "format_version": store.FORMAT_VERSION,
        "created_by": f"tinyllama_jax {__version__}",
        "recipe": frozen.record["recipe"],
        "plan_sha256": frozen.sha256,
        "items": len(records),
        "content_sha256": durable.checksum({"items": [record["content_sha256"] for record in records]}),
        "window_tokens": frozen.recipe.window_tokens,
        "packing": frozen.recipe.packing,
        "dtype": dtype.str,
        "document_marks": frozen.recipe.document_marks,
        "tokenizer": {
            "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizer.files},
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        **_sums(records),
    }
    if "python_version" in frozen.record:
        manifest["python_version"] = frozen.record["python_version"]
    for domain, entry in manifest["splits"]["train"].items():
        if not entry["windows"]:
            raise DataError(
                f"{frozen.folder}: domain {domain!r} has {entry['dropped_tokens']} training tokens, which fill no "
                f"window of {frozen.recipe.window_tokens}; give it more text, or prepare with a smaller --window-tokens"
            )
    with writing(frozen.folder):
        _remove_leftovers(frozen, manifest)
        durable.write_record(frozen.folder / store.MANIFEST, manifest)
    return frozen.folder


def _remove_leftovers(frozen: Plan, manifest: dict) -> None:
    """What killed workers left, and shards of a plan that was taken away."""
    for leftover in (*frozen.folder.glob(".*.tmp-*"), *(frozen.folder / ITEMS).glob(".*.tmp-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    for split, domains in manifest["splits"].items():
        for folder in (frozen.folder / split).glob("*/"):
            listed = {shard["name"] for shard in domains.get(folder.name, {"shards": []})["shards"]}
            for file in folder.iterdir():
                if file.suffix in shards.SUFFIXES and file.stem not in listed:
                    file.unlink()
    for file in (frozen.folder / ITEMS).iterdir():
        if file.suffix == ".sig" or int(file.stem) >= len(frozen.items):
            file.unlink()


def _sums(records: list[dict]) -> dict:
    """What the items' records add up to."""
    read, removed, source_dropped, groups, lengths = Counter(), Counter(), Counter(), defaultdict(Counter), {}
    domains = sorted({domain for record in records for split in record["splits"].values() for domain in split})
    splits = {split: {domain: Counter() for domain in domains} for split in store.SPLITS}
    listed = {(split, domain): [] for split in store.SPLITS for domain in domains}
    for record in records:
        read.update(record["read"])
        removed.update(record["removed"])
        source_dropped.update(record["source_dropped"])
        for domain, group, counts in record["groups"]:
            groups[domain, group].update(counts)
        for domain, histogram in record["lengths"].items():
            lengths[domain] = [a + b for a, b in zip(lengths.get(domain, [0] * len(histogram)), histogram, strict=True)]
        for split, entries in record["splits"].items():
            for domain, entry in entries.items():
                listed[split, domain] += entry["shards"]
                splits[split][domain].update({key: n for key, n in entry.items() if key != "shards"})
    counted = ("windows", "tokens", "documents", "bytes", "dropped_tokens", "dropped_documents")
    return {
        "read": dict(read),
        "removed": dict(sorted(removed.items())),
        "source_dropped": dict(sorted(source_dropped.items())),
        "groups": [[domain, group, dict(n)] for (domain, group), n in sorted(groups.items())],
        "lengths": lengths,
        "splits": {
            split: {
                domain: {key: counts[key] for key in counted} | {"shards": listed[split, domain]}
                for domain, counts in entries.items()
            }
            for split, entries in splits.items()
        },
    }
