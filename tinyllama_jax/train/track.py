"""What a run leaves to be read: JSON lines, progress on stderr, and the views of adapters.py if asked for.

    metrics.jsonl      one line per step: step, tokens, loss, ...; whatever the clock decides is under `timing`
    validation.jsonl   one line per validation
    samples.jsonl      one line per continued prompt
    events.jsonl       what happened when, with the time of day; only ever appended to

The first three are the truth about the run that the newest checkpoint continues: on resume they are cut back to its
step, so that apart from `timing` they end up as if nothing had happened.  What was cut is counted in an event
`cut_back`, because the steps done again are time lost (lab/goodput.py).
"""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tinyllama_jax.config import Run
from tinyllama_jax.lab.goodput import Goodput
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train.adapters import adapters
from tinyllama_jax.train.json_lines import Lines, cut_back, read

RECORDS = ("metrics", "validation", "samples")
PLAIN_SECONDS = 10.0  # between progress lines when stderr is not a terminal


class Tracker:
    """Writes the records of one run.  `event` may be called from any thread, the rest from the training thread."""

    def __init__(self, run_dir: str | Path, run: Run, plan: Plan, *, resume_step: int):
        """Cuts the records back to `resume_step`; 0 empties them.  ConfigError when they cannot be written."""
        self.directory, self._plan = Path(run_dir), plan
        self._events = Lines(self.directory / "events.jsonl")
        seen = self._open(resume_step)
        self._goodput = Goodput(read(self._events.path), read(self._metrics.path))
        self._progress = _Progress(plan, resume_step)
        self._adapters = adapters(self.directory, run, plan, step=resume_step, seen=seen)

    def _open(self, step: int) -> dict[str, int]:
        """Opens the records, cut back to `step`; returns how far metrics and validation went before."""
        cut = {name: cut_back(self.directory / f"{name}.jsonl", step) for name in RECORDS}
        self._metrics, self._validation, self._samples = (Lines(self.directory / f"{name}.jsonl") for name in RECORDS)
        gone = cut["metrics"]
        if gone.steps:
            self.event("cut_back", step=step, steps=gone.steps, seconds=gone.seconds, until=gone.until)
        return {"train": gone.last, "validation": cut["validation"].last}

    def step(self, record: dict) -> None:
        """record: `step` and `tokens` count what is done; `loss`, `stage` and `timing.tokens_per_s` are shown.

        `timing.goodput` is added: the share of the time since the run was first started that trained.
        """
        if "step_s" in record.get("timing", {}):
            record = record | {"timing": record["timing"] | {"goodput": self._goodput.share(time.time(), record)}}
        self._metrics.write(record)
        self._progress.step(record)
        for adapter in self._adapters:
            adapter.scalars("train", record)

    def validation(self, record: dict) -> None:
        self._validation.write(record)
        losses = {name: found["loss"] for name, found in record.get("domains", {}).items() if "loss" in found}
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self._progress.line(f"step {record['step']}  validation  {shown}")
        for adapter in self._adapters:
            adapter.scalars("validation", record)

    def alert(self, alert: dict) -> None:
        """One of train/alerts.py: {"alert": kind, "step", "text", ...}, told wherever somebody may look."""
        self.event("alert", **alert)
        self._progress.line(f"alert: {alert['alert']}: {alert['text']}")
        for adapter in self._adapters:
            adapter.alert(alert | {"tokens": self._plan.tokens_at(alert["step"])})

    def sample(self, record: dict) -> None:
        self._samples.write(record)

    def event(self, kind: str, **fields) -> None:
        self._events.write(_event(kind, fields))
        if kind == "start":
            self._goodput.started(time.time() - fields.get("seconds", 0.0))

    def sync(self) -> None:
        """Returns when every line is on the disk, not only with the operating system."""
        for lines in (self._metrics, self._validation, self._samples, self._events):
            lines.sync()

    def close(self) -> None:
        self._progress.close()
        for adapter in self._adapters:
            adapter.close()
        for lines in (self._metrics, self._validation, self._samples, self._events):
            lines.close()


def ensure_finished(run_dir: Path, step: int) -> None:
    """Adds the event `finished` for a run that was killed between its last save and that line."""
    with contextlib.closing(Lines(run_dir / "events.jsonl")) as events:
        marks = [kind for event in read(events.path) if (kind := event.get("kind")) in ("start", "finished")]
        if marks[-1:] != ["finished"]:
            events.write(_event("finished", {"step": step}))


def _event(kind: str, fields: dict) -> dict:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"time": now, "kind": kind, **fields}


class Silence:
    """Stands for the tracker where another process keeps the records."""

    def step(self, record: dict) -> None: ...
    def validation(self, record: dict) -> None: ...
    def sample(self, record: dict) -> None: ...
    def alert(self, alert: dict) -> None: ...
    def event(self, kind: str, **fields) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, plan: Plan, resume_step: int):
        self._total = plan.total_steps
        self._speed = None
        self._printed = -math.inf
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, initial=resume_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def step(self, record: dict) -> None:
        speed = record.get("timing", {}).get("tokens_per_s")
        if speed:
            self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        shown = {"loss": f"{record['loss']:.4f}"}
        if self._speed:
            shown["tokens/s"] = f"{self._speed:,.0f}"
        if "stage" in record:
            shown["stage"] = record["stage"]
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif time.monotonic() - self._printed > PLAIN_SECONDS or record["step"] == self._total:
            self._printed = time.monotonic()
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.line(f"step {record['step']}/{self._total}  {words}  tokens {record['tokens']:,}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
