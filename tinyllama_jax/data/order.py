"""Which window of which source stands in which row of which batch: a map without a past.

1. mixture (quotas.py): every source stays within one window of its due share after every row.
2. epoch: the n-th window consumed of a source is position n % windows of epoch n // windows.
3. shuffle (permutation.py): a keyed permutation of the source's windows per epoch; of blocks of windows where reading
   in runs matters.

A batch depends on the stages up to its own and on nothing later, so editing the future never moves the past.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinyllama_jax.data.permutation import permute, round_keys
from tinyllama_jax.data.quotas import ONE, Phase
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan, PlannedStage, mixture_at

VERSION = 2  # of the order that one configuration gives; part of a run's identity
# Longer ramps are cut into this many pieces of equal share, so that the table stays small.
RAMP_PIECES = 4096
SHUFFLED_BLOCKS = 16  # with block shuffle, so many blocks that follow each other in the order are mixed


@dataclass(frozen=True)
class _Phase:
    """A ramp, or the constant rest of a stage: the sources in it do not change."""

    start_step: int
    batch_sequences: int
    sources: tuple[int, ...]  # in Order.sources
    taken: tuple[int, ...]  # windows consumed of every source before
    quotas: Phase


class Order:
    """The data order of a run: a pure function of (plan so far, windows per source, seed, skipped steps).

    windows: training windows of each source.  epochs: 'reshuffle' gives every pass its own permutation, 'replay'
    repeats the first pass.  block_windows: windows that stay neighbours (see `_in_blocks`); 1 = all are shuffled.
    skip_ranges: (first, end) steps: from step `first` on the run goes on behind the windows that steps first:end
    would have consumed.  `sources` are the names that source indices refer to, sorted.
    Raises ConfigError if the plan mixes a source that has no window, or a skip range does not lie in one stage.
    """

    def __init__(
        self,
        plan: Plan,
        windows: dict[str, int],
        seed: int,
        epochs: Literal["reshuffle", "replay"] = "reshuffle",
        *,
        block_windows: int = 1,
        skip_ranges: tuple[tuple[int, int], ...] = (),
    ):
        self.plan, self.seed, self.epochs, self.block_windows = plan, seed, epochs, block_windows
        self.sources = tuple(sorted({name for s in plan.stages for name in (*s.stage.mixture, *s.ramp_from)}))
        for name in self.sources:
            if windows.get(name, 0) < 1:
                raise ConfigError(f"source {name!r} has no training window; remove it from the mixture or add data")
        self._windows = np.array([windows[name] for name in self.sources], np.int64)
        self._phases = _phases(plan, self.sources)
        self._starts = [phase.start_step for phase in self._phases]
        self._skipped = [(0, np.zeros(len(self.sources), np.int64))]
        for first, end in sorted(skip_ranges):
            _check_skip(plan, first, end)
            missed = self._scheduled(end) - self._scheduled(first)
            self._skipped.append((first, self._skipped[-1][1] + missed))

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows start:stop of batch `step` -> (index into `sources` int64 [n], window id int64 [n])."""
        size = self.plan.at_step(step).batch_sequences
        stop = size if stop is None else stop
        step, start, stop = int(step), int(start), int(stop)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"rows {start}:{stop} lie outside a batch of {size}")
        phase, draw = self._find(step)
        before = self._before(phase, draw + start) + self._skips(step)
        source = np.array(phase.sources, np.int64)[phase.quotas.sources(draw + start, draw + stop)]
        position = np.empty_like(source)  # how many windows of its source were consumed before the row
        for index in phase.sources:
            mine = np.flatnonzero(source == index)
            position[mine] = before[index] + np.arange(mine.size)
        return source, self._shuffle(source, position)

    def counts(self, step: int) -> dict[str, int]:
        """Windows trained on of each source before batch `step`, 0 <= step <= total_steps.  Exact."""
        return dict(zip(self.sources, self._scheduled(step).tolist(), strict=True))

    def epoch(self, step: int) -> dict[str, float]:
        """Passes over each source before batch `step`, skipped windows included."""
        passed = self._scheduled(step) + self._skips(step)
        return dict(zip(self.sources, (passed / self._windows).tolist(), strict=True))

    def fingerprint(self, step: int) -> str:
        """Sixteen hex digits that name what batches before `step` hold: the windows there are of each source drawn so
        far and the number consumed, and some of those batches themselves, the last among them.  Part of a checkpoint;
        another past gives another name, and a source of the future alone none."""
        drawn = {name: n for name, n in self.counts(step).items() if n}
        windows = {name: int(self._windows[self.sources.index(name)]) for name in drawn}
        told = hashlib.sha256(json.dumps([VERSION, step, drawn, windows]).encode())
        for at in sorted({step * part // 4 for part in range(4)} | {step - 1} if step else ()):
            source, window = self.rows(at)
            told.update(json.dumps([at, [self.sources[i] for i in source], window.tolist()]).encode())
        return told.hexdigest()[:16]

    def _scheduled(self, step: int) -> np.ndarray:
        self.plan.tokens_at(step)  # IndexError outside the run
        return self._before(*self._find(int(step)))

    def _skips(self, step: int) -> np.ndarray:
        return self._skipped[bisect.bisect_right([first for first, _ in self._skipped], step) - 1][1]

    def _find(self, step: int) -> tuple[_Phase, int]:
        phase = self._phases[bisect.bisect_right(self._starts, step) - 1]
        return phase, (step - phase.start_step) * phase.batch_sequences

    def _before(self, phase: _Phase, draw: int) -> np.ndarray:
        counts = np.array(phase.taken, np.int64)
        counts[list(phase.sources)] += phase.quotas.counts(draw)
        return counts

    def _shuffle(self, source: np.ndarray, position: np.ndarray) -> np.ndarray:
        epoch, index = np.divmod(position, self._windows[source])
        if self.epochs == "replay":
            epoch = np.zeros_like(epoch)
        window = np.empty_like(index)
        pairs, which = np.unique(epoch * len(self.sources) + source, return_inverse=True)
        for number, pair in enumerate(pairs.tolist()):
            rows = which == number
            turn, of = divmod(pair, len(self.sources))
            window[rows] = self._permuted(index[rows], int(self._windows[of]), self.sources[of], turn)
        return window

    def _permuted(self, index: np.ndarray, size: int, name: str, epoch: int) -> np.ndarray:
        keys = round_keys(self.seed, name, epoch)
        if self.block_windows == 1:
            return permute(index, size, keys[:, None])
        return _in_blocks(index, size, self.block_windows, keys, lambda part: round_keys(self.seed, name, epoch, part))


def _in_blocks(index: np.ndarray, size: int, block: int, keys: np.ndarray, keys_of) -> np.ndarray:
    """A permutation of range(size) that reads in runs: blocks of `block` neighbours are permuted, and then the windows
    inside of each SHUFFLED_BLOCKS blocks that follow one another.  What fills no block comes last; a rotation, another
    one in each epoch, decides what that is."""
    whole = size // block * block
    span = block * SHUFFLED_BLOCKS
    out = np.empty_like(index)
    for group in np.unique(index // span).tolist():
        rows = np.flatnonzero((index // span == group) & (index < whole))
        first = group * span
        place = first + permute(index[rows] - first, min(span, whole - first), keys_of(group + 1)[:, None])
        out[rows] = permute(place // block, whole // block, keys[:, None]) * block + place % block
    rows = np.flatnonzero(index >= whole)
    out[rows] = whole + permute(index[rows] - whole, size - whole, keys[:, None])
    return (out + int(keys[0] % np.uint64(size))) % size


def _check_skip(plan: Plan, first: int, end: int) -> None:
    where = f"data.skip_ranges has ({first}, {end})"
    if not 0 <= first < end <= plan.total_steps:
        raise ConfigError(f"{where}; it must be two steps (first, end) of the run's {plan.total_steps}, first < end")
    if plan.at_step(first).index != plan.at_step(end - 1).index:
        border = plan.at_step(first).end_step
        raise ConfigError(f"{where}, which crosses the stage border at step {border}; give each stage its own range")


def _phases(plan: Plan, sources: tuple[str, ...]) -> list[_Phase]:
    phases: list[_Phase] = []
    taken, owed = np.zeros(len(sources), np.int64), [0] * len(sources)
    for planned in plan.stages:
        ramp_steps = -(-planned.stage.ramp_tokens // planned.batch_tokens)
        steps = planned.end_step - planned.start_step
        for start, end in ((0, ramp_steps), (ramp_steps, steps)):
            if start == end:
                continue
            if start < ramp_steps:
                pieces = _ramp(plan, planned, ramp_steps, sources)
            else:
                pieces = [(steps - start, _fixed_point(planned.stage.mixture, sources))]
            pieces = [(n * planned.batch_sequences, shares) for n, shares in pieces]
            mixed = tuple(i for i in range(len(sources)) if any(shares[i] for _, shares in pieces))
            pieces = [(n, [shares[i] for i in mixed]) for n, shares in pieces]
            quotas = Phase(pieces, _handed_over(owed, mixed, pieces[0][1]))
            phases.append(
                _Phase(planned.start_step + start, planned.batch_sequences, mixed, tuple(taken.tolist()), quotas)
            )
            draws = (end - start) * planned.batch_sequences
            counts = quotas.counts(draws)
            owed = [0] * len(sources)
            for i, due, count in zip(mixed, quotas.due(draws), counts.tolist(), strict=True):
                owed[i] = due - count * ONE
                taken[i] += count
    return phases


def _handed_over(owed: list[int], mixed: tuple[int, ...], shares: list[int]) -> list[int]:
    """What the sources of a phase are owed at its start; what is owed to sources that leave goes to those that stay,
    by their shares."""
    inherited = -sum(owed[i] for i in mixed)  # all that is owed adds up to 0
    kept = [owed[i] + inherited * share // ONE for i, share in zip(mixed, shares, strict=True)]
    kept[shares.index(max(shares))] -= sum(kept)
    return kept


def _ramp(plan: Plan, planned: PlannedStage, steps: int, sources: tuple[str, ...]) -> list[tuple[int, list[int]]]:
    """(steps, shares) of the pieces of a ramp, each with the mixture in its middle."""
    piece = -(-steps // RAMP_PIECES)
    pieces = []
    for start in range(0, steps, piece):
        length = min(piece, steps - start)
        middle = planned.start_tokens + (start + length / 2) * planned.batch_tokens
        pieces.append((length, _fixed_point(mixture_at(plan, middle), sources)))
    return pieces


def _fixed_point(mixture: dict[str, float], sources: tuple[str, ...]) -> list[int]:
    """Normalised shares as integers that add up to ONE exactly; a weight of zero stays zero.

    Differences of rounded running sums, so sources without a share leave the others untouched.
    """
    total = sum(mixture[name] for name in sources if name in mixture)
    running, last, shares = 0.0, 0, []
    for name in sources:
        running += mixture.get(name, 0.0)
        now = round(running / total * ONE)
        shares.append(now - last)
        last = now
    return shares
