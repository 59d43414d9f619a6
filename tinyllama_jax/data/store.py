"""The token store: what is trained on, as flat files that can be read at any place at any time.

    STORE/manifest.json                     counts, hashes, the tokenizer's identity, the recipe; written last
    STORE/tokenizer.model (or .json)
    STORE/SPLIT/DOMAIN/00000.bin            tokens, headerless little-endian uint16 (uint32 above 65536 ids)
    STORE/SPLIT/DOMAIN/00000.crc            uint32 CRC32 of each 64 KiB of the .bin
    STORE/SPLIT/DOMAIN/documents.npy        uint64 [documents]: where in the split each document begins

Whatever is read has been checked against a checksum once: a flipped bit stops the run instead of training it.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.config import DataError
from tinyllama_jax.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
BLOCK_BYTES = 1 << 16  # of a shard per CRC32
SHARD_TOKENS = 1 << 26
OPEN_SHARDS = 256  # maps kept open per split; each holds a file descriptor
MANIFEST, INDEX = "manifest.json", "documents.npy"
SPLITS = ("train", "validation")
REMEDY = "fetch or prepare the store again"


class TokenStore:
    """An opened store.  Attributes: path, manifest, manifest_sha256 (of the file: identifies the data), domains,
    vocab_size."""

    def __init__(self, path: Path, manifest: dict, manifest_sha256: str):
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256
        self.domains = tuple(manifest["splits"]["train"])
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._splits = {
            (split, domain): Split(path / split / domain, entry, np.dtype(manifest["dtype"]))
            for split, domains in manifest["splits"].items()
            for domain, entry in domains.items()
        }

    @classmethod
    def open(cls, path: str | Path, *, full_check: bool = False) -> TokenStore:
        """Checks the manifest, the tokenizer files and the size of every shard; `full_check` also reads everything
        and compares each SHA-256.  Raises DataError naming the file, what was expected and what was found."""
        path = Path(path)
        manifest, sha256 = read_manifest(path)
        for name, expected in manifest["tokenizer"]["files"].items():
            _check_sha256(path / name, expected)
        store = cls(path, manifest, sha256)
        for split in store._splits.values():
            split.check(full=full_check)
        return store

    def split(self, split: str, domain: str) -> Split:
        if (split, domain) not in self._splits:
            raise DataError(
                f"{self.path}: has no {split} tokens of domain {domain!r}; it holds {', '.join(self.domains)}"
            )
        return self._splits[split, domain]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / next(iter(self.manifest["tokenizer"]["files"])))


class Split:
    """The tokens of one domain in one split: a single long row of documents, cut into shards."""

    def __init__(self, folder: Path, entry: dict, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.bytes: int = entry["bytes"]  # UTF-8 bytes of the documents' text
        self._shards: list[dict] = entry["shards"]
        self._index_sha256: str = entry["index_sha256"]
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in self._shards])  # [shards + 1]
        self._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._checked: dict[int, bytearray] = {}  # shard -> 1 per block whose CRC32 was right

    def windows(self, window_tokens: int) -> int:
        """Non-overlapping windows of that length; the tail that fills none is dropped."""
        return self.tokens // window_tokens

    def read(self, window_ids: np.ndarray, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows [N] -> tokens int32 [N, window_tokens] and documents int32 [N, window_tokens], the index of each
        token's document counted from the window's first.  Raises DataError naming shard and offset on a wrong
        checksum, IndexError for a window that does not exist."""
        ids = np.asarray(window_ids, np.int64)
        count = self.windows(window_tokens)
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise IndexError(f"{self.folder}: windows {ids.min()}..{ids.max()} of {count}")
        starts = ids * window_tokens
        tokens = np.empty((ids.size, window_tokens), np.int32)
        shards = np.searchsorted(self._starts, starts, "right") - 1
        for row, start, shard in zip(tokens, starts.tolist(), shards.tolist(), strict=True):
            filled = 0
            while filled < window_tokens:  # more than once only where a window straddles shards
                data, border = self._shard(shard)
                place = start + filled - border
                size = min(window_tokens - filled, data.size - place)
                self._check_blocks(shard, data, place, size)
                row[filled : filled + size] = data[place : place + size]
                filled += size
                shard += 1
        return tokens, self._documents_in(starts, window_tokens)

    def _documents_in(self, starts: np.ndarray, length: int) -> np.ndarray:
        begins = self._index
        first = np.searchsorted(begins, starts, "right")  # the first document that begins after the window's start
        inside = np.searchsorted(begins, starts + (length - 1), "right") - first
        rows = np.repeat(np.arange(starts.size), inside)
        nth = np.arange(rows.size) - np.repeat(np.cumsum(inside) - inside, inside)
        documents = np.zeros((starts.size, length), np.int32)
        documents[rows, begins[first[rows] + nth] - starts[rows]] = 1
        return np.cumsum(documents, axis=1, dtype=np.int32)

    @functools.cached_property
    def _index(self) -> np.ndarray:
        file = self.folder / INDEX
        _check_sha256(file, self._index_sha256)
        # signed: searching int64 places among uint64 would convert the whole index at every call
        return np.load(file, mmap_mode="r").view(np.ndarray).view(np.int64)

    def _open_shard(self, number: int) -> tuple[np.ndarray, int]:
        file = self.folder / self._shards[number]["file"]
        try:
            data = np.memmap(file, self.dtype, "r")
        except (OSError, ValueError) as error:  # ValueError: emptied since the store was opened
            raise DataError(f"{file}: cannot be read ({error}); {REMEDY}") from error
        if data.size != self._shards[number]["tokens"]:
            raise DataError(f"{file}: changed its size while the store was in use; {REMEDY}")
        return data.view(np.ndarray), int(self._starts[number])  # slicing a plain array is three times faster

    def _check_blocks(self, number: int, data: np.ndarray, place: int, size: int) -> None:
        width = self.dtype.itemsize
        first, last = place * width // BLOCK_BYTES, ((place + size) * width - 1) // BLOCK_BYTES
        checked = self._checked.get(number)
        if checked is None:
            checked = self._checked[number] = bytearray(-(-data.nbytes // BLOCK_BYTES))
        if 0 not in checked[first : last + 1]:
            return
        file = self.folder / self._shards[number]["file"]
        _check_size(file.with_suffix(".crc"), 4 * len(checked))
        expected = np.fromfile(file.with_suffix(".crc"), "<u4", count=last + 1 - first, offset=4 * first)
        for block, crc in zip(range(first, last + 1), expected.tolist(), strict=True):
            if checked[block]:
                continue
            offset = block * BLOCK_BYTES
            found = zlib.crc32(data[offset // width : (offset + BLOCK_BYTES) // width])
            if found != crc:
                raise DataError(
                    f"{file}: the {BLOCK_BYTES} bytes from offset {offset} have CRC32 {found:08x}, not {crc:08x}; "
                    f"the file is damaged, {REMEDY}"
                )
            checked[block] = 1

    def check(self, *, full: bool) -> None:
        """Sizes of all files; with `full` every byte too."""
        for number, shard in enumerate(self._shards):
            file = self.folder / shard["file"]
            size = shard["tokens"] * self.dtype.itemsize
            _check_size(file, size)
            _check_size(file.with_suffix(".crc"), 4 * -(-size // BLOCK_BYTES))
            if full:
                _check_sha256(file, shard["sha256"])
                self._check_blocks(number, self._shard(number)[0], 0, shard["tokens"])
        _check_size(self.folder / INDEX, None)
        if full:
            _check_sha256(self.folder / INDEX, self._index_sha256)


def read_manifest(path: Path) -> tuple[dict, str]:
    """-> (manifest, SHA-256 of its file).  Raises DataError when it is missing, damaged or of another version."""
    file = Path(path) / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: is no token store ({MANIFEST}: {error.strerror}); make one with prepare") from error
    try:
        manifest = json.loads(data)
        version, checksum = manifest["format_version"], manifest["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    found = manifest_checksum(manifest)
    if found != checksum:
        raise DataError(f"{file}: was edited or damaged (checksum {found}, expected {checksum}); {REMEDY}")
    return manifest, hashlib.sha256(data).hexdigest()


def manifest_checksum(manifest: dict) -> str:
    """SHA-256 of everything but the field that holds it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    manifest = {"format_version": FORMAT_VERSION, **manifest}
    manifest["checksum"] = manifest_checksum(manifest)
    with durable(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class SplitWriter:
    """Writes the documents of one split and domain; `entry()` finishes the files and tells what the manifest says."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS):
        folder.mkdir(parents=True)
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.tokens = self.bytes = 0
        self._begins = array.array("Q")
        self._shards: list[dict] = []
        self._open: _ShardFile | None = None

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self._begins.append(self.tokens)
        self.tokens += tokens.size
        self.bytes += text_bytes
        tokens = tokens.astype(self.dtype)
        while tokens.size:
            self._open = self._open or _ShardFile(self.folder / f"{len(self._shards):05d}.bin")
            room = self.shard_tokens - self._open.bytes // self.dtype.itemsize
            self._open.write(tokens[:room].tobytes())
            tokens = tokens[room:]
            if self._open.bytes == self.shard_tokens * self.dtype.itemsize:
                self._close_shard()

    def _close_shard(self) -> None:
        shard, self._open = self._open, None
        entry = {"file": shard.path.name, "tokens": shard.bytes // self.dtype.itemsize, "sha256": shard.close()}
        self._shards.append(entry)

    def entry(self) -> dict:
        if self._open is not None:
            self._close_shard()
        index = self.folder / INDEX
        with durable(index) as file:
            np.save(file, np.frombuffer(self._begins, np.uint64) if self._begins else np.empty(0, np.uint64))
        sync_folder(self.folder)
        return {
            "documents": len(self._begins),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self._shards,
            "index_sha256": sha256_of(index),
        }


class _ShardFile:
    """A shard being written, with its checksums kept on the way."""

    def __init__(self, path: Path):
        self.path = path
        self.bytes = 0
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._crcs = array.array("I")
        self._crc = 0  # of the block that is being filled

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            filled = self.bytes % BLOCK_BYTES
            part = view[: BLOCK_BYTES - filled]
            self._crc = zlib.crc32(part, self._crc)
            self.bytes += len(part)
            view = view[len(part) :]
            if self.bytes % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._crcs.append(self._crc)
        self._crc = 0

    def close(self) -> str:
        if self.bytes % BLOCK_BYTES:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with durable(self.path.with_suffix(".crc")) as file:
            file.write(np.array(self._crcs, "<u4").tobytes())
        return self._sha256.hexdigest()


@contextlib.contextmanager
def durable(path: Path) -> Iterator:
    """A new file that is on the disk, not only in its cache, when the block is left."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _check_sha256(file: Path, expected: str) -> None:
    _check_size(file, None)
    found = sha256_of(file)
    if found != expected:
        raise DataError(f"{file}: is not the file the manifest names (SHA-256 {found}, expected {expected}); {REMEDY}")


def _check_size(file: Path, expected: int | None) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: part of the token store is missing ({error.strerror}); {REMEDY}") from error
    if expected is not None and found != expected:
        raise DataError(f"{file}: has {found} bytes, the manifest says {expected}; {REMEDY}")
