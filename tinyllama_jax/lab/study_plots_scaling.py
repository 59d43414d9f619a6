"""Figures of scaling laws: isoFLOP profiles and their optima, Chinchilla's surface, its residuals and its resamples."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tinyllama_jax.lab.draw import ALARM, FAINT, GREY, INK, PALETTE
from tinyllama_jax.lab.fit import chinchilla
from tinyllama_jax.lab.study_fits import Profiles, Surface
from tinyllama_jax.lab.study_panels import (
    DASHED,
    DOTTED,
    counted,
    dot,
    evenly,
    grid,
    key,
    level,
    log_axis,
    ordered_colors,
    plain,
    ring,
    room,
)
from tinyllama_jax.lab.study_rows import Study, compute, number

BLUE, ORANGE = PALETTE[0], PALETTE[4]


def isoflop_figure(found: Profiles, study: Study) -> Figure:
    """Loss against parameters: one colour for each budget, its parabola and vertex; budgets left out are hollow."""
    figure, (axes,) = grid(["validation loss in nats per token"], columns=1, height=3.9, right=room(["optimum, 95 %"]))
    shades = ordered_colors(len(found.budgets))
    entries, heights = [], []
    for i, (budget, shade) in enumerate(zip(found.budgets, shades, strict=True)):
        kept = i in found.optima
        n, loss = budget.points.N, budget.points.L
        heights.append(loss)
        axes.plot(n, loss, **(dot(shade) if kept else ring(shade)), zorder=3)
        entries.append((plain(budget.compute), dot(shade) if kept else ring(shade)))
        inside = budget.log_n[budget.inside]
        if len(inside) >= 3:
            fine = np.linspace(inside[0], inside[-1], 80)
            curve = np.array([budget.loss_at(x) for x in fine])
            axes.plot(np.exp(fine), curve, color=shade, lw=1.5 if kept else 0.9, ls="-" if kept else DOTTED, zorder=2)
        if kept:
            best = found.optima[i]
            low, high = best["ci95"]
            axes.plot([low, high], [best["loss"]] * 2, color=shade, lw=4, alpha=0.3, solid_capstyle="butt", zorder=2.2)
            axes.plot(best["N"], best["loss"], "D", color=shade, mec="white", mew=0.7, ms=7, zorder=4)
            heights.append(np.array([best["loss"]]))
    waiting = [row for row in study.unfinished if number(row, "loss") > 0 and number(row, "parameters") > 0]
    highest = max(map(np.max, heights))
    for row in waiting:
        if any(abs(math.log(compute(row) / b.compute)) < 0.1 for b in found.budgets):
            axes.plot(number(row, "parameters"), min(number(row, "loss"), highest), **ring(GREY), zorder=3)
    log_axis(axes, "x", found.points.N, counted)
    level(axes, np.concatenate(heights))
    axes.set_xlabel("parameters", loc="left")
    marks = [("optimum, 95 %", {"color": INK, "marker": "D", "ls": "none", "ms": 6})] if found.optima else []
    marks += [("left out", ring(INK))] if found.left_out else []
    key(axes, [*evenly(entries, 14), *marks], "training FLOPs")
    return figure


def optima_figure(found: Profiles) -> Figure | None:
    """N* and D* against compute with the power law, its band, and its exponent."""
    if found.fit is None:
        return None
    titles = []
    for name, what in (("N", "parameters"), ("D", "tokens")):
        low, high = found.fit.ci95[name]
        titles.append(f"best {what} ∝ C^{found.fit.constants[name]:.3f} ({low:.3f} to {high:.3f})")
    figure, panels = grid(titles, columns=2, height=2.7)
    predictions = found.fit.derived["predictions"]
    at = np.array([p["compute"] for p in predictions])
    for axes, name in zip(panels, ("N", "D"), strict=True):
        line = np.array([p[name] for p in predictions])
        band = np.array([p[f"{name}_ci95"] for p in predictions])
        axes.fill_between(at, band[:, 0], band[:, 1], color=BLUE, alpha=0.15, lw=0)
        seen = at <= found.points.C.max() * 1.001
        axes.plot(at[seen], line[seen], color=BLUE, lw=1.6)
        axes.plot(at[~seen], line[~seen], color=BLUE, lw=1.2, ls=DASHED)
        for i, best in found.optima.items():
            ends = np.array(best["ci95"])
            if name == "D":
                ends = np.exp(found.budgets[i].tokens_at(np.log(ends)))
            axes.plot([best["compute"]] * 2, ends, color=INK, lw=1.2)
            axes.plot(best["compute"], best[name], "D", color=INK, mec="white", mew=0.7, ms=6, zorder=3)
        log_axis(axes, "x", at, plain, most=5)
        log_axis(axes, "y", np.concatenate([line, *band.T]), counted, most=6)
        axes.set_xlabel("training FLOPs C", loc="left")
    return figure


def surface_figure(found: Surface, study: Study) -> Figure:
    """Contours of the fitted loss over parameters and tokens, the runs, and the efficient frontier."""
    at, constants = found.points, found.fit.constants
    figure, (axes,) = grid(["tokens"], columns=1, height=4.3, right=room(["largest budget"]))
    n = np.geomspace(at.N.min() / 1.6, at.N.max() * 1.6, 120)
    d = np.geomspace(at.D.min() / 1.6, at.D.max() * 1.6, 120)
    loss = chinchilla.loss(constants, n[None], d[:, None])
    low, high = np.quantile(loss, [0.0, 0.97])
    steps = MaxNLocator(11, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.contourf(n, d, loss, levels=steps, cmap="viridis_r", alpha=0.25, extend="max")
    lines = axes.contour(n, d, loss, levels=steps, colors=[GREY], linewidths=0.8)
    log_axis(axes, "x", n, counted)
    log_axis(axes, "y", d, counted)
    axes.set_xlim(n[0], n[-1])
    axes.set_ylim(d[0], d[-1])
    axes.grid(False)
    axes.clabel(lines, fmt=lambda value: f"{value:g}", fontsize=8, colors=[INK])
    budgets = np.geomspace(6 * n[0] * d[0], 6 * n[-1] * d[-1], 200)
    best = [chinchilla.optimum(constants, c) for c in budgets]
    frontier = np.array([(b["N"], b["D"]) for b in best])
    known = budgets <= at.C.max()
    axes.plot(*frontier[known].T, color=ORANGE, lw=2.2)
    axes.plot(*frontier[~known].T, color=ORANGE, lw=1.6, ls=DASHED)
    axes.plot(at.N[~found.held_out_N], at.D[~found.held_out_N], **dot(INK), zorder=3)
    axes.plot(at.N[found.held_out_N], at.D[found.held_out_N], **dot(INK, marker="s"), zorder=3)
    waiting = [row for row in study.unfinished if number(row, "parameters") > 0 and number(row, "tokens") > 0]
    for row in waiting:
        axes.plot(number(row, "parameters"), number(row, "tokens"), **ring(INK), zorder=3)
    axes.set_xlabel("parameters", loc="left")
    entries = [
        ("run", dot(INK)),
        ("largest budget", dot(INK, marker="s")),
        ("frontier", {"color": ORANGE, "lw": 2.2}),
        ("extrapolated", {"color": ORANGE, "lw": 1.6, "ls": DASHED}),
        ("loss", {"color": GREY, "lw": 0.8}),
    ]
    key(axes, entries + ([("not finished", ring(INK))] if waiting else []))
    return figure


def residuals_figure(found: Surface) -> Figure:
    """Measured over predicted against N, D and D/N; and predicted against measured, held-out runs hollow."""
    at = found.points
    fitted = chinchilla.loss(found.fit.constants, at.N, at.D)
    held, off = found.held_out_N, 100 * (at.L / fitted - 1)
    titles = ["residual, % of the loss", "residual, % of the loss", "residual, % of the loss", "predicted loss"]
    figure, panels = grid(titles, columns=2, height=2.1)
    for axes, values, label in zip(
        panels, (at.N, at.D, at.D / at.N), ("parameters", "tokens", "tokens per parameter"), strict=False
    ):
        axes.axhline(0, color=GREY, lw=0.9)
        axes.plot(values[~held], off[~held], **dot(BLUE), zorder=3)
        axes.plot(values[held], off[held], **dot(ORANGE, marker="s"), zorder=3)
        log_axis(axes, "x", values, counted, most=5)
        level(axes, np.array([*off, 0.0]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+.3g}" if y else "0"))
        axes.set_xlabel(label, loc="left")
    axes = panels[3]
    both = np.concatenate([at.L, fitted, found.without_N[held & np.isfinite(found.without_N)]])
    ends = np.array([both.min(), both.max()])
    axes.plot(ends, ends, color=GREY, lw=0.9)
    axes.plot(at.L[~held], fitted[~held], **dot(BLUE), zorder=3)
    if np.isfinite(found.without_N[held]).any():
        axes.plot(at.L[held], found.without_N[held], **ring(ORANGE, marker="s"), zorder=3)
    level(axes, ends)
    axes.set_xlim(axes.get_ylim())
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("measured loss", loc="left")
    return figure


def pairs_figure(found: Surface) -> Figure | None:
    """Every pair of constants over the resamples: a narrow ridge means that only a combination is known."""
    draws = {
        ("ln " + name if name in "AB" else name): (np.log(values) if name in "AB" else np.asarray(values))
        for name, values in found.fit.draws.items()
        if name in chinchilla.NAMES and np.isfinite(values).all() and np.min(values) > 0
    }
    if len(draws) < 2 or len(next(iter(draws.values()))) < 10:
        return None
    names, count = list(draws), len(draws)
    side, gap, left, bottom = 1.22, 0.16, 0.85, 0.6
    width, height = 8.0, bottom + count * (side + gap) + 0.15
    figure = Figure(figsize=(width, height))
    constants = found.fit.constants
    fitted = {n: math.log(constants[n[3:]]) if n.startswith("ln ") else constants[n] for n in names}
    limits = {name: _limits(values, fitted[name]) for name, values in draws.items()}
    for i, row in enumerate(names):
        for j, column in enumerate(names[: i + 1]):
            x, y = left + j * (side + gap), bottom + (count - 1 - i) * (side + gap)
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.set_xlim(limits[column])
            axes.grid(False)
            if i == j:
                axes.hist(draws[row], bins=24, range=limits[row], color=BLUE, alpha=0.6)
                axes.set_yticks([])
            else:
                axes.plot(draws[column], draws[row], "o", color=BLUE, ms=2.2, alpha=0.4, mew=0)
                axes.axhline(fitted[row], color=FAINT, lw=0.8, zorder=0)
                axes.set_ylim(limits[row])
                axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.axvline(fitted[column], color=ALARM, lw=0.9)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(labelsize=7.5, labelbottom=i == count - 1, labelleft=j == 0 and i > 0)
            if i == count - 1:
                axes.set_xlabel(column, size=9.5, color=INK)
            if j == 0 and i:
                axes.set_ylabel(row, size=9.5, color=INK)
    condition = found.fit.quality.get("condition_number", math.nan)
    said = f"{len(next(iter(draws.values()))):,} resamples of the runs\ncondition number {condition:,.0f}"
    figure.text(0.97, 1 - 0.35 / height, said, ha="right", va="top", size=10, color=INK)
    return figure


def _limits(values: np.ndarray, fitted: float) -> tuple[float, float]:
    low, high = np.quantile(values, [0.01, 0.99])
    low, high = min(low, fitted), max(high, fitted)
    pad = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad
