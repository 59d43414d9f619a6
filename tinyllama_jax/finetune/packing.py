"""From examples to windows on disk.

An example is uint32 [T]: ids, and in the highest bit whether the token is learned; so the packers of running text
(data/windows.py) pack it as it is.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from tinyllama_jax.data.windows import PAD_ID, BestFit, Block, InARow
from tinyllama_jax.finetune.store import window_dtype

LEARNED = np.uint32(1 << 31)

Packing = Literal["best_fit", "single", "concatenated", "pairs"]


def flagged(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """int32 [T], bool [T] -> uint32 [T]."""
    return ids.astype(np.uint32) | learned.astype(np.uint32) << np.uint32(31)


class Single:
    """One example to a window, both of a pair to one; the rest is padding.  None is longer than the window."""

    def __init__(self, window_tokens: int):
        self.window_tokens = window_tokens

    def add(self, *parts: np.ndarray) -> Iterator[Block]:
        row = np.full((1, self.window_tokens), PAD_ID, np.uint32)
        used = sum(part.size for part in parts)
        np.concatenate(parts, out=row[0, :used])
        yield row, [np.cumsum([0, *(part.size for part in parts[:-1])])], [used]

    def finish(self) -> Iterator[Block]:
        yield from ()


class Concatenated(InARow):
    """As running text, but the last window is padded, not dropped: examples are few."""

    def finish(self) -> Iterator[Block]:
        if self._tokens >= self.window_tokens:
            yield self._cut()
        if used := self._tokens:
            row = np.full((1, self.window_tokens), PAD_ID, np.uint32)
            np.concatenate(self._rows, out=row[0, :used])
            yield row, [np.array(self._begins, np.int64)], [used]


PACKERS = {"best_fit": BestFit, "single": Single, "concatenated": Concatenated, "pairs": Single}


def write(
    path: Path, examples: Iterable[tuple[np.ndarray, ...]], packing: Packing, window_tokens: int, vocab: int
) -> dict:
    """Packs examples (tuples: one, or both of a pair) into a new file of windows -> its entry in the manifest."""
    dtype, packer = window_dtype(window_tokens, vocab), PACKERS[packing](window_tokens)
    counts = dict.fromkeys(("windows", "documents", "tokens", "learned"), 0)
    digest = hashlib.sha256()

    def blocks() -> Iterator[Block]:
        for parts in examples:
            counts["documents"] += len(parts)
            yield from packer.add(*parts)
        yield from packer.finish()

    with path.open("xb") as file:
        for rows_NW, places, used in blocks():
            records = _records(np.ascontiguousarray(rows_NW, np.uint32), places, used, dtype)
            counts["windows"] += len(used)
            counts["tokens"] += sum(used)
            counts["learned"] += int(np.count_nonzero(rows_NW & LEARNED))
            data = records.tobytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {**counts, "sha256": digest.hexdigest()}


def _records(rows_NW: np.ndarray, places: list[np.ndarray], used: list[int], dtype: np.dtype) -> np.ndarray:
    records = np.zeros(len(rows_NW), dtype)
    records["used"] = used
    records["tokens"] = rows_NW & ~LEARNED
    records["learned"] = np.packbits(rows_NW & LEARNED != 0, axis=1)
    begins = np.zeros(rows_NW.shape, bool)
    for row, at in zip(begins, places, strict=True):
        row[at] = True
    records["begins"] = np.packbits(begins, axis=1)
    for row, data in zip(records, records.view(np.uint8).reshape(len(records), -1), strict=True):
        row["crc"] = zlib.crc32(data[4:])
    return records
