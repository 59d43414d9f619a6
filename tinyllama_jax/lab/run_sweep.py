"""Runs a sweep on this machine: each run in a directory of its own, as many at a time as there are devices for.

    DIR/sweep.json           the experiment, and which run is where
    DIR/0, DIR/1, ...        run directories, in the order of the experiment's list
    DIR/logs/0.log, ...      what each said

A run that is done, by its fingerprint, is passed over; one that is half done goes on; a directory that holds another
run stops the sweep before it begins.  Each runs under the supervisor that `launch` uses, so that it is started again
by its exit status.  A fork of "@NAME" begins as soon as that run's checkpoint is there.

SIGTERM and SIGINT reach every run; each saves, and the same command goes on.  No jax here: a run is a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinyllama_jax import configio
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.slots import Slot
from tinyllama_jax.launch.supervise import NEVER, PARENT
from tinyllama_jax.schedules import Plan

if TYPE_CHECKING:
    from tinyllama_jax.lab.runs import Run as Measured

POLL_SECONDS = 0.2
FINAL = ("done", "failed", "skipped")


@dataclass
class Task:
    """One run of the sweep."""

    index: int
    run: Run
    directory: Path
    parent: Task | None = None  # whose checkpoint it forks from
    state: str = "waiting"  # | running | done | failed | skipped
    why: str = ""
    begun: bool = False  # a run directory of it is there already
    elsewhere: bool = False  # done, by a table that says so: there is no directory
    todo: list[list[str]] = field(default_factory=list, repr=False)  # commands that are left
    process: subprocess.Popen | None = field(default=None, repr=False)
    slot: Slot | None = None

    @property
    def ready(self) -> bool:
        """Whether what it continues is there."""
        return self.begun or self.parent is None or checkpoint_of(self).is_dir()


def checkpoint_of(task: Task) -> Path:
    """The parent's checkpoint that a fork continues."""
    plan = Plan(task.parent.run.curriculum, task.parent.run.data.sequence_tokens)
    return task.parent.directory / "checkpoints" / f"{plan.step_at(task.run.fork.tokens):08d}"


def tasks(runs: Sequence[Run], workdir: Path, done: Sequence[str] = ()) -> list[Task]:
    """The runs with their directories; those that are done are marked: finished there, or by a fingerprint in `done`.

    Raises ConfigError when a directory holds another run, or a fork names a run that the sweep does not have.
    """
    made = [Task(index, run, workdir / str(index)) for index, run in enumerate(runs)]
    named = {task.run.name: task for task in made}
    for task in made:
        if task.run.fork and task.run.fork.run.startswith("@"):
            parent = task.run.fork.run[1:]
            if parent not in named:
                raise ConfigError(
                    f"{task.run.name}: fork.run={task.run.fork.run}: no run of the sweep is called {parent}"
                )
            task.parent = named[parent]
        print_, there = configio.fingerprint(task.run), _there(task.directory)
        if there is None:
            if print_ in done:
                task.state, task.elsewhere = "done", True
            continue
        if there.info.get("fingerprint") != print_:
            raise ConfigError(
                f"{task.directory} holds another run ({there.name}) than {task.run.name}; use another --workdir, or "
                "move it away"
            )
        task.begun = True
        if there.finished:
            task.state = "done"
    for task in made:  # a trunk whose branches are done is needed by nobody
        if task.elsewhere and any(t.parent is task and t.state != "done" for t in made):
            task.state, task.elsewhere = "waiting", False
    return made


def _there(directory: Path) -> Measured | None:
    if not (directory / "run.json").exists():
        return None
    from tinyllama_jax.lab.runs import Run as Measured  # needs numpy, and a plan should not wait for that

    try:
        return Measured(directory)
    except DataError:
        return None


