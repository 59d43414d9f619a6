"""Goodput: the share of a run's time that trained, and where the rest went.

    goodput(events, metrics)  ->  {"wall_s", "train_s", "goodput", "lost": {"compile": s, "data": s, ...}}

Time counts from the beginning of the first process to the last sign of life, through every restart.  Sources are the
two records that a run keeps of itself.  metrics.jsonl says how long each step took that is part of the run as it
finally went.  events.jsonl, which is never cut back, says what befell it:

    start       time; `seconds` since the process began, of which `restore_s` read a checkpoint
    cut_back    `seconds` that the steps took which are done again, and `until` when the process lived that did them
    saved       `seconds` for which training waited for a save
    evaluated   `seconds` of a validation or of samples

and by its times until when each process lived.  What none of them explains is `other`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

# what was lost to -> how the report says it
LOSSES = {
    "start": "starting: programs, data, weights",
    "restore": "reading checkpoints",
    "compile": "compiling",
    "data": "waiting for data",
    "save": "waiting for saves",
    "evaluate": "validation and samples",
    "skipped": "steps that were skipped",
    "redone": "steps done again",
    "down": "between a process's end and the next start",
    "other": "other",
}
_COLUMNS = ("time", "step_s", "data_wait_s", "compiled")  # of `timing`


def goodput(events: Iterable[dict], metrics: Iterable[dict], now: float | None = None) -> dict[str, Any]:
    """Seconds of wall time and of training, their ratio, and the seconds lost to each of LOSSES.

    events, metrics: the records of events.jsonl and metrics.jsonl.  now: seconds since 1970 until when a run that is
    still alive is to be accounted for; None = its last sign of life.  The ratio is NaN for a run without a step.
    """
    rows = []
    for record in metrics:
        timing = record.get("timing") or {}
        rows.append([timing.get(name) for name in _COLUMNS] + [record.get("batch_tokens"), record.get("skipped")])
    columns = np.array(rows, dtype=float).reshape(-1, len(_COLUMNS) + 2).T
    return account(events, dict(zip((*_COLUMNS, "batch_tokens", "skipped"), columns, strict=True)), now)


def account(events: Iterable[dict], columns: dict[str, np.ndarray], now: float | None = None) -> dict[str, Any]:
    """As `goodput`, from columns as `lab.runs.Run` has them: float64 [steps] each, NaN where a record had none."""
    events = list(events)
    seconds = np.nan_to_num(columns["step_s"])
    lost = dict.fromkeys(LOSSES, 0.0) | _within_steps(columns)
    for event in events:
        spent = _number(event.get("seconds"))
        kind = {"saved": "save", "evaluated": "evaluate", "cut_back": "redone"}.get(event.get("kind"))
        if kind:
            lost[kind] += spent
    lives = _lives(events, columns["time"], seconds)
    if not lives:
        return {"wall_s": 0.0, "train_s": 0.0, "goodput": math.nan, "lost": lost}
    lost["start"] = sum(max(life.started - life.began - life.restored, 0.0) for life in lives)
    lost["restore"] = sum(life.restored for life in lives)
    lost["down"] = sum(after.began - before.ended for before, after in itertools.pairwise(lives))
    wall = max(now or -math.inf, lives[-1].ended) - lives[0].began
    train = max(float(seconds.sum()) - lost["compile"] - lost["data"] - lost["skipped"], 0.0)
    lost["other"] = max(wall - train - sum(lost.values()), 0.0)
    share = train / wall if wall > 0 and len(seconds) else math.nan
    return {"wall_s": wall, "train_s": train, "goodput": share, "lost": lost}


def _within_steps(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Seconds of the steps that compiled, waited for data, or changed nothing.

    Batches are fetched while the device works, so that a wait is lost only as far as it makes a step longer than the
    steps of this batch size are that do not wait.  Where all wait, how long the device worked is not known, and the
    whole wait counts.  A wait is measured while one of the two steps before is under way.
    """
    seconds, compiled = np.nan_to_num(columns["step_s"]), columns["compiled"] == 1
    skipped = np.nan_to_num(columns["skipped"]) > 0
    padded = np.append(np.nan_to_num(columns["data_wait_s"]), [0.0, 0.0])
    waits = np.maximum.reduce([padded[:-2], padded[1:-1], padded[2:]])
    waiting = waits > seconds / 2
    usual = np.zeros(len(seconds))  # of a step of this batch size that neither compiles nor waits
    batches = np.nan_to_num(columns["batch_tokens"])
    for batch in np.unique(batches):
        same = batches == batch
        calm = seconds[same & ~compiled & ~waiting]
        usual[same] = np.median(calm) if len(calm) else 0.0
    beyond = np.maximum(seconds - usual, 0.0)
    return {
        "compile": float(beyond[compiled].sum()),
        "data": float(np.minimum(beyond, waits)[waiting & ~compiled].sum()),
        "skipped": float(np.minimum(seconds, usual)[skipped].sum()),
    }


@dataclass
class _Life:
    """One process; all times are seconds since 1970."""

    began: float
    started: float  # when its event `start` was written
    restored: float  # seconds for which it read a checkpoint
    ended: float  # its last sign of life


def _lives(events: list[dict], times: np.ndarray, seconds: np.ndarray) -> list[_Life]:
    """The processes in their order.  None began before the one before it had ended, whatever its event says."""
    seen = [t for t in times.tolist() if math.isfinite(t)]
    seen += [event["until"] for event in events if isinstance(event.get("until"), int | float)]
    starts = []
    for event in events:
        at = _time(event)
        if event.get("kind") == "start" and at is not None:
            starts.append((at, event))
        elif at is not None and event.get("kind") != "cut_back":  # written by the process after the one it tells of
            seen.append(at)
    if not starts and len(times) and math.isfinite(times[0]):
        starts = [(float(times[0]), {"seconds": float(seconds[0])})]
    starts.sort(key=lambda start: start[0])
    signs, lives = np.sort(seen), []
    for (at, event), (following, _) in itertools.zip_longest(starts, starts[1:], fillvalue=(math.inf, {})):
        earliest = lives[-1].ended if lives else -math.inf
        last = np.searchsorted(signs, following) - 1
        ended = max(at, float(signs[last])) if last >= 0 else at
        began = max(at - _number(event.get("seconds")), earliest)
        lives.append(_Life(began, at, min(_number(event.get("restore_s")), at - began), ended))
    return lives


class Goodput:
    """The same share while the run goes on, for each line of metrics.jsonl; a step that compiled counts for nothing."""

    def __init__(self, events: Iterable[dict], metrics: Iterable[dict]):
        """events, metrics: the records so far, metrics cut back to where the run goes on."""
        lives = _lives([e for e in events if e.get("kind") == "start"], np.empty(0), np.empty(0))
        self._began = lives[0].began if lives else None
        self._trained = math.fsum(_trained(record) for record in metrics)

    def started(self, began: float) -> None:
        """A process began at this time, in seconds since 1970."""
        self._began = began if self._began is None else self._began

    def share(self, now: float, record: dict) -> float | None:
        """Counts the record's step, and returns the share up to `now`; None before the run has any duration."""
        self._trained += _trained(record)
        if self._began is None or now <= self._began:
            return None
        return min(self._trained / (now - self._began), 1.0)


def _trained(record: dict) -> float:
    timing = record.get("timing") or {}
    seconds, waited = _number(timing.get("step_s")), _number(timing.get("data_wait_s"))
    if record.get("skipped") or timing.get("compiled"):
        return 0.0
    return max(seconds - waited, 0.0) if waited > seconds / 2 else seconds


def _time(event: dict) -> float | None:
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
