"""What is in a token store, for people and programs: what `inspect STORE` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.data.filters import NEAR
from tinyllama_jax.data.plan import Progress, silent
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.verify import verify as find_damage
from tinyllama_jax.errors import DataError

SHOWN_CHARACTERS, SHOWN_LINES = 400, 8  # of a sample's text
BAR = 30  # characters of the longest bar of a histogram
COUNTED = ("documents", "tokens", "windows", "bytes", "dropped_tokens", "dropped_documents")


def describe(
    path: str | Path,
    *,
    samples: int = 0,
    seed: int = 0,
    verify: bool = False,
    workers: int = 1,
    progress: Progress = silent,
) -> tuple[dict, list[str]]:
    """-> (everything as JSON can hold it, lines to print).

    samples: documents to decode per domain: the first one, then random ones by `seed`.  verify: read and check
    everything; the value's "findings" are what is wrong.  Raises DataError for a store that cannot be read, unless the
    findings say so already.
    """
    value: dict = {"store": str(path)}
    verdict = []
    if verify:
        findings = value["findings"] = find_damage(path, workers=workers, progress=progress)
        verdict = [f"verified: {len(findings)} findings", *(f"  {line}" for line in findings)]
        if not findings:
            verdict = ["verified: every file, window and count is what the manifest says"]
    try:
        store = TokenStore.open(path)
        value |= summary(store)
        value["samples"] = list(_samples(store, samples, seed))
    except DataError:
        if not value.get("findings"):
            raise
        value.setdefault("samples", [])
    return value, [*(_lines(value) if "domains" in value else ()), *verdict]


def summary(store: TokenStore) -> dict:
    """The manifest's numbers; of a view, what was read and left out is that of its store."""
    manifest, origin = store.manifest, store.parent.manifest if store.parent else store.manifest
    recipe, tokenizer = origin["recipe"], manifest["tokenizer"]
    trained = max(1, sum(entry["tokens"] for entry in manifest["splits"]["train"].values()))
    view = {"view_of": {**manifest["view_of"], "path": str(store.parent.path)}} if store.parent else {}
    return {
        **view,
        "manifest_sha256": store.manifest_sha256,
        "created_by": manifest["created_by"],
        "sources": recipe["sources"],
        "filters": recipe["filters"],
        "items": origin["items"],
        "window_tokens": store.window_tokens,
        "packing": manifest["packing"],
        "document_marks": manifest["document_marks"],
        "tokenizer": {key: tokenizer[key] for key in ("sha256", "vocab_size", "bos_id", "eos_id")},
        "read": origin["read"],
        "removed": _removed(recipe["filters"], origin["removed"]),
        "source_dropped": origin["source_dropped"],
        "domains": {
            domain: {
                "share": manifest["splits"]["train"][domain]["tokens"] / trained,
                **{
                    split: {key: domains[domain][key] for key in COUNTED if key in domains[domain]}
                    for split, domains in manifest["splits"].items()
                },
                "groups": {group: counts for name, group, counts in origin["groups"] if name == domain},
                "lengths": [
                    {"from": 1 << power, "to": (2 << power) - 1, "documents": n}
                    for power, n in enumerate(origin["lengths"].get(domain, ()))
                    if n
                ],
            }
            for domain in store.domains
        },
    }


def _removed(filters: list[str], removed: dict[str, int]) -> dict[str, int]:
    """Documents that each filter left out, those that found nothing too."""
    names = (NEAR if spec.startswith(NEAR) else spec for spec in filters)
    return {name: removed.get(name, 0) for name in names} | removed


def _samples(store: TokenStore, count: int, seed: int) -> Iterator[dict]:
    """Documents as far as they lie in one window."""
    random = np.random.default_rng(seed)
    tokenizer = store.tokenizer() if count else None
    for domain in store.domains if count else ():
        split = store.split("train", domain)
        available = split.windows(store.window_tokens)
        if not available:
            continue
        ids = np.append(0, random.integers(0, available, count - 1))
        for number, (window, row, documents, used) in enumerate(
            zip(ids.tolist(), *split.read(ids, store.window_tokens)[:3], strict=True)
        ):
            documents = documents[:used]
            document = int(random.integers(0, documents[-1] + 1)) if number else 0
            tokens = row[:used][documents == document]
            yield {
                "domain": domain,
                "window": window,
                "document": document,
                "tokens": tokens.size,
                "text": tokenizer.decode(tokens),
            }


