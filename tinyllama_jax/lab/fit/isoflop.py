"""IsoFLOP profiles: at each compute budget the model size of least loss, and its power law in compute.

Per budget, within a window around the lowest point, a parabola through the loss over ln N has a vertex (arXiv
2203.15556, approach 2), and an Akima spline through ln loss has a minimum (arXiv 2406.19146).  A window that is too
wide, or a grid that is not centred, biases the exponent; so the window is stated, and a budget whose lowest point is at
the edge is dropped.

The uncertainty is that of noise in the losses (`noise`, a standard deviation of log loss; else the spread around the
parabolas): every loss is drawn again, every optimum found again.  An optimum that is lost in some draws counts for
less; none counts as better known than a third of the distance between two sizes.  The exponents are from weighted
least squares of ln N* and ln D* on ln C, and their intervals are percentiles over the draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.fit.points import Points, clusters, repeats
from tinyllama_jax.lab.fit.resample import interval
from tinyllama_jax.lab.fit.result import Fit

WINDOW = 4.0  # sizes within this factor of the lowest point, on both sides
SIZES = 5  # in a window, at least
METHODS = ("quadratic", "akima")
FINE = 400  # points of the spline that are looked at


class Budget:
    """The runs of one compute budget, in the order of their sizes; several of one size (seeds) are averaged."""

    def __init__(self, points: Points, window: float):
        self.compute = float(np.exp(np.log(points.C).mean()))
        self.points = points
        sizes, member = np.unique(points.N, return_inverse=True)
        mean = np.bincount(member, np.log(points.L)) / np.bincount(member)
        self.log_n, self.log_loss, self.runs = np.log(sizes), mean, np.bincount(member)
        self.lowest = int(np.argmin(mean))
        near = np.abs(self.log_n - self.log_n[self.lowest]) <= math.log(window) + 1e-9
        self.inside = np.flatnonzero(near)

    @property
    def centre(self) -> float:
        return float(self.log_n[self.inside].mean())

    def parabola(self) -> np.ndarray:
        """(3, sizes): coefficients of 1, x, x² from losses, x = ln N less the centre; a size counts by its runs."""
        x, share = self.log_n[self.inside] - self.centre, np.sqrt(self.runs[self.inside])
        return np.linalg.pinv(np.stack([np.ones_like(x), x, x * x], 1) * share[:, None]) * share

    def vertex(self) -> np.ndarray:
        """The coefficients for the measured losses."""
        return self.parabola() @ np.exp(self.log_loss[self.inside])

    def spread(self) -> float:
        """Standard deviation of log loss around the parabola; NaN when the sizes leave nothing over."""
        x = self.log_n[self.inside] - self.centre
        if len(x) <= 3:
            return math.nan
        c = self.vertex()
        off = np.log(c[0] + c[1] * x + c[2] * x * x) - self.log_loss[self.inside]
        return float(np.sqrt((self.runs[self.inside] * off**2).sum() / (len(x) - 3)))

    def refused(self) -> str:
        """Why it has no optimum; empty if it has."""
        if len(self.inside) < SIZES:
            return f"{len(self.inside)} sizes in the window, and {SIZES} are needed"
        if self.lowest in (0, len(self.log_n) - 1):
            return "its lowest loss is at the edge of the grid"
        return ""

    def optima(self, log_loss_RN: np.ndarray, method: str) -> np.ndarray:
        """ln N* for each row of log losses (of the sizes inside); NaN where it has none within them."""
        low, high = self.log_n[self.inside[0]], self.log_n[self.inside[-1]]
        if method == "quadratic":
            c_3R = self.parabola() @ np.exp(log_loss_RN).T
            with np.errstate(divide="ignore", invalid="ignore"):
                vertex_R = self.centre - c_3R[1] / (2 * c_3R[2])
            return np.where((c_3R[2] > 0) & (vertex_R > low) & (vertex_R < high), vertex_R, np.nan)
        from scipy.interpolate import Akima1DInterpolator  # slow to import, and the usual method needs none of it

        fine = np.linspace(low, high, FINE)
        best_R = Akima1DInterpolator(self.log_n[self.inside], log_loss_RN.T, axis=0)(fine).argmin(0)
        return np.where((best_R > 0) & (best_R < FINE - 1), fine[best_R], np.nan)

    def tokens_at(self, log_n: np.ndarray) -> np.ndarray:
        """ln D at these sizes, between those of the runs: constant compute, whatever its convention."""
        order = np.argsort(self.points.N)
        return np.interp(log_n, np.log(self.points.N[order]), np.log(self.points.D[order]))

    def loss_at(self, log_n: float) -> float:
        c, x = self.vertex(), log_n - self.centre
        return float(c[0] + c[1] * x + c[2] * x * x)


def fit(
    points: Points,
    *,
    method: str = "quadratic",
    window: float = WINDOW,
    noise: float | None = None,
    compute: Sequence[float] = (),
    draws: int = 1000,
    seed: int = 0,
) -> Fit:
    """Exponents of N* and D* in compute, with the optimum of every budget and why others were dropped.

    Raises DataError when fewer than two budgets have an optimum, ConfigError for an option that means nothing.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: not one of {', '.join(METHODS)}")
    if not window > 1:
        raise ConfigError(f"window {window}: a factor above 1")
    number_N = clusters(points.C)
    budgets = [Budget(points.take(number_N == k), window) for k in range(number_N.max() + 1)]
    warnings = [*points.notes, *repeats(points)]
    kept = [b for b in budgets if not b.refused()]
    warnings += [f"{b.compute:.3g} FLOPs is left out: {b.refused()}" for b in budgets if b.refused()]
    if noise is None:
        spreads = np.array([b.spread() for b in kept])
        noise = float(np.sqrt(np.nanmean(spreads**2))) if np.isfinite(spreads).any() else 0.0
    rng, rows = np.random.default_rng(seed), []
    for budget in kept:
        log_loss = budget.log_loss[budget.inside]
        drawn_RN = log_loss + noise / np.sqrt(budget.runs[budget.inside]) * rng.normal(size=(draws, len(log_loss)))
        own = float(budget.optima(log_loss[None], method)[0])
        drawn_R = budget.optima(drawn_RN, method)
        lost = float(np.isnan(drawn_R).mean())
        if math.isnan(own) or lost > 0.5:
            warnings.append(f"{budget.compute:.3g} FLOPs is left out: no minimum in the window stands out of the noise")
            continue
        step = float(np.diff(budget.log_n[budget.inside]).mean())
        width = max(float(np.nanstd(drawn_R)), step / 3) * (1 + lost)
        rows.append((budget, own, np.where(np.isnan(drawn_R), own, drawn_R), width))
    if len(rows) < 2:
        raise DataError(
            f"{len(rows)} of {len(budgets)} budgets have an optimum, and a power law needs two: " + "; ".join(warnings)
        )
    if len(rows) < 4:
        warnings.append(f"{len(rows)} budgets have an optimum; four make an exponent")
    log_c = np.array([math.log(b.compute) for b, *_ in rows])
    if log_c[-1] - log_c[0] < math.log(10):
        warnings.append(f"compute spans a factor of {math.exp(log_c[-1] - log_c[0]):.1f} only")
    weight = np.array([1 / width**2 for *_, width in rows])
    own_n = np.array([own for _, own, *_ in rows])
    own_d = np.array([b.tokens_at(np.array([own]))[0] for b, own, *_ in rows])
    drawn_n = np.stack([d for _, _, d, _ in rows], 1)
    drawn_d = np.stack([b.tokens_at(d) for b, _, d, _ in rows], 1)
    lines = {"N": _line(log_c, own_n[None], weight), "D": _line(log_c, own_d[None], weight)}
    drawn = {"N": _line(log_c, drawn_n, weight), "D": _line(log_c, drawn_d, weight)}
    exponents = {name: float(slope[0]) for name, (slope, _) in lines.items()}
    budgets_asked = sorted({math.exp(log_c[-1]), 10 * math.exp(log_c[-1]), *map(float, compute)})
    return Fit(
        law=f"N* ~ C^a, D* ~ C^b by {method} within a factor of {window:g}",
        constants=exponents,
        objective=float((weight * (own_n - lines["N"][1][0] - exponents["N"] * log_c) ** 2).sum()),
        ci95={name: interval(slope) for name, (slope, _) in drawn.items()},
        derived={
            "optima": [
                {
                    "compute": b.compute,
                    "N": math.exp(own),
                    "D": math.exp(own_d[i]),
                    "loss": b.loss_at(own),
                    "log_sd": width,
                    "ci95": [math.exp(x) for x in interval(drawn_n[:, i])],
                    "sizes": len(b.inside),
                }
                for i, (b, own, _, width) in enumerate(rows)
            ],
            "predictions": [_predict(c, lines, drawn) for c in budgets_asked],
        },
        warnings=warnings,
        quality={
            "points": len(points),
            "budgets": len(budgets),
            "noise": noise,
            "resamples": draws,
            "held_out": _held_out(rows[-1][0], log_c, own_n, drawn_n, weight) if len(rows) > 2 else None,
        },
        data=points.span(),
        draws={name: slope for name, (slope, _) in drawn.items()}
        | {f"{name}_intercept": intercept for name, (_, intercept) in drawn.items()},
    )


