"""What a run leaves to be read: JSON lines, progress on stderr, TensorBoard and Weights & Biases if asked for.

    metrics.jsonl      one line per step: step, tokens, loss, ...; whatever the clock decides is under `timing`
    validation.jsonl   one line per validation
    samples.jsonl      one line per continued prompt
    events.jsonl       what happened when, with the time of day; only ever appended to

The first three are the truth about the run that the newest checkpoint continues: on resume they are cut back to its
step, so that apart from `timing` they end up as if nothing had happened.  Every line is JSON as the standard has it:
floats have as many digits as they need to be read back exactly, and NaN and the infinities are `null`.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from tinyllama_jax.config import Run
from tinyllama_jax.configio import to_dict
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan

PLAIN_SECONDS = 10.0  # between progress lines when stderr is not a terminal


class Tracker:
    """Writes the records of one run.  `event` may be called from any thread, the rest from the training thread."""

    def __init__(self, run_dir: str | Path, run: Run, plan: Plan, *, resume_step: int):
        """Cuts the records back to `resume_step`; 0 empties them.  ConfigError when they cannot be written."""
        run_dir = Path(run_dir)
        for name in ("metrics", "validation", "samples"):
            cut_back(run_dir / f"{name}.jsonl", resume_step)
        self._metrics = _Lines(run_dir / "metrics.jsonl")
        self._validation = _Lines(run_dir / "validation.jsonl")
        self._samples = _Lines(run_dir / "samples.jsonl")
        self._events = _Lines(run_dir / "events.jsonl")
        self._progress = _Progress(plan, resume_step)
        self._adapters: list[_Adapter] = []
        if run.tracking.tensorboard:
            self._adapters.append(_TensorBoard(run_dir / "tensorboard", plan.tokens_at(resume_step)))
        if run.tracking.wandb_project:
            self._adapters.append(_WandB(run_dir, run))

    def step(self, record: dict) -> None:
        """record: `step` and `tokens` count what is done; `loss`, `stage` and `timing.tokens_per_s` are shown."""
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

    def sample(self, record: dict) -> None:
        self._samples.write(record)

    def event(self, kind: str, **fields) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._events.write({"time": now, "kind": kind, **fields})

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


class Silence:
    """Stands for the tracker where another process keeps the records."""

    def step(self, record: dict) -> None: ...
    def validation(self, record: dict) -> None: ...
    def sample(self, record: dict) -> None: ...
    def alert(self, alert: dict) -> None: ...
    def event(self, kind: str, **fields) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to and including `step`, or none if it is 0; by writing a new file and renaming it.

    A line that is not JSON, as a kill in the middle of a write leaves one, is dropped.
    """
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, encoding="utf-8", errors="replace") as before, open(temporary, "w", encoding="utf-8") as after:
            after.writelines(line for line in before if line.endswith("\n") and 0 < step and _step(line) <= step)
            after.flush()
            os.fsync(after.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {error.strerror}; mend that and start again")


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
                raise _cannot_write(self.path, error) from error

    def sync(self) -> None:
        os.fsync(self._file.fileno())

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


class _Adapter:
    """A view of the records elsewhere.  Its first failure ends it with one warning; training goes on."""

    name = ""

    def __init__(self, *arguments):
        self._on = True
        self._try(self.open, *arguments)

    def scalars(self, prefix: str, record: dict) -> None:
        self._try(self.write, {name: value for name, value in _flat(prefix, record)}, record)

    def close(self) -> None:
        self._try(self.finish)
        self._on = False

    def _try(self, function: Callable, *arguments) -> None:
        if not self._on:
            return
        try:
            function(*arguments)
        except Exception as error:  # whatever it is: a tracker must not stop a run
            self._on = False
            print(f"{self.name} is off: {' '.join(str(error).split())[:200]}; metrics.jsonl goes on", file=sys.stderr)


class _TensorBoard(_Adapter):
    """Scalars over tokens."""

    name = "TensorBoard"

    def open(self, directory: Path, tokens: int) -> None:
        from tensorboardX import SummaryWriter

        # purge_step: what a killed run wrote beyond its checkpoint is not shown
        self._writer = SummaryWriter(str(directory), purge_step=tokens + 1)

    def write(self, scalars: dict[str, float], record: dict) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record["tokens"])

    def finish(self) -> None:
        self._writer.close()


class _WandB(_Adapter):
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine.  A resumed run continues its own page."""

    name = "wandb"

    def open(self, run_dir: Path, run: Run) -> None:
        import wandb

        mark = run_dir / "wandb_id"
        if not mark.exists():
            mark.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=run.tracking.wandb_project,
            dir=run_dir,
            name=run.name,
            id=mark.read_text(),
            resume="allow",
            config=to_dict(run),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, scalars: dict[str, float], record: dict) -> None:
        self._run.log({**scalars, "tokens": record["tokens"]}, step=record["step"])

    def finish(self) -> None:
        self._run.finish()


def _flat(prefix: str, record: dict):
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}/{name}", value)
        elif name not in ("step", "tokens") and isinstance(value, (int, float)):
            yield f"{prefix}/{name}", value
