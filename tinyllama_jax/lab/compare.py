"""Is one setting better than another?  Means over seeds, their standard errors, and the p-value of a difference.

Runs of one seed share their batches and their first weights, so their noise is shared too: where two settings have
seeds in common, the differences seed by seed are tested (paired t-test).  Otherwise the two means are compared with
Welch's test, which lets the variances differ.  One run for each setting says nothing about noise, and no number here
pretends that it does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

NO_CLAIM = "one seed: no standard error, no claim"


@dataclass(frozen=True)
class Mean:
    """A mean over n runs; `se` is its standard error, NaN for one run."""

    value: float
    se: float
    n: int


@dataclass(frozen=True)
class Difference:
    """second - first.  `se` and `p` (two-sided) are NaN where there is nothing to estimate them from."""

    value: float
    se: float
    p: float
    n: int  # pairs, or runs of the smaller side
    method: str  # "paired", "Welch" or "none"
    note: str = ""


def mean(values: Iterable[float]) -> Mean:
    """The mean and its standard error, sd/sqrt(n) with n - 1 degrees of freedom.  ValueError for no values."""
    found = np.asarray(list(values), float)
    if not len(found):
        raise ValueError("the mean of no values")
    se = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
    return Mean(float(found.mean()), se, len(found))


def difference(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Difference:
    """What `second` has more than `first`; both map a seed to a loss.

    Paired over the seeds that both have, if these are two or more, and then the value is the mean over those pairs;
    Welch's test where each side has two runs or more; otherwise the bare difference, with a note.
    """
    shared = [seed for seed in first if seed in second and seed is not None]
    if len(shared) > 1:
        gaps = np.array([second[seed] - first[seed] for seed in shared])
        se = float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
        return _tested(float(gaps.mean()), se, len(gaps) - 1, len(gaps), "paired")
    a, b = mean(first.values()), mean(second.values())
    gap = b.value - a.value
    if min(a.n, b.n) < 2:
        return Difference(gap, math.nan, math.nan, min(a.n, b.n), "none", NO_CLAIM)
    se = math.hypot(a.se, b.se)
    # Welch and Satterthwaite's degrees of freedom
    freedom = se**4 / (a.se**4 / (a.n - 1) + b.se**4 / (b.n - 1)) if se > 0 else 1.0
    return _tested(gap, se, freedom, min(a.n, b.n), "Welch")


def two_sided(t: float, freedom: float) -> float:
    """How often Student's t is at least so far from 0 by chance."""
    from scipy.special import stdtr  # slow to import

    return float(2 * stdtr(freedom, -abs(t)))


def _tested(gap: float, se: float, freedom: float, n: int, method: str) -> Difference:
    # Equal numbers leave rounding behind, not noise.
    if not se > 1e-12 * max(abs(gap), 1e-300) or se == 0:
        return Difference(gap, 0.0, math.nan, n, method, "the same in every run: no noise to test against")
    return Difference(gap, se, two_sided(gap / se, freedom), n, method)
