"""The windows of one domain in one split of a store: by number, checked, in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax.data.permutation import permute, round_keys
from tinyllama_jax.data.shards import Shard, ShardReader
from tinyllama_jax.data.storage import REMEDY, Storage
from tinyllama_jax.errors import ConfigError, DataError


class Windows(NamedTuple):
    """N windows of T tokens."""

    tokens_NT: np.ndarray  # int32
    documents_NT: np.ndarray  # int32: index of each token's document, counted from the window's first
    used_N: np.ndarray  # int32: tokens before the padding, T where there is none
    # Of examples (finetune/store.py) only.
    learned_NT: np.ndarray | None = None  # bool: tokens whose prediction counts; None = all
    reference_N2: np.ndarray | None = None  # float32: log-probabilities of the pair's answers, before training

    def rows(self, which: slice | np.ndarray) -> Windows:
        """Some of the windows."""
        return Windows(*(None if array is None else array[which] for array in self))


class Split:
    """The windows of one domain in one split.

    window_tokens; tokens (in windows, without padding); documents (that begin in them); bytes (UTF-8, of all documents
    that were tokenised); shards.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        entry: dict,
        window_tokens: int,
        dtype: np.dtype,
        packed: bool,
        readers: Callable[[Split, int], ShardReader],
    ):
        self.storage, self.folder, self.dtype = storage, folder, dtype
        self.window_tokens, self.packed = window_tokens, packed
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.bytes: int = entry["bytes"]
        self.shards = [Shard(**shard) for shard in entry["shards"]]
        self.first = np.cumsum([0] + [shard.windows for shard in self.shards])  # of each shard, and the end
        self._items = np.array([shard.item for shard in self.shards])
        self._readers = readers

    def windows(self, window_tokens: int) -> int:
        """Windows of that length; none overlaps another, and none crosses from one item into the next."""
        if window_tokens == self.window_tokens:
            return int(self.first[-1])
        return int(self._rows(window_tokens)[1][-1])

    def read(self, window_ids: np.ndarray, window_tokens: int) -> Windows:
        """Windows [N] of that length.  Raises DataError naming shard and window on a wrong checksum, IndexError for a
        window that does not exist, ConfigError for another length than that of a packed store."""
        ids = np.asarray(window_ids, np.int64)
        _check_ids(ids, self.windows(window_tokens), self.folder)
        if window_tokens == self.window_tokens:
            return _windows(*self._stored(ids))
        begins, counts = self._rows(window_tokens)
        row = np.searchsorted(counts, ids, "right") - 1
        return self._cut(begins[row], (ids - counts[row]) * window_tokens, window_tokens)

    def _stored(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows [N] as stored -> tokens [N, W], 1 where a document begins int8 [N, W], used [N]."""
        raw = np.empty((ids.size, self.window_tokens), self.dtype)
        marks = np.zeros(raw.shape, np.int8)
        used = np.empty(ids.size, np.int32)
        shards = np.searchsorted(self.first, ids, "right") - 1

        def read(row: int, shard: int, window: int) -> None:
            places, used[row] = self._readers(self, shard).read(window, raw[row].data)
            marks[row, places] = 1

        self.storage.each(read, range(ids.size), shards.tolist(), (ids - self.first[shards]).tolist())
        return raw, marks, used

    def _cut(self, first: np.ndarray, start: np.ndarray, length: int) -> Windows:
        """Windows of another length: each begins `start` tokens behind the begin of stored window `first`."""
        begin, offset = first + start // self.window_tokens, start % self.window_tokens
        needed = -(-(offset + length) // self.window_tokens)  # stored windows that each touches
        before = np.cumsum(needed) - needed
        raw, marks, _ = self._stored(np.repeat(begin - before, needed) + np.arange(needed.sum()))
        places = (before * self.window_tokens + offset)[:, None] + np.arange(length)
        return _windows(raw.reshape(-1)[places], marks.reshape(-1)[places], np.full(first.size, length, np.int32))

    def _rows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each item's uninterrupted run of windows: its first window, and the windows of that length before it; the
        second has the total at its end."""
        if self.packed:
            raise ConfigError(
                f"{self.storage.where(self.folder)}: its documents were packed into windows of {self.window_tokens} "
                f"tokens and cannot be read in windows of {length}; set data.sequence_tokens={self.window_tokens - 1}"
            )
        edges = np.flatnonzero(np.diff(self._items, prepend=-1, append=-1)) if self.shards else np.zeros(1, np.int64)
        begins = self.first[edges]
        return begins[:-1], np.cumsum(np.append(0, np.diff(begins) * self.window_tokens // length))

    def open(self, number: int) -> ShardReader:
        return ShardReader(self.storage, self.folder, self.shards[number], self.window_tokens, self.dtype)

    def check_sizes(self) -> None:
        found = self.storage.files(self.folder)
        for shard in self.shards:
            for suffix, size in shard.sizes(self.window_tokens, self.dtype).items():
                problem = size_problem(found, shard.name + suffix, size)
                if problem:
                    raise DataError(f"{self.storage.where(self.folder)}/{problem}; {REMEDY}")


class ChosenWindows:
    """The first windows of a keyed permutation of a split's: the training windows of a view.

    Which ones is computed while reading, so a view costs no memory.  window_tokens; tokens; documents (that begin in
    the windows).
    """

    def __init__(self, split: Split, entry: dict, keys: np.ndarray, view: str | Path):
        self.window_tokens = split.window_tokens
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self._split, self._windows, self._keys, self._view = split, entry["windows"], keys, view

    def windows(self, window_tokens: int) -> int:
        if window_tokens != self.window_tokens:
            raise ConfigError(
                f"{self._view}: is a view of windows of {self.window_tokens} tokens and cannot be read in windows of "
                f"{window_tokens}; set data.sequence_tokens={self.window_tokens - 1}, or make a view of a store "
                f"prepared with --window-tokens {window_tokens}"
            )
        return self._windows

    def read(self, window_ids: np.ndarray, window_tokens: int) -> Windows:
        ids = np.asarray(window_ids, np.int64)
        _check_ids(ids, self.windows(window_tokens), self._view)
        return self._split.read(self.parent_ids(ids), window_tokens)

    def parent_ids(self, ids: np.ndarray) -> np.ndarray:
        """Which windows of the store they are: int64 [N] -> int64 [N]."""
        return permute(ids, self._split.windows(self.window_tokens), self._keys)


def view_keys(seed: int, domain: str) -> np.ndarray:
    """Of the permutation whose first windows a view has: others than those of any shuffle with the same seed."""
    return round_keys(seed, f"view {domain}", 0)[:, None]


def _check_ids(ids: np.ndarray, count: int, where: str | Path) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise IndexError(f"{where}: windows {ids.min()}..{ids.max()} of {count}")


def _windows(raw: np.ndarray, marks: np.ndarray, used: np.ndarray) -> Windows:
    marks[:, 0] = 1  # counted from the window's first document, wherever that began
    begins = np.flatnonzero(marks.view(bool))  # repeating numbers between them is six times as fast as a running sum
    numbers = np.arange(begins.size, dtype=np.int32)
    numbers -= np.maximum.accumulate(np.where(begins % marks.shape[1] == 0, numbers, 0))
    documents = np.repeat(numbers, np.diff(begins, append=marks.size)).reshape(marks.shape)
    return Windows(raw.astype(np.int32), documents, used)


def size_problem(found: dict[str, int], name: str, expected: int) -> str | None:
    """What is wrong with a file, given the sizes of those that are there."""
    if name not in found:
        return f"{name}: part of the token store is missing"
    return None if found[name] == expected else f"{name}: has {found[name]} bytes, the manifest says {expected}"
