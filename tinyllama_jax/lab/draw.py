"""The house style of every figure, and the few drawing helpers that matplotlib lacks.

Figures are 8 inches wide, to be shown at 800 pixels: 10 points are 14 pixels there.  Lines are labelled where they
end instead of in a legend.  Nothing here touches matplotlib's global state, so that reports can be written from
threads and notebooks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

# Okabe & Ito, "Color universal design" (2008): told apart with every common colour blindness.  Their black is the
# role of INK; their yellow is darkened, because it would vanish on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A89B00")
INK, GREY, FAINT, ALARM = "#1f2328", "#6a737d", "#e6e9ec", "#c4320a"

STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same figure everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#b3b9c0",
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": "#b3b9c0",
    "ytick.color": "#b3b9c0",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_WIDTH, _LEFT, _BOTTOM, _GAP = 8.0, 0.72, 0.55, 0.62  # inches
_LETTER = 0.068  # inches that a letter of a label takes on average
_POINTS = 3000  # more than can be seen at 800 pixels
_FEW = 25  # points up to which each one is drawn


def si(value: float, digits: int = 3) -> str:
    """1234567 -> "1.23M": thousands k, millions M, then the field's B and T; "–" where there is no number."""
    if not math.isfinite(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 0.5 * 10.0**-digits):
            return f"{_significant(value / size, digits)}{unit}"
    return _significant(value, digits)


