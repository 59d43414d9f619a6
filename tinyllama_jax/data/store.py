"""The token store: what is trained on, readable at any place at any time.

    STORE/manifest.json            counts, hashes, the tokenizer's identity, the recipe; written last
    STORE/tokenizer.model (or .json)
    STORE/plan.json, items/        what was prepared from what
    STORE/SPLIT/DOMAIN/            token shards (shards.py)

A store is what its manifest says: whatever is read has been checked against a checksum in it or below it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax.config import ConfigError, DataError
from tinyllama_jax.data.shards import Shard, ShardReader
from tinyllama_jax.data.storage import REMEDY, Storage
from tinyllama_jax.data.tokenizer import Tokenizer

FORMAT_VERSION = 2
OPEN_SHARDS = 256  # kept open per split; each holds three file descriptors
MANIFEST, PLAN = "manifest.json", "plan.json"
SPLITS = ("train", "validation")


class Windows(NamedTuple):
    """N windows of T tokens."""

    tokens_NT: np.ndarray  # int32
    documents_NT: np.ndarray  # int32: index of each token's document, counted from the window's first
    used_N: np.ndarray  # int32: tokens before the padding, T where there is none


class TokenStore:
    """An opened store.  Attributes: path, manifest, manifest_sha256 (of the file: identifies the data), domains,
    vocab_size, window_tokens."""

    def __init__(self, storage: Storage, manifest: dict, manifest_sha256: str):
        self.storage, self.manifest, self.manifest_sha256 = storage, manifest, manifest_sha256
        self.path = Path(storage.root) if not storage.remote else storage.root
        self.domains = tuple(manifest["splits"]["train"])
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.window_tokens: int = manifest["window_tokens"]
        dtype, packed = np.dtype(manifest["dtype"]), manifest["packing"] != "none"
        self._splits = {
            (split, domain): Split(storage, f"{split}/{domain}", entry, self.window_tokens, dtype, packed)
            for split, domains in manifest["splits"].items()
            for domain, entry in domains.items()
        }

    @classmethod
    def open(cls, path: str | Path, *, cache: str | Path = "") -> TokenStore:
        """Checks the manifest, the tokenizer files and the size of every shard.

        cache: a local folder that keeps what is read of a remote store.
        Raises DataError naming the file, what was expected and what was found.
        """
        storage = Storage(path, cache)
        manifest, sha256 = read_manifest(storage)
        for name, expected in manifest["tokenizer"]["files"].items():
            check_sha256(storage, name, expected)
        store = cls(storage, manifest, sha256)
        for split in store._splits.values():
            split.check_sizes()
        return store

    def split(self, split: str, domain: str) -> Split:
        if (split, domain) not in self._splits:
            raise DataError(
                f"{self.path}: has no {split} tokens of domain {domain!r}; it holds {', '.join(self.domains)}"
            )
        return self._splits[split, domain]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(Path(self.path) / next(iter(self.manifest["tokenizer"]["files"])))


class Split:
    """The windows of one domain in one split.

    window_tokens; tokens (in windows, without padding); documents (that begin in them); bytes (UTF-8, of all documents
    that were tokenised); shards.
    """

    def __init__(self, storage: Storage, folder: str, entry: dict, window_tokens: int, dtype: np.dtype, packed: bool):
        self.storage, self.folder, self.dtype = storage, folder, dtype
        self.window_tokens, self.packed = window_tokens, packed
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.bytes: int = entry["bytes"]
        self.shards = [Shard(**shard) for shard in entry["shards"]]
        self._first = np.cumsum([0] + [shard.windows for shard in self.shards])  # of each shard, and the end
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def windows(self, window_tokens: int) -> int:
        """Windows of that length; none overlaps another, and none crosses from one item into the next."""
        if window_tokens == self.window_tokens:
            return int(self._first[-1])
        return int(self._rows(window_tokens)[1][-1])

    def read(self, window_ids: np.ndarray, window_tokens: int) -> Windows:
        """Windows [N] of that length.  Raises DataError naming shard and window on a wrong checksum, IndexError for a
        window that does not exist, ConfigError for another length than that of a packed store."""
        ids = np.asarray(window_ids, np.int64)
        count = self.windows(window_tokens)
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise IndexError(f"{self.folder}: windows {ids.min()}..{ids.max()} of {count}")
        if window_tokens == self.window_tokens:
            return _windows(*self._stored(ids))
        begins, counts = self._rows(window_tokens)
        row = np.searchsorted(counts, ids, "right") - 1
        return self._cut(begins[row], (ids - counts[row]) * window_tokens, window_tokens)

    def _stored(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows [N] as stored -> tokens [N, W], 1 where a document begins int8 [N, W], used [N]."""
        raw, marks = (
            np.empty((ids.size, self.window_tokens), self.dtype),
            np.zeros((ids.size, self.window_tokens), np.int8),
        )
        used = np.empty(ids.size, np.int32)
        shards = np.searchsorted(self._first, ids, "right") - 1
        for row, (shard, window) in enumerate(zip(shards.tolist(), (ids - self._first[shards]).tolist(), strict=True)):
            places, used[row] = self._reader(shard).read(window, raw[row].data)
            marks[row, places] = 1
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
        items = np.array([shard.item for shard in self.shards])
        edges = np.flatnonzero(np.diff(items, prepend=-1, append=-1)) if items.size else np.zeros(1, np.int64)
        begins = self._first[edges]
        return begins[:-1], np.cumsum(np.append(0, np.diff(begins) * self.window_tokens // length))

    def _open(self, number: int) -> ShardReader:
        return ShardReader(self.storage, self.folder, self.shards[number], self.window_tokens, self.dtype)

    def check_sizes(self) -> None:
        for shard in self.shards:
            for suffix, size in shard.sizes(self.window_tokens, self.dtype).items():
                check_size(self.storage, f"{self.folder}/{shard.name}{suffix}", size)


def _windows(raw: np.ndarray, marks: np.ndarray, used: np.ndarray) -> Windows:
    marks[:, 0] = 0  # counted from the window's first document, wherever that began
    return Windows(raw.astype(np.int32), np.cumsum(marks, axis=1, dtype=np.int32), used)


def read_manifest(storage: Storage) -> tuple[dict, str]:
    """-> (manifest, SHA-256 of its file).  Raises DataError when it is missing, damaged or of another version."""
    file = storage.where(MANIFEST)
    try:
        data = storage.bytes(MANIFEST)
    except OSError as error:
        raise DataError(_without_manifest(storage, error)) from error
    try:
        manifest = json.loads(data)
        version, checksum = manifest["format_version"], manifest["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    found = json_checksum(manifest)
    if found != checksum:
        raise DataError(f"{file}: was edited or damaged (checksum {found}, expected {checksum}); {REMEDY}")
    return manifest, hashlib.sha256(data).hexdigest()


def _without_manifest(storage: Storage, error: OSError) -> str:
    try:
        storage.size(PLAN)
    except OSError:
        return f"{storage.root}: is no token store ({MANIFEST}: {error.strerror or error}); make one with prepare"
    return f"{storage.root}: its preparation is not finished; give the same prepare command again, it goes on"


def json_checksum(record: dict) -> str:
    """SHA-256 of everything but the field that holds it."""
    content = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_sha256(storage: Storage, name: str, expected: str) -> None:
    check_size(storage, name, None)
    found = hashlib.sha256(storage.bytes(name)).hexdigest()
    if found != expected:
        where = storage.where(name)
        raise DataError(f"{where}: is not the file the manifest names (SHA-256 {found}, expected {expected}); {REMEDY}")


def check_size(storage: Storage, name: str, expected: int | None) -> None:
    try:
        found = storage.size(name)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{storage.where(name)}: part of the token store is missing ({reason}); {REMEDY}") from error
    if expected is not None and found != expected:
        raise DataError(f"{storage.where(name)}: has {found} bytes, the manifest says {expected}; {REMEDY}")
