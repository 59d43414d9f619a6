"""The fits that a study's rows support, chosen from the rows; a fit that fails leaves the reason in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyllama_jax.errors import UserError
from tinyllama_jax.lab.fit import chinchilla, isoflop, repeated, repetition, resample
from tinyllama_jax.lab.fit.points import Points
from tinyllama_jax.lab.fit.result import Fit
from tinyllama_jax.lab.fit.robust import Problem, minimise
from tinyllama_jax.lab.study_factors import SIZE, design
from tinyllama_jax.lab.study_rows import ONE_EPOCH, Row, Study, alike, column, compute, epochs, number, points

SAME_BUDGET = 1.08  # FLOPs within so much of a neighbour belong to one budget ...
WIDEST_BUDGET = 1.25  # ... unless a chain of neighbours reaches further than this
SIZES = 3  # of a budget that can show a parabola
DRAWS = 200
MOST_POINTS = 400  # of a surface with its resamples in ten seconds
SURFACE_POINTS = 8


@dataclass(frozen=True)
class Profiles:
    """Runs by compute budget, and the fit of their optima, or why there is none."""

    rows: list[Row]
    points: Points
    budgets: list[isoflop.Budget]
    left_out: dict[int, str]  # index of a budget -> why it has no optimum
    optima: dict[int, dict]  # index of a budget -> what the fit says
    fit: Fit | None
    failure: str
    compute_G: np.ndarray = field(default_factory=lambda: np.empty(0))  # grid of the band, FLOPs


@dataclass(frozen=True)
class Surface:
    points: Points
    fit: Fit
    held_out_N: np.ndarray  # which points belong to the largest budget
    without_N: np.ndarray  # the loss that a fit without them predicts


@dataclass(frozen=True)
class Repetition:
    """Runs of one weight decay, and the laws fitted to them: {} and a reason where they cannot be."""

    weight_decay: float
    rows: list[Row]
    points: Points
    base: dict[str, float]
    laws: dict[str, np.ndarray]  # name -> theta of the law
    found: Fit | None  # the effective law, with its profiles
    failure: str

    def loss(self, law: str, N, D, U) -> np.ndarray:
        """Nats per token by one of the laws."""
        N, D, U = np.broadcast_arrays(*(np.asarray(x, float) for x in (N, D, U)))
        at = Points.of(N.ravel(), D.ravel(), np.ones(D.size), U=U.ravel())
        return np.exp(repeated.LAWS[law](self.base).at(at)(self.laws[law][None])[0][0]).reshape(D.shape)


def one_recipe(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The runs of the most usual recipe where several were tried at the same sizes, and a sentence about the rest.

    A law is about size and data; a field that takes several values within one size and length is something else.
    """
    rows, said = list(rows), []
    for name in [n for n in design(rows) if n not in SIZE]:
        table = design(rows)
        if name not in table:
            continue
        values = table[name]
        places: dict[tuple, set] = {}
        for row, value in zip(rows, values, strict=True):
            place = (number(row, "parameters"), number(row, "tokens"), number(row, "unique_tokens"))
            places.setdefault(place, set()).add(value)
        if all(len(found) == 1 for found in places.values()):
            continue
        usual = max(dict.fromkeys(values), key=values.count)
        said.append(f"{name} = {usual}")
        rows = [row for row, value in zip(rows, values, strict=True) if value == usual]
    return rows, f"Only runs with {', '.join(said)} are fitted." if said else ""


def profiles(study: Study, draws: int = DRAWS) -> Profiles | None:
    """None where no two budgets have three sizes each."""
    rows, _ = one_recipe(study.fresh)
    if len(rows) < 2 * SIZES:
        return None
    flops = np.array([compute(row) for row in rows])
    budget, sizes = alike(flops, SAME_BUDGET), column(rows, "parameters")
    kept = []
    for k in range(budget.max() + 1):
        inside = budget == k
        distinct = alike(sizes[inside], 1.05).max() + 1
        wide = sizes[inside].max() / sizes[inside].min() >= 2
        if distinct >= SIZES and wide and flops[inside].max() / flops[inside].min() <= WIDEST_BUDGET:
            kept.append(k)
    if len(kept) < 2:
        return None
    rows = [row for row, k in zip(rows, budget, strict=True) if k in kept]
    at = points(rows)
    number_N = alike(at.C, SAME_BUDGET)
    budgets = [isoflop.Budget(at.take(number_N == k), isoflop.WINDOW) for k in range(number_N.max() + 1)]
    grid = np.geomspace(at.C.min(), 10 * at.C.max(), 25)
    found, failure = _try(lambda: isoflop.fit(at, compute=grid.tolist(), draws=draws))
    if found is None:
        left_out = {i: b.refused() or "no power law without a second optimum" for i, b in enumerate(budgets)}
        return Profiles(rows, at, budgets, left_out, {}, None, failure)
    optima = {
        i: optimum
        for i, b in enumerate(budgets)
        for optimum in found.derived["optima"]
        if math.isclose(optimum["compute"], b.compute, rel_tol=0.02)
    }
    left_out = {
        i: b.refused() or "no minimum stands out of the noise" for i, b in enumerate(budgets) if i not in optima
    }
    return Profiles(rows, at, budgets, left_out, optima, found, "", grid)


