"""Which window of which source stands in which row of which batch: a closed-form map.

Three exact steps, none of which looks at the past:
1. mixture: nested two-way splits (the first source against the rest, the second against the rest of the rest, ...)
   in integer fixed point.  A source is taken whenever its accumulated share passes a whole number, so each source is
   consumed 0, 1, 2, ... without gap or repeat.  It stays within 2 windows of its ideal running share for up to five
   sources of constant share (1 for two sources); in ramps between random mixtures of five we have seen 2.2.
2. epoch: the n-th window consumed of a source is position n % windows of epoch n // windows.
3. shuffle: a keyed permutation of the source's windows, a Feistel network of 16 rounds.  (Few rounds are measurably
   not random: with 4 rounds neighbouring draws correlate by up to 0.46.)

The table of mixture segments depends only on stages up to a step, so editing the future never moves the past.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinyllama_jax.config import ConfigError
from tinyllama_jax.schedules import Plan, mixture_at

# Shares are multiples of 2**-40: rounding adds up to under a hundredth of a window in 10**9 windows, and a batch of
# up to 2**22 rows accumulates in int64.
BITS = 40
ONE = 1 << BITS
ROUNDS = 16
# Longer ramps are cut into this many pieces of equal share, so that the table stays small.
RAMP_PIECES = 4096


@dataclass(frozen=True)
class _Segment:
    """A run of batches with constant shares.  Tuples hold one integer per source, in the order of Order.sources."""

    start_step: int
    batch_sequences: int
    taken: tuple[int, ...]  # windows consumed before the segment
    carry: tuple[int, ...]  # accumulated part of the next window, in [0, ONE)
    splits: tuple[int, ...]  # share of the source in what the sources before it left over, in [0, ONE]


class Order:
    """The data order of a run: a pure function of (plan so far, windows per source, seed).

    windows: training windows of each source.  epochs: 'reshuffle' gives every pass its own permutation, 'replay'
    repeats the first pass.  `sources` are the names that source indices refer to, sorted.
    Raises ConfigError if the plan mixes a source that has no window.
    """

    def __init__(self, plan: Plan, windows: dict[str, int], seed: int, epochs: Literal["reshuffle", "replay"]):
        self.plan, self.seed, self.epochs = plan, seed, epochs
        self.sources = tuple(sorted({name for s in plan.stages for name in (*s.stage.mixture, *s.ramp_from)}))
        for name in self.sources:
            if windows.get(name, 0) < 1:
                raise ConfigError(f"source {name!r} has no training window; remove it from the mixture or add data")
        self._windows = np.array([windows[name] for name in self.sources], np.int64)
        self._segments = _segments(plan, self.sources)
        self._starts = [s.start_step for s in self._segments]

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows start:stop of batch `step` -> (index into `sources` int64 [n], window id int64 [n])."""
        size = self.plan.at_step(step).batch_sequences
        stop = size if stop is None else stop
        # Python integers from here on: an int64 step would overflow in offset * split.
        step, start, stop = int(step), int(start), int(stop)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"rows {start}:{stop} lie outside a batch of {size}")
        segment, offset = self._find(step)
        offset += start
        source = np.empty(stop - start, np.int64)
        position = np.empty(stop - start, np.int64)  # how many windows of its source were consumed before the row
        left = np.arange(stop - start)  # rows that no earlier source has taken
        for index, (taken, carry, split) in enumerate(zip(segment.taken, segment.carry, segment.splits, strict=True)):
            if not split:
                continue
            whole, part = divmod(carry + offset * split, ONE)
            passed = (part + np.arange(len(left) + 1, dtype=np.int64) * split) >> BITS
            chosen = passed[1:] > passed[:-1]
            source[left[chosen]] = index
            position[left[chosen]] = taken + whole + passed[:-1][chosen]
            left = left[~chosen]
            offset -= whole
        return source, self._shuffle(source, position)

    def counts(self, step: int) -> dict[str, int]:
        """Windows consumed of each source before batch `step`, 0 <= step <= total_steps.  Exact."""
        self.plan.tokens_at(step)  # IndexError outside the run
        segment, offset = self._find(int(step))
        counts = {}
        for name, taken, carry, split in zip(self.sources, segment.taken, segment.carry, segment.splits, strict=True):
            whole = (carry + offset * split) >> BITS
            counts[name] = taken + whole
            offset -= whole
        return counts

    def epoch(self, step: int) -> dict[str, float]:
        """Passes over each source before batch `step`."""
        return {name: count / int(n) for (name, count), n in zip(self.counts(step).items(), self._windows, strict=True)}

    def _find(self, step: int) -> tuple[_Segment, int]:
        segment = self._segments[bisect.bisect_right(self._starts, step) - 1]
        return segment, (step - segment.start_step) * segment.batch_sequences

    def _shuffle(self, source: np.ndarray, position: np.ndarray) -> np.ndarray:
        windows = self._windows[source]
        epoch, index = np.divmod(position, windows)
        if self.epochs == "replay":
            epoch = np.zeros_like(epoch)
        # One permutation per (source, epoch) in the batch, all rows in one vectorised pass.
        pairs, which = np.unique(epoch * len(self.sources) + source, return_inverse=True)
        keys = np.stack(
            [round_keys(self.seed, self.sources[p % len(self.sources)], p // len(self.sources)) for p in pairs.tolist()]
            or [np.zeros(ROUNDS, np.uint64)],
            axis=1,
        )
        return permute(index, windows, keys[:, which] if len(pairs) > 1 else keys)


def _segments(plan: Plan, sources: tuple[str, ...]) -> list[_Segment]:
    segments = []
    taken = [0] * len(sources)
    ideal = [0] * len(sources)  # exact cumulative shares, in windows * ONE
    for planned in plan.stages:
        ramp_steps = -(-planned.stage.ramp_tokens // planned.batch_tokens)
        piece = -(-ramp_steps // RAMP_PIECES) or 1
        starts = [*range(0, ramp_steps, piece), ramp_steps]
        ends = [*starts[1:], planned.end_step - planned.start_step]
        for start, end in zip(starts, ends, strict=True):
            if end == start:  # the ramp fills the stage
                continue
            middle = planned.start_tokens + (start + end) * planned.batch_tokens / 2
            mixture = mixture_at(plan, middle) if start < ramp_steps else planned.stage.mixture
            shares = _fixed_point(mixture, sources)
            splits, carry = [], []
            rest, actual_rest, ideal_rest = ONE, sum(taken), sum(ideal)
            for share, had, due in zip(shares, taken, ideal, strict=True):
                split = (share * ONE + rest // 2) // rest if rest else 0
                # Aim at the ideal share of what really reaches this source, whatever the shares were before: an error
                # made in one segment is paid back instead of adding up over the segments of a ramp.
                aim = ONE // 2 + due - had * ONE + (split * (actual_rest * ONE - ideal_rest) >> BITS)
                splits.append(split)
                carry.append(min(max(aim, 0), ONE - 1))
                rest, actual_rest, ideal_rest = rest - share, actual_rest - had, ideal_rest - due
            segments.append(
                _Segment(planned.start_step + start, planned.batch_sequences, tuple(taken), tuple(carry), tuple(splits))
            )
            rows = offset = (end - start) * planned.batch_sequences
            for index, share in enumerate(shares):
                whole = (carry[index] + offset * splits[index]) >> BITS
                taken[index] += whole
                ideal[index] += share * rows
                offset -= whole
    return segments


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


@functools.lru_cache(maxsize=8192)
def round_keys(seed: int, source: str, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS] from SHA-256 of (seed, epoch, source's name): adding or renaming another changes nothing."""
    text = f"tinyllama_jax order 1|{seed}|{epoch}|{source}".encode()
    digest = b"".join(hashlib.sha256(bytes([block]) + text).digest() for block in range(ROUNDS // 4))
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(index: np.ndarray, size: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Keyed bijection of range(size): int64 [N], 0 <= index < size -> int64 [N].

    keys: uint64 [ROUNDS, N] or [ROUNDS, 1].  An alternating Feistel network on Z_a x Z_b with a*b just above `size`
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); the few results outside the range are
    enciphered again until they fall inside (cycle walking).  Sizes up to 2**62.
    """
    out = np.array(index, np.int64)
    size = np.broadcast_to(np.asarray(size, np.int64), out.shape)
    keys = np.broadcast_to(keys, (len(keys), *out.shape))
    # An upper bound of the square root is enough; floats are exact to far better than 1 here.
    a = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))), 1).astype(np.uint64)
    b = (size.astype(np.uint64) + a - np.uint64(1)) // a
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _encipher(out[todo].astype(np.uint64), a[todo], b[todo], keys[:, todo]).astype(np.int64)
        todo = todo[out[todo] >= size[todo]]
    return out


def _encipher(x: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    low = x % a
    high = x // a
    for number, key in enumerate(keys):
        if number % 2:
            high = _add(high, _mix(low, key), b)
        else:
            low = _add(low, _mix(high, key), a)
    return high * a + low


def _mix(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    """32 well-mixed bits of (value, key): multiply and fold, constants of the SplitMix64 finaliser."""
    h = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0x94D049BB133111EB)
    return h >> np.uint64(32)


def _add(value: np.ndarray, bits32: np.ndarray, modulus: np.ndarray) -> np.ndarray:
    total = value + (bits32 * modulus >> np.uint64(32))
    return np.where(total >= modulus, total - modulus, total)
