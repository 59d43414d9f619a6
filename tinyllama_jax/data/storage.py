"""Where a store's files are: a local folder, or any object store that fsspec knows (`gs://`, `s3://`, `memory://`)."""

from __future__ import annotations

import os
from pathlib import Path

from tinyllama_jax.config import ConfigError, DataError

REMEDY = "fetch or prepare the store again"
# What a remote store hands over at once and the cache keeps: a few hundred windows, which block shuffle reads together.
CACHE_BLOCK_BYTES = 1 << 20


class Storage:
    """The files below `root`.  cache: local folder where blocks of remote files are kept."""

    def __init__(self, root: str | os.PathLike, cache: str | os.PathLike = ""):
        self.root = os.fspath(root).rstrip("/") or "/"
        self.remote = "://" in self.root
        self._remote = _remote(self.root, os.fspath(cache)) if self.remote else None

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file; OSError if there is none."""
        if self._remote:
            return int(self._remote.size(self.where(name)))
        return os.stat(self.where(name)).st_size

    def bytes(self, name: str) -> bytes:
        """A whole file; OSError if there is none."""
        if self._remote:
            return self._remote.cat_file(self.where(name))
        return Path(self.where(name)).read_bytes()

    def open(self, name: str) -> LocalFile | RemoteFile:
        """A file for reads at any place; DataError if there is none."""
        path = self.where(name)
        try:
            return RemoteFile(path, self._remote) if self._remote else LocalFile(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); {REMEDY}") from error


class LocalFile:
    """Several threads may read at once."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise _short(self.path, offset + len(data), offset + size)
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        read = os.preadv(self._descriptor, [buffer], offset)
        if read != buffer.nbytes:
            raise _short(self.path, offset + read, offset + buffer.nbytes)

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteFile:
    def __init__(self, path: str, filesystem):
        self.path = path
        self._file = filesystem.open(path, "rb", block_size=CACHE_BLOCK_BYTES)

    def read(self, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(size)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}); is the store still there?") from error
        if len(data) != size:
            raise _short(self.path, offset + len(data), offset + size)
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer.cast("B")[:] = self.read(offset, buffer.nbytes)

    def close(self) -> None:
        self._file.close()


def _short(path: str, end: int, wanted: int) -> DataError:
    return DataError(f"{path}: ends at byte {end}, and bytes up to {wanted} belong to it; {REMEDY}")


def _remote(root: str, cache: str):
    import fsspec

    protocol = root.partition("://")[0]
    try:
        if not cache:
            return fsspec.filesystem(protocol)
        return fsspec.filesystem("blockcache", target_protocol=protocol, cache_storage=cache)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{root}: {error}") from error
