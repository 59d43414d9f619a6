"""How much repeated data is worth: the laws of repeated.py fitted to runs of several epochs, and compared.

Two stages, as Muennighoff et al. did it: Chinchilla's surface first, from the runs of one epoch (exponents tied) or
given; then, with it held, the constants of repetition from all runs.  Of two such surfaces (`_surfaces`) the one that
leaves the law the lower objective is held.  Several minima are usual: the lowest is taken
and the others are listed.  A `start` searches its own valley in short steps instead, to look at one of them.

The laws are compared by what they predict when the runs with most epochs, and those of the largest budget, are left
out.  A constant whose profile stays level up to its bounds is called unidentified, with the range in the warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.fit import chinchilla, many, repeated, resample
from tinyllama_jax.lab.fit.points import Points
from tinyllama_jax.lab.fit.profile import CHI2_95, profile
from tinyllama_jax.lab.fit.result import Fit, residual_quality
from tinyllama_jax.lab.fit.robust import DELTA, Minima, Problem, minimise

ONE_EPOCH = 1.01  # epochs up to which a run counts as one that repeats nothing
SHORT = 0.05  # steps from a given start, so that it ends in the valley where it began
FAR_OFF = 0.05  # of the loss: more than repetition itself may cost
EPOCHS = (1, 2, 4, 8, 16, 32, 64)


def fit(
    points: Points,
    *,
    law: str = "effective",
    base: Mapping[str, float] | None = None,
    start: Mapping[str, float] | None = None,
    draws: int = 1000,
    seed: int = 0,
    delta: float = DELTA,
) -> Fit:
    """The constants of repetition, with their profile and the comparison of all three laws.

    base: Chinchilla's A, B, E, alpha and beta; fitted to the runs of one epoch where it is not given.
    start: where the search begins, in the law's own constants; from many places otherwise.
    Raises DataError when there are too few runs of one epoch or of several, ConfigError for an unknown law or constant.
    """
    if law not in repeated.LAWS:
        raise ConfigError(f"law {law!r}: not one of {', '.join(repeated.LAWS)}")
    _, repeats = repeated.unique(points)
    if (repeats + 1 > ONE_EPOCH).sum() < 4:
        raise DataError(f"{int((repeats + 1 > ONE_EPOCH).sum())} runs of several epochs; at least 4 must be there")
    warnings = list(points.notes)
    tried = []
    for surface, about in [(dict(base), "given")] if base else _surfaces(points, delta):
        chosen = repeated.LAWS[law](surface)
        found = _search(_problem_of(chosen, delta), chosen, points, start, every=True)
        tried.append((float(found.objective_S[found.best]), chosen, found, about))
    _, chosen, found, about = min(tried, key=lambda each: each[0])
    base, problem_of = dict(chosen.base), _problem_of(chosen, delta)
    problem = problem_of(points)
    if not found.converged_S[found.best]:
        warnings.append("the search did not end in a minimum")
    theta_P = found.theta_SP[found.best]
    warnings += many.note(points)
    drawn_SP = many.resampled(problem_of, points, theta_P, chosen.lower_P, chosen.upper_P, draws, seed)
    profiles = {
        name: profile(problem, theta_P, chosen.lower_P, chosen.upper_P, p, _width(drawn_SP[:, p]))
        for p, name in enumerate(chosen.names)
        if len(points) <= many.MANY
    }
    warnings += _unidentified(chosen, profiles, theta_P)
    predicted = np.exp(problem.law(theta_P[None])[0][0])
    warnings += _missed_once(np.abs(predicted / points.L - 1)[repeats + 1 <= ONE_EPOCH])
    constants = _natural(chosen, theta_P)
    draws_of = {name: _natural_column(chosen, p, drawn_SP[:, p]) for p, name in enumerate(chosen.names)}
    derived: dict[str, object] = {"base": base, "base_from": about}
    if law == "effective":
        derived["effective_epochs"] = {str(e): float(repeated.effective_epochs(e, constants["R_D"])) for e in EPOCHS}
    return Fit(
        law=law,
        constants=constants,
        objective=float(found.objective_S[found.best]),
        ci95={name: resample.interval(values) for name, values in draws_of.items()},
        derived=derived,
        warnings=warnings,
        quality=residual_quality(predicted, points.L)
        | {"resamples": draws, "minima": _minima(chosen, found), "compared": compare(points, base, delta)},
        data=points.span(),
        draws=draws_of,
        profiles=profiles,
    )


def compare(points: Points, base: Mapping[str, float], delta: float = DELTA) -> dict[str, dict]:
    """Of every law: its objective, R², constants fitted, and its error where it was not fitted.

    `most_epochs` leaves out the tenth of the runs with most epochs, `largest_budget` those of the most compute.
    """
    epochs = points.D / np.minimum(points.D, points.U)
    left_out = {
        "most_epochs": epochs >= np.quantile(epochs, 0.9),
        "largest_budget": resample.largest_budget(points),
    }
    table: dict[str, dict] = {}
    for name, kind in repeated.LAWS.items():
        law = kind(base)

        def best(some: Points, law=law) -> tuple[np.ndarray, float]:
            found = _search(_problem_of(law, delta), law, some, None)
            return found.theta_SP[found.best], float(found.objective_S[found.best])

        theta_P, objective = best(points)
        row: dict[str, object] = {"objective": objective, "constants": len(law.names)}
        row["r2"] = residual_quality(np.exp(law.at(points)(theta_P[None])[0][0]), points.L)["r2"]
        for what, last_N in left_out.items():
            if last_N.all() or (~last_N).sum() <= len(law.names):
                continue
            theta_P, _ = best(points.take(~last_N))
            other = points.take(last_N)
            error = np.exp(law.at(other)(theta_P[None])[0][0]) / other.L - 1
            row[what] = {"points": len(other), "mean_relative_error": float(np.abs(error).mean())}
        table[name] = row
    return table


def _surfaces(points: Points, delta: float) -> list[tuple[dict[str, float], str]]:
    """Chinchilla's surface, exponents tied, from the runs that repeat nothing, in two ways; with what it rests on.

    From those without more parameters than their tokens deserve, left out again and again until the surface and the
    choice agree: the law says that such parameters are worth less, so that they do not lie on the surface.  And from
    all of them: a surface that rests on long runs alone may be far off where the unique tokens are few.
    """
    _, repeats = repeated.unique(points)
    once = points.take(repeats + 1 <= ONE_EPOCH)
    surface = chinchilla.Surface(tied=True, delta=delta)
    needed = len(surface.columns) + 1
    if len(once) < needed:
        raise DataError(
            f"{len(once)} runs of one epoch cannot determine the surface that repetition is measured against; {needed} "
            "could, or give its constants (--given A=... B=... E=... alpha=... beta=...)"
        )
    every = surface.constants(surface.best(once))
    chosen, base = np.ones(len(once), bool), every
    for _ in range(10):
        again = once.N <= repeated.optimal_parameters(base, once.U) * (1 + 1e-6)
        if again.sum() < needed or (again == chosen).all():
            break
        chosen = again
        base = surface.constants(surface.best(once.take(chosen)))
    some = (base, f"{chosen.sum()} runs of one epoch, with no more parameters than their tokens deserve")
    return [some] if chosen.all() else [some, (every, f"all {len(once)} runs of one epoch")]


def _missed_once(off: np.ndarray) -> list[str]:
    """A warning when the law does not even hold for runs that repeat nothing; off: their relative errors."""
    if not (off > FAR_OFF).any():
        return []
    return [
        f"{(off > FAR_OFF).sum()} of {len(off)} runs of one epoch are missed by up to {off.max():.0%} of their loss: "
        "the surface does not hold where repetition is measured against it"
    ]


def _problem_of(law, delta: float) -> many.ProblemOf:
    return lambda points, weight=None: Problem(law.at(points), np.log(points.L), weight, delta)


def _search(
    problem_of: many.ProblemOf, law, points: Points, start: Mapping[str, float] | None, every: bool = False
) -> Minima:
    if start is None:
        start_SP = law.starts(points.some(many.MANY))
        return many.search(problem_of, points, start_SP, law.lower_P, law.upper_P, every)[0]
    if set(start) != set(law.names):
        raise ConfigError(f"the start names {', '.join(start) or 'nothing'}; the constants are {', '.join(law.names)}")
    theta_P = [math.log(start[n]) if p in law.logarithms else start[n] for p, n in enumerate(law.names)]
    return minimise(problem_of(points), np.array([theta_P]), law.lower_P, law.upper_P, longest=SHORT, max_steps=3000)


def _natural(law, theta_P: Sequence[float]) -> dict[str, float]:
    return {name: float(_natural_column(law, p, theta_P[p])) for p, name in enumerate(law.names)}


def _natural_column(law, p: int, value):
    return np.exp(value) if p in law.logarithms else value


def _width(theta_S: np.ndarray) -> float:
    """A robust standard error: some resamples may have run away."""
    low, high = np.quantile(theta_S, [0.16, 0.84])
    return max(float(high - low) / 2, 1e-3)


def _minima(law, found: Minima, most: int = 6) -> list[dict]:
    """The distinct minima, lowest first."""
    distinct: list[tuple[float, np.ndarray]] = []
    for i in np.argsort(found.objective_S, kind="stable"):
        theta_P = found.theta_SP[i]
        if found.converged_S[i] and all(np.abs(theta_P - t).max() > 1e-3 for _, t in distinct):
            distinct.append((float(found.objective_S[i]), theta_P))
    return [{"objective": objective, **_natural(law, theta_P)} for objective, theta_P in distinct[:most]]


def _unidentified(law, profiles: dict[str, dict], theta_P: np.ndarray) -> list[str]:
    """A warning for each constant that the runs do not determine."""
    warnings = []
    for p, name in enumerate(law.names):
        if name not in profiles:
            continue
        low, high = profiles[name]["interval"]
        scale = (lambda x: float(np.exp(x))) if p in law.logarithms else float
        ends = [scale(x) if x is not None else None for x in (low, high)]
        wide = p in law.logarithms and None not in (low, high) and high - low > math.log(10)
        if None in ends or wide:
            said = f"{ends[0]:.3g}" if ends[0] is not None else "its lower bound"
            said += f" to {ends[1]:.3g}" if ends[1] is not None else " to its upper bound"
            warnings.append(
                f"{name} is not identified by these runs: from {said} the fit is as good (profile likelihood, 95 %, "
                f"threshold {CHI2_95 / 2:.2f} in log likelihood); do not use {scale(theta_P[p]):.4g} as a constant"
            )
    return warnings
