"""Chinchilla's surface, L(N, D) = E + A/N^alpha + B/D^beta (arXiv 2203.15556), fitted as its authors meant to.

Huber loss (1e-3) of log-loss residuals, summed; starts from the best of a grid as large as theirs and from variable
projection: for given exponents the rest is linear (A, B, E by least squares), so that a grid of exponents finds the
right valley without a start for A and B.  Compute is C = 6 N D unless the points say otherwise.

At compute C = 6 N D the loss is least at  N = G (C/6)^a, D = (C/6)^b / G,  a = beta/(alpha+beta), b = 1 - a,
G = (alpha A / (beta B))^(1/(alpha+beta)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab.fit import many, resample
from tinyllama_jax.lab.fit.points import Points, check_span, repeats
from tinyllama_jax.lab.fit.profile import profile
from tinyllama_jax.lab.fit.result import Fit, residual_quality
from tinyllama_jax.lab.fit.robust import DELTA, Minima, Problem, minimise
from tinyllama_jax.lab.fit.terms import Terms

NAMES = ("A", "B", "E", "alpha", "beta")  # the first three are fitted as logarithms
LOWER, UPPER = np.array([-20.0, -20.0, -10.0, 0.01, 0.01]), np.array([60.0, 60.0, 3.0, 3.0, 3.0])
GRID = (range(0, 26, 5), range(0, 26, 5), (-1, -0.5, 0, 0.5, 1), (0.0, 0.5, 1, 1.5, 2), (0.0, 0.5, 1, 1.5, 2))
STARTS = 48  # the lowest of the grid, and as many from variable projection
EXTRAPOLATION = 30  # times the largest budget: E decides there, and it is the least known


def terms(points: Points) -> Terms:
    """ln L as a function of (ln A, ln B, ln E, alpha, beta)."""
    design_NKP = np.zeros((len(points), 3, 5))
    design_NKP[:, 0, 0], design_NKP[:, 0, 3] = 1, -np.log(points.N)
    design_NKP[:, 1, 1], design_NKP[:, 1, 4] = 1, -np.log(points.D)
    design_NKP[:, 2, 2] = 1
    return Terms(design_NKP, np.zeros((len(points), 3)))


def loss(constants: Mapping[str, float], N, D) -> np.ndarray:
    """Nats per token."""
    return (
        constants["E"]
        + constants["A"] / np.power(N, constants["alpha"])
        + constants["B"] / np.power(D, constants["beta"])
    )


def optimum(constants: Mapping[str, float], compute: float) -> dict[str, float]:
    """The N and D of least loss at `compute` = 6 N D FLOPs, and that loss."""
    alpha, beta = constants["alpha"], constants["beta"]
    a = beta / (alpha + beta)
    # Of logarithms: A and B of a resample may be beyond what their ratio can hold.
    log_g = (math.log(alpha / beta) + math.log(constants["A"]) - math.log(constants["B"])) / (alpha + beta)
    N = math.exp(log_g + a * math.log(compute / 6))
    D = compute / 6 / N
    return {"N": N, "D": D, "tokens_per_parameter": D / N, "loss": float(loss(constants, N, D))}


class Surface:
    """One way to fit it: which constants are given, whether the exponents are tied."""

    def __init__(self, *, tied: bool = False, given: Mapping[str, float] | None = None, delta: float = DELTA):
        given = dict(given or {})
        for name, value in given.items():
            if name not in NAMES:
                raise ConfigError(f"{name} is no constant of this law; they are {', '.join(NAMES)}")
            if not value > 0:
                raise ConfigError(f"{name}={value}: must be above 0")
        if tied and {"alpha", "beta"} & set(given):
            raise ConfigError("tied exponents cannot be given as well")
        self.tied, self.given, self.delta = tied, given, delta
        self._fixed = {NAMES.index(n): math.log(v) if n in NAMES[:3] else v for n, v in given.items()}
        self.columns = [p for p in range(5) if p not in self._fixed and not (tied and p == 4)]
        self.lower_P, self.upper_P = LOWER[self.columns], UPPER[self.columns]

    def law(self, points: Points) -> Terms:
        found = terms(points)
        return found.tied(3, 4) if self.tied else found.given(self._fixed)

    def starts(self, points: Points) -> np.ndarray:
        """Where the search begins: the columns of this law only."""
        grid_SP = np.array(list(itertools.product(*GRID)), float)
        objective_S = Problem(terms(points), np.log(points.L), delta=self.delta).objective(grid_SP, np.arange(0))
        grid_SP = grid_SP[np.argsort(objective_S, kind="stable")[:STARTS]]
        return np.concatenate([variable_projection(points)[:STARTS], grid_SP])[:, self.columns]

    def problem(self, points: Points, weight=None) -> Problem:
        return Problem(self.law(points), np.log(points.L), weight, self.delta)

    def minimise(self, points: Points, start_SP: np.ndarray, weight=None) -> Minima:
        return minimise(self.problem(points, weight), start_SP, self.lower_P, self.upper_P)

    def search(self, points: Points) -> tuple[Minima, float]:
        """(minima, share of the starts in the lowest)."""
        return many.search(self.problem, points, self.starts(points.some(many.MANY)), self.lower_P, self.upper_P)

    def resampled(self, points: Points, theta_P: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """theta_SP of the bootstrap."""
        return many.resampled(self.problem, points, theta_P, self.lower_P, self.upper_P, draws, seed)

    def constants(self, theta_P: np.ndarray) -> dict[str, float]:
        full = dict(zip(self.columns, theta_P, strict=True)) | self._fixed
        if self.tied:
            full[4] = full[3]
        return {name: float(math.exp(full[p]) if p < 3 else full[p]) for p, name in enumerate(NAMES)}

    def best(self, points: Points) -> np.ndarray:
        """theta of the lowest minimum."""
        found, _ = self.search(points)
        return found.theta_SP[found.best]


def variable_projection(points: Points, size: int = 32) -> np.ndarray:
    """(ln A, ln B, ln E, alpha, beta), best first: for each pair of exponents the rest by least squares of the loss."""
    exponents = np.geomspace(0.05, 2, size)
    pair_S2 = np.array(list(itertools.product(exponents, exponents)))
    by_n_SN = np.exp(-pair_S2[:, :1] * np.log(points.N / points.N.min()))
    by_d_SN = np.exp(-pair_S2[:, 1:] * np.log(points.D / points.D.min()))
    design_SNK = np.stack([by_n_SN, by_d_SN, np.ones_like(by_n_SN)], -1)
    q_SNK, r_SKK = np.linalg.qr(design_SNK)
    along_SK = np.einsum("snk,n->sk", q_SNK, points.L)
    miss_S = (points.L**2).sum() - (along_SK**2).sum(-1)
    usable = np.abs(np.diagonal(r_SKK, axis1=1, axis2=2)).min(-1) > 1e-9
    factor_SK = np.full_like(along_SK, -1.0)
    factor_SK[usable] = np.linalg.solve(r_SKK[usable], along_SK[usable][..., None])[..., 0]
    good = np.flatnonzero((factor_SK > 0).all(-1))
    good = good[np.argsort(miss_S[good], kind="stable")]
    log_SK, pair_S2 = np.log(factor_SK[good]), pair_S2[good]
    log_SK[:, 0] += pair_S2[:, 0] * math.log(points.N.min())
    log_SK[:, 1] += pair_S2[:, 1] * math.log(points.D.min())
    return np.concatenate([log_SK, pair_S2], -1)


def fit(
    points: Points,
    *,
    tied: bool = False,
    given: Mapping[str, float] | None = None,
    compute: Sequence[float] = (),
    draws: int = 1000,
    seed: int = 0,
    delta: float = DELTA,
    profiles: bool = True,
) -> Fit:
    """The constants, their bootstrap intervals, and the best N and D at each of `compute` FLOPs.

    given: constants that are held (such as {"E": 1.69}).  Points of one `group` are resampled together.
    profiles: of every constant, which takes most of the time.
    Raises DataError when the points cannot determine the law.
    """
    surface = Surface(tied=tied, given=given, delta=delta)
    warnings = check_span(points, len(surface.columns)) + repeats(points)
    found, share = surface.search(points)
    theta_P, objective = found.theta_SP[found.best], float(found.objective_S.min())
    if not found.converged_S[found.best]:
        warnings.append("the search did not end in a minimum: the constants are not determined by these points")
    constants = surface.constants(theta_P)
    warnings += [
        f"{NAMES[p]} is at its bound: these points do not determine it"
        for p, value, low, high in zip(surface.columns, theta_P, surface.lower_P, surface.upper_P, strict=True)
        if value <= low or value >= high
    ]
    budgets = sorted({float(points.C.max()), 10 * float(points.C.max()), *map(float, compute)})
    warnings += [
        f"{budget:.3g} FLOPs is {budget / points.C.max():.0f} times the largest budget: beyond {EXTRAPOLATION} times, "
        "take the interval and not the number"
        for budget in budgets
        if budget > EXTRAPOLATION * points.C.max()
    ]
    warnings += many.note(points)
    drawn_SP = surface.resampled(points, theta_P, draws, seed)
    every = [surface.constants(theta) for theta in drawn_SP]
    derived, derived_ci = _derive(constants, every, budgets)
    quality = residual_quality(loss(constants, points.N, points.D), points.L) | {
        "starts_in_this_minimum": share,
        "resamples": draws,
        "resampled": f"{len(np.unique(points.group))} groups",
        "condition_number": _condition(drawn_SP),
        "held_out": _held_out(surface, points),
    }
    problem = surface.problem(points)
    return Fit(
        law="E + A/N^alpha + B/D^beta" + (" with alpha = beta" if tied else ""),
        constants=constants,
        objective=objective,
        ci95={name: resample.interval(np.array([c[name] for c in every])) for name in NAMES} | derived_ci,
        derived=derived,
        warnings=warnings,
        quality=quality,
        data=points.span(),
        draws={name: np.array([c[name] for c in every]) for name in NAMES},
        profiles={
            NAMES[p]: profile(problem, theta_P, surface.lower_P, surface.upper_P, i, float(drawn_SP[:, i].std()))
            for i, p in enumerate(surface.columns)
            if profiles and len(points) <= many.MANY
        },
    )


def _derive(constants: dict, every: list[dict], budgets: list[float]) -> tuple[dict, dict]:
    """a, b, G and the optima, with their intervals."""

    def of(c: dict) -> dict[str, float]:
        total = c["alpha"] + c["beta"]
        log_g = (math.log(c["alpha"] / c["beta"]) + math.log(c["A"]) - math.log(c["B"])) / total
        return {"a": c["beta"] / total, "b": c["alpha"] / total, "G": math.exp(log_g)}

    own, drawn = of(constants), [of(c) for c in every]
    optima = []
    for budget in budgets:
        best, spread = optimum(constants, budget), [optimum(c, budget) for c in every]
        ci95 = {name: resample.interval(np.array([s[name] for s in spread])) for name in best}
        optima.append({"compute": budget, **best, "ci95": ci95})
    return own | {"optima": optima}, {name: resample.interval(np.array([d[name] for d in drawn])) for name in own}


def _condition(theta_SP: np.ndarray) -> float:
    """Of the correlations of the resampled constants: 1 where they vary independently."""
    moving = theta_SP.std(0) > 1e-9 * (1 + np.abs(theta_SP).max(0))
    if moving.sum() < 2:
        return 1.0
    return float(np.linalg.cond(np.corrcoef(theta_SP[:, moving], rowvar=False)))


def _held_out(surface: Surface, points: Points) -> dict | None:
    """None where too little is left without the largest budget."""

    def refit(rest: Points):
        constants = surface.constants(surface.best(rest))
        return lambda other: loss(constants, other.N, other.D)

    if (~resample.largest_budget(points)).sum() <= len(surface.columns):
        return None
    return resample.held_out(points, refit)
