"""One shard against the manifest: its files' hashes and every window in it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from typing import NamedTuple

import numpy as np

from tinyllama_jax.data.shards import BIN, DOC, IDX, INDEX_DTYPE, Shard, place_dtype, window_crc
from tinyllama_jax.data.storage import Storage
from tinyllama_jax.data.windows import PAD_ID
from tinyllama_jax.errors import DataError

CHUNK_BYTES = 8 << 20
NAMED = 5  # windows in one finding; the others are only counted


class Counts(NamedTuple):
    windows: int = 0
    tokens: int = 0
    documents: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def end_with_parent() -> None:
    """Of a worker: it would wait for work for ever when its parent was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def check_shard(
    root: str, folder: str, shard: Shard, *, window_tokens: int, dtype: np.dtype, packed: bool, vocab_size: int
) -> tuple[list[str], Counts]:
    """-> (what is wrong, one line each; what is in it).  Its files have the sizes they should; each is read once."""
    storage, name = Storage(root), f"{folder}/{shard.name}"
    sizes = shard.sizes(window_tokens, dtype)
    try:
        tokens, index, places = (storage.open(name + suffix) for suffix in (BIN, IDX, DOC))
        windows = _Windows(
            np.frombuffer(index.read(0, sizes[IDX]), INDEX_DTYPE),
            np.frombuffer(places.read(0, sizes[DOC]), place_dtype(window_tokens)),
            window_tokens,
            PAD_ID if packed else None,
            vocab_size,
        )
        digests = {IDX: hashlib.sha256(windows.index), DOC: hashlib.sha256(windows.places), BIN: hashlib.sha256()}
        step = max(1, CHUNK_BYTES // (window_tokens * dtype.itemsize))
        for first in range(0, shard.windows, step):
            count = min(step, shard.windows - first)
            size = window_tokens * dtype.itemsize
            data = tokens.read(first * size, count * size)
            digests[BIN].update(data)
            windows.check(first, np.frombuffer(data, dtype).reshape(count, window_tokens))
    except DataError as error:
        return [str(error)], Counts()
    findings = [
        f"{storage.where(name)}{suffix}: is not the file the manifest names (SHA-256 {digest.hexdigest()}, expected "
        f"{shard.sha256[suffix]})"
        for suffix, digest in digests.items()
        if digest.hexdigest() != shard.sha256[suffix]
    ]
    findings += [f"{storage.where(name)}: {_named(ids)}: {what}" for what, ids in windows.wrong.items()]
    documents = int(windows.index["before"][-1])
    return findings, Counts(shard.windows, int(windows.index["used"][:-1].sum(dtype=np.int64)), documents)


class _Windows:
    """Checks windows against the index [windows + 1] and the document places [documents] of their shard.

    pad: the id after the used tokens, None where every token is used.  wrong: what is wrong -> in which windows.
    """

    def __init__(self, index: np.ndarray, places: np.ndarray, window_tokens: int, pad: int | None, vocab_size: int):
        self.index, self.places, self.window_tokens = index, places, window_tokens
        self.pad, self.vocab_size = pad, vocab_size
        self.wrong: dict[str, list[int]] = {}
        before = index["before"].astype(np.int64)
        self._documents = np.diff(before)
        self._sound = before[0] == 0 and before[-1] == places.size and (self._documents >= 0).all()
        if not self._sound:
            self._say("the index does not tell where their documents are", np.flatnonzero(self._documents < 0))
        else:
            self._check_places()
        used = index["used"][:-1]
        least = window_tokens if pad is None else 1
        self._say(
            "the index has an impossible number of tokens", np.flatnonzero((used < least) | (used > window_tokens))
        )

    def _check_places(self) -> None:
        window = np.repeat(np.arange(self._documents.size), self._documents)
        places = self.places.astype(np.int64)
        outside = places >= self.index["used"][window]
        order = np.diff(places + window * self.window_tokens, prepend=-1) <= 0
        self._say("documents begin where they cannot", np.unique(window[outside | order]))

    def check(self, first: int, tokens_NW: np.ndarray) -> None:
        rows = slice(first, first + len(tokens_NW))
        used_N1 = self.index["used"][rows, None]
        self._say(f"has tokens above the vocabulary of {self.vocab_size}", first + _rows(tokens_NW >= self.vocab_size))
        if self.pad is not None:
            padding = np.arange(self.window_tokens) >= used_N1
            self._say("has something else than padding at its end", first + _rows((tokens_NW != self.pad) & padding))
        if self._sound:
            self._say("differs from its checksum", first + np.flatnonzero(self._crc(rows, tokens_NW)))

    def _crc(self, rows: slice, tokens_NW: np.ndarray) -> list[bool]:
        """Of each window, whether its checksum is wrong."""
        width, data = self.places.itemsize, memoryview(self.places).cast("B") if self.places.size else b""
        index = self.index[rows.start : rows.stop + 1].tolist()
        return [
            window_crc(row, data[record[1] * width : following[1] * width], following[1] - record[1], record[2])
            != record[0]
            for row, record, following in zip(tokens_NW, index, index[1:], strict=False)
        ]

    def _say(self, what: str, windows: np.ndarray) -> None:
        if windows.size:
            self.wrong.setdefault(what, []).extend(windows.tolist())


def _rows(bad_NW: np.ndarray) -> np.ndarray:
    return np.flatnonzero(bad_NW.any(axis=1))


def _named(windows: list[int]) -> str:
    some = ", ".join(map(str, windows[:NAMED])) + (f" and {len(windows) - NAMED:,} more" if windows[NAMED:] else "")
    return f"window{'s' * (len(windows) > 1)} {some}"
