"""Files of JSON lines, the records of a run: appended to whole line by whole line, cut back on resume.

Every line is JSON as the standard has it: floats have as many digits as they need to be read back exactly, and NaN and
the infinities are `null`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama_jax.errors import ConfigError


@dataclass
class Cut:
    """What was cut off a file of records: how many, how long their steps took, and until when and where it went."""

    steps: int = 0
    seconds: float = 0.0
    until: float | None = None  # seconds since 1970
    last: int = -1  # step of the last whole line, cut or not


def cut_back(path: Path, step: int) -> Cut:
    """Keeps the lines up to and including `step`, or none if it is 0; by writing a new file and renaming it.

    A line that is not JSON, as a kill in the middle of a write leaves one, is dropped.
    """
    cut = Cut()
    if not path.exists():
        return cut
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, encoding="utf-8", errors="replace") as before, open(temporary, "w", encoding="utf-8") as after:
            for line in before:
                record = _record(line)
                if record is None:
                    continue
                cut.last = max(cut.last, record["step"])
                if 0 < step and record["step"] <= step:
                    after.write(line)
                    continue
                timing = record.get("timing") or {}
                cut.steps += 1
                cut.seconds += timing.get("step_s") or 0.0
                cut.until = timing.get("time") or cut.until
            after.flush()
            os.fsync(after.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    return cut


def _record(line: str) -> dict | None:
    """A whole line's record; None for what is none."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read(path: Path) -> Iterator[dict]:
    """The records of a file of JSON lines."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


class RecordFailed(ConfigError):
    """A record of a run under way could not be written; a launcher may try again, as after a save that failed.

    On a disk that fills up it is chance which of the two is the first; a new start says if there is no room for it.
    """

    exit_status = 1


def _cannot_write(path: Path, error: OSError, kind: type[ConfigError] = ConfigError) -> ConfigError:
    return kind(f"{path}: cannot be written: {error.strerror}; mend that and start again")


def plain(value):
    """`value` as strict JSON can say it: NumPy scalars as numbers, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A file of JSON lines; each is handed to the operating system at once."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "ab+", buffering=0)
            self._drop_incomplete_line()
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _drop_incomplete_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        if end < size:
            self._file.truncate(end)

    def write(self, record: dict) -> None:
        line = memoryview(json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        with self._lock:
            try:
                while line:  # an unbuffered write may take only a part
                    line = line[self._file.write(line) :]
            except OSError as error:
                raise _cannot_write(self.path, error, RecordFailed) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # a disk that takes blocks only now, as over a network
            raise _cannot_write(self.path, error, RecordFailed) from error

    def close(self) -> None:
        self._file.close()
