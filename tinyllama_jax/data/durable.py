"""Files that are there completely or not at all, and survive the machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.errors import DataError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space on the disk and start again" if error.errno in _DISK_FULL else "name another --out"
        raise DataError(f"{out}: the token store cannot be written: {reason}; {advice}") from error


def write(path: Path, data: bytes) -> None:
    """Replaces `path`; until then, what was there before stays."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path, *, below: Path) -> None:
    """Creates `path` and its parents, durably, up to the existing folder `below`."""
    missing = [folder for folder in (path, *path.parents) if below in folder.parents and not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def write_json(path: Path, value: dict) -> None:
    write(path, json.dumps(value, indent=1).encode() + b"\n")


def write_record(path: Path, record: dict) -> dict:
    """Writes JSON with its own checksum; returns the record with it."""
    record = {**record, "checksum": checksum(record)}
    write_json(path, record)
    return record


def checksum(record: dict) -> str:
    """SHA-256 of everything but the field that holds it."""
    content = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