def _held_out(largest: Budget, log_c: np.ndarray, own_n: np.ndarray, drawn_n: np.ndarray, weight: np.ndarray) -> dict:
    """What the power law of the other budgets says of the largest, and what a model of that size would lose there."""

    def beyond(y_RN: np.ndarray) -> np.ndarray:
        slope_R, intercept_R = _line(log_c[:-1], y_RN[:, :-1], weight[:-1])
        return intercept_R + slope_R * log_c[-1]

    said, measured = float(beyond(own_n[None])[0]), float(own_n[-1])
    return {
        "compute_ratio": math.exp(log_c[-1] - log_c[-2]),
        "N": math.exp(said),
        "N_ci95": interval(np.exp(beyond(drawn_n))),
        "measured_N": math.exp(measured),
        "relative_error": math.exp(said - measured) - 1,
        "relative_loss": largest.loss_at(said) / largest.loss_at(measured) - 1,
    }


def _line(x: np.ndarray, y_RN: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slope_R, intercept_R) by weighted least squares."""
    mean_x = (weight * x).sum() / weight.sum()
    mean_R = (y_RN * weight).sum(1) / weight.sum()
    slope_R = ((y_RN - mean_R[:, None]) * (x - mean_x) * weight).sum(1) / ((x - mean_x) ** 2 * weight).sum()
    return slope_R, mean_R - slope_R * mean_x


def _predict(compute: float, lines: dict, drawn: dict) -> dict:
    at = math.log(compute)
    value: dict = {"compute": compute}
    for name, (slope, intercept) in lines.items():
        value[name] = float(math.exp(intercept[0] + slope[0] * at))
        value[f"{name}_ci95"] = interval(np.exp(drawn[name][1] + drawn[name][0] * at))
    return value
