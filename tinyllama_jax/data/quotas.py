"""Which source each draw of a mixture comes from, so that every source keeps to its share at every moment.

A source with share p is due p draws per draw; what it is due accumulates in exact integers.  Draw k must leave every
source within one draw of its due: the j-th draw of a source may come once more than j - 1 are due, and must have come
when j are.  Serving the earliest deadline first meets these windows whenever they can be met (Liu and Layland, 1973;
that they can be is R. Tijdeman's theorem on the chairman assignment problem, 1980).

That rule walks, and an order must be entered anywhere.  So a phase is cut into frames of about FRAME draws.  Their
borders need no past: among BORDER_CHOICES neighbouring draws the one is taken where all dues are nearly whole numbers,
and the counts there are the dues, rounded.  Inside a frame, the rule walks from border to border.

A phase never looks beyond its end: shares that change later leave the draws before as they were.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import numpy as np

# Shares are multiples of 2**-40: rounding them adds up to less than a hundredth of a draw in 10**9, and what is due
# in a frame fits into int64.
ONE = 1 << 40
FRAME = 16384
BORDER_CHOICES = 256
CACHED_FRAMES = 16


class Phase:
    """Draws of `n` sources whose shares are piecewise constant.

    pieces: (draws, shares) one after another; shares are integers that add up to ONE.  The last piece goes on for
    ever, so a phase can be read beyond the end that the plan gives it.
    owed: what each source is due at the start, in parts of ONE, as the phase before left it; adds up to 0.
    """

    def __init__(self, pieces: Sequence[tuple[int, Sequence[int]]], owed: Sequence[int]):
        self.n = len(owed)
        self._starts = [0]
        self._due = [list(owed)]  # Python integers, before each piece
        for draws, shares in pieces:
            self._starts.append(self._starts[-1] + draws)
            self._due.append([due + draws * share for due, share in zip(self._due[-1], shares, strict=True)])
        self._piece_starts = np.array(self._starts[:-1], np.int64)
        self._shares = np.array([shares for _, shares in pieces], np.int64)  # [pieces, n]
        self._frame = functools.lru_cache(maxsize=CACHED_FRAMES)(self._walk)
        self._border = functools.lru_cache(maxsize=CACHED_FRAMES)(self._choose_border)

    def due(self, draw: int) -> list[int]:
        """What each source is due after `draw` draws, in parts of ONE; exact."""
        piece = self._piece(draw)
        ahead = draw - self._starts[piece]
        return [due + ahead * int(share) for due, share in zip(self._due[piece], self._shares[piece], strict=True)]

    def counts(self, draw: int) -> np.ndarray:
        """Draws of each source among the first `draw`: int64 [n]."""
        start, counts, sources = self._frame(self._frame_of(draw))
        return counts + np.bincount(sources[: draw - start], minlength=self.n)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The source of each of the draws start:stop: int64 [stop - start]."""
        parts = []
        while start < stop:
            frame_start, _, sources = self._frame(self._frame_of(start))
            parts.append(sources[start - frame_start : stop - frame_start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _piece(self, draw: int) -> int:
        return int(np.searchsorted(self._piece_starts, draw, "right")) - 1

    def _frame_of(self, draw: int) -> int:
        frame = draw // FRAME
        return frame - 1 if draw < self._border(frame)[0] else frame

    def _accrued(self, start: int, draws: int) -> np.ndarray:
        """What falls due in each source after 1, 2, ... draws from `start`: int64 [draws, n]."""
        piece = np.searchsorted(self._piece_starts, np.arange(start, start + draws), "right") - 1
        return np.cumsum(self._shares[piece], axis=0)

    def _choose_border(self, frame: int) -> tuple[int, np.ndarray]:
        """(draw, counts there) of the border before a frame."""
        if frame == 0:
            return 0, np.zeros(self.n, np.int64)
        first = frame * FRAME
        whole, part = np.array([divmod(due, ONE) for due in self.due(first)], np.int64).T
        due = part + np.concatenate(
            [np.zeros_like(part)[None], self._accrued(first, BORDER_CHOICES - 1)]
        )  # beyond whole
        total = first - whole.sum() + np.arange(BORDER_CHOICES)
        counts = _rounded(due, -whole, total, self._shares[self._piece(first)])
        best = int(np.argmin(np.abs(counts * ONE - due).max(axis=1)))
        return first + best, whole + counts[best]

    def _walk(self, frame: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(first draw, counts before it, source of each draw) of a frame."""
        (start, before), (stop, after) = self._border(frame), self._border(frame + 1)
        accrued = self._accrued(start, stop - start)
        jobs = []
        for source, due in enumerate(self.due(start)):
            wanted = np.arange(after[source] - before[source])  # 0 = the next draw of this source
            offset = due - int(before[source]) * ONE
            release = np.searchsorted(accrued[:, source], wanted * ONE - offset, "right")
            deadline = np.searchsorted(accrued[:, source], (wanted + 1) * ONE - offset, "left")
            jobs.append(np.stack([release, deadline, np.full(wanted.size, source)]))
        release, deadline, source = np.concatenate(jobs, axis=1)
        order = np.argsort(release, kind="stable")
        waiting = list(zip(deadline[order].tolist(), source[order].tolist(), strict=True))
        released = np.searchsorted(release[order], np.arange(stop - start), "right").tolist()
        heap: list[tuple[int, int]] = []
        drawn, taken = np.empty(stop - start, np.int64), 0
        for slot, known in enumerate(released):
            # Where the phase before left more owed than one draw each, a slot may find nobody due: then the next.
            known = max(known, slot + 1)
            while taken < known:
                heapq.heappush(heap, waiting[taken])
                taken += 1
            drawn[slot] = heapq.heappop(heap)[1]
        return start, before, drawn


def _rounded(due: np.ndarray, least: np.ndarray, total: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Dues [choices, n] rounded to integers of at least `least` [n] that add up to `total` [choices].

    Sources that are due at least a few draws per frame take the remainder, those with the largest fractions first.
    Counts must not fall from one border to the next, so those of the other sources depend on nothing but their own
    due; their thresholds are spread, lest many of them are rounded up at once.
    """
    small = shares * FRAME < 4 * ONE
    small[np.argmax(shares)] = False
    large = np.flatnonzero(~small)
    counts = due // ONE
    spread = (2 * np.arange(small.sum()) + 1) * ONE // max(2 * int(small.sum()), 1)
    counts[:, small] = np.maximum((due[:, small] + spread) // ONE, least[small])
    each, extra = np.divmod(total - counts.sum(axis=1), large.size)
    rank = np.argsort(np.argsort(-(due[:, large] % ONE), axis=1, kind="stable"), axis=1)
    counts[:, large] += each[:, None] + (rank < extra[:, None])
    return counts
