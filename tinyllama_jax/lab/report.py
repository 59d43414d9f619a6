"""A run's report: one HTML page that needs nothing beside itself, and the same figures as PNG files.

The page holds its style and its figures inline, and a content security policy that forbids every request, so that it
can be mailed, archived, or opened from a cluster's file system years later.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax import __version__
from tinyllama_jax.lab import fine_tuning
from tinyllama_jax.lab.draw import last, png, scientific, si, smooth
from tinyllama_jax.lab.evaluations import evaluations
from tinyllama_jax.lab.history import events, time_spent
from tinyllama_jax.lab.page import CAPTIONS, PAGE, duration, number, picture, table, write_page
from tinyllama_jax.lab.plots import breaks, figures, unique_names
from tinyllama_jax.lab.reference import Comparison, Curve, of_run
from tinyllama_jax.lab.reference import compare as compare_curves
from tinyllama_jax.lab.reference_plots import deviations, reference_figure
from tinyllama_jax.lab.runs import Run

_MOST_SAMPLES = 200  # rows; a page must stay light enough to be mailed


def write_report(
    run_dir: str | Path | Run, *, compare: Sequence[str | Path | Run] = (), references: Sequence[Curve] = ()
) -> Path:
    """Write `report.html` and `plots/*.png` into the run directory, and return the page's path.

    `compare` names other runs, whose loss curves are laid over this one's; `references` are curves from elsewhere
    (reference.read), beside which this run's is drawn with the difference.  Both the page and the plots are written
    under temporary names and renamed; plots of an earlier report that this one lacks are left alone.  The run may
    still be going on.  Raises DataError where a directory is no run directory or cannot be written to.
    """
    run = run_dir if isinstance(run_dir, Run) else Run(run_dir)
    others = [other if isinstance(other, Run) else Run(other) for other in compare]
    compared = against(run, references)
    drawn = figures(run, others)
    if compared:
        drawn["reference"] = reference_figure(run.name, compared)
    images = {name: png(figure) for name, figure in drawn.items()}
    return write_page(run.directory, render(run, images, others, compared), images)


def against(run: Run, references: Sequence[Curve]) -> list[Comparison]:
    """The run beside each of the curves.  DataError where they have no tokens in common."""
    own = of_run(run) if references else None
    return [compare_curves(own, reference) for reference in references]


def render(run: Run, images: dict[str, bytes], others: Sequence[Run] = (), compared: Sequence[Comparison] = ()) -> str:
    """The page as text; `images` are PNGs by the names of `plots.figures`."""
    below = {"compare": _comparison(run, others), "reference": deviations(compared)}
    sections = [
        _head(run),
        fine_tuning.section(run),
        _verdicts(run),
        *(_figure(name, images[name]) + below.get(name, "") for name in CAPTIONS if name in images),
        evaluations(run),
        _stages(run),
        _samples(run),
        time_spent(run),
        events(run),
        _provenance(run),
    ]
    body = "\n".join(section for section in sections if section)
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return PAGE.substitute(
        title=escape(run.name), body=body, footer=f"tinyllama_jax {escape(__version__)} · written {written}"
    )


def _head(run: Run) -> str:
    total = run.plan.get("total_tokens", 0)
    done = min(run.tokens / total, 1.0) if total else math.nan
    if run.finished:
        state = '<span class="state good">finished</span>'
    elif run.step:
        share = f"{done:.0%} of {si(total)} planned tokens" if total else "length unknown"
        state = f'<span class="state open">not finished</span> {share}'
    else:
        state = '<span class="state open">no steps yet</span>'
    bar = f'<div class="progress"><i style="width:{100 * done:.1f}%"></i></div>' if 0 < done < 1 else ""
    return f"<header><h1>{escape(run.name)}</h1><p>{state}</p>{bar}</header>" + _tiles(run)


def _tiles(run: Run) -> str:
    parameters = run.info.get("model", {}).get("parameters", {})
    loss, speed = run.column("loss"), run.column("timing.tokens_per_s")
    averaged = max(1, len(loss) // 80 + 1)
    in_steps, elapsed = float(np.nansum(run.column("timing.step_s"))), _elapsed(run)
    skipped = int((np.nan_to_num(run.column("skipped")) > 0).sum())
    tiles = [
        ("parameters", si(parameters.get("total", math.nan)), _maybe(parameters, "non_embedding", "{} non-embedding")),
        ("tokens", si(run.tokens), f"{run.step:,} steps" + (f", {skipped:,} skipped" if skipped else "")),
        (
            "training loss",
            number(last(smooth(loss, breaks(run)))),
            f"nats per token, last {averaged} steps" if run.step else "",
        ),
        ("time in steps", duration(in_steps), f"{duration(elapsed)} with pauses" if elapsed > 1.01 * in_steps else ""),
        ("tokens per second", si(_median(speed)), _utilisation(run)),
        ("device", *_device(run.info.get("devices"))),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd{' class=long' if len(value) > 16 else ''}>{escape(value)}</dd>"
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _verdicts(run: Run) -> str:
    """Validation against the counting baselines; the model's loss is the one measured with them, where there is one."""
    measured = run.baselines.get("domains", {})
    names = list(dict.fromkeys([*run.domains, *measured]))
    if not names:
        return "<h2>Validation</h2><p>No validation was recorded.</p>"
    rows, margins = [], []
    for name in names:
        baseline = measured.get(name, {})
        model = baseline.get("model", {})
        loss = _float(model.get("loss", run.last_validation(name)))
        bits = _float(model.get("bits_per_byte", run.last_validation(name, "bits_per_byte")))
        unigram, bigram = (_float(baseline.get(order, {}).get("loss")) for order in ("unigram", "bigram"))
        margin, verdict = bigram - loss, "–"
        if not math.isnan(bigram):
            good = margin > 0
            margins.append(margin)
            text = f"{abs(margin):.2f} {'below' if good else 'above'} the bigram"
            text = text if math.isfinite(margin) else "no finite loss"
            verdict = f'<span class="{"good" if good else "bad"}">{"✓" if good else "✗"} {text}</span>'
        perplexity = f"{math.exp(loss):,.1f}" if loss < 20 else "–"
        rows.append([escape(name), number(loss, 3), number(bits, 3), perplexity])
        rows[-1] += [number(unigram), number(bigram), verdict] if measured else []
    finding = "" if measured else "<p>Not yet compared with counting: <code>eval RUN --baselines</code> does that.</p>"
    if margins:
        won, fitted = sum(margin > 0 for margin in margins), _float(run.baselines.get("fitted_on_tokens"))
        first = "first " if fitted < run.tokens else ""
        finding = (
            f"<p>Below the bigram in {won} of {len(margins)} {'domain' if len(margins) == 1 else 'domains'}: "
            + ("the model has learned" if won == len(margins) else "elsewhere the model has not yet learned")
            + (" more than which token follows which." if won == len(margins) else " which token follows which.")
            + (f" The baselines count the {first}{si(fitted)} tokens that it was trained on." if fitted > 0 else "")
            + "</p>"
        )
    header = ["domain", "loss", "bits per byte", "perplexity"]
    header += ["unigram loss", "bigram loss", "against counting"] if measured else []
    return f"<h2>Validation</h2>{finding}{table(header, rows)}"


