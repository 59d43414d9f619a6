"""Directories that are there completely or not at all, and whose every byte can be checked.

The rename from a temporary to the final name is the commit.  `checksums.json` holds the SHA-256 of every other file.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from tinyllama_jax.data.durable import sync
from tinyllama_jax.errors import CheckpointError

_FINAL = re.compile(r"\d{8,}")


class Damaged(CheckpointError):
    """The files of a checkpoint are not the ones that were committed."""


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}"


def steps(directory: Path) -> list[int]:
    """Committed steps, ascending."""
    return sorted(int(p.name) for p in directory.iterdir() if _FINAL.fullmatch(p.name) and p.is_dir())


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


def set_aside(path: Path) -> str:
    """Renames a damaged checkpoint; returns its new name."""
    target = free_name(path, "corrupt")
    try:
        path.rename(target)
    except OSError as error:
        raise CheckpointError(f"{path}: is damaged and cannot be renamed: {one_line(error)}") from error
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


def seal(temporary: Path) -> None:
    """Adds checksums.json to a complete directory and waits until all of it is on the disk."""
    sums = _checksums(temporary, sorted(p for p in temporary.rglob("*") if p.is_file()))
    (temporary / "checksums.json").write_text(json.dumps(sums, indent=1))  # every byte counts
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)


def commit(temporary: Path, final: Path) -> None:
    if final.exists():  # the same step again: the old one gives way only now; a kill in between is mended on start
        replaced = final.with_name(f"{final.name}.replaced")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    sync(final.parent)


def verify(path: Path, only: str | None = None) -> dict:
    """meta.json, after comparing every file (or `only` one) with checksums.json."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checksums = json.loads((path / "checksums.json").read_text())
        chosen = [only] if only else sorted({*checksums, "meta.json"})
        for name, found in _checksums(path, [path / name for name in chosen]).items():
            if checksums.get(name) != found:
                raise Damaged(f"{path}: {name} differs from its checksum")
        return json.loads((path / "meta.json").read_text())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise Damaged(f"{path}: {Path(error.filename or path).name}: {error.strerror}") from error
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error  # permissions, open files
    except (ValueError, AttributeError, TypeError) as error:  # not JSON, not UTF-8, or not an object
        raise Damaged(f"{path}: checksums.json is not readable") from error


def _checksums(root: Path, paths: list[Path]) -> dict[str, str]:
    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return {
            path.relative_to(root).as_posix(): digest
            for path, digest in zip(paths, pool.map(sha256, paths), strict=True)
        }


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "No space left on device" in text:
        return "no space left on the device; free some and start again"
    return text[:300] or type(error).__name__
