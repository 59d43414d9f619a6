"""The sections of a run's report that tell what befell it: where the time went, and the events."""

from __future__ import annotations

import json
import math
from collections import Counter
from html import escape
from typing import Any

import numpy as np

from tinyllama_jax.lab.draw import palette
from tinyllama_jax.lab.goodput import LOSSES, account
from tinyllama_jax.lab.page import clock, duration, table
from tinyllama_jax.lab.runs import Run

_MOST_EVENTS = 200  # rows; a page must stay light enough to be mailed
_COUNTED = ("saved", "evaluated", "heartbeat")  # told by where the time went
_CHECKPOINTS = ("checkpoint_writing", "checkpoint_written", "checkpoint_committed")  # told in one sentence
_FEW = 20  # events of one kind that are listed; of more, only the number is told


def time_spent(run: Run) -> str:
    """Goodput and what was lost to what, as one bar and its numbers; nothing for a run without events or steps."""
    if not run.step or not run.events:
        return ""
    columns = {name: run.column(f"timing.{name}") for name in ("time", "step_s", "data_wait_s", "compiled")}
    columns |= {name: run.column(name) for name in ("batch_tokens", "skipped")}
    if any(values.dtype != float for values in columns.values()):
        return ""
    spent = account(run.events, columns)
    wall = spent["wall_s"]
    if not wall > 0:
        return ""
    parts = [("training", spent["train_s"], "var(--ink)")]
    parts += [
        (words, spent["lost"][name], palette(i)) for i, (name, words) in enumerate(LOSSES.items()) if name != "other"
    ]
    parts.append((LOSSES["other"], spent["lost"]["other"], "var(--line)"))
    parts = [(words, seconds, color) for words, seconds, color in parts if seconds >= 0.0005 * wall]
    bar = "".join(f'<i style="flex:{seconds / wall:.4f};background:{color}"></i>' for _, seconds, color in parts)
    rows = [
        [f'<i class="dot" style="background:{color}"></i>{escape(words)}', duration(seconds), f"{seconds / wall:.1%}"]
        for words, seconds, color in parts
    ]
    return (
        f"<h2>Where the time went</h2><p>Of {duration(wall)} since the first start, {spent['goodput']:.1%} trained "
        f'steps that count (goodput).</p><div class="parts">{bar}</div>{table(["", "time", "share"], rows)}'
    )


def events(run: Run) -> str:
    """What is worth a sentence, and a table of the events: alerts all, others where there are few of their kind."""
    kinds = Counter(str(event.get("kind", "?")) for event in run.events)
    routine = {kind for kind, number in kinds.items() if number > _FEW and kind != "alert"} | {*_COUNTED, *_CHECKPOINTS}
    notes = [*_steps(run), *_faults(run, kinds)]
    begun = kinds["checkpoint_writing"]
    if begun:
        notes.append(f"{kinds['checkpoint_committed']:,} of {begun:,} checkpoints begun were committed.")
    often = [kind for kind in kinds if kind in routine and kind not in (*_COUNTED, *_CHECKPOINTS)]
    notes += [f"{kinds[kind]:,} × {escape(kind.replace('_', ' '))}." for kind in often]
    rows = [_row(event) for event in run.events if str(event.get("kind", "?")) not in routine]
    if len(rows) > _MOST_EVENTS:
        notes.append(f"The last {_MOST_EVENTS} of {len(rows):,} events:")
        rows = rows[-_MOST_EVENTS:]
    text = f"<p>{' '.join(notes)}</p>" if notes else ""
    rows_table = table(["step", "time (UTC)", "event", ""], rows, text=(1, 2, 3)) if rows else ""
    return f"<h2>Events</h2>{text}{rows_table}" if text or rows_table else ""


def _steps(run: Run) -> list[str]:
    """Sentences about steps that did not do what a step does."""
    notes = []
    skipped = run.column("step")[np.nan_to_num(run.column("skipped")) > 0].astype(int).tolist()
    if skipped:
        some = ", ".join(f"{step:,}" for step in skipped[:12]) + (", …" if len(skipped) > 12 else "")
        notes.append(f"{_number(len(skipped), 'skipped step')}: {some}.")
    missing = int((~np.isfinite(run.column("loss"))).sum())
    if missing:
        notes.append(f"{_number(missing, 'step')} without a finite loss.")
    damaged = run.metrics.damaged_lines + run.validation.damaged_lines
    if damaged:
        notes.append(f"{damaged} half-written {'line was' if damaged == 1 else 'lines were'} left out.")
    return notes


def _faults(run: Run, kinds: Counter[str]) -> list[str]:
    """Sentences about alerts, rollbacks and steps done again."""
    notes = []
    if kinds["alert"]:
        alerts = Counter(str(event.get("alert", "?")) for event in run.events if event.get("kind") == "alert")
        told = ", ".join(f"{number} × {escape(kind)}" for kind, number in alerts.most_common())
        notes.append(f"{_number(kinds['alert'], 'alert')}: {told}.")
    if run.rollbacks:
        some = ", ".join(f"from step {back.get('from')} to {back.get('to')}" for back in run.rollbacks[:12])
        notes.append(f"{_number(len(run.rollbacks), 'rollback')}: {escape(some)}.")
    again = [event.get("steps", 0) for event in run.events if event.get("kind") == "cut_back"]
    if again:
        notes.append(f"{_number(sum(again), 'step')} done again, from {_number(len(again), 'checkpoint')}.")
    return notes


def _row(event: dict[str, Any]) -> list[str]:
    kind = str(event.get("kind", "?"))
    words = kind.replace("_", " ")
    if kind == "alert" and "text" in event:
        words, told = f"alert: {event.get('alert')}", str(event["text"])
    else:
        rest = {k: v for k, v in event.items() if k not in ("kind", "step", "tokens", "time")}
        told = "; ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in rest.items())
    return [_step(event.get("step")), *map(escape, (clock(event.get("time")), words, told))]


def _step(value: Any) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
