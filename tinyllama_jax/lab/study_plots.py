"""Figures that every study has: loss against compute with its envelope, and the runs laid over each other."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tinyllama_jax.lab.draw import INK, STYLE, evenly, label_ends, shorten, smooth
from tinyllama_jax.lab.study_panels import (
    DASHED,
    LETTER,
    colors,
    counted,
    dot,
    grid,
    key,
    level,
    log_axis,
    ordered_colors,
    plain,
    ring,
    room,
)
from tinyllama_jax.lab.study_panels import evenly as some
from tinyllama_jax.lab.study_rows import Row, Study, alike, column, compute, number

MOST_CURVES = 24  # that can be told apart
SAME_BUDGET = 0.04  # in ln FLOPs
MOST_READ = 300  # run directories whose curves are drawn behind the points


def styled(make: Callable[[], Figure | None]) -> Figure | None:
    """A figure in the house style, without touching matplotlib's global state."""
    with matplotlib.rc_context(STYLE):
        return make()


def sizes(rows: list[Row]) -> tuple[np.ndarray, list[float], list[str]]:
    """(index of its size for each row, the sizes, their colours); sizes within 2 % are one."""
    parameters = np.nan_to_num(column(rows, "parameters"), nan=1.0)
    member = alike(parameters, 1.02)
    found = [float(np.median(parameters[member == k])) for k in range(member.max() + 1)]
    return member, found, ordered_colors(len(found))


def compute_figure(study: Study) -> Figure | None:
    """Loss against training FLOPs: curves, end points, and the lower convex hull of the end points."""
    rows = [row for row in study.rows if compute(row) > 0 and number(row, "loss") > 0]
    flops = np.array([compute(row) for row in rows])
    ended = {id(row) for row in study.finished}
    loss, done = column(rows, "loss"), np.array([id(row) in ended for row in rows], bool)
    if len(rows) < 3 or (spread := flops[done] if done.sum() > 1 else flops).max() / spread.min() < 1.5:
        return None
    member, found, shades = sizes(rows)
    figure, (axes,) = grid(["validation loss in nats per token"], columns=1, height=3.7, right=room(["not finished"]))
    for row, k in list(zip(rows, member, strict=True))[:MOST_READ]:
        tokens, values = study.validation(row)
        if len(tokens) > 1 and number(row, "tokens") > 0:
            at = compute(row) * tokens / number(row, "tokens")
            axes.plot(at[tokens > 0], values[tokens > 0], color=shades[k], lw=0.7, alpha=0.55, zorder=1.5)
    for k, shade in enumerate(shades):
        for style, which in ((dot(shade), done), (ring(shade), ~done)):
            inside = (member == k) & which
            axes.plot(flops[inside], loss[inside], **style, zorder=3)
    hull = envelope(flops[done], loss[done])
    if len(hull) > 1:
        axes.plot(*hull.T, color=INK, lw=1.3, ls=DASHED, zorder=2.5)
    seen = done if done.sum() > 1 else np.full(len(rows), True)  # a run that has only begun does not set the scale
    log_axis(axes, "x", flops[seen], plain)
    axes.set_xlabel("training FLOPs", loc="left")
    low, high = loss[seen].min(), loss[seen].max()
    level(axes, np.array([low, high + 0.12 * (high - low)]))
    entries = some([(counted(n), dot(shade)) for n, shade in zip(found, shades, strict=True)], 15)
    entries += [("envelope", {"color": INK, "ls": DASHED, "lw": 1.3})] if len(hull) > 1 else []
    entries += [("not finished", ring(INK))] if not done.all() else []
    key(axes, entries, "parameters")
    return figure


def envelope(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """[(FLOPs, loss)]: the lower convex hull over ln FLOPs, from the cheapest run down to the lowest loss."""
    hull: list[tuple[float, float]] = []
    lowest_at: dict[int, tuple[float, float]] = {}
    for x, y in zip(np.log(flops), loss, strict=True):  # of one budget, borders of batches apart, the lowest counts
        place = round(x / SAME_BUDGET)
        lowest_at[place] = min(lowest_at.get(place, (x, y)), (x, y), key=lambda spot: spot[1])
    for x, y in sorted(lowest_at.values()):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) <= 0:
            hull.pop()
        hull.append((x, y))
    lowest = int(np.argmin([y for _, y in hull])) if hull else 0
    return np.array([(np.exp(x), y) for x, y in hull[: lowest + 1]]).reshape(-1, 2)