def _figure(name: str, image: bytes) -> str:
    heading, caption = CAPTIONS[name]
    return f"<h2>{heading}</h2>" + picture(image, heading, caption)


def _comparison(run: Run, others: Sequence[Run]) -> str:
    """The table that stands below the comparing figure."""
    rows = []
    runs = [run, *others]
    for each, name in zip(runs, unique_names(runs), strict=True):
        validation = [each.last_validation(domain) for domain in each.domains]
        total = each.info.get("model", {}).get("parameters", {}).get("total", math.nan)
        rows.append(
            [
                escape(name),
                si(total),
                si(each.tokens),
                number(last(smooth(each.column("loss"), breaks(each))), 3),
                number(float(np.mean(validation)) if validation else math.nan, 3),
                si(_median(each.column("timing.tokens_per_s"))),
            ]
        )
    header = ["run", "parameters", "tokens", "training loss", "validation loss, mean of domains", "tokens per second"]
    return table(header, rows)


def _stages(run: Run) -> str:
    if not run.stages:
        return ""
    steps, loss, rate = run.column("step"), smooth(run.column("loss"), breaks(run)), run.column("lr")
    configured = {stage.get("name"): stage for stage in run.config.get("curriculum", []) if isinstance(stage, dict)}
    rows = []
    for stage in run.stages:
        start, end = stage.get("start_step", 0), stage.get("end_step", 0)
        inside = (steps > start) & (steps <= end)
        rates = rate[inside]
        done = min(max((run.step - start) / max(end - start, 1), 0.0), 1.0)
        rows.append(
            [
                escape(str(stage.get("name", ""))),
                f"{si(stage.get('start_tokens', math.nan))} – {si(stage.get('end_tokens', math.nan))}",
                f"{end - start:,}",
                si(stage.get("batch_tokens", math.nan)),
                _mixture(configured.get(stage.get("name"), {})),
                f"{scientific(rates[0], 1)} → {scientific(rates[-1], 1)}" if len(rates) else "–",
                number(last(loss[inside])),
                "done" if done == 1 else f"{done:.0%}" if done else "to come",
            ]
        )
    header = ["stage", "tokens", "steps", "batch tokens", "mixture", "learning rate", "training loss", "state"]
    return "<h2>Stages</h2>" + table(header, rows, text=(0, 4))


