"""From documents to windows: in a row as TinyLlama did, or each window filled with documents that fit.

Both take token arrays one after another and give blocks for shards.ShardWriter: (tokens [N, W], where documents begin
in each window, how many tokens of each are no padding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

Block = tuple[np.ndarray, list[np.ndarray], list[int]]
BLOCK_WINDOWS = 512  # handed on at once
BUFFER_WINDOWS = 4096  # BestFit chooses among so many windows' documents: 34 MB of windows of 2049 tokens
PAD_ID = 0  # never predicted, never seen by a token that is


def packer(packing: Literal["none", "best_fit"], window_tokens: int) -> InARow | BestFit:
    """What `data.recipe.packing` names."""
    return InARow(window_tokens) if packing == "none" else BestFit(window_tokens)


class InARow:
    """Documents one after another, cut into windows wherever that falls; the last, partial window is dropped.

    After the last `add`: dropped_tokens, and dropped_documents (those of which not one token is in a window).
    """

    def __init__(self, window_tokens: int):
        self.window_tokens = window_tokens
        self._rows: list[np.ndarray] = []
        self._begins: list[int] = []
        self._tokens = 0

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        self._begins.append(self._tokens)
        self._rows.append(tokens)
        self._tokens += tokens.size
        if self._tokens >= BLOCK_WINDOWS * self.window_tokens:
            yield self._cut()

    def finish(self) -> Iterator[Block]:
        if self._tokens >= self.window_tokens:
            yield self._cut()
        self.dropped_tokens, self.dropped_documents = self._tokens, len(self._begins)

    def _cut(self) -> Block:
        row = np.concatenate(self._rows)
        windows = row.size // self.window_tokens
        whole = windows * self.window_tokens
        begins = np.array(self._begins, np.int64)
        inside = begins[begins < whole]
        edges = np.searchsorted(inside, np.arange(windows + 1) * self.window_tokens)
        places = np.split(inside % self.window_tokens, edges[1:-1])
        self._rows, self._tokens = [row[whole:]], row.size - whole
        self._begins = (begins[inside.size :] - whole).tolist()
        return row[:whole].reshape(windows, self.window_tokens), places, [self.window_tokens] * windows


class BestFit:
    """Windows filled with documents that fit, and padded at their end; no document that fits into a window is cut.

    Best-fit decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830): of the documents at hand the
    longest goes first, into the fullest window that has room for it, else into a new one.  Longer documents are cut
    into whole windows and a rest, which is packed like a document; each piece begins a document of its own.  Nothing
    is dropped.  What is at hand is the text of `buffer_windows` windows; the same documents in the same order give the
    same windows.
    """

    def __init__(self, window_tokens: int, buffer_windows: int = BUFFER_WINDOWS):
        self.window_tokens, self._buffer_tokens = window_tokens, buffer_windows * window_tokens
        self.dropped_tokens = self.dropped_documents = 0
        self._pieces: list[np.ndarray] = []
        self._tokens = 0

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        for start in range(0, tokens.size, self.window_tokens):
            self._pieces.append(tokens[start : start + self.window_tokens])
        self._tokens += tokens.size
        if self._tokens >= self._buffer_tokens:
            yield from self._pack()

    def finish(self) -> Iterator[Block]:
        if self._pieces:
            yield from self._pack()

    def _pack(self) -> Iterator[Block]:
        pieces, self._pieces, self._tokens = self._pieces, [], 0
        sizes = np.array([piece.size for piece in pieces])
        window = best_fit_decreasing(sizes, self.window_tokens)
        # Windows and the pieces in them stand in the order of the documents, so that neither a place in the store nor
        # one in the window says how long a document is.
        first = np.full(window.max() + 1, len(pieces))
        np.minimum.at(first, window, np.arange(len(pieces)))
        window = np.argsort(np.argsort(first))[window]
        order = np.argsort(window, kind="stable")
        sizes, ends = sizes[order], np.searchsorted(window[order], np.arange(first.size), "right")
        start = np.cumsum(sizes) - sizes
        begins = np.split(start, ends[:-1])
        for block in range(0, first.size, BLOCK_WINDOWS):
            rows = begins[block : block + BLOCK_WINDOWS]
            tokens = np.full((len(rows), self.window_tokens), PAD_ID, np.uint32)
            used, piece = [], ends[block] - rows[0].size
            for row, begin in zip(tokens, rows, strict=True):
                inside = [pieces[i] for i in order[piece : piece + begin.size]]
                piece += begin.size
                used.append(sum(part.size for part in inside))
                np.concatenate(inside, out=row[: used[-1]], casting="unsafe")
            yield tokens, [begin - begin[0] for begin in rows], used


def best_fit_decreasing(sizes: np.ndarray, room: int) -> np.ndarray:
    """A bin for each of `sizes`, 1 <= size <= room: int64 [N], bins counted from 0."""
    bins = np.empty(sizes.size, np.int64)
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = 0  # bit r is set where a bin with room r is open: the least that suffices is the lowest bit from `size` on
    opened = 0
    for index, size in zip(*(a.tolist() for a in _longest_first(sizes)), strict=True):
        suffice = rooms >> size
        if suffice:
            left = size + (suffice & -suffice).bit_length() - 1
            chosen = by_room[left].pop()
            if not by_room[left]:
                rooms ^= 1 << left
        else:
            left, chosen, opened = room, opened, opened + 1
        bins[index] = chosen
        left -= size
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return bins


def _longest_first(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-sizes, kind="stable")
    return order, sizes[order]
