"""Figures of repeated data: loss against epochs with the laws, their profiles, and the gap between seen and fresh."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tinyllama_jax.lab.draw import ALARM, GREY, INK, PALETTE
from tinyllama_jax.lab.fit import chinchilla
from tinyllama_jax.lab.fit.points import AS_NEW
from tinyllama_jax.lab.fit.profile import CHI2_95
from tinyllama_jax.lab.study_fits import Repetition
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
    ring,
    room,
)
from tinyllama_jax.lab.study_rows import ONE_EPOCH, Row, Study, alike, column, epochs, number

MOST_PANELS = 6
LAWS = {  # name of the law -> what it is called, how it is drawn
    "effective": ("effective data", PALETTE[0], "-"),
    "penalty": ("penalty", PALETTE[4], "-"),
    "saturating": ("saturating", PALETTE[2], "-"),
}


def panels_of(found: Sequence[Repetition]) -> tuple[list[tuple[Repetition, float]], int]:
    """((weight decay, size) of each panel, how many were left out), those with most repeated runs first."""
    places = []
    for each in found:
        member = alike(each.points.N, 1.02)
        for k in range(member.max() + 1):
            inside = member == k
            epochs_N = each.points.D / np.minimum(each.points.U, each.points.D)
            several = int((epochs_N[inside] > AS_NEW).sum())
            if several:
                places.append((several, each, float(np.median(each.points.N[inside]))))
    kept = sorted(sorted(places, key=lambda place: -place[0])[:MOST_PANELS], key=_order)
    return [(each, size) for _, each, size in kept], len(places) - len(kept)


def epochs_figure(found: Sequence[Repetition], study: Study) -> tuple[Figure | None, str]:
    """Loss against epochs: a colour for each number of unique tokens, a panel for each weight decay and size."""
    places, left = panels_of(found)
    if not places:
        return None, ""
    budgets = _budgets([row for each, _ in places for row in each.rows])
    shades = ordered_colors(len(budgets))
    titles = [_title(each, size, places) for each, size in places]
    columns = 1 if len(places) == 1 else 2
    figure, panels = grid(
        titles, columns=columns, height=3.6 if columns == 1 else 2.7, right=room(["effective-data law"]), gap=0.65
    )
    heights, references, laws = [], False, False
    for axes, (each, size) in zip(panels, places, strict=True):
        rows = [row for row in each.rows if abs(number(row, "parameters") / size - 1) < 0.02]
        waiting = [
            row
            for row in study.unfinished
            if abs(number(row, "parameters") / size - 1) < 0.02 and number(row, "loss") > 0 and _same_decay(row, each)
        ]
        most = max(map(epochs, rows))
        grid_E = np.geomspace(1, most, 80)
        for unique, shade in zip(budgets, shades, strict=True):
            mine = sorted((row for row in rows if _is_of(row, unique)), key=epochs)
            if not mine:
                continue
            x, y = np.array(list(map(epochs, mine))), column(mine, "loss")
            heights.append(y)
            axes.plot(x, y, **dot(shade), zorder=3)
            if "effective" in each.laws:
                laws = True
                curve = each.loss("effective", size, unique * grid_E, unique)
                axes.plot(grid_E, curve, color=shade, lw=1.6, zorder=2)
            else:
                at, mean = _means(x, y)
                axes.plot(at, mean, color=shade, lw=1.1, zorder=2)
            as_new, nothing = _references(each, rows, size, unique, grid_E)
            references |= as_new is not None
            if as_new is not None:
                axes.plot(grid_E, as_new, color=shade, lw=1.0, ls=DOTTED, zorder=1.8)
            if nothing is not None:
                axes.plot(grid_E, np.full_like(grid_E, nothing), color=shade, lw=0.9, ls=DASHED, alpha=0.8, zorder=1.7)
        for row in waiting:
            axes.plot(epochs(row), number(row, "loss"), **ring(GREY), zorder=3)
        log_axis(axes, "x", np.array([1.0, most]), lambda value: f"{value:g}", most=6)
        axes.set_xlabel("epochs", loc="left")
    for axes in panels:
        level(axes, np.concatenate(heights))
    entries = evenly([(counted(u), dot(shade)) for u, shade in zip(budgets, shades, strict=True)], 10)
    entries += [("effective-data law", {"color": INK, "lw": 1.6})] if laws else []
    entries += [("as good as new", {"color": INK, "ls": DOTTED, "lw": 1.2})] if references else []
    entries += [("worth nothing", {"color": INK, "ls": DASHED, "lw": 1.0})]
    key(panels[min(columns, len(panels)) - 1], entries, "unique tokens")
    said = f"{left} more combinations of weight decay and size are not drawn." if left else ""
    return figure, said


def laws_figure(each: Repetition) -> Figure | None:
    """One panel for each number of unique tokens: three laws against what was measured."""
    if not each.laws:
        return None
    sizes = Counter(round(float(np.log(n)) / 0.02) for n in each.points.N)
    size = float(np.exp(0.02 * sizes.most_common(1)[0][0]))
    rows = [row for row in each.rows if abs(number(row, "parameters") / size - 1) < 0.03]
    size = float(np.median(column(rows, "parameters")))
    budgets = [u for u in _budgets(rows) if sum(_is_of(row, u) and epochs(row) > AS_NEW for row in rows) >= 2]
    if not budgets:
        return None
    budgets = budgets[:MOST_PANELS]
    titles = [f"{counted(u)} unique tokens" for u in budgets]
    columns = min(2, len(budgets))
    figure, panels = grid(titles, columns=columns, height=2.4, right=room(["as good as new"]), gap=0.65)
    for axes, unique in zip(panels, budgets, strict=True):
        mine = [row for row in rows if _is_of(row, unique)]
        x, y = np.array(list(map(epochs, mine))), column(mine, "loss")
        fine = np.geomspace(1, x.max(), 80)
        as_new, nothing = _references(each, rows, size, unique, fine)
        if as_new is not None:
            axes.plot(fine, as_new, color=GREY, lw=1.1, ls=DOTTED)
        if nothing is not None:
            axes.plot(fine, np.full_like(fine, nothing), color=GREY, lw=1.0, ls=DASHED)
        for name, (_, color, style) in LAWS.items():
            if name in each.laws:
                axes.plot(fine, each.loss(name, size, unique * fine, unique), color=color, lw=1.5, ls=style)
        axes.plot(x, y, **dot(INK), zorder=3)
        log_axis(axes, "x", np.array([1.0, x.max()]), lambda value: f"{value:g}", most=6)
        level(axes, np.array([*y, *([] if nothing is None else [nothing])]), share=0.12)
        axes.set_xlabel("epochs", loc="left")
    entries = [("run", dot(INK))]
    entries += [(said, {"color": color, "ls": style}) for n, (said, color, style) in LAWS.items() if n in each.laws]
    entries += [("as good as new", {"color": GREY, "ls": DOTTED}), ("worth nothing", {"color": GREY, "ls": DASHED})]
    key(panels[columns - 1], entries)
    return figure


def profile_figure(each: Repetition) -> Figure | None:
    """How much worse the fit is when a constant is held elsewhere; below the line it is as good, statistically."""
    if each.found is None or not each.found.profiles:
        return None
    names = {"R_D": "repeats", "R_N": "parameters in excess"}
    profiles = {name: each.found.profiles[name] for name in names if name in each.found.profiles}
    figure, panels = grid([f"likelihood lost: {n}*, {names[n]}" for n in profiles], columns=2, height=2.2)
    for axes, (name, profile) in zip(panels, profiles.items(), strict=True):
        at, excess = np.exp(profile["grid"]), np.asarray(profile["excess"])
        low, high = profile["interval"]
        ends = (at[0] if low is None else math.exp(low), at[-1] if high is None else math.exp(high))
        axes.axvspan(*ends, color=PALETTE[0], alpha=0.12, lw=0)
        axes.axhline(CHI2_95, color=ALARM, lw=1.0, ls=DASHED)
        axes.plot(at, excess, color=PALETTE[0], lw=1.6, marker="o", ms=3)
        axes.axvline(each.found.constants[name], color=INK, lw=0.9)
        shown = at[excess < 25]
        shown = np.array([*shown, *ends, each.found.constants[name]])
        axes.set_ylim(0, 14)
        log_axis(axes, "x", shown, counted, most=6)
        axes.set_xlabel(name + "*", loc="left")
    return figure


def gap_figure(study: Study) -> Figure | None:
    """What repetition leaves behind: the gap between seen and fresh text, and the loss lost after the best moment."""
    rows = [row for row in study.finished if epochs(row) > 0]
    gap, late = [_gap(row) for row in rows], [number(row, "loss") - number(row, "best_loss") for row in rows]
    data = {
        "fresh minus seen text, nats per token": np.array(gap),
        "final minus best loss, nats per token": np.array(late),
    }
    data = {title: values for title, values in data.items() if np.isfinite(values).any()}
    if not data or max(map(epochs, rows), default=1.0) < 2:  # little came again
        return None
    budgets = _budgets(rows)
    shades = ordered_colors(len(budgets))
    figure, panels = grid(list(data), columns=max(2, len(data)), height=2.7, right=room(["unique tokens"]), gap=0.75)
    x = np.array(list(map(epochs, rows)))
    decays = column(rows, "weight_decay")
    marks = {d: m for d, m in zip(np.unique(decays[np.isfinite(decays)]), "os^vDP", strict=False)}
    for axes, values in zip(panels, data.values(), strict=True):
        axes.axhline(0, color=GREY, lw=0.9)
        for unique, shade in zip(budgets, shades, strict=True):
            for decay, mark in (marks or {math.nan: "o"}).items():
                inside = np.array([_is_of(row, unique) for row in rows]) & np.isfinite(values)
                inside &= (decays == decay) if marks else True
                axes.plot(x[inside], values[inside], **dot(shade, marker=mark), zorder=3)
        log_axis(axes, "x", x, lambda value: f"{value:g}", most=6)
        level(axes, np.array([0.0, *values[np.isfinite(values)]]))
        axes.set_xlabel("epochs", loc="left")
    entries = evenly([(counted(u), dot(shade)) for u, shade in zip(budgets, shades, strict=True)], 10)
    if len(marks) > 1:
        entries += [(f"decay {d:g}", dot(INK, marker=mark)) for d, mark in marks.items()]
    key(panels[len(data) - 1], entries, "unique tokens")
    return figure


def _references(
    each: Repetition, rows: Sequence[Row], size: float, unique: float, fine: np.ndarray
) -> tuple[np.ndarray | None, float | None]:
    """Loss if every repeat were new text, and if none were worth anything: by the surface, or else as measured."""
    if each.base:
        return chinchilla.loss(each.base, size, unique * fine), float(chinchilla.loss(each.base, size, unique))
    once = [row for row in rows if epochs(row) <= ONE_EPOCH]
    own = [number(row, "loss") for row in once if abs(number(row, "tokens") / unique - 1) < 0.05]
    nothing = float(np.mean(own)) if own else None
    tokens, loss = _means(column(once, "tokens"), column(once, "loss")) if once else (np.empty(0), np.empty(0))
    if len(tokens) < 2:
        return None, nothing
    asked = unique * fine
    curve = np.interp(np.log(asked), np.log(tokens), loss)
    return np.where((asked >= 0.99 * tokens[0]) & (asked <= 1.01 * tokens[-1]), curve, np.nan), nothing


def _means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.unique(x)
    return at, np.array([y[x == each].mean() for each in at])


def _budgets(rows: Sequence[Row]) -> list[float]:
    """The numbers of unique tokens that were repeated, in increasing order."""
    unique = np.array([number(row, "unique_tokens") for row in rows if epochs(row) > AS_NEW])
    unique = unique[np.isfinite(unique)]
    if not len(unique):
        return []
    member = alike(unique, 1.02)
    return [float(np.median(unique[member == k])) for k in range(member.max() + 1)]


def _is_of(row: Row, unique: float) -> bool:
    """Whether the run saw these unique tokens: a run of one epoch sees as many as it has tokens."""
    own = min(number(row, "unique_tokens"), number(row, "tokens"))
    return abs(own / unique - 1) < 0.03


def _gap(row: Row) -> float:
    gaps = [value for key, value in row.items() if key.startswith("gap.") and isinstance(value, int | float)]
    return float(np.mean(gaps)) if gaps else math.nan


def _same_decay(row: Row, each: Repetition) -> bool:
    return math.isnan(each.weight_decay) or number(row, "weight_decay") == each.weight_decay


def _order(place: tuple[int, Repetition, float]) -> tuple[float, float]:
    return (place[1].weight_decay if math.isfinite(place[1].weight_decay) else 0.0, place[2])


def _title(each: Repetition, size: float, places: Sequence[tuple[Repetition, float]]) -> str:
    parts = [f"weight decay {each.weight_decay:g}"] if math.isfinite(each.weight_decay) else []
    parts += [f"N = {counted(size)}"] if len({round(math.log(s), 1) for _, s in places}) > 1 else []
    return "loss at " + ", ".join(parts) if parts else "validation loss in nats per token"
