"""Directories that are there completely or not at all, and whose every byte can be checked.

The rename from a temporary to the final name is the commit.  `checksums.json` holds the SHA-256 of every other file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllama_jax.data.durable import sync
from tinyllama_jax.errors import CheckpointError

_FINAL = re.compile(r"\d{8,}")

# Hashing and waiting for the disk release the interpreter lock.  Half of many cores, for a run goes on meanwhile.
THREADS = min(16, max(4, (os.cpu_count() or 1) // 2))


class Damaged(CheckpointError):
    """The files of a checkpoint are not the ones that were committed."""


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}"


def is_final(name: str) -> bool:
    """Whether only complete checkpoints have such a name."""
    return _FINAL.fullmatch(name) is not None


def steps(directory: Path) -> list[int]:
    """Committed steps, ascending."""
    return sorted(int(p.name) for p in directory.iterdir() if is_final(p.name) and p.is_dir())


def of_step(directory: Path, step: int) -> Path:
    path = path_of(directory, step)
    if not path.is_dir():
        have = ", ".join(map(str, steps(directory))) or "none"
        raise CheckpointError(f"{directory}: no checkpoint of step {step}; steps there: {have}")
    return path


def mend(directory: Path) -> None:
    """Makes `directory` if need be, and clears what a killed process left there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.replaced"):  # killed between the two renames of `commit`
            if not leftover.with_suffix("").exists():
                leftover.rename(leftover.with_suffix(""))
        for pattern in ("*.tmp-*", "*.replaced"):
            for leftover in directory.glob(pattern):
                shutil.rmtree(leftover)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be used for checkpoints: {one_line(error)}") from error


def is_permanent(path: Path) -> bool:
    try:
        return json.loads((path / "meta.json").read_text())["checkpoint"]["permanent"]
    except (OSError, ValueError, KeyError, TypeError):
        return True  # unreadable: not ours to delete


def free_name(path: Path, word: str) -> Path:
    """`path`.word, or with a number behind it if that is taken."""
    target, number = path.with_name(f"{path.name}.{word}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{word}{number}")
    return target


def set_aside(path: Path, word: str = "corrupt") -> str:
    """Renames a checkpoint to `<step>.word`; returns its new name."""
    target = free_name(path, word)
    try:
        path.rename(target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be renamed: {one_line(error)}") from error
    return target.name


def remove(path: Path) -> None:
    """Deletes a checkpoint so that a kill half way leaves nothing under its final name."""
    doomed = path.with_name(f"{path.name}.tmp-old")
    path.rename(doomed)
    shutil.rmtree(doomed)


def require_room(directory: Path, n_bytes: int) -> None:
    """OSError (ENOSPC) if so many bytes cannot fit: orbax would find that out in several threads, half way."""
    if shutil.disk_usage(directory).free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def discard(temporary: Path) -> None:
    """Deletes a directory that could not be completed.

    Orbax reports the first failure while its other writes go on, and each of them makes its directories again: the
    name must stay free for half a second, for at most ten.  What a later one leaves, `mend` deletes on the next start.
    """
    end = time.monotonic() + 10
    free_since = None
    while time.monotonic() < end and (free_since is None or time.monotonic() - free_since < 0.5):
        if temporary.exists():
            free_since = None
            shutil.rmtree(temporary, ignore_errors=True)
        elif free_since is None:
            free_since = time.monotonic()
        time.sleep(0.02)


def files_of(root: Path) -> list[str]:
    """Every file below `root`, by its name relative to it."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def keep(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Waits until these files are on the disk; their checksums."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        synced = pool.map(lambda name: sync(root / name), names)
        checksums = checksums_of(root, names)
        list(synced)  # raises what one of them raised
    return checksums


def seal(temporary: Path, checksums: dict[str, str] | None = None) -> None:
    """Adds checksums.json to a complete directory and waits until all names are on the disk.

    checksums: of every other file, which `keep` has made durable; without it that happens here.
    """
    checksums = keep(temporary, files_of(temporary)) if checksums is None else checksums
    (temporary / "checksums.json").write_text(json.dumps(checksums, indent=1))  # every byte counts
    sync(temporary / "checksums.json")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]))


def commit(temporary: Path, final: Path) -> None:
    if final.exists():  # the same step again: the old one gives way only now; a kill in between is mended on start
        replaced = final.with_name(f"{final.name}.replaced")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    sync(final.parent)


def read_checksums(path: Path) -> dict[str, str]:
    """What checksums.json says; Damaged if it cannot be read."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    with _damage_of(path):
        checksums = json.loads((path / "checksums.json").read_text())
        return {str(name): str(checksum) for name, checksum in checksums.items()}


def compare(root: Path, checksums: dict[str, str], names: Iterable[str], what: str | Path | None = None) -> None:
    """Raises Damaged for the first of the files below `root` that is not as it was written.  what: how to call it."""
    with _damage_of(what or root):
        for name, found in checksums_of(root, names).items():
            if checksums.get(name) != found:
                raise Damaged(f"{what or root}: {name} differs from its checksum")


def verify(path: Path, only: str | None = None) -> dict:
    """meta.json, after comparing every file (or `only` one) with checksums.json."""
    checksums = read_checksums(path)
    compare(path, checksums, [only] if only else sorted({*checksums, "meta.json"}))
    with _damage_of(path):
        return json.loads((path / "meta.json").read_text())


@contextlib.contextmanager
def _damage_of(path: str | Path) -> Iterator[None]:
    """Tells damage from what may pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise Damaged(f"{path}: {Path(error.filename or path).name}: {error.strerror}") from error
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error  # permissions, open files
    except (ValueError, AttributeError, TypeError) as error:  # not JSON, not UTF-8, or not an object
        raise Damaged(f"{path}: checksums.json is not readable") from error


def checksums_of(root: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files below `root`, by their names."""

    def sha256(name: str) -> str:
        with open(root / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "No space left on device" in text:
        return "no space left on the device; free some and start again"
    return text[:300] or type(error).__name__
