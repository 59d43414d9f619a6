"""TinyLlama's own packed token files (`LITPKDS`), read back as the documents that were put into them.

A file is a header of 24 bytes (magic, u64 version 1, u8 dtype code, u64 tokens) and its tokens; little-endian.  One
process of TinyLlama's `prepare_*.py` wrote PREFIX_0000000000.bin, PREFIX_0000000001.bin, ...: one stream, cut anywhere.
So a document belongs to the file that it begins in, and its end may be read from the next ones.  The last file of a
stream may be filled up with BOS, which TinyLlama trained on; here it is left out and counted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from tinyllama_jax.errors import DataError

MAGIC, HEADER_BYTES, VERSION = b"LITPKDS", 24, 1
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which no token is
MARKS = ("eos", "bos", "both")
LONGEST_DOCUMENT = 1 << 26  # tokens; beyond it the marks are taken for wrong


def read(file: Path) -> np.ndarray:
    """The tokens of one file, mapped.  Raises DataError for anything but a whole file of this kind."""
    try:
        with file.open("rb") as opened:
            header = opened.read(HEADER_BYTES)
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if header[:7] != MAGIC:
        raise DataError(f"{file}: does not begin with {MAGIC.decode()}; name TinyLlama's packed .bin files")
    if len(header) < HEADER_BYTES:
        raise DataError(f"{file}: ends inside its header; fetch the file again")
    version, code, count = struct.unpack("<QBQ", header[7:])
    if version != VERSION or code not in DTYPES:
        raise DataError(
            f"{file}: is of version {version} with dtype {code}; only version 1 with whole numbers is known"
        )
    dtype = np.dtype(DTYPES[code])
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise DataError(
            f"{file}: has {size} bytes, its header promises {HEADER_BYTES + count * dtype.itemsize}; fetch it again"
        )
    return np.memmap(file, dtype, "r", HEADER_BYTES, (count,)) if count else np.zeros(0, dtype)


def neighbour(file: Path, step: int) -> Path | None:
    """The file `step` places on in the same stream, if it is there."""
    found = re.fullmatch(r"(.*_)(\d{10})\.bin", file.name)
    if not found or int(found[2]) + step < 0:
        return None
    other = file.with_name(f"{found[1]}{int(found[2]) + step:010d}.bin")
    return other if other.exists() else None


class Stream:
    """How documents lie in a stream.  marks: `bos` they begin with BOS, `eos` end with EOS, `both`."""

    def __init__(self, marks: str, bos: int, eos: int):
        self.marks, self.bos, self.eos = marks, bos, eos

    def filler(self, file: Path, tokens: np.ndarray) -> int:
        """How many tokens at the end of a stream's last file are BOS and nothing else; 0 in other files."""
        if neighbour(file, 1) is not None:
            return 0
        others = np.flatnonzero(tokens[::-1] != self.bos)
        return int(others[0]) if others.size else len(tokens)

    def documents(self, file: Path) -> Iterator[tuple[int, np.ndarray]]:
        """(place in the file, int32 tokens with marks) of each document that begins in it, in order.

        Raises DataError for a damaged file and for tokens that contradict the marks.
        """
        tokens = read(file)
        end = len(tokens) - self.filler(file, tokens)
        borders = self._borders(tokens[:end])
        previous = neighbour(file, -1)
        starts = borders if previous and not self._ends_document(read(previous)) else np.union1d([0], borders)
        starts = starts[starts < end]
        self._require_marks(file, tokens[:end], starts, certain=previous is not None)
        for start, stop in pairwise([*starts.tolist(), end]):
            parts = [tokens[start:stop]]
            if stop == end and not self._ends_document(parts[0]):
                parts += self._rest(file, stop - start)
            document = np.concatenate(parts).astype(np.int32)
            if document.min() < 0:
                raise DataError(f"{file}#{start}: has the token {document.min()}; fetch the file again")
            yield start, document

    def _borders(self, tokens: np.ndarray) -> np.ndarray:
        """Places in [0, len(tokens)] where a document begins, as far as the tokens say."""
        return np.flatnonzero(tokens == self.bos) if self.marks == "bos" else np.flatnonzero(tokens == self.eos) + 1

    def _ends_document(self, tokens: np.ndarray) -> bool:
        return self.marks != "bos" and len(tokens) > 0 and int(tokens[-1]) == self.eos

    def _rest(self, file: Path, length: int) -> list[np.ndarray]:
        """What of a file's last document lies in the files after it."""
        parts = []
        following = file
        while (following := neighbour(following, 1)) is not None:
            tokens = read(following)
            tokens = tokens[: len(tokens) - self.filler(following, tokens)]
            borders = self._borders(tokens)
            parts.append(tokens[: borders[0]] if borders.size else tokens)
            length += len(parts[-1])
            if borders.size:
                break
            if length > LONGEST_DOCUMENT:
                raise DataError(
                    f"{file}: its last document has more than {LONGEST_DOCUMENT} tokens; say with ?marks=bos or "
                    "?marks=eos what parts documents here"
                )
        return parts

    def _require_marks(self, file: Path, tokens: np.ndarray, starts: np.ndarray, certain: bool) -> None:
        """certain: whether a document begins at the first of `starts` too, or only what was found of one."""
        marked = np.flatnonzero(tokens == self.bos)
        opened, closed = bool(marked.size), bool(np.any(tokens == self.eos))
        fits = {
            "eos": not opened,
            "bos": not closed,
            "both": np.isin(marked, starts).all() and np.isin(starts if certain else starts[1:], marked).all(),
        }
        if not fits[self.marks]:
            raise DataError(
                f"{file}: has {_some(opened)} BOS ({self.bos}) and {_some(closed)} EOS ({self.eos}) where ?marks="
                f"{self.marks} does not expect it; write how documents are marked here, and with which ?bos= and ?eos="
            )


def _some(there: bool) -> str:
    return "a" if there else "no"
