"""The section of a run's report that shows what `eval` kept in RUN/evaluations, beside what was published."""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tinyllama_jax.evaluate import milestones, records
from tinyllama_jax.evaluate.suites import SHARES
from tinyllama_jax.lab.draw import canvas, label_ends, last, line, palette, shorten, si
from tinyllama_jax.lab.page import number, table
from tinyllama_jax.lab.runs import Run

_PUBLISHED = (*milestones.TINYLLAMA, *milestones.V1_1, *milestones.BASELINES)

Results = dict[str, list[dict[str, Any]]]  # by what was evaluated, in the order of steps


def evaluations(run: Run) -> str:
    """HTML: one table per list of tasks and one of losses; empty where there is nothing."""
    found = _results(run)
    if not found:
        return ""
    parts = [_tasks(label, rows) if "results" in rows[0] else _losses(rows) for label, rows in found.items()]
    return "<h2>Evaluations of checkpoints</h2>" + "".join(parts)


def evaluations_figure(run: Run) -> Figure | None:
    """Each task's share over tokens, of the list of tasks with most checkpoints; None where none has two."""
    tracks = [rows for rows in _results(run).values() if "results" in rows[0] and len(rows) > 1]
    rows = max(tracks, key=len, default=[])
    tasks = [name for name in _names(rows, "results") if _share(rows[0]["results"].get(name, {}))]
    if not tasks:
        return None
    tokens = np.array([row["tokens"] for row in rows], float)
    longest = max(len(shorten(_title(name))) for name in tasks) + len("  00.0")
    figure, (axes,) = canvas([3.2], ["downstream tasks, %"], span=(0.0, tokens[-1]), longest_label=longest)
    labels = []
    for i, name in enumerate(tasks):
        values = np.array([_percent(row["results"].get(name, {})) for row in rows])
        line(axes, tokens, values, palette(i), marker="o")
        labels.append((last(values), f"{shorten(_title(name))}  {last(values):.1f}", palette(i)))
    label_ends(axes, labels)
    return figure


def _results(run: Run) -> Results:
    found: Results = defaultdict(list)
    for row in records.read(run.directory):
        if isinstance(row.get("results"), dict) or isinstance(row.get("domains"), dict):
            found[row["label"]].append(row)
    return dict(found)


def _tasks(label: str, rows: list[dict[str, Any]]) -> str:
    names = _names(rows, "results")
    metrics = {name: next(r["results"][name]["metric"] for r in rows if name in r["results"]) for name in names}
    header = ["", "tokens", *(f"{escape(_title(n))} <small>{escape(metrics[n])}</small>" for n in names), "mean"]
    cells = []
    for row in rows:
        values = [_cell(row["results"].get(name, {})) for name in names]
        mean = row.get("mean")
        mean = number(100 * mean) if isinstance(mean, float) else "–"
        cells.append([f"step {row['step']:,}", si(row["tokens"]), *values, mean])
    known = [name for name in names if name in milestones.COMMON_SENSE]
    note = ""
    if known:
        for row in _PUBLISHED:
            scores = dict(zip(milestones.COMMON_SENSE, row.scores, strict=True))
            whole = set(names) == set(milestones.COMMON_SENSE)
            values = [number(scores.get(name, math.nan)) for name in names]
            name = f"TinyLlama {row.name}" if row not in milestones.BASELINES else row.name
            mark = f"<small>{escape(name)}</small>"
            cells.append([mark, si(row.tokens), *values, number(row.mean) if whole else "–"])
        wrong = [f"{row.name}: {row.note}" for row in _PUBLISHED if row.note]
        note = f"<p><small>Below: published, 0-shot. {escape('; '.join(wrong))}.</small></p>"
    return f"<h3>{escape(label)}</h3>{note}{table(header, cells)}"


def _losses(rows: list[dict[str, Any]]) -> str:
    names = _names(rows, "domains")
    header = ["", "tokens", *(f"{escape(name)} <small>loss, bits per byte</small>" for name in names)]
    cells = []
    for row in rows:
        measured = [row["domains"].get(name, {}) for name in names]
        values = [f"{_number(m.get('loss'), 4)}, {_number(m.get('bits_per_byte'), 4)}" for m in measured]
        cells.append([f"step {row['step']:,}", si(row["tokens"]), *values])
    return f"<h3>loss</h3>{table(header, cells)}"


def _names(rows: list[dict[str, Any]], kind: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(kind, {})))


def _title(name: str) -> str:
    return milestones.TITLES.get(name, name)


def _share(result: dict[str, Any]) -> bool:
    return result.get("metric") in SHARES


def _percent(result: dict[str, Any]) -> float:
    value = result.get("value")
    return 100.0 * value if _share(result) and isinstance(value, (int, float)) else math.nan


def _cell(result: dict[str, Any]) -> str:
    scale, stderr = (100 if _share(result) else 1), result.get("stderr")
    within = f" <small>± {number(scale * stderr)}</small>" if isinstance(stderr, (int, float)) else ""
    return _number(result.get("value"), 2, scale) + within


def _number(value: Any, digits: int, scale: float = 1) -> str:
    return number(scale * value, digits) if isinstance(value, (int, float)) else "–"
