"""Budgets of unique tokens: a view is a store that holds some windows of another one, exactly so many.

    VIEW/manifest.json    which windows of which store; nothing is copied

The training windows are the first ones of a keyed permutation of each domain's, so that of two views with one seed the
smaller lies inside the larger (what experiments on repeated data need: arXiv 2305.16264).  Which they are is computed
while reading (splits.ChosenWindows).  Held-out windows are all those of the store.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from tinyllama_jax import __version__
from tinyllama_jax.data import durable
from tinyllama_jax.data.permutation import permute
from tinyllama_jax.data.shards import read_index
from tinyllama_jax.data.splits import Split, view_keys
from tinyllama_jax.data.store import FORMAT_VERSION, MANIFEST, TokenStore
from tinyllama_jax.errors import DataError

COPIED = ("recipe", "window_tokens", "packing", "dtype", "document_marks", "tokenizer")  # from the store's manifest
CHUNK = 1 << 16  # window ids computed at once


def make_view(store: TokenStore, tokens: dict[str, int] | int, out: str | Path, *, seed: int) -> Path:
    """Makes the view `out` of a store; returns its path.  A view that is there already is left as it is.

    tokens: the budget; floor(tokens / window_tokens) windows of the store's training windows are in the view, of each
    domain as given, or of all domains together in proportion to their sizes (`in_proportion`).  Domains without a
    budget keep their held-out windows.
    Raises DataError for a budget that is smaller than a window or larger than the store, a domain that the store
    lacks, a view of a view, and for anything else that is there under that name.
    """
    out = Path(os.path.abspath(out))
    if store.parent:
        raise DataError(
            f"{store.path}: is a view itself; make the view of {store.parent.path}: with the same seed the smaller of "
            "two views lies inside the larger"
        )
    if not store.storage.remote and store.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{out}: lies inside of the store that it is to be a view of; name another --out")
    windows = _windows(store, tokens)
    view_of = {"path": _path(store, out), "manifest_sha256": store.manifest_sha256, "seed": seed}
    # Another process may be making the same view: what it has half written is nobody else's store.
    if out.exists() and (not out.is_dir() or any(not e.name.startswith(f".{MANIFEST}.tmp-") for e in out.iterdir())):
        _require_same(out, view_of, windows)
        return out
    manifest = {
        "format_version": FORMAT_VERSION,
        "created_by": f"tinyllama_jax {__version__}",
        "view_of": view_of,
        **{key: store.manifest[key] for key in COPIED},
        "splits": {
            "train": {domain: entry_of(store, domain, n, seed) for domain, n in windows.items()},
            "validation": {
                domain: {key: n for key, n in entry.items() if key != "shards"}
                for domain, entry in store.manifest["splits"]["validation"].items()
            },
        },
    }
    with durable.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        durable.write_record(out / MANIFEST, manifest)
        durable.sync(out.parent)
    return out


def in_proportion(total: int, sizes: dict[str, int]) -> dict[str, int]:
    """`total` windows divided among domains of the given sizes, none of which gives more than it has; no domain's part
    ever shrinks when the total grows.

    The method of Webster and Sainte-Lague: the next window comes from the domain with the least (n + 1/2) / size.
    """
    whole = sum(sizes.values())
    # The method leaves no domain further than (domains + 1) / 2 below its exact part: the rest goes one by one.
    given = {name: max(0, total * size // whole - len(sizes)) for name, size in sizes.items()}
    waiting = [(Fraction(2 * given[name] + 1, size), name) for name, size in sizes.items() if size]
    heapq.heapify(waiting)
    for _ in range(total - sum(given.values())):
        name = waiting[0][1]
        given[name] += 1
        heapq.heapreplace(waiting, (Fraction(2 * given[name] + 1, sizes[name]), name))
    return given


def entry_of(store: TokenStore, domain: str, windows: int, seed: int) -> dict:
    """What the view's manifest says about `windows` training windows of a domain; takes a byte of memory per window of
    the domain.  tokens: without padding; documents: that begin in the windows; ids_sha256: of their numbers in the
    store, int64 in order."""
    split = store.split("train", domain)
    available = split.windows(store.window_tokens)
    chosen, digest, keys = np.zeros(available, bool), hashlib.sha256(), view_keys(seed, domain)
    for start in range(0, windows, CHUNK):
        ids = permute(np.arange(start, min(start + CHUNK, windows)), available, keys)
        chosen[ids] = True
        digest.update(ids.astype("<i8").tobytes())
    tokens, documents = _count(split, chosen)
    return {"windows": windows, "tokens": tokens, "documents": documents, "ids_sha256": digest.hexdigest()}


def _count(split: Split, chosen: np.ndarray) -> tuple[int, int]:
    """(tokens, documents) in the chosen windows: bool [windows]."""
    tokens = documents = 0
    for shard, first in zip(split.shards, split.first.tolist(), strict=False):
        mine = chosen[first : first + shard.windows]
        if mine.any():
            index = read_index(split.storage, split.folder, shard)
            tokens += int(index["used"][:-1][mine].sum(dtype=np.int64))
            documents += int(np.diff(index["before"].astype(np.int64))[mine].sum())
    return tokens, documents


def _windows(store: TokenStore, tokens: dict[str, int] | int) -> dict[str, int]:
    """Windows of each of the store's domains."""
    sizes = {domain: store.split("train", domain).windows(store.window_tokens) for domain in store.domains}
    budgets = tokens if isinstance(tokens, dict) else {"": tokens}
    for domain, budget in budgets.items():
        where = f"{store.path}" + (f", domain {domain!r}" if domain else "")
        available = sizes[domain] if domain in sizes else sum(sizes.values())
        if domain and domain not in sizes:
            raise DataError(f"{store.path}: has no domain {domain!r}; it holds {', '.join(store.domains)}")
        if budget < store.window_tokens:
            raise DataError(f"{where}: a budget of {budget} tokens fills no window of {store.window_tokens} tokens")
        if budget // store.window_tokens > available:
            raise DataError(
                f"{where}: a budget of {budget} tokens is {budget // store.window_tokens} windows of "
                f"{store.window_tokens}, and there are {available}; ask for at most {available * store.window_tokens}"
            )
    if isinstance(tokens, dict):
        return {domain: tokens.get(domain, 0) // store.window_tokens for domain in sizes}
    return in_proportion(tokens // store.window_tokens, sizes)


def _path(store: TokenStore, out: Path) -> str:
    """Where the store is, seen from the view: both may be moved together."""
    if store.storage.remote:
        return store.storage.root
    return os.path.relpath(os.path.realpath(store.path), os.path.realpath(out))


def _require_same(out: Path, view_of: dict, windows: dict[str, int]) -> None:
    found = TokenStore.open(out).manifest
    if found.get("view_of") != view_of or {d: e["windows"] for d, e in found["splits"]["train"].items()} != windows:
        raise DataError(f"{out}: is a store, or a view of other windows than these; name another --out")
