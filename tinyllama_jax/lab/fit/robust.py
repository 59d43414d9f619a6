"""Minimises a sum of Huber losses over a few constants, from many starts and for many resamples at once.

    minimise over theta   sum_i  weight_i * Huber_delta( law_i(theta) - y_i ),
    Huber_delta(r) = r²/2 if |r| <= delta else delta (|r| - delta/2)

as Hoffmann et al. (arXiv 2203.15556, appendix D.3) do with log losses and delta = 1e-3.  A sum, not a mean: with the
mean and an optimiser's usual tolerances such a fit stops wherever it begins (arXiv 2404.10102).

With residuals far above delta this is nearly the sum of absolute deviations, on which quasi-Newton methods creep and
stop early.  Here every step is a damped Newton step: the Hessian by differences of the analytic gradient, damped by
J' diag(min(1, delta/|r|)) J, the curvature of the quadratic that touches the objective from above.  That matrix
changes with the units of the constants as the Hessian does, so it does not matter that they are ill scaled, and
heavily damped steps are those of iteratively reweighted least squares, which never go up.  All starts and resamples
advance together as one batch of small matrices.

Axes: S starts or resamples, N points, P constants.  Everything is float64; jax is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllama_jax.errors import DataError

Law = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # theta_SP -> prediction_SN, its derivative_SNP

DELTA = 1e-3
GRADIENT_STEP = 1e-6  # of the differences that make the Hessian: small beside delta / |derivative|
LONGEST = 3.0  # step in any constant: a factor of 20 in one that is kept as its logarithm
HEAVIEST_DAMPING = 1e12
FLAT = 1e-10  # of the objective, still to be gained: converged


@dataclass(frozen=True)
class Minima:
    """Where each start has ended."""

    theta_SP: np.ndarray
    objective_S: np.ndarray  # sum, not mean
    converged_S: np.ndarray  # whether it stands in a minimum, perhaps a local one

    @property
    def best(self) -> int:
        return int(np.argmin(self.objective_S))


@dataclass(frozen=True)
class Problem:
    """A law, what was measured (y_N), and the weight of each point: weight_N, or weight_SN with one row per start."""

    law: Law
    y_N: np.ndarray
    weight: np.ndarray | None = None
    delta: float = DELTA

    def weights(self, rows: np.ndarray) -> np.ndarray | float:
        if self.weight is None:
            return 1.0
        return self.weight if self.weight.ndim == 1 else self.weight[rows]

    def objective(self, theta_SP: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._objective(self.law(theta_SP)[0] - self.y_N, rows)

    def gradient(self, theta_SP: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._gradient(*self._residuals(theta_SP), rows)

    def everything(self, theta_SP: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(objective_S, gradient_SP, majoriser_SPP)."""
        r_SN, jac_SNP = self._residuals(theta_SP)
        touching_SN = self.weights(rows) * np.minimum(1.0, self.delta / np.maximum(np.abs(r_SN), self.delta))
        majoriser_SPP = np.swapaxes(touching_SN[..., None] * jac_SNP, 1, 2) @ jac_SNP
        return self._objective(r_SN, rows), self._gradient(r_SN, jac_SNP, rows), majoriser_SPP

    def _residuals(self, theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prediction_SN, jac_SNP = self.law(theta_SP)
        return prediction_SN - self.y_N, jac_SNP

    def _objective(self, r_SN: np.ndarray, rows: np.ndarray) -> np.ndarray:
        size_SN = np.abs(r_SN)
        huber_SN = np.where(size_SN <= self.delta, 0.5 * r_SN**2, self.delta * (size_SN - 0.5 * self.delta))
        return (self.weights(rows) * huber_SN).sum(-1)

    def _gradient(self, r_SN: np.ndarray, jac_SNP: np.ndarray, rows: np.ndarray) -> np.ndarray:
        pull_SN = self.weights(rows) * np.clip(r_SN, -self.delta, self.delta)
        return (pull_SN[:, None, :] @ jac_SNP)[:, 0]


def minimise(
    problem: Problem,
    start_SP: np.ndarray,
    lower,
    upper,
    *,
    longest: float = LONGEST,
    max_steps: int = 300,
    enough: float = 0.0,
) -> Minima:
    """The minimum below every start, within lower <= theta <= upper (P, or SP with bounds for each start).

    Equal bounds hold a constant fixed.  With short steps (`longest`) a start ends in its own valley; Newton's longer
    ones may cross into another.  A start stops where a step promises no more than `enough` of its objective.
    """
    theta_SP = np.array(start_SP, float)
    lower_SP, upper_SP = (np.broadcast_to(np.asarray(b, float), theta_SP.shape) for b in (lower, upper))
    theta_SP = np.clip(theta_SP, lower_SP, upper_SP)
    n_starts = len(theta_SP)
    objective_S = problem.objective(theta_SP, np.arange(n_starts))
    damping_S, converged_S = np.ones(n_starts), np.zeros(n_starts, bool)
    moving = np.flatnonzero(np.isfinite(objective_S))
    for _ in range(max_steps):
        if not moving.size:
            break
        here_SP, damping = theta_SP[moving], damping_S[moving]
        objective, gradient_SP, majoriser_SPP = problem.everything(here_SP, moving)
        low_SP, high_SP = lower_SP[moving], upper_SP[moving]
        outward_SP = ((here_SP <= low_SP) & (gradient_SP > 0)) | ((here_SP >= high_SP) & (gradient_SP < 0))
        gradient_SP = np.where(outward_SP, 0.0, gradient_SP)
        majoriser_SPP = _held(majoriser_SPP, outward_SP)
        hessian_SPP = _held(_hessian(problem, here_SP, moving), outward_SP)
        step_SP = -_solve(hessian_SPP + damping[:, None, None] * majoriser_SPP, gradient_SP)
        step_SP *= np.minimum(1.0, longest / np.maximum(np.abs(step_SP).max(-1, keepdims=True), 1e-300))
        there_SP = np.clip(here_SP + step_SP, low_SP, high_SP)
        after = problem.objective(there_SP, moving)
        better = (gradient_SP * (there_SP - here_SP)).sum(-1) <= 0
        better &= after < objective
        # What a step of reweighted least squares would gain; it does not depend on the units of the constants.
        to_gain = (gradient_SP * _solve(majoriser_SPP, gradient_SP)).sum(-1)
        theta_SP[moving[better]] = there_SP[better]
        objective_S[moving] = np.where(better, after, objective)
        damping_S[moving] = np.where(better, np.maximum(damping / 5, 1e-12), damping * 4)
        ended = (damping_S[moving] > HEAVIEST_DAMPING) | (to_gain <= 1e-28 + enough * objective)
        ended |= better & (np.abs(there_SP - here_SP) <= 1e-12 * (1 + np.abs(here_SP))).all(-1)
        converged_S[moving] = to_gain <= FLAT * objective + 1e-24
        moving = moving[~ended]
    return Minima(theta_SP, objective_S, converged_S)


def _hessian(problem: Problem, theta_SP: np.ndarray, rows: np.ndarray) -> np.ndarray:
    columns = []
    for p in range(theta_SP.shape[1]):
        h_P = np.zeros(theta_SP.shape[1])
        h_P[p] = GRADIENT_STEP
        columns.append(problem.gradient(theta_SP + h_P, rows) - problem.gradient(theta_SP - h_P, rows))
    hessian_SPP = np.stack(columns, -1) / (2 * GRADIENT_STEP)
    return 0.5 * (hessian_SPP + np.swapaxes(hessian_SPP, 1, 2))


def _held(matrix_SPP: np.ndarray, outward_SP: np.ndarray) -> np.ndarray:
    """Without what would move a constant out of its bounds."""
    free_SP = ~outward_SP
    eye_PP = np.eye(matrix_SPP.shape[-1])
    return np.where(free_SP[:, :, None] & free_SP[:, None, :], matrix_SPP, eye_PP)


def _solve(matrix_SPP: np.ndarray, vector_SP: np.ndarray) -> np.ndarray:
    """matrix⁻¹ vector; scaled to a unit diagonal first, with a touch on it where a constant moves nothing."""
    scale_SP = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(matrix_SPP, axis1=1, axis2=2)), 1e-200))
    scaled_SPP = matrix_SPP * scale_SP[:, :, None] * scale_SP[:, None, :]
    right_SP1 = (scale_SP * vector_SP)[..., None]
    for touch in (1e-15, 1e-10, 1e-5):
        try:
            return scale_SP * np.linalg.solve(scaled_SPP + touch * np.eye(matrix_SPP.shape[-1]), right_SP1)[..., 0]
        except np.linalg.LinAlgError:  # two constants move the same
            continue
    raise DataError("these rows leave constants of the law wholly undetermined; add runs of other sizes and lengths")
