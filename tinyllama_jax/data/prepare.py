"""From a recipe to a token store: plan, run the items, finalize.

Each step may be repeated and does only what is missing, so a killed one is simply started again, and the items may be
made by any number of processes on any number of machines that share the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tinyllama_jax import __version__, configio
from tinyllama_jax.config import DataError, Recipe
from tinyllama_jax.data import durable, items, plan, store, workers
from tinyllama_jax.data.plan import ITEMS, PLAN, Plan, Progress
from tinyllama_jax.data.shards import token_dtype
from tinyllama_jax.data.tokenizer import Tokenizer

TOKENIZE, WAIT = "tokenize", "wait for another prepare"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(recipe: Recipe, out: str | Path, *, processes: int = 1, progress: Progress = plan.silent) -> Path:
    """Makes the token store `out` unless it is there already; returns its path.

    A store of the same recipe is opened (sizes checked) and left as it is; a half-made one is finished.
    Raises DataError for a store of another recipe or anything else under that name, for sources and tokenizers that
    cannot be used, and for a disk that cannot be written; nothing is overwritten.  Of several processes that want the
    same store one makes it and the others wait.
    """
    out = Path(os.path.abspath(out))
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not _complete(recipe, out):
            with _locked(out, progress):
                if not _complete(recipe, out):
                    frozen = freeze(recipe, out, progress)
                    run(frozen, range(len(frozen.items)), processes, progress)
                    finalize(frozen)
    return out


def freeze(recipe: Recipe, out: str | Path, progress: Progress = plan.silent) -> Plan:
    """The frozen plan of store `out`: made now, or before with the same recipe."""
    out = Path(out)
    with _writing(out):
        if (out / PLAN).exists():
            frozen = plan.load(out)
            _require_same(recipe, frozen.recipe, out)
            return frozen
        if out.exists() and any(entry.name not in plan.BEFORE_PLAN for entry in out.iterdir()):
            raise DataError(f"{out}: exists and is no token store; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        return plan.make(recipe, out, progress)


def run(frozen: Plan, numbers: Sequence[int], processes: int = 1, progress: Progress = plan.silent) -> None:
    """Makes those of the numbered items that are not done.

    Raises DataError naming the first item that failed; the others are made all the same.
    """
    dtype = token_dtype(Tokenizer.load(frozen.folder).vocab_size)
    missing = [n for n in numbers if items.finished(frozen, frozen.items[n], dtype) is None]
    total = sum(frozen.items[n].bytes for n in missing)
    counts = Counter()

    def report(documents: int, tokens: int, n_bytes: int) -> None:
        counts.update(documents=documents, tokens=tokens, bytes=n_bytes)
        progress(TOKENIZE, counts["documents"], counts["tokens"], counts["bytes"] / max(total, 1))

    with _writing(frozen.folder):
        (frozen.folder / ITEMS).mkdir(exist_ok=True)
        failed = workers.each(frozen.folder, _run_item, missing, min(processes, len(missing)), report)
    if failed:
        number, error = failed[0]
        more = f"; {len(failed) - 1} more failed" if failed[1:] else ""
        raise DataError(f"item {number}: {error}{more}; what is done is kept, start again when it is mended")


def _run_item(state: dict, number: int, report) -> None:
    frozen: Plan = state["plan"]
    if "tokenizer" not in state:
        state["tokenizer"] = Tokenizer.load(frozen.folder)
    items.run(frozen, frozen.items[number], state["tokenizer"], {}, report)


def finalize(frozen: Plan) -> Path:
    """Writes the manifest.  Raises DataError naming the items that are not done."""
    tokenizer = Tokenizer.load(frozen.folder)
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
        "window_tokens": frozen.recipe.window_tokens,
        "packing": frozen.recipe.packing,
        "dtype": dtype.str,
        "document_marks": frozen.recipe.document_marks,
        "tokenizer": {
            "files": {file.name: store.sha256_of(file) for file in tokenizer.files},
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        **_sums(records),
    }
    for domain, entry in manifest["splits"]["train"].items():
        if not entry["windows"]:
            raise DataError(
                f"{frozen.folder}: domain {domain!r} has {entry['dropped_tokens']} training tokens, which fill no window "
                f"of {frozen.recipe.window_tokens}; give it more text, or prepare with a smaller --window-tokens"
            )
    with _writing(frozen.folder):
        for leftover in (frozen.folder / ITEMS).glob(".*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        durable.write_record(frozen.folder / store.MANIFEST, manifest)
    return frozen.folder


def _sums(records: list[dict]) -> dict:
    """What the items' records add up to."""
    read, removed, groups, lengths = Counter(), Counter(), defaultdict(Counter), {}
    domains = sorted({domain for record in records for split in record["splits"].values() for domain in split})
    splits = {split: {domain: Counter() for domain in domains} for split in items.SPLITS}
    shards = {(split, domain): [] for split in items.SPLITS for domain in domains}
    for record in records:
        read.update(record["read"])
        removed.update(record["removed"])
        for domain, group, counts in record["groups"]:
            groups[domain, group].update(counts)
        for domain, histogram in record["lengths"].items():
            lengths[domain] = [a + b for a, b in zip(lengths.get(domain, [0] * len(histogram)), histogram, strict=True)]
        for split, entries in record["splits"].items():
            for domain, entry in entries.items():
                shards[split, domain] += entry["shards"]
                splits[split][domain].update({key: n for key, n in entry.items() if key != "shards"})
    counted = ("windows", "tokens", "documents", "bytes", "dropped_tokens", "dropped_documents")
    return {
        "read": dict(read),
        "removed": dict(sorted(removed.items())),
        "groups": [[domain, group, dict(n)] for (domain, group), n in sorted(groups.items())],
        "lengths": lengths,
        "splits": {
            split: {
                domain: {key: counts[key] for key in counted} | {"shards": shards[split, domain]}
                for domain, counts in entries.items()
            }
            for split, entries in splits.items()
        },
    }


def _complete(recipe: Recipe, out: Path) -> bool:
    if not (out / store.MANIFEST).exists():
        return False
    manifest = store.TokenStore.open(out).manifest
    _require_same(recipe, configio.from_dict(Recipe, manifest["recipe"]), out)
    if recipe.tokenizer and Path(recipe.tokenizer).exists():
        wanted, found = Tokenizer.load(recipe.tokenizer).sha256, manifest["tokenizer"]["sha256"]
        if wanted != found:
            raise DataError(
                f"{out}: was prepared with another tokenizer (SHA-256 {found}) than {recipe.tokenizer} is now "
                f"({wanted}); name another --out"
            )
    return True


def _require_same(wanted: Recipe, found: Recipe, out: Path) -> None:
    for line in configio.differences(found, wanted):
        raise DataError(f"{out}: was prepared with another recipe ({line}); name another --out")


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space on the disk and start again" if error.errno in _DISK_FULL else "name another --out"
        raise DataError(f"{out}: the token store cannot be written: {reason}; {advice}") from error


@contextlib.contextmanager
def _locked(out: Path, progress: Progress) -> Iterator[None]:
    """Holds `.NAME.lock` beside `out`; the system lets go of it when the process dies."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(WAIT, 0, 0, 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The holder before us removed the name with the lock in hand: then ours guards nothing, and we start over.
        if _is_open_at(lock, path):
            break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _is_open_at(lock: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
