"""Which source each draw of a mixture comes from, so that every source keeps to its share at every moment.

A source with share p is due p draws per draw; what it is due accumulates in exact integers.  Draw k must leave every
source within one draw of its due: the j-th draw of a source may come once more than j - 1 are due, and must have come
when j are.  Serving the earliest deadline first meets these windows whenever they can be met (Liu and Layland, 1973;
that they can be is R. Tijdeman's theorem on the chairman assignment problem, 1980).

That rule walks, and an order must be entered anywhere.  So a phase is cut into frames, as long as it takes until every
source is due FEW draws, within limits.  Their borders need no past: among BORDER_CHOICES neighbouring draws the one is
taken where all dues are nearly whole numbers, and the counts there are the dues, rounded.  Inside a frame, the rule
walks from a little before the draw that is asked for: as far back as the oldest draw that may still be waiting there
became possible, which for a source with share p is about 1/p draws.

A phase never looks beyond its end: shares that change later leave the draws before as they were.
"""

from __future__ import annotations

import functools
import heapq
import threading
from collections.abc import Sequence

import numpy as np

# Shares are multiples of 2**-40: rounding them adds up to less than a hundredth of a draw in 10**9, and what is due
# in a frame fits into int64.
ONE = 1 << 40
FEW = 4
SHORTEST_FRAME, LONGEST_FRAME = 1 << 14, 1 << 20  # draws
STRIDE = 4096  # draws that are walked at a time; each takes about a third of a microsecond
BORDER_CHOICES = 256
CACHED_FRAMES = 4


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
        rarest = int(self._shares.max(axis=0).min())
        self._length = min(max(SHORTEST_FRAME, 1 << (FEW * ONE // rarest).bit_length()), LONGEST_FRAME)
        self._frame = functools.lru_cache(maxsize=CACHED_FRAMES)(self._make_frame)
        self._border = functools.lru_cache(maxsize=CACHED_FRAMES)(self._choose_border)

    def due(self, draw: int) -> list[int]:
        """What each source is due after `draw` draws, in parts of ONE; exact."""
        piece = self._piece(draw)
        ahead = draw - self._starts[piece]
        return [due + ahead * int(share) for due, share in zip(self._due[piece], self._shares[piece], strict=True)]

    def counts(self, draw: int) -> np.ndarray:
        """Draws of each source among the first `draw`: int64 [n]."""
        return self._frame(self._frame_of(draw)).counts(draw)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The source of each of the draws start:stop: int64 [stop - start]."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            frame = self._frame(self._frame_of(start))
            parts.append(frame.sources(start, min(stop, frame.stop)))
            start += len(parts[-1])
        return np.concatenate(parts)

    def _piece(self, draw: int) -> int:
        return int(np.searchsorted(self._piece_starts, draw, "right")) - 1

    def _frame_of(self, draw: int) -> int:
        frame = draw // self._length
        return frame - 1 if draw < self._border(frame)[0] else frame

    def _choose_border(self, frame: int) -> tuple[int, np.ndarray]:
        """(draw, counts there) of the border before a frame."""
        if frame == 0:
            return 0, np.zeros(self.n, np.int64)
        first = frame * self._length
        whole, part = np.array([divmod(due, ONE) for due in self.due(first)], np.int64).T
        piece = np.searchsorted(self._piece_starts, np.arange(first, first + BORDER_CHOICES - 1), "right") - 1
        due = np.cumsum(np.concatenate([part[None], self._shares[piece]]), axis=0)  # beyond whole
        total = first - whole.sum() + np.arange(BORDER_CHOICES)
        rare = self._shares[self._piece(first)] * self._length < FEW * ONE
        rare[np.argmax(self._shares[self._piece(first)])] = False
        counts = _rounded(due, -whole, total, rare)
        best = int(np.argmin(np.abs(counts * ONE - due).max(axis=1)))
        return first + best, whole + counts[best]

    def _make_frame(self, number: int) -> _Frame:
        (start, before), (stop, after) = self._border(number), self._border(number + 1)
        first, last = self._piece(start), self._piece(stop - 1)
        edges = np.clip(np.append(self._piece_starts[first : last + 1], stop), start, stop) - start
        shares = self._shares[first : last + 1]
        accrued = np.concatenate([np.zeros((1, self.n), np.int64), np.cumsum(np.diff(edges)[:, None] * shares, axis=0)])
        releases, jobs = [], []
        for source, due in enumerate(self.due(start)):
            # Draw 0, 1, ... of this source from here on.
            wanted = np.arange(after[source] - before[source] + 1) * ONE + (int(before[source]) * ONE - due)
            line = edges, accrued[:, source], shares[:, source]
            releases.append(_slot(wanted[:-1] + 1, *line))
            jobs.append(_slot(wanted[1:], *line) * self.n + source)
        release = np.concatenate(releases)
        order = np.argsort(release, kind="stable")
        return _Frame(start, stop, before, release[order], np.concatenate(jobs)[order])


class _Frame:
    """The draws from one border to the next, walked where they were asked for.

    before [n]: draws of each source ahead of the frame.  release [draws]: slots from which on draws are possible,
    ascending; jobs [draws]: their deadline times n plus their source.
    """

    def __init__(self, start: int, stop: int, before: np.ndarray, release: np.ndarray, jobs: np.ndarray):
        self.start, self.stop, self._n = start, stop, before.size
        self._before, self._release, self._jobs = before, release, jobs
        self._drawn = np.empty(stop - start, np.int64)  # of the slots from `_first` to `_walked`
        self._lock = threading.Lock()  # batches are read ahead in another thread than the one that counts them
        self._begin(0, 0)

    def counts(self, draw: int) -> np.ndarray:
        """Draws of each source ahead of `draw`: int64 [n]."""
        slot = draw - self.start
        with self._lock:
            self._reach(slot, slot)
            return self._ahead + np.bincount(self._drawn[self._first : slot], minlength=self._n)

    def sources(self, start: int, stop: int) -> np.ndarray:
        start, stop = start - self.start, stop - self.start
        with self._lock:
            self._reach(start, stop)
            return self._drawn[start:stop].copy()

    def _reach(self, start: int, stop: int) -> None:
        """Walks until the slots start:stop are drawn."""
        if not self._first <= start <= self._walked:
            possible = self._possible(start)
            waiting = np.flatnonzero(self._jobs[:possible] >= start * self._n)  # perhaps: they are not due yet
            enter = min(waiting[0], self._release[waiting[0]]) if waiting.size else start
            if start < self._first or enter > self._walked:
                self._enter(enter, start)
        self._walk(stop)

    def _enter(self, slot: int, start: int) -> None:
        """Walks from `slot` to `start` without the past.

        What waits at `slot` is known by its number only.  All of it, and all that was possible earlier, is due before
        `start`, hence before whatever may be waiting there: so it does not matter which it is.
        """
        taken = self._possible(slot)
        self._begin(slot, taken)
        self._heap = [-1] * (taken - slot)
        self._walk(start)
        if self._heap and self._heap[0] < start * self._n:  # late, since the phase before left much owed
            self._begin(0, 0)
            self._walk(start)
        else:
            self._begin(start, self._taken, self._heap)

    def _begin(self, slot: int, taken: int, heap: Sequence[int] = ()) -> None:
        """At a slot before which all of the first `taken` jobs were drawn but those in `heap`."""
        self._first, self._walked, self._taken, self._heap = slot, slot, taken, list(heap)
        drawn = np.bincount(self._jobs[:taken] % self._n, minlength=self._n)
        self._ahead = self._before + drawn - np.bincount(np.array(self._heap, np.int64) % self._n, minlength=self._n)

    def _possible(self, slots: np.ndarray | int) -> np.ndarray | int:
        """Jobs that were possible before the slots.  Where the phase before left more owed than one draw each, a slot
        may find nobody due: then the next."""
        return np.maximum(np.searchsorted(self._release, slots), slots)

    def _walk(self, stop: int) -> None:
        while self._walked < stop:
            slots = np.arange(self._walked, min(self._walked + STRIDE, stop))
            possible = self._possible(slots + 1)
            jobs, taken, drawn = self._jobs[self._taken : possible[-1]].tolist(), 0, []
            for known in (possible - self._taken).tolist():
                for job in jobs[taken:known]:
                    heapq.heappush(self._heap, job)
                taken = max(taken, known)
                drawn.append(heapq.heappop(self._heap))
            self._drawn[slots] = np.array(drawn) % self._n
            self._walked, self._taken = self._walked + slots.size, int(possible[-1])


def _slot(due: np.ndarray, edges: np.ndarray, accrued: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The slots [N] behind which at least `due` [N] has accrued; the end where it never does.

    edges and accrued [pieces + 1]: slots where shares [pieces] change, and what has accrued there.
    """
    # Outside of ramps there is one piece, and with scalars the line below takes a third of the time.
    piece = np.minimum(np.searchsorted(accrued[1:], due), shares.size - 1) if shares.size > 1 else 0
    draws = edges[piece] - -(due - accrued[piece]) // np.maximum(shares[piece], 1)
    draws[due > accrued[-1]] = edges[-1] + 1
    return np.maximum(draws, 1) - 1


def _rounded(due: np.ndarray, least: np.ndarray, total: np.ndarray, rare: np.ndarray) -> np.ndarray:
    """Dues [choices, n] rounded to integers of at least `least` [n] that add up to `total` [choices].

    Sources that are not rare take the remainder, those with the largest fractions first.  Counts must not fall from
    one border to the next, so those of rare sources depend on nothing but their own due; their thresholds are spread,
    lest many of them are rounded up at once.
    """
    large = np.flatnonzero(~rare)
    counts = due // ONE
    spread = (2 * np.arange(rare.sum()) + 1) * ONE // max(2 * int(rare.sum()), 1)
    counts[:, rare] = np.maximum((due[:, rare] + spread) // ONE, least[rare])
    each, extra = np.divmod(total - counts.sum(axis=1), large.size)
    rank = np.argsort(np.argsort(-(due[:, large] % ONE), axis=1, kind="stable"), axis=1)
    counts[:, large] += each[:, None] + (rank < extra[:, None])
    return counts
