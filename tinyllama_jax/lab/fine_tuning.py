"""What a report says of a run that went on from a checkpoint: its base, what was trained, its best step, its pairs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from tinyllama_jax.lab.draw import (
    INK,
    canvas,
    label_ends,
    last,
    line,
    palette,
    raw_and_smooth,
    shorten,
    si,
    smooth,
)
from tinyllama_jax.lab.page import number
from tinyllama_jax.lab.runs import Run
from tinyllama_jax.train import best

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def section(run: Run) -> str:
    """HTML; empty for a run that began with fresh weights."""
    start = run.config.get("start") or {}
    if not start:
        return ""
    adapter, model = run.config.get("adapter") or {}, run.info.get("model", {})
    trained, total = model.get("trained_parameters"), (model.get("parameters") or {}).get("total")
    lines = [f"Went on from <code>{escape(str(start.get('checkpoint')))}</code>."]
    if adapter:
        what = f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {', '.join(adapter['targets'])}"
        if adapter["method"] == "prefix":
            what = f"{adapter['prefix_tokens']} tokens"
        lines.append(f"Trained: {escape(adapter['method'])}, {escape(what)}; base frozen in {adapter['base_weights']}.")
    if trained and total:
        lines.append(f"{si(trained)} of {si(total)} parameters were trained ({trained / total:.2%}).")
    measured = best.losses(run.directory)
    step = best.best(measured)
    if step is not None:
        loss = dict(measured)[step]
        lines.append(f"Best validation: {number(loss)} nats at step {step:,}, from {number(measured[0][1])} before.")
    if ended := run.info.get("ended"):
        lines.append(f"Ended at step {ended['step']:,}: validations without a better one had used up the patience.")
    return "<h2>Fine-tuning</h2><p>" + " ".join(lines) + "</p>"


def preference_figure(run: Run) -> Figure | None:
    """Share of pairs ranked rightly, and the margin of their rewards, in training and on held-out pairs."""
    tokens = run.column("tokens")
    if "accuracy" not in run.metrics.names or not len(tokens):
        return None
    titles = ["share of pairs whose preferred answer has the higher reward", "margin of rewards in nats"]
    figure, panels = canvas([2.4, 2.4], titles, span=(0.0, float(tokens[-1])), longest_label=24)
    seen = run.column("tokens", "validation")
    for axes, name in zip(panels, ("accuracy", "margin"), strict=True):
        values = run.column(name)
        smoothed = smooth(values)
        raw_and_smooth(axes, tokens, values, smoothed, INK)
        labels = [(last(smoothed), f"train  {last(smoothed):.2f}", INK)]
        for index, domain in enumerate(run.domains):
            held_out = run.column(f"domains.{domain}.{name}", "validation")
            if np.isfinite(held_out).any():
                line(axes, seen, held_out, palette(index), marker="o")
                labels.append((last(held_out), f"{shorten(domain)}  {last(held_out):.2f}", palette(index)))
        label_ends(axes, labels)
    return figure
