"""The search and the resamples of a fit, also of tables with a hundred thousand rows.

Up to MANY points everything is done with all of them.  Beyond, the search begins with a sample and ends with all, and
the resamples are those of a sample, their spread reduced by sqrt(sample / all) (an m-out-of-n bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyllama_jax.lab.fit import resample
from tinyllama_jax.lab.fit.points import Points
from tinyllama_jax.lab.fit.robust import FLAT, Minima, Problem, minimise

MANY = 2000
BLOCK = 1_000_000  # points times resamples in memory at a time
ENOUGH = 1e-8  # of the objective, still to be gained by a resample or a start that is only looked at
STEPS = 80  # of such a start
SAME = 1e-4  # objectives that differ by less, relatively, are those of one minimum
POLISHED = 8  # minima from which the search goes on, to the last digit

ProblemOf = Callable[..., Problem]  # points, weight -> the problem


def search(
    problem_of: ProblemOf, points: Points, start_SP: np.ndarray, lower_P, upper_P, every: bool = False
) -> tuple[Minima, float]:
    """(the lowest minima, or one for every start; what share of the starts ended in the lowest)."""
    if every and len(points) <= MANY:
        found = minimise(problem_of(points), start_SP, lower_P, upper_P)
        return found, float((found.objective_S <= found.objective_S.min() * (1 + SAME) + 1e-18).mean())
    found = minimise(problem_of(points.some(MANY)), start_SP, lower_P, upper_P, enough=ENOUGH, max_steps=STEPS)
    least = float(found.objective_S.min())
    share = float((found.objective_S <= least * (1 + SAME) + 1e-18).mean())
    best_SP = found.theta_SP[np.argsort(found.objective_S, kind="stable")[:POLISHED]]
    if len(points) <= MANY:
        return minimise(problem_of(points), best_SP, lower_P, upper_P), share
    return minimise(problem_of(points), best_SP[:2], lower_P, upper_P, enough=0.5 * FLAT, max_steps=STEPS), share


def resampled(
    problem_of: ProblemOf, points: Points, theta_P: np.ndarray, lower_P, upper_P, draws: int, seed: int
) -> np.ndarray:
    """theta_SP of so many resamples of whole groups, each refitted from theta."""
    some, centre_P, shrink = points.some(MANY), theta_P, 1.0
    if len(some) < len(points):
        shrink = np.sqrt(len(np.unique(some.group)) / len(np.unique(points.group)))
        centre_P = minimise(problem_of(some), theta_P[None], lower_P, upper_P).theta_SP[0]
    weight_SN = resample.weights(some.group, draws, seed)
    each = max(1, BLOCK // len(some))
    blocks = []
    for first in range(0, draws, each):
        block_SN = weight_SN[first : first + each]
        start_SP = np.tile(centre_P, (len(block_SN), 1))
        found = minimise(problem_of(some, block_SN), start_SP, lower_P, upper_P, enough=ENOUGH)
        blocks.append(found.theta_SP)
    return np.clip(theta_P + shrink * (np.concatenate(blocks) - centre_P), lower_P, upper_P)


def note(points: Points) -> list[str]:
    """What to say of a large table."""
    if len(points) <= MANY:
        return []
    return [f"{len(points)} points: intervals are from resamples of {MANY} of them, scaled; there are no profiles"]