# --- for people ---


def _lines(value: dict) -> Iterator[str]:
    packing = {"none": "documents in a row", "best_fit": "packed by best fit"}[value["packing"]]
    tokenizer, read = value["tokenizer"], value["read"]
    yield (
        f"{value['store']}: windows of {value['window_tokens']} tokens, {packing}, document marks "
        f"{value['document_marks']}, vocabulary {tokenizer['vocab_size']}"
    )
    yield f"  manifest SHA-256 {value['manifest_sha256']}, by {value['created_by']}"
    if "view_of" in value:
        yield f"  a view of {value['view_of']['path']}, seed {value['view_of']['seed']}; of that store:"
    yield from (f"  source {source}" for source in value["sources"])
    yield f"  read {read['documents']:,} documents, {read['bytes']:,} bytes of text, in {value['items']:,} items"
    yield from (f"  left out {n:,} documents: {why}" for why, n in value["removed"].items())
    yield from (f"  left out by the sources: {n:,} {what}" for what, n in value["source_dropped"].items())
    yield ""
    yield from _table(value["domains"])
    whole = ", in the whole store" if "view_of" in value else ""
    for domain, about in value["domains"].items():
        yield from _groups(f"{domain}, by set or language{whole}:", about["groups"])
        yield from _histogram(f"{domain}, documents by length in tokens{whole}:", about["lengths"])
    for sample in value["samples"]:
        yield ""
        yield (
            f"-- {sample['domain']}, window {sample['window']}, document {sample['document']} in it, "
            f"{sample['tokens']} tokens:"
        )
        yield from shown(sample["text"])
    if value["samples"]:
        yield ""


def _table(domains: dict[str, dict]) -> Iterator[str]:
    width = max(6, *map(len, domains))
    titles = f"{'documents':>13} {'tokens':>17} {'windows':>13} {'dropped':>11} {'share':>7}"
    yield f"{'domain':<{width}} {'split':<10} {titles}"
    for domain, about in domains.items():
        for split in ("train", "validation"):
            part = about[split]
            dropped = f"{part['dropped_tokens']:,}" if "dropped_tokens" in part else "-"
            share = f"{100 * about['share']:.2f} %" if split == "train" else ""
            yield (
                f"{domain:<{width}} {split:<10} {part['documents']:>13,} {part['tokens']:>17,} {part['windows']:>13,} "
                f"{dropped:>11} {share:>7}"
            ).rstrip()


def _groups(title: str, groups: dict[str, dict]) -> Iterator[str]:
    """Shares of the sets or languages, of the domain's tokens."""
    if set(groups) <= {""}:
        return
    total = max(1, sum(counts["tokens"] for counts in groups.values()))
    width = max(len(group) for group in groups)
    yield ""
    yield title
    for group, counts in sorted(groups.items(), key=lambda one: -one[1]["tokens"]):
        yield (
            f"  {group or '-':<{width}} {counts['documents']:>13,} documents {counts['tokens']:>17,} tokens "
            f"{100 * counts['tokens'] / total:>6.2f} %"
        )


def _histogram(title: str, lengths: list[dict]) -> Iterator[str]:
    if not lengths:
        return
    most = max(one["documents"] for one in lengths)
    yield ""
    yield title
    for one in lengths:
        bar = "#" * -(-BAR * one["documents"] // most)
        yield f"  {one['from']:>11,} to {one['to']:>11,} {one['documents']:>13,} {bar}"


def shown(text: str, characters: int = SHOWN_CHARACTERS, most_lines: int = SHOWN_LINES) -> Iterator[str]:
    """The beginning of a text, without what a terminal would obey."""
    lines = text[:characters].split("\n")
    for line in lines[:most_lines]:
        yield "   | " + "".join(c if c.isprintable() else "\ufffd" if c != "\t" else "    " for c in line)
    if len(lines) > most_lines or len(text) > characters:
        yield "   | ..."