def surface(study: Study, draws: int = DRAWS) -> tuple[Surface | None, str]:
    """Chinchilla's surface, or ("" where nobody would expect one) why not."""
    rows, said = one_recipe(study.fresh)
    if len(rows) < SURFACE_POINTS:
        return None, ""
    sizes, tokens = column(rows, "parameters"), column(rows, "tokens")
    if alike(sizes, 1.05).max() < 2 or alike(tokens, 1.05).max() < 2:
        return None, ""
    at = points(rows[:MOST_POINTS])
    found, failure = _try(lambda: chinchilla.fit(at, draws=draws))
    if found is None:
        return None, failure
    held_out = resample.largest_budget(at)
    rest = at.take(~held_out)
    without = np.full(len(at), math.nan)
    law = chinchilla.Surface()
    if len(rest) > len(law.columns):
        # From the minimum of all points: one start is enough to move from there.
        begin = [math.log(found.constants[n]) if n in "ABE" else found.constants[n] for n in chinchilla.NAMES]
        refit, _ = _try(lambda: law.constants(law.minimise(rest, np.array([begin])).theta_SP[0]))
        if refit:
            without = chinchilla.loss(refit, at.N, at.D)
    return Surface(at, found, held_out, without), said


def repetitions(study: Study, draws: int = DRAWS) -> list[Repetition]:
    """One for each weight decay; none where unique tokens do not vary or nothing was repeated."""
    rows = study.repeated
    if not rows or max(map(epochs, rows)) <= ONE_EPOCH or alike(column(rows, "unique_tokens"), 1.02).max() < 1:
        return []
    decays = [_decay(row) for row in rows]
    known = sorted({d for d in decays if math.isfinite(d)})
    groups = {d: [r for r, own in zip(rows, decays, strict=True) if own == d] for d in known} or {math.nan: rows}
    groups = {d: those for d, those in groups.items() if any(epochs(row) > ONE_EPOCH for row in those)}
    return [_repetition(decay, those, study, draws) for decay, those in groups.items()]


def _repetition(decay: float, rows: list[Row], study: Study, draws: int) -> Repetition:
    rows, _ = one_recipe(rows)
    at = points(rows)
    once = [row for row in rows if epochs(row) <= ONE_EPOCH]
    if len(once) < 6 or alike(column(once, "parameters"), 1.05).max() < 2:
        why = (
            f"{len(once)} runs of one epoch do not determine the surface that repetition is measured against: at least "
            "6 runs of 3 sizes would (`tinyllama runs THIS OTHER --out both.jsonl` puts two sweeps into one table). "
            "The lines join what was measured"
        )
        return Repetition(decay, rows, at, {}, {}, None, why)
    found, failure = _try(lambda: repetition.fit(at, draws=draws))
    if found is None:
        return Repetition(decay, rows, at, {}, {}, None, failure)
    base, laws = found.derived["base"], {}
    for name, kind in repeated.LAWS.items():
        law = kind(base)
        theta, _ = _try(lambda law=law: _best(at, law))
        if theta is not None:
            laws[name] = theta
    return Repetition(decay, rows, at, base, laws, found, "")


def _best(at: Points, law) -> np.ndarray:
    found = minimise(Problem(law.at(at), np.log(at.L)), law.starts(at), law.lower_P, law.upper_P)
    return found.theta_SP[found.best]


def _decay(row: Row) -> float:
    own = number(row, "weight_decay")
    return own if math.isfinite(own) else number(row, "config.optimizer.weight_decay")


def _try(make: Callable[[], Any]) -> tuple[Any, str]:
    """(what it makes, "") or (None, why not): points that lie badly must not cost the rest of the report."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)
    except np.linalg.LinAlgError as error:
        return None, f"these points do not determine the law ({error})"
