"""Named arrays in one file: written whole, checked whole, read in parts."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable
from tinyllama_jax.errors import DataError

CHECKSUM_BYTES = 64  # hexadecimal SHA-256 of all that follows, in the first line; the second line names the arrays


def write(path: Path, kind: str, plan: str, arrays: dict[str, np.ndarray]) -> None:
    """Replaces `path`, durably.  kind: what the arrays are.  plan: the SHA-256 of the plan they were made for."""
    head = {"kind": kind, "plan": plan, "arrays": {name: [a.dtype.str, a.shape] for name, a in arrays.items()}}
    content = json.dumps(head).encode() + b"\n" + b"".join(a.tobytes() for a in arrays.values())
    durable.write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


class Columns:
    """The arrays of one file, which stay on disk.

    Opening reads the file once.  Raises DataError when it is not there, damaged, of another kind or of another plan.
    """

    def __init__(self, path: Path, kind: str, plan: str):
        self.path = path
        try:
            with path.open("rb") as file:
                checksum = file.read(CHECKSUM_BYTES + 1)
                found = hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n"
                file.seek(CHECKSUM_BYTES + 1)
                line = file.readline()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); `prepare` makes it when started again"
            ) from error
        if checksum != found:
            raise DataError(f"{path}: is damaged; remove it and start `prepare` again")
        head = json.loads(line)
        if (head["kind"], head["plan"]) != (kind, plan):
            raise DataError(f"{path}: holds {head['kind']} of another plan; remove it and start `prepare` again")
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        offset = CHECKSUM_BYTES + 1 + len(line)
        for name, (dtype, shape) in head["arrays"].items():
            self._places[name] = offset, np.dtype(dtype), tuple(shape)
            offset += math.prod(shape) * np.dtype(dtype).itemsize

    def rows(self, name: str) -> int:
        return self._places[name][2][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of an array."""
        offset, dtype, (rows, *others) = self._places[name]
        stop = rows if stop is None else stop
        width = math.prod(others)
        offset += start * width * dtype.itemsize
        return np.fromfile(self.path, dtype, (stop - start) * width, offset=offset).reshape(stop - start, *others)