def _mixture(stage: dict[str, Any]) -> str:
    weights = {name: float(weight) for name, weight in stage.get("mixture", {}).items()}
    total = sum(weights.values()) or 1.0
    text = ", ".join(f"{escape(name)} {weight / total:.0%}" for name, weight in weights.items())
    ramp = stage.get("ramp_tokens")
    return text + (f" <small>(ramped over {si(ramp)})</small>" if ramp else "")


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    moments: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples[-_MOST_SAMPLES:]:
        moments.setdefault(sample.get("step", 0), []).append(sample)
    parts = []
    for step in sorted(moments, reverse=True):
        quotes = "".join(
            f"<blockquote><b>{escape(str(s.get('prompt', '')))}</b>{escape(_continuation(s))}</blockquote>"
            for s in moments[step]
        )
        when = f"after {si(_float(moments[step][0].get('tokens')))} tokens, step {step:,}"
        parts.append(f"<details{' open' if not parts else ''}><summary>{when}</summary>{quotes}</details>")
    return "<h2>Samples</h2><p>Prompts in bold; what follows is the model's.</p>" + "".join(parts)


def _continuation(sample: dict[str, Any]) -> str:
    prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
    return text.removeprefix(prompt) if prompt else text


def _provenance(run: Run) -> str:
    model = run.info.get("model", {})
    facts = {"fingerprint": run.info.get("fingerprint"), "directory": run.directory.name}
    facts |= {f"parameters, {k.replace('_', ' ')}": v for k, v in model.get("parameters", {}).items()}
    flops = model.get("train_flops_per_token") or model.get("flops_per_token") or {}
    facts |= {f"training FLOPs per token, {k} count": v for k, v in flops.items()}
    facts |= run.info.get("versions", {}) if isinstance(run.info.get("versions"), dict) else {}
    rows = [
        [escape(str(k)), escape(f"{v:,}" if isinstance(v, int) else si(v, 4) if isinstance(v, float) else str(v))]
        for k, v in facts.items()
        if v is not None and not isinstance(v, dict | list)
    ]
    config = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return (
        f"<h2>Configuration</h2><details><summary>Versions and model sizes</summary>{table(['', ''], rows)}</details>"
        f"<details><summary>Resolved configuration</summary><pre>{config}</pre></details>"
    )


def _elapsed(run: Run) -> float:
    """Wall-clock seconds from the first step to the last, pauses between restarts included; 0 where unknown."""
    times = run.column("timing.time")
    if times.dtype != float or not len(times) or not np.isfinite(times[[0, -1]]).all():
        return 0.0
    return float(times[-1] - times[0]) + float(np.nan_to_num(run.column("timing.step_s")[0]))


def _utilisation(run: Run) -> str:
    for name, label in (("palm", "PaLM count"), ("causal", "causal count")):
        mfu = _median(run.column(f"timing.mfu_{name}"))
        if math.isfinite(mfu):
            return f"median; MFU {mfu:.1%} ({label})"
    return "median" if run.step else ""


def _device(devices: Any) -> tuple[str, str]:
    """(what, note) from run.json's `devices`, in any of the shapes that describe them."""
    if isinstance(devices, list) and devices:
        kinds = Counter(str(d.get("kind", d) if isinstance(d, dict) else d) for d in devices)
        return ", ".join(f"{number} × {kind}" for kind, number in kinds.items()), ""
    if isinstance(devices, dict) and devices:
        kind, number = devices.get("kind") or devices.get("device_kind"), devices.get("count")
        rest = ", ".join(
            f"{k} {' × '.join(f'{a} {n}' for a, n in v.items()) if isinstance(v, dict) else v}"
            for k, v in devices.items()
            if k not in ("kind", "device_kind", "count")
        )
        return (f"{number} × {kind}" if number else str(kind), rest) if kind else (rest, "")
    return (str(devices) if devices else "–"), ""


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _maybe(values: dict[str, Any], key: str, text: str) -> str:
    return text.format(si(values[key])) if key in values else ""
