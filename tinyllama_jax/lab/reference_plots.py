"""A run beside curves from elsewhere: a figure of both losses and of their difference, and the numbers below it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tinyllama_jax.lab.draw import GREY, INK, STYLE, canvas, label_ends, limit_to_what_matters, palette, shorten, si
from tinyllama_jax.lab.page import table
from tinyllama_jax.lab.reference import Comparison


def reference_figure(name: str, found: Sequence[Comparison]) -> Figure:
    """`name` is the run's; one colour for each reference."""
    with matplotlib.rc_context(STYLE):
        names = [shorten(each.name, 24) for each in found]
        figure, (upper, lower) = canvas(
            [3.1, 1.7],
            ["loss in nats per token, running means", "run minus reference, nats per token"],
            span=(min(each.tokens[0] for each in found), max(each.tokens[-1] for each in found)),
            longest_label=max(map(len, [*names, shorten(name, 24)])) + len("  +0.000"),
        )
        longest = max(found, key=lambda each: each.tokens[-1] - each.tokens[0])
        upper.plot(longest.tokens, longest.run, color=INK, lw=1.6, zorder=3)
        labels, gaps = [(longest.run[-1], f"{shorten(name, 24)}  {longest.run[-1]:.3f}", INK)], []
        lower.axhline(0, color=GREY, lw=0.9)
        for i, (each, label) in enumerate(zip(found, names, strict=True)):
            upper.plot(each.tokens, each.reference, color=palette(i), lw=1.4)
            labels.append((each.reference[-1], f"{label}  {each.reference[-1]:.3f}", palette(i)))
            lower.plot(each.tokens, each.difference, color=palette(i), lw=1.4)
            gaps.append((each.difference[-1], f"{label}  {each.difference[-1]:+.3f}", palette(i)))
        x = np.concatenate([np.tile(each.tokens, 2) for each in found])
        y = np.concatenate([curve for each in found for curve in (each.run, each.reference)])
        limit_to_what_matters(upper, x, y, [level for level, *_ in labels], after=0.03)
        x, y = (np.concatenate([getattr(each, part) for each in found]) for part in ("tokens", "difference"))
        limit_to_what_matters(lower, x, y, [0.0], after=0.03)
        label_ends(upper, labels)
        label_ends(lower, gaps)
    return figure


def deviations(found: Sequence[Comparison]) -> str:
    """The table below the figure, as HTML."""
    rows = []
    for each in found:
        value = each.as_json()
        lag = value["lag_percent"]
        rows.append(
            [
                escape(each.name),
                f"{si(value['from_tokens'])} – {si(value['to_tokens'])}",
                f"{value['mean_difference']:+.4f}",
                f"{value['mean_absolute_difference']:.4f}",
                f"{value['largest_absolute_difference']:.4f} <small>at {si(value['largest_at_tokens'])}</small>",
                f"{value['final_difference']:+.4f}",
                "–" if lag is None else f"{lag:+.1f}%",
            ]
        )
    header = ["reference", "tokens compared", "mean difference", "mean absolute", "largest", "final"]
    return table([*header, "tokens needed for the same loss"], rows)