class Sweep:
    """Starts tasks as slots and parents become free, until none is left or a signal came.

    commands(task): one after the other, each only if the one before ended with 0.  ended(task): called when it has.
    """

    def __init__(
        self,
        todo: list[Task],
        commands: Callable[[Task], list[list[str]]],
        slots: Sequence[Slot],
        say: Callable[[str], None],
        ended: Callable[[Task], None] = lambda task: None,
        lock: int | None = None,
    ):
        self.tasks, self._commands, self._say, self._ended = todo, commands, say, ended
        self._free, self._signal, self._lock = list(slots), 0, lock

    def run(self) -> None:
        """Returns when every task has a final state, or, after a signal, when all that ran have ended."""
        with self._signals():
            while True:
                self._reap()
                if not self._signal:
                    self._start()
                running = any(task.state == "running" for task in self.tasks)
                waiting = [task for task in self.tasks if task.state == "waiting"]
                if not running and (self._signal or not waiting):
                    return
                if not running and not any(task.ready for task in waiting):
                    for task in waiting:
                        self._end(task, "skipped", _missing(task))
                time.sleep(POLL_SECONDS)

    @property
    def signal(self) -> int:
        """That ended it early; 0 = none."""
        return self._signal

    def _start(self) -> None:
        for task in self.tasks:
            if self._free and task.state == "waiting" and task.ready:
                task.slot, task.todo, task.state = self._free.pop(0), self._commands(task), "running"
                self._next(task)
                self._say(f"{task.run.name}: {'goes on' if task.begun else 'started'} in {task.directory}")

    def _next(self, task: Task) -> None:
        with _log(task) as log, task.slot.taken() as environment:
            task.process = subprocess.Popen(
                task.todo.pop(0),
                env=os.environ | environment | {PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a signal to the terminal's group reaches it through us, once
                pass_fds=() if self._lock is None else (self._lock,),  # the sweep is taken as long as a run goes on
            )
        if self._signal:  # it came while the process was being made
            self._pass_on(task)

    def _reap(self) -> None:
        for task in self.tasks:
            if task.state != "running" or (status := task.process.poll()) is None:
                continue
            if status == 0 and task.todo and not self._signal:
                self._next(task)
                continue
            self._free.append(task.slot)
            if status == 0 and not task.todo:
                self._end(task, "done", "")
            elif self._signal:
                task.state = "waiting"
            else:
                again = "" if status in NEVER else ", started again in vain"
                self._end(task, "failed", f"status {status}{again}: {last_line(task)}")

    def _end(self, task: Task, state: str, why: str) -> None:
        task.state, task.why = state, why
        left = sum(task.state not in FINAL for task in self.tasks)
        self._say(f"{task.run.name}: {state}{': ' + why if why else ''}; {left} to go")
        self._ended(task)

    def _pass_on(self, task: Task) -> None:
        if task.process is not None and task.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                task.process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _signals(self):
        def forward(number: int, frame) -> None:
            if not self._signal:
                self._say(f"{signal.Signals(number).name}: the runs save and stop")
            self._signal = number
            for task in self.tasks:
                self._pass_on(task)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def claimed(workdir: Path, say: Callable[[str], None], seconds: float = 60.0) -> Iterator[int]:
    """Holds the sweep's directory, so that no other process starts its runs; gives the lock's file descriptor.

    Runs of a sweep that was killed hold it until they have saved: they are waited for, `seconds` at most.  Raises
    ConfigError when it is still held then.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin > seconds:
                    raise ConfigError(
                        f"{workdir}: another sweep is running there; wait for it, or use another --workdir"
                    ) from None
                if time.monotonic() - begin < POLL_SECONDS:
                    say(f"{workdir}: another sweep holds it, or runs of one are still saving: waiting {seconds:.0f} s")
                time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _missing(task: Task) -> str:
    if task.parent.state == "done":
        return f"{task.parent.run.name}, which it forks from, has no checkpoint at {task.run.fork.tokens:,} tokens"
    return f"{task.parent.run.name}, which it forks from, is {task.parent.state}"


def log_path(task: Task) -> Path:
    return task.directory.parent / "logs" / f"{task.index}.log"


def _log(task: Task) -> IO[bytes]:
    path = log_path(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")


def last_line(task: Task) -> str:
    """The last thing that the run said for a person."""
    lines = log_path(task).read_text(errors="replace").splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if line.startswith("tinyllama ")), lines[-1])
