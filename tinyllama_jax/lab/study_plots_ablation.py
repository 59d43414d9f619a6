"""Figures of ablations: loss against what a variant costs to serve, and loss beyond the length of training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from tinyllama_jax.lab.compare import Mean, mean
from tinyllama_jax.lab.draw import GREY, INK, shorten, si
from tinyllama_jax.lab.study_factors import SIZE, design, variant
from tinyllama_jax.lab.study_panels import DASHED, colors, counted, dot, grid, key, level, log_axis, room
from tinyllama_jax.lab.study_rows import Row, Study, alike, column, number

DECODE = re.compile(r"measure\.decode\.(.+)\.tokens_per_s")
BEYOND = re.compile(r"measure\.beyond\.([^.]+)\.(\d+)\.loss")
BY_POSITION = re.compile(r"measure\.beyond\.([^.]+)\.(\d+)\.by_position")
CACHE = "measure.cache_bytes_per_token"
MOST_VARIANTS = 14
MOST_PANELS = 6


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seeds only."""

    label: str
    size: int  # index of its size
    rows: list[Row]

    def mean(self, key: str) -> Mean | None:
        values = column(self.rows, key)
        return mean(values[np.isfinite(values)]) if np.isfinite(values).any() else None


def variants(rows: Sequence[Row]) -> list[Variant]:
    """By everything in the configuration that differs, seeds apart.

    Each is named by the fields, sizes apart, in which it has not the value that most have; what is usual in all of them
    by the first one.
    """
    rows = list(rows)
    table = design(rows)
    fields = [f for f in table if f not in (*SIZE, "model.heads", "batch_tokens") and not f.startswith("lr.")]
    fields = [f for f in fields if f != "model.d_ff" or not any(size in table for size in SIZE)] or fields
    size = alike(np.nan_to_num(column(rows, "parameters"), nan=1.0), 1.6)
    groups: dict[tuple, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(tuple(values[i] for values in table.values()), []).append(i)
    several = size.max() > 0 if len(rows) else False
    values = {field: [table[field][members[0]] for members in groups.values()] for field in fields}
    usual = {field: max(dict.fromkeys(those), key=those.count) for field, those in values.items()}
    found = []
    for members in groups.values():
        those = [rows[i] for i in members]
        other = [field for field in fields if table[field][members[0]] != usual[field]]
        label = variant(those[0], other or fields[:1]) or str(those[0].get("name", "run"))
        if several:
            label = f"{si(float(np.mean(column(those, 'parameters'))))}: {label}"
        found.append(Variant(label, int(size[members[0]]), those))
    return found


def serving_figure(study: Study) -> Figure | None:
    """Loss against decode speed and against KV-cache bytes per token; the Pareto front of each size."""
    settings = sorted({m[1] for row in study.finished for k in row if (m := DECODE.fullmatch(k))}, key=_settings_order)
    keys = [f"measure.decode.{name}.tokens_per_s" for name in settings]
    keys = [k for k in keys if _varies(study, k)]
    if len(keys) > 3:
        keys = [keys[i] for i in np.linspace(0, len(keys) - 1, 3).round().astype(int)]
    axes_of = [(k, f"loss: decoding, {_said(DECODE.fullmatch(k)[1])}", "tokens per second", True) for k in keys]
    axes_of += [(CACHE, "loss: KV cache", "bytes per token", False)] if _varies(study, CACHE) else []
    measured = [row for row in study.finished if any(math.isfinite(number(row, k)) for k, *_ in axes_of)]
    if not axes_of or len(measured) < 2:
        return None
    found = [v for v in variants(measured)][:MOST_VARIANTS]
    margin = room([shorten(v.label, 32) for v in found] + ["trained length"])
    figure, panels = grid([title for _, title, *_ in axes_of], columns=2, height=2.8, right=margin, gap=0.85)
    shade = _shades(found)
    for axes, (name, _, label, more_is_better) in zip(panels, axes_of, strict=True):
        spots = []
        for each in found:
            x, y = each.mean(name), each.mean("loss")
            if x is None or y is None:
                continue
            spots.append((each.size, x.value, y.value))
            look = dot(shade[each.label], marker="os^vDP"[each.size % 6], ms=7)
            if math.isfinite(y.se):
                axes.plot([x.value] * 2, [y.value - y.se, y.value + y.se], color=shade[each.label], lw=1.4)
            if math.isfinite(x.se):
                axes.plot([x.value - x.se, x.value + x.se], [y.value] * 2, color=shade[each.label], lw=1.4)
            axes.plot(x.value, y.value, **look, zorder=3)
        for size in sorted({s for s, *_ in spots}):
            front = pareto([(x, y) for s, x, y in spots if s == size], more_is_better)
            axes.plot(*np.array(front).T, color=GREY, lw=1.0, ls=DASHED, zorder=1.5)
        log_axis(axes, "x", np.array([x for _, x, _ in spots]), counted, most=5)
        spread = [v.mean("loss") for v in found]
        level(axes, np.array([m.value + s * m.se if math.isfinite(m.se) else m.value for m in spread for s in (-1, 1)]))
        axes.set_xlabel(label, loc="left")
    entries = [(shorten(v.label, 32), dot(shade[v.label], marker="os^vDP"[v.size % 6])) for v in found]
    key(panels[min(2, len(panels)) - 1], [*entries, ("Pareto front", {"color": GREY, "ls": DASHED, "lw": 1})])
    return figure


def pareto(spots: Sequence[tuple[float, float]], more_is_better: bool) -> list[tuple[float, float]]:
    """Those (x, loss) that no other beats in both."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(spots, key=lambda spot: (-spot[0] if more_is_better else spot[0], spot[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def beyond_figure(study: Study) -> Figure | None:
    """Loss at lengths up to and beyond that of training: a panel for each variant, a line for each method."""
    rows = [row for row in study.finished if any(BEYOND.fullmatch(k) for k in row)]
    if not rows:
        return None
    found = variants(rows)[:MOST_PANELS]
    methods = _methods(rows, BEYOND)
    lengths = sorted({length for those in methods.values() for length in those})
    shade = dict(zip(methods, colors(len(methods)), strict=True))
    single = len(found) == 1
    titles = ["loss" if single else shorten(f"loss: {v.label}", 40) for v in found]
    columns = 1 if single else 2
    figure, panels = grid(
        titles, columns=columns, height=3.2 if single else 2.3, right=room(["trained length"]), gap=0.65
    )
    heights = []
    for axes, each in zip(panels, found, strict=True):
        for i, (method, those) in enumerate(methods.items()):
            spots = [(n, m) for n in those if (m := each.mean(f"measure.beyond.{method}.{n}.loss"))]
            if not spots:
                continue
            x = np.array([n for n, _ in spots]) * 1.015 ** (i - (len(methods) - 1) / 2)  # beside each other
            y, se = np.array([m.value for _, m in spots]), np.array([m.se for _, m in spots])
            heights.append(y)
            axes.plot(x, y, color=shade[method], lw=1.5, marker="o", ms=4, zorder=2)
            for at, middle, bar in zip(x, y, se, strict=True):
                if math.isfinite(bar):
                    axes.plot([at, at], [middle - bar, middle + bar], color=shade[method], lw=1.2)
        trained = number(each.rows[0], "sequence_tokens")
        if trained > 0:
            axes.axvline(trained, color=INK, lw=0.9, ls=DASHED)
        log_axis(axes, "x", np.array(lengths, float), counted, most=6)
        ticks = [n for n in lengths] if len(lengths) <= 6 else lengths[:: -(-len(lengths) // 6)]
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set_xlabel("tokens in the window", loc="left")
    for axes in panels:
        level(axes, np.concatenate(heights))
    entries = [(method, {"color": shade[method], "marker": "o", "ms": 4}) for method in methods]
    key(panels[columns - 1], [*entries, ("trained length", {"color": INK, "ls": DASHED, "lw": 0.9})], "method")
    return figure


def position_figure(study: Study) -> Figure | None:
    """Loss by position in the longest window: a panel for each method, a line for each variant."""
    rows = [row for row in study.finished if any(BY_POSITION.fullmatch(k) and isinstance(row[k], list) for k in row)]
    if not rows:
        return None
    methods = dict(list(_methods(rows, BY_POSITION).items())[:MOST_PANELS])
    found = variants(rows)[:MOST_VARIANTS]
    shade = _shades(found)
    margin = room([shorten(v.label, 32) for v in found] + ["trained length"])
    columns = min(2, len(methods))
    titles = [f"loss: {method}, window of {max(lengths):,}" for method, lengths in methods.items()]
    figure, panels = grid(titles, columns=columns, height=2.3, right=margin, gap=0.65)
    for axes, (method, lengths) in zip(panels, methods.items(), strict=True):
        heights, name = [], f"measure.beyond.{method}.{max(lengths)}.by_position"
        for each in found:
            lists = [row[name] for row in each.rows if isinstance(row.get(name), list)]
            lists = [np.asarray(values, float) for values in lists if values]
            if not lists or len({len(values) for values in lists}) > 1:
                continue
            curve = np.mean(lists, axis=0)
            edges = np.linspace(0, max(lengths), len(curve) + 1)
            axes.plot((edges[1:] + edges[:-1]) / 2, curve, color=shade[each.label], lw=1.4)
            heights.append(curve[len(curve) // 50 :])
        if heights:
            level(axes, np.concatenate(heights))
        trained = number(rows[0], "sequence_tokens")
        if 0 < trained < max(lengths):
            axes.axvline(trained, color=INK, lw=0.9, ls=DASHED)
        axes.set_xlim(0, max(lengths))
        axes.set_xlabel("position in the window, tokens", loc="left")
    entries = [(shorten(v.label, 32), {"color": shade[v.label]}) for v in found]
    key(panels[columns - 1], [*entries, ("trained length", {"color": INK, "ls": DASHED, "lw": 0.9})])
    return figure


def _methods(rows: Sequence[Row], pattern: re.Pattern) -> dict[str, list[int]]:
    """Method -> its lengths."""
    found: dict[str, set[int]] = {}
    for row in rows:
        for name in row:
            if match := pattern.fullmatch(name):
                found.setdefault(match[1], set()).add(int(match[2]))
    return {method: sorted(lengths) for method, lengths in found.items()}


def _varies(study: Study, name: str) -> bool:
    values = column(study.finished, name)
    values = values[np.isfinite(values) & (values > 0)]
    return len(values) > 1 and values.max() > 1.005 * values.min()


def _shades(found: Sequence[Variant]) -> Mapping[str, str]:
    return dict(zip((v.label for v in found), colors(len(found)), strict=True))


def _settings_order(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _said(setting: str) -> str:
    """ "b8.c1024" -> "batch 8, context 1,024"; any other setting as it is."""
    match = re.fullmatch(r"b(\d+)\.c(\d+)", setting)
    return f"batch {match[1]}, context {int(match[2]):,}" if match else setting
