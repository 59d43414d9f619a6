"""The figures of a run's report, one function each, from what `lab.runs.Run` reads.

The training curve is ink; colours belong to sources and domains and mean the same one in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tinyllama_jax.lab import context_plots
from tinyllama_jax.lab.draw import (
    GREY,
    INK,
    STYLE,
    canvas,
    evenly,
    label_ends,
    last,
    limit_to_what_matters,
    line,
    log_ticks,
    marker,
    palette,
    raw_and_smooth,
    rug,
    scientific,
    shorten,
    si,
    smooth,
    thinned,
)
from tinyllama_jax.lab.evaluations import evaluations_figure
from tinyllama_jax.lab.fine_tuning import preference_figure
from tinyllama_jax.lab.runs import Run


def figures(run: Run, compare: Sequence[Run] = ()) -> dict[str, Figure]:
    """All figures that the run has data for, by file name without suffix, in the order of the report."""
    makers: dict[str, Callable[[], Figure | None]] = {
        "loss": lambda: loss_figure(run),
        "validation": lambda: validation_figure(run),
        "compare": lambda: compare_figure(run, compare),
        "preference": lambda: preference_figure(run),
        "schedule": lambda: schedule_figure(run),
        "mixture": lambda: mixture_figure(run),
        "norms": lambda: norms_figure(run),
        "throughput": lambda: throughput_figure(run),
        "evaluations": lambda: evaluations_figure(run),
        "positions": lambda: context_plots.of_run(run, "positions"),
        "passkey": lambda: context_plots.of_run(run, "passkey"),
    }
    with matplotlib.rc_context(STYLE):
        made = {name: make() for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def loss_figure(run: Run) -> Figure | None:
    """Training loss (raw and smoothed), validation loss, n-gram baselines and stage borders."""
    tokens, loss = run.column("tokens"), run.column("loss")
    if not len(tokens):
        return None
    figure, (axes,) = _canvas(run, [3.5], "loss in nats per token")
    smoothed = smooth(loss, breaks(run))
    raw_and_smooth(axes, tokens, loss, smoothed, INK)
    labels = [(last(smoothed), f"train  {last(smoothed):.2f}", INK)]
    color, seen = colors(run), run.column("tokens", "validation")
    for domain in run.domains:
        values = run.column(f"domains.{domain}.loss", "validation")
        line(axes, seen, values, color[domain], marker="o")
        labels.append((last(values), f"{shorten(domain)}  {last(values):.2f}", color[domain]))
    labels += _baselines(axes, run, color, "loss")
    limit_to_what_matters(axes, tokens, loss, [y for y, _, _ in labels])
    labels += rug(axes, tokens[~np.isfinite(loss)], "not finite")
    label_ends(axes, labels)
    return figure


def validation_figure(run: Run) -> Figure | None:
    """Validation loss and bits per byte of every domain."""
    seen = run.column("tokens", "validation")
    if not run.domains or not len(seen):
        return None
    color = colors(run)
    figure, panels = _canvas(run, [2.6, 2.6], "validation loss in nats per token", "validation bits per byte")
    for axes, measure in zip(panels, ("loss", "bits_per_byte"), strict=True):
        labels, all_values = [], []
        for domain in run.domains:
            values = run.column(f"domains.{domain}.{measure}", "validation")
            line(axes, seen, values, color[domain], marker="o")
            labels.append((last(values), f"{shorten(domain)}  {last(values):.2f}", color[domain]))
            all_values.append(values)
        labels += _baselines(axes, run, color, measure)
        x, y = np.tile(seen, len(all_values)), np.concatenate(all_values)
        limit_to_what_matters(axes, x, y, [level for level, *_ in labels], spikes=0.0)
        label_ends(axes, labels)
    return figure


def compare_figure(run: Run, others: Sequence[Run]) -> Figure | None:
    """Smoothed training loss of several runs, and the mean of their validation domains where they have them."""
    runs = [r for r in (run, *others) if len(r.metrics)]
    if not others or not runs:
        return None
    names = [shorten(name, 28) for name in unique_names(runs)]
    figure, (axes,) = canvas(
        [3.5],
        ["loss in nats per token: smoothed, and the mean of the validation domains as points"],
        span=(0.0, max(each.tokens for each in runs)),
        longest_label=max(map(len, names)) + len("  0.00"),
    )
    labels, raw = [], []
    for index, (each, name) in enumerate(zip(runs, names, strict=True)):
        color = INK if each is run else palette(index - 1)
        tokens, loss = each.column("tokens"), smooth(each.column("loss"), breaks(each))
        axes.plot(*thinned(tokens, loss), color=color, lw=1.6, marker=marker(tokens), ms=4)
        domains = [each.column(f"domains.{d}.loss", "validation") for d in each.domains]
        if domains:
            axes.plot(
                each.column("tokens", "validation"), np.mean(domains, axis=0), "o", color=color, ms=3.5, alpha=0.6
            )
        labels.append((last(loss), f"{name}  {last(loss):.2f}", color))
        raw.append((tokens, loss))
    limit_to_what_matters(axes, *(np.concatenate(part) for part in zip(*raw, strict=True)), [], after=0.03)
    label_ends(axes, labels)
    return figure


def schedule_figure(run: Run) -> Figure | None:
    """Learning rate and batch size against tokens."""
    tokens, rate = run.column("tokens"), run.column("lr")
    if not len(tokens):
        return None
    batch = batch_tokens(run)
    highest = np.nanmax(rate, initial=0.0)
    exponent = math.floor(math.log10(1.01 * highest)) if highest > 0 else 0
    unit = f" ({scientific(10.0**exponent).removeprefix('1')})" if exponent else ""
    figure, (upper, lower) = _canvas(run, [2.0, 1.5], f"learning rate{unit}", "batch size in tokens")
    line(upper, tokens, rate / 10.0**exponent, INK)
    upper.set_ylim(bottom=0)
    label_ends(upper, [(last(rate) / 10.0**exponent, scientific(last(rate)), INK)])
    line(lower, tokens, batch, INK, drawstyle="steps-pre")
    lower.set_ylim(0, 1.15 * np.nanmax(batch, initial=1.0))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda y, _: si(y)))
    label_ends(lower, [(last(batch), f"{last(batch):,.0f}", INK)])
    return figure


def mixture_figure(run: Run) -> Figure | None:
    """Realised share of every source in the batches, and how often each source has been read."""
    tokens, sources, color = run.column("tokens"), run.sources, colors(run)
    if not sources or not len(tokens):
        return None
    figure, (upper, lower) = _canvas(run, [2.3, 2.0], "share of each source in the batches", "epochs over each source")
    measured = [smooth(run.column(f"mixture.{source}"), breaks(run), trim=0.0) for source in sources]
    shares = np.nan_to_num(measured)
    edges = np.vstack([np.zeros(len(tokens)), np.cumsum(shares, axis=0)])
    pick = evenly(len(tokens))
    labels = []
    for i, source in enumerate(sources):
        if len(tokens) == 1:  # an area needs a width
            upper.bar(tokens, shares[i], bottom=edges[i], color=color[source], alpha=0.85, width=0.2 * tokens)
        else:
            low, high = edges[i][pick], edges[i + 1][pick]
            upper.fill_between(tokens[pick], low, high, color=color[source], alpha=0.85, lw=0)
            upper.plot(tokens[pick], high, color="white", lw=0.8)
        labels.append(((edges[i][-1] + edges[i + 1][-1]) / 2, f"{shorten(source)}  {shares[i][-1]:.0%}", color[source]))
    upper.set_ylim(0, 1)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    label_ends(upper, labels)
    labels = []
    for source in sources:
        epochs = run.column(f"epoch.{source}")
        line(lower, tokens, epochs, color[source])
        labels.append((last(epochs), f"{shorten(source)}  {last(epochs):.2f}", color[source]))
    lower.set_ylim(bottom=0)
    label_ends(lower, labels)
    return figure


def norms_figure(run: Run) -> Figure | None:
    """Global L2 norms of the gradient (before clipping) and of the parameters; skipped steps are marked."""
    tokens, gradient, parameters = run.column("tokens"), run.column("grad_norm"), run.column("param_norm")
    if not (np.isfinite(gradient).any() or np.isfinite(parameters).any()):
        return None
    figure, (upper, lower) = _canvas(run, [2.3, 1.7], "gradient norm", "parameter norm")
    positive = np.where(gradient > 0, gradient, np.nan)
    smoothed = smooth(positive, breaks(run))
    raw_and_smooth(upper, tokens, positive, smoothed, INK)
    log_ticks(upper)
    labels = [(last(smoothed), f"{last(smoothed):.3g}", INK)]
    clip = run.config.get("optimizer", {}).get("clip_norm")
    low, high = upper.get_ylim()
    if clip and low < clip < high:
        upper.axhline(clip, color=GREY, lw=1, ls=(0, (5, 3)))
        labels.append((clip, f"clipped at {clip:g}", GREY))
    label_ends(upper, labels + rug(upper, tokens[np.nan_to_num(run.column("skipped")) > 0], "skipped"))
    line(lower, tokens, parameters, INK)
    label_ends(lower, [(last(parameters), f"{last(parameters):.4g}", INK)])
    return figure


def throughput_figure(run: Run) -> Figure | None:
    """Tokens per second, the share of a step spent waiting for data, and model FLOP utilisation where known."""
    tokens, speed = run.column("tokens"), run.column("timing.tokens_per_s")
    if not np.isfinite(speed).any():
        return None
    wait = 100 * run.column("timing.data_wait_s") / run.column("timing.step_s")
    mfu = {name: 100 * run.column(f"timing.mfu_{key}") for name, key in (("PaLM", "palm"), ("causal", "causal"))}
    shades = (palette(0), palette(1))
    mfu = {name: values for name, values in mfu.items() if np.isfinite(values).any()}
    titles = ["tokens per second", "waiting for data, % of step time"] + (["model FLOP utilisation, %"] if mfu else [])
    figure, panels = _canvas(run, [2.0, 1.4, 1.6][: len(titles)], *titles)
    rows = [(panels[0], "", speed, INK), (panels[1], "", wait, INK)]
    rows += [(panels[2], f"{name} count  ", mfu[name], color) for name, color in zip(mfu, shades, strict=False)]
    labels: dict[Axes, list[tuple[float, str, str]]] = {axes: [] for axes in panels}
    compiled = run.column("timing.compiled") == 1
    compiled &= len(tokens) > 25  # of a few steps all are shown as they were
    for axes, name, values, color in rows:
        smoothed = smooth(np.where(compiled, np.nan, values), breaks(run))
        raw_and_smooth(axes, tokens, values, smoothed, color)
        top = np.nanquantile(values, 0.99) if np.isfinite(values).any() else 0.0
        axes.set_ylim(0, max(axes.get_ylim()[1] if labels[axes] else 1.0, 1.25 * top))
        end = last(smoothed)
        labels[axes].append((end, f"{name}{si(end) if axes is panels[0] else f'{end:.2g}%'}", color))
    for axes in panels:
        label_ends(axes, labels[axes])
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: si(y)))
    return figure


def colors(run: Run) -> dict[str, str]:
    """One colour for each training source and validation domain; those of one name share it."""
    names = dict.fromkeys([*run.sources, *run.domains, *run.baselines.get("domains", {})])
    return {name: palette(i) for i, name in enumerate(names)}


def breaks(run: Run) -> list[int]:
    """Indices of the steps that begin a stage: running means do not reach over them."""
    ends = [stage["end_step"] for stage in run.stages[:-1] if "end_step" in stage]
    return np.searchsorted(run.column("step"), ends, side="right").tolist()


def batch_tokens(run: Run) -> np.ndarray:
    """Tokens in the batch of each step: from the plan, or else from how far each step advanced; float64 [steps]."""
    steps, tokens = run.column("step"), run.column("tokens")
    ends = [stage.get("end_step") for stage in run.stages]
    sizes = [stage.get("batch_tokens") for stage in run.stages]
    if ends and None not in ends + sizes:
        return np.asarray(sizes, float)[np.minimum(np.searchsorted(ends, steps), len(ends) - 1)]
    before_steps, before_tokens = np.append(0, steps[:-1]), np.append(0, tokens[:-1])
    return (tokens - before_tokens) / np.maximum(steps - before_steps, 1)


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; where two share one, with their directories."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.directory.name})"
        for name, run in zip(names, runs, strict=True)
    ]


def _canvas(run: Run, heights: Sequence[float], *titles: str) -> tuple[Figure, list[Axes]]:
    """A canvas whose margin fits this run's longest label, so that the x axes of all its figures are aligned."""
    tokens = run.column("tokens")
    names = [shorten(name) for name in (*run.sources, *run.domains)]
    begin = run.stages[0].get("start_tokens", 0) if run.stages and run.step else 0
    forked = len(tokens) > 1 and tokens[0] > 0.5 * tokens[-1] and tokens[0] - begin > 10 * (tokens[1] - tokens[0])
    figure, panels = canvas(
        heights,
        titles,
        span=(tokens[0] if forked else 0.0, run.tokens),
        longest_label=max([len(name) for name in names], default=0) + len("  unigram  0.00"),
        borders=[(s.get("start_tokens", 0), s.get("end_tokens", 0), str(s.get("name", ""))) for s in run.stages],
    )
    return figure, panels


def _baselines(axes: Axes, run: Run, color: dict[str, str], measure: str) -> list[tuple[float, str, str]]:
    """Horizontal lines at what counting achieves; returns their labels.  Over many domains only the mean bigram."""
    found = {
        (domain, order): float(values[order][measure])
        for domain, values in run.baselines.get("domains", {}).items()
        for order in ("unigram", "bigram")
        if isinstance(values.get(order, {}).get(measure), int | float)
    }
    if len({domain for domain, _ in found}) > 3:
        bigrams = [value for (_, order), value in found.items() if order == "bigram"]
        found = {("mean of domains", "bigram"): float(np.mean(bigrams))} if bigrams else {}
    labels = []
    for (domain, order), value in found.items():
        if math.isfinite(value):
            shade = color.get(domain, GREY)
            axes.axhline(value, color=shade, lw=1.1, ls=(0, (5, 3)) if order == "bigram" else (0, (1, 2)), alpha=0.9)
            labels.append((value, f"{shorten(domain)} {order}  {value:.2f}", shade))
    return labels
