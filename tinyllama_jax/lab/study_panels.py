"""Panels for figures of many runs: grids of axes, logarithmic axes with plain numbers, keys that stand beside them.

As in draw.py a figure is 8 inches wide and matplotlib's global state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tinyllama_jax.lab.draw import GREY, INK, palette, si

WIDTH, LEFT, BOTTOM = 8.0, 0.72, 0.62  # inches
LETTER = 0.068
DASHED, DOTTED = (0, (5, 3)), (0, (1, 2))


def grid(
    titles: Sequence[str], *, columns: int, height: float, right: float = 0.25, gap: float = 0.8, between: float = 0.95
) -> tuple[Figure, list[Axes]]:
    """One panel for each title, row by row, each `height` inches high; `right` inches are left for a key.

    gap and between: inches between columns and between rows, for the labels of the axes.
    """
    rows = -(-len(titles) // columns)
    top = 0.4
    total = top + rows * height + (rows - 1) * between + BOTTOM
    width = (WIDTH - LEFT - right - gap * (columns - 1)) / columns
    figure, panels = Figure(figsize=(WIDTH, total)), []
    for i, title in enumerate(titles):
        row, column = divmod(i, columns)
        x, y = LEFT + column * (width + gap), BOTTOM + (rows - 1 - row) * (height + between)
        axes = figure.add_axes((x / WIDTH, y / total, width / WIDTH, height / total))
        axes.text(-0.58 / width, 1 + 9 / 72 / height, title, transform=axes.transAxes, weight="bold", size=10)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        panels.append(axes)
    return figure, panels


def plain(value: float) -> str:
    """1.2e13 -> "1.2e13": FLOPs are compared by their exponents."""
    if not math.isfinite(value) or value <= 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def counted(value: float) -> str:
    """Parameters and tokens: "1.5M"."""
    return si(value, 3)


def log_axis(axes: Axes, which: str, values: np.ndarray, form: Callable[[float], str], *, most: int = 7) -> None:
    """A logarithmic axis around `values` (a fifth of a decade more at most), with plain ticks, at most so many."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 10.0)
    room = max((high / low) ** 0.05, 1.06)
    low, high = low / room, high * room
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(nice_ticks(low, high, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Numbers between low and high, about evenly spaced in their logarithms: two at least, `most` at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [(1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)]
    found: list[float] = []
    for steps in choices:
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= most:
            break
    else:
        found = found[:: -(-len(found) // most)]
    if len(found) >= 2:
        return found
    return [float(f"{low * (high / low) ** share:.2g}") for share in (0.15, 0.5, 0.85)]


def ordered_colors(count: int) -> list[str]:
    """Colours for an order (sizes, budgets): dark to light in viridis, which every colour vision can order."""
    map_ = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(map_(0.86 * i / max(count - 1, 1))) for i in range(count)]


def colors(count: int) -> list[str]:
    """Colours for names."""
    return [palette(i) for i in range(count)]


def evenly(entries: Sequence, most: int) -> list:
    """At most so many of them, the first and the last included."""
    pick = np.unique(np.linspace(0, len(entries) - 1, min(most, len(entries))).round().astype(int))
    return [entries[i] for i in pick]


def key(axes: Axes, entries: Sequence[tuple[str, dict]], title: str = "") -> None:
    """A list of (text, style of a line) to the right of the panel."""
    height = axes.get_position().height * axes.figure.get_figheight()
    width = axes.get_position().width * axes.figure.get_figwidth()
    place, step = 1.0, min(0.19, height / max(len(entries) + bool(title), 1)) / height
    style = {"transform": axes.transAxes, "clip_on": False}
    if title:
        axes.text(1 + 0.16 / width, place, title, size=8.5, color=GREY, va="center", **style)
        place -= 1.1 * step
    for text, look in entries:
        ends = [1 + 0.17 / width, 1 + 0.42 / width]
        middle = look.get("marker") and look.get("ls") in ("", "none")
        x = [sum(ends) / 2] if middle else ends
        line = Line2D(x, [place] * len(x), **{"lw": 1.6, "ms": 5, **look, **style})
        axes.add_artist(line)
        axes.text(1 + 0.5 / width, place, text, size=8.5, color=INK, va="center", **style)
        place -= step


def room(texts: Sequence[str]) -> float:
    """Inches that a key of these entries takes."""
    return min(0.72 + LETTER * max(map(len, texts), default=0), 3.0)


def dot(color: str, **more) -> dict:
    """A filled marker's style."""
    return {"color": color, "marker": "o", "ls": "none", "mec": "white", "mew": 0.6, "ms": 5.5, **more}


def ring(color: str, **more) -> dict:
    """A hollow marker's style: seen, but not counted."""
    return {"color": color, "marker": "o", "ls": "none", "mfc": "white", "mec": color, "mew": 1.3, "ms": 5.5, **more}


def level(axes: Axes, values: np.ndarray, *, share: float = 0.07) -> None:
    """The y range around the finite values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values):
        pad = share * (values.max() - values.min()) or 0.02 * abs(values.max()) or 1.0
        axes.set_ylim(values.min() - pad, values.max() + pad)
