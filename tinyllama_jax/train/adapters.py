"""Views of the records elsewhere: TensorBoard, Weights & Biases and trackio, each with the library's own writer.

A view may be lost, a run may not: the first failure of an adapter ends it with one warning, and training goes on.
metrics.jsonl is the truth.  A step that a resumed run takes again is shown once: by TensorBoard as it was taken last,
by the others, whose pages cannot be shortened, as it was taken first.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllama_jax.config import Run
from tinyllama_jax.configio import to_dict
from tinyllama_jax.schedules import Plan


def adapters(run_dir: Path, run: Run, plan: Plan, *, step: int, seen: dict[str, int]) -> list[Adapter]:
    """The adapters that `run.tracking` asks for, opened to go on after `step`.

    seen: the last step of "train" and of "validation" that an earlier process of this run may have shown.
    """
    found: list[Adapter] = []
    if run.tracking.tensorboard:
        found.append(TensorBoard(run_dir / "tensorboard", plan.tokens_at(step)))
    if run.tracking.wandb_project:
        found.append(WandB(run_dir, run, seen))
    if run.tracking.trackio_project:
        found.append(Trackio(run_dir, run, seen))
    return found


class Adapter:
    """What all have in common.  Only the training thread calls."""

    name = ""
    extra = ""  # of this package, that brings the library

    def __init__(self, *arguments):
        self._on = True
        self._seen: dict[str, int] = {}  # prefix -> last step shown
        self._try(self.open, *arguments)

    def scalars(self, prefix: str, record: dict) -> None:
        """Shows the numbers of a record; those of a step that was shown before are left out."""
        if record["step"] > self._seen.get(prefix, -1):
            self._try(self.write, dict(_flat(prefix, record)), record)
            self._seen[prefix] = record["step"]

    def alert(self, alert: dict) -> None:
        self._try(self.warn, alert)

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
            said = " ".join(str(error).split())[:200] or type(error).__name__
            if isinstance(error, ModuleNotFoundError) and self.extra:
                said += f" (pip install 'tinyllama_jax[{self.extra}]')"
            print(f"{self.name} is off: {said}; metrics.jsonl goes on", file=sys.stderr)


class TensorBoard(Adapter):
    """Scalars over tokens, alerts as texts.

    Written and flushed line by line: SummaryWriter has a thread between, whose death on a full disk makes the next
    call wait for ever.
    """

    name = "TensorBoard"

    def open(self, directory: Path, tokens: int) -> None:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary, self._pb = summary, event_pb2
        directory.mkdir(exist_ok=True)
        # A file's name has only the second, and a file of that name would be overwritten.
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        # From here on: what a killed run wrote beyond its checkpoint is not shown.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(tokens + 1, session_log=start)

    def write(self, scalars: dict[str, float], record: dict) -> None:
        values = [self._summary.scalar(name, value).value[0] for name, value in scalars.items()]
        self._event(record["tokens"], summary={"value": values})

    def warn(self, alert: dict) -> None:
        self._event(alert["tokens"], summary=self._summary.text(f"alert/{alert['alert']}", alert["text"]))

    def _event(self, tokens: int, **content) -> None:
        self._writer.write_event(self._pb.Event(step=tokens, wall_time=time.time(), **content))
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class WandB(Adapter):
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine.  A resumed run continues its own page."""

    name = extra = "wandb"

    def open(self, run_dir: Path, run: Run, seen: dict[str, int]) -> None:
        import wandb

        page, continued = _page(run_dir / "wandb_id")
        self._run = wandb.init(
            project=run.tracking.wandb_project,
            dir=run_dir,
            name=run.name,
            id=page,
            resume="allow",
            config=to_dict(run),
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self._run.offline:  # nobody is there to be asked what the page has
            self._seen = dict(seen) if continued else {}

    def write(self, scalars: dict[str, float], record: dict) -> None:
        if record["step"] >= self._run.step:  # what the server already has, it would refuse
            self._run.log({**scalars, "tokens": record["tokens"]}, step=record["step"])

    def warn(self, alert: dict) -> None:
        self._run.alert(title=alert["alert"], text=alert["text"], level="WARN")

    def finish(self) -> None:
        self._run.finish()


class Trackio(Adapter):
    """trackio: a database on this machine, no account; `trackio show` opens its page.

    It is where TRACKIO_DIR says, for all runs together, so that they can be compared there.
    """

    name = extra = "trackio"

    def open(self, run_dir: Path, run: Run, seen: dict[str, int]) -> None:
        self._trouble: list[str] = []
        self._pass_on, warnings.showwarning = warnings.showwarning, self._listen
        with _silence():
            import trackio

            page, continued = _page(run_dir / "trackio_id")
            self._trackio = trackio
            self._run = trackio.init(
                project=run.tracking.trackio_project,
                name=f"{run.name}-{page}",  # runs of one name are one to trackio
                resume="allow",
                config=to_dict(run),
                embed=False,
            )
        self._seen = dict(seen) if continued else {}

    def write(self, scalars: dict[str, float], record: dict) -> None:
        self._check()
        self._run.log({**scalars, "tokens": record["tokens"]}, step=record["step"])

    def warn(self, alert: dict) -> None:
        with _silence():  # it has been said on stderr
            self._run.alert(alert["alert"], alert["text"], level=self._trackio.AlertLevel.WARN, step=alert["step"])

    def finish(self) -> None:
        with _silence():
            self._trackio.finish()
        self._check()

    def close(self) -> None:
        super().close()
        if warnings.showwarning == self._listen:
            warnings.showwarning = self._pass_on

    def _listen(self, message, category, filename, *arguments, **named) -> None:
        """trackio writes in a thread of its own, and tells of failures by warnings."""
        if Path(filename).parent.name == "trackio":
            self._trouble.append(str(message))
        else:
            self._pass_on(message, category, filename, *arguments, **named)

    def _check(self) -> None:
        if self._trouble:
            raise RuntimeError(self._trouble[0])


def _page(mark: Path) -> tuple[str, bool]:
    """The name by which a run's page is found again, and whether it is there already."""
    continued = mark.exists()
    if not continued:
        mark.write_text(secrets.token_hex(4))
    return mark.read_text(), continued


def _silence() -> contextlib.AbstractContextManager:
    """stdout is for results; what a tracker has to tell goes nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


def _flat(prefix: str, record: dict) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}/{name}", value)
        elif name not in ("step", "tokens") and isinstance(value, (int, float)):
            yield f"{prefix}/{name}", value