def scientific(value: float, digits: int = 2) -> str:
    """0.0004 -> "4×10⁻⁴"; at most `digits` after the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}×10{raised}"


def palette(index: int) -> str:
    """The index-th colour; after the last come the same ones again, lighter."""
    color, lighter = PALETTE[index % len(PALETTE)], index // len(PALETTE) % 2
    return _mixed(color, 255, 0.45) if lighter else color


def shorten(name: str, letters: int = 22) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def smooth(values: np.ndarray, breaks: Sequence[int] = (), *, trim: float = 0.1) -> np.ndarray:
    """Running mean over a fortieth of the points, without the shares `trim` of highest and lowest in each window.

    Windows do not reach over `breaks` (indices at which something changed), where they are cut off.  Over the first
    points they shrink on both sides alike, because a loss falls too steeply there for a lopsided mean.  Values that
    are not finite take no part and are NaN in the answer.
    """
    n, half = len(values), len(values) // 80
    if half == 0:
        return np.where(np.isfinite(values), values, np.nan)
    at = evenly(n)
    edges = np.unique(np.clip([0, *breaks, n], 0, n))
    segment = np.searchsorted(edges, at, side="right")
    low = np.maximum(at - half, edges[segment - 1])
    high = np.minimum(at + half, edges[segment] - 1)
    high = np.where(segment == 1, np.minimum(high, 2 * at), high)
    taken = np.linspace(0, 1, min(2 * half + 1, 201))  # of a wide window, a few hundred points say enough
    places = np.round(low[:, None] + (high - low)[:, None] * taken).astype(int)
    window = np.where(np.isfinite(values), values, np.nan)[places]
    window.sort(axis=1)  # NaN go last
    present = np.isfinite(window).sum(axis=1)
    cut = (trim * present).astype(int)
    rank = np.arange(window.shape[1])
    kept = (rank >= cut[:, None]) & (rank < (present - cut)[:, None])
    means = np.where(kept, window, 0.0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    ok = present > 0
    filled = np.interp(np.arange(n), at[ok], means[ok]) if ok.any() else np.full(n, np.nan)
    return np.where(np.isfinite(values), filled, np.nan)


def last(values: np.ndarray) -> float:
    """The last finite value, NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def canvas(
    heights: Sequence[float],
    titles: Sequence[str],
    *,
    span: tuple[float, float],
    longest_label: int,
    borders: Sequence[tuple[float, float, str]] = (),
) -> tuple[Figure, list[Axes]]:
    """A column of panels of `heights` inches over one axis of tokens from span[0] to span[1].

    `borders` are stages (start, end, name): lines between them, their names above the uppermost panel.
    """
    shown = [b for b in borders if b[0] < span[1] and b[1] > span[0]]
    named = 0.2 if len(shown) > 1 else 0.0
    top = 0.38 + named
    height = top + sum(heights) + _GAP * (len(heights) - 1) + _BOTTOM
    right = min(max(0.25 + _LETTER * longest_label, 1.0), 3.0)
    figure = Figure(figsize=(_WIDTH, height))
    panels, above = [], top
    for panel_height, title in zip(heights, titles, strict=True):
        box = (_LEFT, height - above - panel_height, _WIDTH - _LEFT - right, panel_height)
        axes = figure.add_axes((box[0] / _WIDTH, box[1] / height, box[2] / _WIDTH, box[3] / height))
        lift = (8 + 72 * named if not panels else 8) / 72 / panel_height
        axes.text(-0.58 / box[2], 1 + lift, title, transform=axes.transAxes, weight="bold", size=10.5)
        slack = 0.0 if span[1] > span[0] else 1.0
        axes.set_xlim(span[0], span[1] + slack)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: si(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for start, end, name in shown if len(shown) > 1 else ():
            if start > span[0]:
                axes.axvline(start, color="#9aa3ac", lw=0.8, zorder=0.5)
            visible = (min(end, span[1]) - max(start, span[0])) / (span[1] - span[0]) * box[2]
            if not panels and visible > _LETTER * len(name) + 0.08:
                place = axes.get_xaxis_transform()
                axes.annotate(name, (max(start, span[0]), 1), xycoords=place, xytext=(2, 5), textcoords="offset points",
                              size=8.5, color=GREY)  # fmt: skip
        panels.append(axes)
        above += panel_height + _GAP
    panels[-1].set_xlabel("tokens seen", loc="left")
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
    return figure, panels


def log_ticks(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, at 1, 2 and 5 of each decade while there are few decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, **style) -> None:
    """A line that shows its points while they are few."""
    style = {"lw": 1.6, "marker": marker(x), "ms": 4, "clip_on": False, **style}
    axes.plot(*thinned(x, y), color=color, **style)


def raw_and_smooth(axes: Axes, x: np.ndarray, raw: np.ndarray, smoothed: np.ndarray, color: str) -> None:
    """The values as measured, thin and pale, and their running mean."""
    if len(x) > _FEW:
        axes.plot(*_envelope(x, raw), color=color, lw=0.6, alpha=0.25)
    line(axes, x, smoothed, color, clip_on=len(x) > _FEW)


def rug(axes: Axes, x: np.ndarray, text: str) -> list[tuple[float, str, str]]:
    """Marks along the lower edge, for steps at which something went wrong; returns their label for `label_ends`."""
    if not len(x):
        return []
    axes.plot(x, np.full(len(x), 0.03), "|", transform=axes.get_xaxis_transform(), color=ALARM, ms=7, mew=1.3)
    height = axes.transData.inverted().transform(axes.transAxes.transform((0, 0.03)))[1]
    return [(float(height), f"{len(x):,} {text}", ALARM)]


def limit_to_what_matters(
    axes: Axes, x: np.ndarray, y: np.ndarray, levels: Sequence[float], *, after: float = 0.01, spikes: float = 0.002
) -> None:
    """Set the y range to `levels` and to the values beyond the first share `after` of x, less a share of `spikes`."""
    finite = np.isfinite(y) & np.isfinite(x)
    if finite.any():
        x, y = x[finite], y[finite]
        few = len(y) <= _FEW
        begin, end = axes.get_xlim()
        settled = y if few else y[x >= begin + after * (end - begin)]
        levels = [*levels, *np.quantile(settled, [0, 1 if few else 1 - spikes])]
    levels = [level for level in levels if math.isfinite(level)]
    if levels:
        low, high = min(levels), max(levels)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], *, size: float = 8.5) -> None:
    """Write (y, text, colour) beside the right edge at height y, moved apart where they would overlap.

    Call it when the y range is final: lines that leave it are cut off from here on.
    """
    low, high = axes.get_ylim()  # also makes pending autoscaling happen before heights are computed
    for drawn in axes.lines:
        if drawn.get_transform() == axes.transData and not np.all(_inside(drawn.get_ydata(), low, high)):
            drawn.set_clip_on(True)
    labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    if not labels:
        return
    _, _, width, height = axes.get_position().bounds
    width, height = width * axes.figure.get_figwidth(), height * axes.figure.get_figheight()
    ys = axes.transAxes.inverted().transform(axes.transData.transform([(0, y) for y, _, _ in labels]))[:, 1]
    ys = np.clip(ys, 0, 1)
    # Text needs more contrast than lines do: its colours are darkened.
    gap = min(1.45 * size / 72 / height, 1.15 / len(labels))
    style = {"transform": axes.transAxes, "clip_on": False}
    for y, place, (_, text, color) in zip(ys, _spread(ys, gap), labels, strict=True):
        ends = [1 + 0.03 / width, 1 + 0.14 / width]
        axes.plot(ends, [y, place], color=color, lw=0.8, **style)
        axes.text(ends[1] + 0.04 / width, place, text, color=_mixed(color, 0, 0.22), size=size, va="center", **style)


