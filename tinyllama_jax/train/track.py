"""What a run leaves to be read: JSON lines, progress on stderr, and the views of adapters.py if asked for.

    metrics.jsonl      one line per step: step, tokens, loss, ...; whatever the clock decides is under `timing`
    validation.jsonl   one line per validation
    samples.jsonl      one line per continued prompt
    events.jsonl       what happened when, with the time of day; only ever appended to

The first three are the truth about the run that the newest checkpoint continues: on resume they are cut back to its
step, so that apart from `timing` they end up as if nothing had happened.  What was cut is counted in an event
`cut_back`, because the steps done again are time lost (lab/goodput.py).  Every line is JSON as the standard has it:
floats have as many digits as they need to be read back exactly, and NaN and the infinities are `null`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab.goodput import Goodput
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train.adapters import adapters

RECORDS = ("metrics", "validation", "samples")
PLAIN_SECONDS = 10.0  # between progress lines when stderr is not a terminal


class Tracker:
    """Writes the records of one run.  `event` may be called from any thread, the rest from the training thread."""

    def __init__(self, run_dir: str | Path, run: Run, plan: Plan, *, resume_step: int):
        """Cuts the records back to `resume_step`; 0 empties them.  ConfigError when they cannot be written."""
        self.directory, self._plan = Path(run_dir), plan
        self._events = _Lines(self.directory / "events.jsonl")
        seen = self._open(resume_step)
        self._goodput = Goodput(read(self._events.path), read(self._metrics.path))
        self._progress = _Progress(plan, resume_step)
        self._adapters = adapters(self.directory, run, plan, step=resume_step, seen=seen)

    def _open(self, step: int) -> dict[str, int]:
        """Opens the records, cut back to `step`; returns how far metrics and validation went before."""
        cut = {name: cut_back(self.directory / f"{name}.jsonl", step) for name in RECORDS}
        self._metrics, self._validation, self._samples = (_Lines(self.directory / f"{name}.jsonl") for name in RECORDS)
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
    events = _Lines(run_dir / "events.jsonl")
    since_start = []
    for event in read(events.path):
        since_start = [] if event.get("kind") == "start" else [*since_start, event.get("kind")]
    if "finished" not in since_start:
        events.write(_event("finished", {"step": step}))
    events.close()


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


@dataclass
class Cut:
    """What was cut off a file of records: how many, how long their steps took, and until when and where it went."""

    steps: int = 0
    seconds: float = 0.0
    until: float | None = None  # seconds since 1970
    last: int = -1  # step of the last whole line, cut or not


def cut_back(path: Path, step: int) -> Cut:
    """Keeps the lines up to and including `step`, or none if it is 0; by writing a new file and renaming it.

    A line that is not JSON, as a kill in the middle of a write leaves one, is dropped.
    """
    cut = Cut()
    if not path.exists():
        return cut
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, encoding="utf-8", errors="replace") as before, open(temporary, "w", encoding="utf-8") as after:
            for line in before:
                record = _record(line)
                if record is None:
                    continue
                cut.last = max(cut.last, record["step"])
                if 0 < step and record["step"] <= step:
                    after.write(line)
                    continue
                timing = record.get("timing") or {}
                cut.steps += 1
                cut.seconds += timing.get("step_s") or 0.0
                cut.until = timing.get("time") or cut.until
            after.flush()
            os.fsync(after.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    return cut


def _record(line: str) -> dict | None:
    """A whole line's record; None for what is none."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read(path: Path) -> Iterator[dict]:
    """The records of a file of JSON lines."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


class RecordFailed(ConfigError):
    """A record of a run under way could not be written; a launcher may try again, as after a save that failed.

    On a disk that fills up it is chance which of the two is the first; a new start says if there is no room for it.
    """

    exit_status = 1


def _cannot_write(path: Path, error: OSError, kind: type[ConfigError] = ConfigError) -> ConfigError:
    return kind(f"{path}: cannot be written: {error.strerror}; mend that and start again")


def plain(value):
    """`value` as strict JSON can say it: NumPy scalars as numbers, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Lines:
    """A file of JSON lines; each is handed to the operating system at once."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "ab+", buffering=0)
            self._drop_incomplete_line()
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _drop_incomplete_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        if end < size:
            self._file.truncate(end)

    def write(self, record: dict) -> None:
        line = memoryview(json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        with self._lock:
            try:
                while line:  # an unbuffered write may take only a part
                    line = line[self._file.write(line) :]
            except OSError as error:
                raise _cannot_write(self.path, error, RecordFailed) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # a disk that takes blocks only now, as over a network
            raise _cannot_write(self.path, error, RecordFailed) from error

    def close(self) -> None:
        self._file.close()


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