def overlay_figure(study: Study) -> tuple[Figure | None, str]:
    """Loss against tokens of several runs, and a sentence about what is drawn and what is left out."""
    curves, measured = [], 0
    for row in study.rows:
        validation = study.validation(row)
        measured += len(validation[0]) >= 5
        curves.append((row, validation))
    by_validation = measured >= max(1, len(curves) / 2)
    if not by_validation:
        curves = [(row, _smoothed(*study.training(row))) for row in study.rows]
    curves = [(row, *curve) for row, curve in curves if len(curve[0]) > 1]
    if len(curves) < 2:
        return None, ""
    names = [str(row.get("name", "?")) for row, *_ in curves]
    pick = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), MOST_CURVES)).round().astype(int))
    left = [name for i, name in enumerate(names) if i not in set(pick)]
    shown = [curves[i] for i in pick]
    labels = without_common([names[i] for i in pick])
    what = "validation loss, mean of the domains" if by_validation else "training loss, running mean"
    height = max(3.6, 0.17 * len(shown))
    margin = min(0.35 + LETTER * max(len(shorten(label, 26)) + 6 for label in labels), 2.9)
    figure, (axes,) = grid([f"{what}, nats per token"], columns=1, height=height, right=margin)
    recipes = list(dict.fromkeys(_recipe(row) for row, *_ in shown))
    shade = {r: c for r, c in zip(recipes, _many(len(recipes)), strict=True)}
    ended = [id(row) for row in study.finished]
    scale = [curve for curve in shown if id(curve[0]) in ended]
    scale = scale if len(scale) > 1 else shown  # a run that has only begun does not set it
    longest, shortest = (most(tokens[-1] for _, tokens, _ in scale) for most in (max, min))
    logarithmic = longest / shortest > 4
    ends = []
    for (row, tokens, loss), label in zip(shown, labels, strict=True):
        at = evenly(len(tokens))
        at = at[tokens[at] > 0] if logarithmic else at  # what was measured before the first step has no place there
        color = shade[_recipe(row)]
        axes.plot(tokens[at], loss[at], color=color, lw=1.3, alpha=0.9)
        ends.append((float(loss[-1]), f"{shorten(label, 26)}  {loss[-1]:.3f}", color))
    if logarithmic:
        first = min(t[t > 0][0] for _, t, _ in scale)
        log_axis(axes, "x", np.array([max(first, shortest / 10), longest]), counted)
    else:
        axes.set_xlim(0, longest)
        axes.xaxis.set_major_formatter(lambda value, _: counted(value))
    axes.set_xlabel("tokens seen", loc="left")
    low = min(loss.min() for *_, loss in scale)
    high = max(float(np.interp(0.25 * t[-1], t, loss)) for _, t, loss in scale)
    level(axes, np.array([low, high]))
    label_ends(axes, ends, size=8.5 if len(shown) <= 14 else 7.5)
    said = ""
    if left:
        some = ", ".join(left[:12]) + (f" and {len(left) - 12} more" if len(left) > 12 else "")
        said = f"{len(shown)} of {len(curves)} runs are drawn, evenly chosen; left out: {some}."
    return figure, said


def without_common(names: list[str]) -> list[str]:
    """The names without the words (between dashes) with which all of them begin."""
    parts = [name.split("-") for name in names]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return ["-".join(part[common:]) for part in parts]


def _many(count: int) -> list[str]:
    return colors(count) if count <= 14 else ordered_colors(count)


def _recipe(row: Row) -> str:
    """Runs that differ in their seeds only have one colour."""
    same = {k: v for k, v in row.items() if k.startswith("config.") and k not in ("config.seed", "config.name")}
    return str(sorted(same.items(), key=lambda item: item[0])) if same else str(row.get("name"))


def _smoothed(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens, smooth(loss)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
