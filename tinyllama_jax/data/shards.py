"""Token shards: windows of fixed length, each with a checksum and the places where documents begin in it.

    NAME.bin   tokens of the windows, one after another: headerless little-endian uint16 (uint32 above 65536 ids)
    NAME.idx   per window its CRC32, the documents of the shard that begin before it, and the tokens in it that are
               not padding, uint32 each; one record more at the end
    NAME.doc   where documents begin, as a place in their window, in order: uint16 (uint32 for longer windows)

The CRC32 of a window covers its tokens, its document places and its record, and nothing is handed out unchecked: a
flipped bit, a wrong index and a file that became shorter all end in DataError.  Reading a window takes three reads of
known places, so neither its cost nor the memory depends on the size of the corpus.  (Files are read, not mapped: pages
of a mapped file count as memory of the process, and cutting one short kills it.)
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllama_jax.data.storage import REMEDY, Storage
from tinyllama_jax.errors import DataError

SUFFIXES = BIN, IDX, DOC = ".bin", ".idx", ".doc"
_RECORD = struct.Struct("<III")  # CRC32, documents before, tokens
INDEX_DTYPE = np.dtype([("crc", "<u4"), ("before", "<u4"), ("used", "<u4")])  # the same for whole files
_TWO = struct.Struct("<IIIIII")
_COVERED = struct.Struct("<II")  # of a record: documents in the window, tokens


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def place_dtype(window_tokens: int) -> np.dtype:
    return np.dtype("<u2" if window_tokens <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it.  Shards of one item follow each other without a break."""

    name: str
    item: int
    windows: int
    documents: int  # that begin in it
    sha256: dict[str, str]  # by suffix

    def sizes(self, window_tokens: int, dtype: np.dtype) -> dict[str, int]:
        """Bytes of each file."""
        return {
            BIN: self.windows * window_tokens * dtype.itemsize,
            IDX: (self.windows + 1) * _RECORD.size,
            DOC: self.documents * place_dtype(window_tokens).itemsize,
        }


class ShardReader:
    """Checked windows of one shard."""

    def __init__(self, storage: Storage, folder: str, shard: Shard, window_tokens: int, dtype: np.dtype):
        self.name = f"{folder}/{shard.name}"
        self._storage, self._documents = storage, shard.documents
        self._places = place_dtype(window_tokens)
        self._window_bytes = window_tokens * dtype.itemsize
        self._bin, self._idx, self._doc = (storage.open(self.name + suffix) for suffix in (BIN, IDX, DOC))

    def read(self, window: int, tokens: memoryview) -> tuple[np.ndarray, int]:
        """Fills `tokens` (the bytes of one window); -> where documents begin in it, unsigned [documents], and how many
        tokens are no padding.  Raises DataError for what is damaged or gone."""
        try:
            return self._read(window, tokens)
        except DataError:
            if not self._storage.cache:
                raise
            for file in (self._bin, self._idx, self._doc):  # perhaps it is the cache that is damaged
                file.forget()
            return self._read(window, tokens)

    def _read(self, window: int, tokens: memoryview) -> tuple[np.ndarray, int]:
        self._bin.read_into(window * self._window_bytes, tokens)
        crc, before, used, _, after, _ = _TWO.unpack(self._idx.read(window * _RECORD.size, _TWO.size))
        places = b""
        if before != after:
            if not before < after <= self._documents:
                raise self._damaged(IDX, window)
            width = self._places.itemsize
            places = self._doc.read(before * width, (after - before) * width)
        if window_crc(tokens, places, after - before, used) != crc:
            raise self._damaged(BIN, window)
        return np.frombuffer(places, self._places), used

    def _damaged(self, suffix: str, window: int) -> DataError:
        where = self._storage.where(self.name + suffix)
        return DataError(f"{where}: window {window} differs from its checksum; the shard is damaged, {REMEDY}")


def read_index(storage: Storage, folder: str, shard: Shard) -> np.ndarray:
    """The whole index of a shard: INDEX_DTYPE [windows + 1].  Raises DataError if it is not what the manifest says."""
    name = f"{folder}/{shard.name}{IDX}"
    size = (shard.windows + 1) * INDEX_DTYPE.itemsize
    data = storage.open(name).read(0, size)
    if hashlib.sha256(data).hexdigest() != shard.sha256[IDX]:
        raise DataError(f"{storage.where(name)}: differs from its checksum; the shard is damaged, {REMEDY}")
    return np.frombuffer(data, INDEX_DTYPE)


def window_crc(tokens, places: bytes, documents: int, used: int) -> int:
    return zlib.crc32(_COVERED.pack(documents, used), zlib.crc32(places, zlib.crc32(tokens)))


class ShardWriter:
    """Windows into shards PREFIX-00, PREFIX-01, ... in an existing folder; `close` makes them durable.

    Attributes after `close`: shards, windows.
    """

    def __init__(self, folder: Path, item: int, window_tokens: int, dtype: np.dtype, shard_windows: int):
        self.folder, self.item, self.window_tokens, self.dtype = folder, item, window_tokens, dtype
        self.shard_windows = shard_windows
        self.shards: list[Shard] = []
        self.windows = 0
        self._open: _Files | None = None

    def add(self, tokens_NW: np.ndarray, places: list[np.ndarray], used: list[int]) -> None:
        """Appends N windows: tokens [N, window_tokens], and per window where documents begin and how many tokens are
        no padding."""
        places_dtype = place_dtype(self.window_tokens)
        rows = np.ascontiguousarray(tokens_NW, self.dtype)
        for row, begins, n in zip(rows, places, used, strict=True):
            if self._open is None:
                self._open = _Files(self.folder / f"{self.item:06d}-{len(self.shards):02d}")
            self._open.add(row.data, begins.astype(places_dtype).tobytes(), begins.size, n)
            self.windows += 1
            if self._open.windows == self.shard_windows:
                self._close_shard()

    def close(self) -> None:
        if self._open is not None:
            self._close_shard()

    def _close_shard(self) -> None:
        files, self._open = self._open, None
        sha256 = files.close()
        self.shards.append(Shard(files.path.name, self.item, files.windows, files.documents, sha256))


class _Files:
    """The three files of a shard being written, hashed on the way."""

    def __init__(self, path: Path):
        self.path = path
        self.windows = self.documents = 0
        self._files = {suffix: open(f"{path}{suffix}", "xb") for suffix in (BIN, IDX, DOC)}
        self._hashes = {suffix: hashlib.sha256() for suffix in self._files}

    def add(self, tokens: memoryview, places: bytes, documents: int, used: int) -> None:
        self._write(BIN, tokens)
        self._write(DOC, places)
        self._write(IDX, _RECORD.pack(window_crc(tokens, places, documents, used), self.documents, used))
        self.windows += 1
        self.documents += documents

    def _write(self, suffix: str, data) -> None:
        self._files[suffix].write(data)
        self._hashes[suffix].update(data)

    def close(self) -> dict[str, str]:
        self._write(IDX, _RECORD.pack(0, self.documents, 0))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {suffix: digest.hexdigest() for suffix, digest in self._hashes.items()}
