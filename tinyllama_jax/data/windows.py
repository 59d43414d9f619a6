"""From documents to windows: in a row as TinyLlama did, or each window filled with documents that fit.

Both take token arrays one after another and give blocks (tokens [N, W], places, used) for shards.ShardWriter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Block = tuple[np.ndarray, list[np.ndarray], list[int]]
BLOCK_WINDOWS = 512  # handed on at once


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
