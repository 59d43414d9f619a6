"""Uncertainty by resampling: weights of a bootstrap, its percentile intervals, and the run that is left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyllama_jax.lab.fit.points import Points, clusters


def weights(group_N: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, N): how often each point is drawn when whole groups are drawn with replacement.

    Points of one training trunk or one model share their noise, so that drawing rows would count it too often; where
    every point is a group of its own this is the ordinary bootstrap.
    """
    names, member_N = np.unique(group_N, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return drawn[:, member_N].astype(float)


def interval(values_S: np.ndarray, level: float = 0.95) -> list[float]:
    """The percentile interval; infinite ends where so many draws have none."""
    edges = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return [float(edges[0]), float(edges[1])]


def largest_budget(points: Points) -> np.ndarray:
    """Whether a point belongs to the largest compute budget; where budgets are not grouped, to the top tenth."""
    number_N = clusters(points.C)
    last_N = number_N == number_N.max()
    if last_N.sum() < 3 or last_N.sum() > len(points) / 2:
        last_N = points.C >= np.quantile(points.C, 0.9)
    return last_N


def held_out(points: Points, fit: Callable[[Points], Callable[[Points], np.ndarray]]) -> dict:
    """How far a fit without the largest budget misses it: relative errors of the loss.

    fit: returns what predicts the loss of other points.
    """
    last_N = largest_budget(points)
    rest = points.take(~last_N)
    error = fit(rest)(points.take(last_N)) / points.L[last_N] - 1
    return {
        "points": int(last_N.sum()),
        "compute_ratio": float(points.C[last_N].max() / rest.C.max()),
        "mean_relative_error": float(np.abs(error).mean()),
        "largest_relative_error": float(np.abs(error).max()),
        "bias": float(error.mean()),
    }