def marker(x: np.ndarray) -> str:
    return "o" if len(x) <= _FEW else ""


def evenly(n: int) -> np.ndarray:
    """Indices of at most a drawable number of n points, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).astype(int))


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pick = evenly(len(x))
    return x[pick], y[pick]


def png(figure: Figure, *, dpi: int = 200) -> bytes:
    """The figure as PNG, of 256 colours: a third of the bytes for no difference that one could see."""
    whole, few = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(whole, format="png", dpi=dpi)
    _of_few_colours(Image.open(whole).convert("RGB")).save(few, format="png", optimize=True, dpi=(dpi, dpi))
    return few.getvalue()


def _of_few_colours(image: Image.Image, exact: int = 64) -> Image.Image:
    """The image with a palette: its commonest colours as they are, and 256 - `exact` that lie close to all others."""
    red, green, blue = np.moveaxis(np.asarray(image, np.int32), -1, 0)
    packed = red << 16 | green << 8 | blue
    codes, place, counts = np.unique(packed, return_inverse=True, return_counts=True)
    seen = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    rest = image.quantize(256 - exact, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette()
    palette = np.concatenate([seen[np.argsort(-counts)[:exact]], np.reshape(rest, (-1, 3))])[:256]
    nearest = ((seen[:, None] - palette) ** 2).sum(-1).argmin(1)
    few = Image.frombytes("P", image.size, nearest[place].astype(np.uint8).tobytes())
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def _envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `thinned`, but keeping the lowest and the highest value of what is left out: a spike must stay visible."""
    if len(x) <= _POINTS:
        return x, y
    starts = np.linspace(0, len(x), _POINTS // 2, endpoint=False).astype(int)
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return np.repeat(x[starts], 2), np.stack([low, high], axis=1).ravel()


def _spread(ys: np.ndarray, gap: float) -> np.ndarray:
    """Places at least `gap` apart, nearest to the increasing `ys` in the least-squares sense.

    With z_i = y_i - i gap the condition is that z does not decrease: isotonic regression by pooling adjacent
    violators.
    """
    blocks: list[tuple[float, int]] = []
    for i, y in enumerate(ys):
        blocks.append((y - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    places = np.concatenate([np.full(n, z) for z, n in blocks])
    return np.clip(places, -0.02, max(1.02 - (len(ys) - 1) * gap, -0.02)) + gap * np.arange(len(ys))


def _inside(y: np.ndarray, low: float, high: float) -> np.ndarray:
    y = np.asarray(y, float)
    return ~np.isfinite(y) | ((low <= y) & (y <= high))


def _mixed(color: str, with_grey: int, share: float) -> str:
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * part + share * with_grey):02x}" for part in parts)


def _significant(value: float, digits: int) -> str:
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.0f}" if whole >= digits else f"{value:.{digits}g}"
