"""Where a store's files are: a local folder, or any object store that fsspec knows (`gs://`, `s3://`, `memory://`).

What is read of an object store is kept in a local folder, if one is named, as blocks that are there completely or not
at all: any number of processes and threads may share it, and it outlives them.  (fsspec's own block cache marks a
block as present before it has arrived, and rewrites the list of all blocks whenever a file is opened.)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tinyllama_jax.errors import DataError

REMEDY = "fetch or prepare the store again"
CACHE_BLOCK_BYTES = 1 << 20  # a few hundred windows, which block shuffle reads together
REMOTE_READS = 32  # at once: an object store answers after tens of milliseconds, however little is asked
# Threads that want the same block wait for the one that fetches it.
_FETCHING = [threading.Lock() for _ in range(64)]


class Storage:
    """The files below `root`, by names relative to it.  cache: local folder for what is read of a remote `root`."""

    def __init__(self, root: str | os.PathLike, cache: str | os.PathLike = ""):
        self.root = os.fspath(root).rstrip("/") or "/"
        self.remote = "://" in self.root
        self.cache = Path(cache) if self.remote and os.fspath(cache) else None
        self._filesystem = _filesystem(self.root) if self.remote else None

    def identify(self, content: str) -> None:
        """Names the content: what was cached of another one is not taken for it."""
        if self.cache:
            self.cache = self.cache / content

    def where(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def files(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file in the folder and below it, by name relative to it; none if it does not exist."""
        top = self.where(folder)
        if not self.remote:
            return dict(_local_files(top))
        with _as_oserror():
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(top, detail=True)
            prefix = self._filesystem._strip_protocol(top).rstrip("/") + "/"
        return {path.removeprefix(prefix): int(about["size"]) for path, about in found.items()}

    def bytes(self, name: str) -> bytes:
        """A whole file, as it is now; OSError if there is none."""
        if not self.remote:
            return Path(self.where(name)).read_bytes()
        with _as_oserror():
            return self._filesystem.cat_file(self.where(name))

    def open(self, name: str) -> LocalFile | RemoteFile:
        """A file for reads at any place; DataError if there is none (of a remote one, when it is read)."""
        path = self.where(name)
        if self.remote:
            return RemoteFile(path, self._filesystem, self.cache and self.cache / name)
        try:
            return LocalFile(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def each(self, function: Callable, *arguments: Iterable) -> None:
        """Calls function(*a) for each: one after another locally, side by side where every call waits for a network."""
        for _ in (self._threads if self.remote else _Here()).map(function, *arguments):
            pass

    def write(self, name: str, data: bytes) -> None:
        """A remote file, which is there wholly or not at all; OSError."""
        with _as_oserror():
            self._filesystem.pipe_file(self.where(name), data)

    def upload(self, files: dict[str, Path]) -> None:
        """Local files to the remote names given; OSError."""
        with _as_oserror():
            self.each(lambda name, path: self._filesystem.put_file(str(path), self.where(name)), *_columns(files))

    def download(self, files: dict[str, Path]) -> None:
        """Remote files, by name, to local ones; OSError, FileNotFoundError if there is no such file."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with _as_oserror():
            self.each(lambda name, path: self._filesystem.get_file(self.where(name), str(path)), *_columns(files))

    def copy(self, name: str, target: str) -> None:
        with _as_oserror():
            self._filesystem.cp_file(self.where(name), self.where(target))

    def remove(self, name: str) -> None:
        with _as_oserror():
            self._filesystem.rm_file(self.where(name))

    @functools.cached_property
    def _threads(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(REMOTE_READS)


def _columns(files: dict[str, Path]) -> tuple[list[str], list[Path]]:
    return list(files), list(files.values())


class _Here:
    map = staticmethod(map)


class LocalFile:
    """Several threads may read at once; closed when nobody holds it."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(data) != size:
            raise _short(self.path, offset + len(data), offset + size)
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            read = os.preadv(self._descriptor, [buffer], offset)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if read != buffer.nbytes:
            raise _short(self.path, offset + read, offset + buffer.nbytes)


class RemoteFile:
    """Several threads may read at once.  cache: folder for blocks of this file, or None."""

    def __init__(self, path: str, filesystem, cache: Path | None):
        self.path, self._filesystem, self._cache = path, filesystem, cache

    def read(self, offset: int, size: int) -> bytes:
        if self._cache is None:
            data = self._fetch(offset, offset + size)
        else:
            first = offset // CACHE_BLOCK_BYTES
            blocks = [self._block(n) for n in range(first, -(-(offset + size) // CACHE_BLOCK_BYTES))]
            start = offset - first * CACHE_BLOCK_BYTES
            data = b"".join(blocks)[start : start + size]
        if len(data) != size:
            raise _short(self.path, offset + len(data), offset + size)
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer.cast("B")[:] = self.read(offset, buffer.nbytes)

    def forget(self) -> None:
        """Drops what the cache has of this file; its folder stays, since another thread may be about to write there."""
        with contextlib.suppress(OSError):
            for block in self._cache.glob("[!.]*"):
                block.unlink(missing_ok=True)

    def _block(self, number: int) -> bytes:
        place = self._cache / f"{number:06d}"
        with _FETCHING[hash((self.path, number)) % len(_FETCHING)]:
            try:
                return place.read_bytes()
            except FileNotFoundError:
                data = self._fetch(number * CACHE_BLOCK_BYTES, (number + 1) * CACHE_BLOCK_BYTES)
            except OSError as error:
                raise self._unusable(error) from error
            temporary = place.with_name(f".{place.name}.tmp-{os.getpid()}-{threading.get_ident()}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(place)
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise self._unusable(error) from error
            return data

    def _unusable(self, error: OSError) -> DataError:
        advice = "free space there, or set data.cache to another folder"
        return DataError(f"{self._cache}: the cache cannot be used: {error.strerror}; {advice}")

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            with _as_oserror():
                return self._filesystem.cat_file(self.path, start=start, end=end)
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _local_files(top: str) -> Iterator[tuple[str, int]]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise _unreadable(error.filename, error) from error

    for folder, _, names in os.walk(top, onerror=refuse, followlinks=True):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a link to nothing is no file
                yield os.path.relpath(path, top), os.stat(path).st_size


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """Clients of object stores raise what they like, of any length: here it becomes an OSError of one line."""
    try:
        yield
    except Exception as error:
        text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(" ".join(text.split())) from error


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); {REMEDY}")


def _short(path: str, end: int, wanted: int) -> DataError:
    return DataError(f"{path}: ends at byte {end}, and bytes up to {wanted} belong to it; {REMEDY}")


def _filesystem(root: str):
    try:
        import fsspec

        with _as_oserror():
            return fsspec.core.url_to_fs(root)[0]
    except (ImportError, OSError) as error:  # the package, or the one that it needs for this protocol, is missing
        raise DataError(f"{root}: this kind of storage cannot be read here: {error}") from error
