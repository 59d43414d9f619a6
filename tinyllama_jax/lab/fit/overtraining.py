"""Loss in compute and tokens per parameter, and error from loss, after Gadre et al. (arXiv 2403.08540).

    L(C, M) = E + (a M^eta + b M^-eta) C^-eta,     M = D/N, C = 6 N² M
    Err(L)  = epsilon - k exp(-gamma L)

The first is Chinchilla's surface with equal exponents 2 eta, written so that at any fixed M the loss is one power law
in compute with the same exponent: runs far from the compute-optimal M predict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tinyllama_jax.errors import DataError
from tinyllama_jax.lab.fit import many, resample
from tinyllama_jax.lab.fit.points import Points, check_span
from tinyllama_jax.lab.fit.result import Fit, residual_quality
from tinyllama_jax.lab.fit.robust import DELTA, Minima, Problem
from tinyllama_jax.lab.fit.terms import Terms

NAMES = ("a", "b", "E", "eta")  # the first three are fitted as logarithms
LOWER, UPPER = np.array([-20.0, -20.0, -10.0, 0.005]), np.array([60.0, 60.0, 3.0, 1.5])


def terms(points: Points) -> Terms:
    log_c, log_m = np.log(points.C), np.log(points.D / points.N)
    design_NKP = np.zeros((len(points), 3, 4))
    design_NKP[:, 0, 0], design_NKP[:, 0, 3] = 1, log_m - log_c
    design_NKP[:, 1, 1], design_NKP[:, 1, 3] = 1, -log_m - log_c
    design_NKP[:, 2, 2] = 1
    return Terms(design_NKP, np.zeros((len(points), 3)))


def loss(constants: Mapping[str, float], C, M) -> np.ndarray:
    """Nats per token at C FLOPs and M tokens per parameter."""
    eta = constants["eta"]
    return constants["E"] + (constants["a"] * np.power(M, eta) + constants["b"] * np.power(M, -eta)) * np.power(C, -eta)


def _starts(points: Points) -> np.ndarray:
    """For a grid of exponents the rest by least squares of the loss."""
    found = []
    for eta in np.geomspace(0.02, 1, 40):
        M = points.D / points.N
        scale = points.C.min() ** -eta
        columns = [M**eta * points.C**-eta / scale, M**-eta * points.C**-eta / scale, np.ones(len(points))]
        a, b, e = np.linalg.lstsq(np.stack(columns, 1), points.L, rcond=None)[0]
        if min(a, b, e) > 0:
            found.append([math.log(a) - math.log(scale), math.log(b) - math.log(scale), math.log(e), eta])
    guesses = [[math.log(150), math.log(150), 0.5, eta] for eta in (0.05, 0.1, 0.2, 0.4)]
    return np.array(found + guesses)


def _problem_of(delta: float) -> many.ProblemOf:
    return lambda points, weight=None: Problem(terms(points), np.log(points.L), weight, delta)


def _best(points: Points, delta: float) -> Minima:
    return many.search(_problem_of(delta), points, _starts(points.some(many.MANY)), LOWER, UPPER)[0]


def _constants(theta_P: np.ndarray) -> dict[str, float]:
    return {name: float(math.exp(theta_P[p]) if p < 3 else theta_P[p]) for p, name in enumerate(NAMES)}


def fit(points: Points, *, draws: int = 1000, seed: int = 0, delta: float = DELTA) -> Fit:
    """E, a, b, eta with bootstrap intervals.  Raises DataError when the points cannot determine them."""
    warnings = check_span(points, len(NAMES))
    M = points.D / points.N
    if M.max() / M.min() < 4:
        warnings.append(
            f"tokens per parameter span a factor of {M.max() / M.min():.1f} only: a and b cannot be told apart"
        )
    found = _best(points, delta)
    theta_P = found.theta_SP[found.best]
    if not found.converged_S[found.best]:
        warnings.append("the search did not end in a minimum: the constants are not determined by these points")
    warnings += many.note(points)
    every = [_constants(t) for t in many.resampled(_problem_of(delta), points, theta_P, LOWER, UPPER, draws, seed)]
    constants = _constants(theta_P)

    def refit(rest: Points):
        again = _best(rest, delta)
        return lambda other: loss(_constants(again.theta_SP[again.best]), other.C, other.D / other.N)

    enough = (~resample.largest_budget(points)).sum() > len(NAMES)
    return Fit(
        law="E + (a M^eta + b M^-eta) C^-eta",
        constants=constants,
        objective=float(found.objective_S[found.best]),
        ci95={name: resample.interval(np.array([c[name] for c in every])) for name in NAMES}
        | {"M_optimal": resample.interval(np.array([_best_ratio(c) for c in every]))},
        derived={"M_optimal": _best_ratio(constants)},
        warnings=warnings,
        quality=residual_quality(loss(constants, points.C, M), points.L)
        | {"resamples": draws, "held_out": resample.held_out(points, refit) if enough else None},
        data=points.span(),
        draws={name: np.array([c[name] for c in every]) for name in NAMES},
    )


def _best_ratio(constants: Mapping[str, float]) -> float:
    """Tokens per parameter of least loss, the same at every budget."""
    log = (math.log(constants["b"]) - math.log(constants["a"])) * 0.5 / constants["eta"]
    return math.exp(min(log, 700.0))


def error(constants: Mapping[str, float], L) -> np.ndarray:
    return constants["epsilon"] - constants["k"] * np.exp(-constants["gamma"] * np.asarray(L, float))


def fit_downstream(L: np.ndarray, err: np.ndarray, *, draws: int = 1000, seed: int = 0) -> Fit:
    """epsilon, k, gamma by least squares of the error; for a given gamma the other two are linear.

    Averages over tasks behave like this, single tasks often do not.  DataError for fewer than four points.
    """
    L, err = np.asarray(L, float), np.asarray(err, float)
    if len(L) < 4:
        raise DataError(f"{len(L)} points cannot determine three constants of error against loss: 4 could")
    constants = _exponential(L, err)
    rng, every = np.random.default_rng(seed), []
    while len(every) < draws:
        rows = rng.integers(0, len(L), len(L))
        if len(np.unique(L[rows])) >= 3:
            every.append(_exponential(L[rows], err[rows]))
    warnings = []
    if constants["gamma"] <= GAMMAS[0] * 1.001 or constants["gamma"] >= GAMMAS[-1] * 0.999:
        warnings.append("gamma is at its bound: these points do not bend enough to determine it")
    if L.max() - L.min() < 0.3:
        warnings.append(f"losses span {L.max() - L.min():.2f} nats only")
    predicted = error(constants, L)
    around = ((err - err.mean()) ** 2).sum()
    return Fit(
        law="epsilon - k exp(-gamma L)",
        constants=constants,
        objective=float(((predicted - err) ** 2).sum()),
        ci95={name: resample.interval(np.array([c[name] for c in every])) for name in constants},
        derived={},
        warnings=warnings,
        quality={
            "points": len(L),
            "r2": float(1 - ((predicted - err) ** 2).sum() / around) if around > 0 else math.nan,
            "resamples": draws,
        },
        data={"points": len(L), "loss": [float(L.min()), float(L.max())]},
        draws={name: np.array([c[name] for c in every]) for name in constants},
    )


GAMMAS = np.geomspace(0.01, 20, 60)


def _exponential(L: np.ndarray, err: np.ndarray) -> dict[str, float]:
    from scipy.optimize import minimize_scalar  # slow to import, and `fit` needs none of it

    def solved(gamma: float) -> tuple[float, np.ndarray]:
        design = np.stack([np.ones_like(L), -np.exp(-gamma * (L - L.min()))], 1)
        factors = np.linalg.lstsq(design, err, rcond=None)[0]
        return float(((design @ factors - err) ** 2).sum()), factors

    k = int(np.argmin([solved(gamma)[0] for gamma in GAMMAS]))
    low, high = GAMMAS[max(k - 1, 0)], GAMMAS[min(k + 1, len(GAMMAS) - 1)]
    gamma = float(
        minimize_scalar(lambda g: solved(g)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
    )
    epsilon, k_scaled = solved(gamma)[1]
    return {"epsilon": float(epsilon), "k": float(k_scaled * math.exp(gamma * L.min())), "gamma": gamma}
