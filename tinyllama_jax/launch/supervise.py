"""Runs a command again by its exit status, a bounded number of times without a new checkpoint.  Standard library only.

    0        done
    2, 78    never again: the command, the configuration or the data are wrong
    75       again: it saved and was asked to stop, or part of the work is done
    other    again, at most `max_restarts` times until there is a new checkpoint

Where it stands.  All processes of a run have to start again together, so it stands where all of them end together:

    slurm    in the batch script, around `srun --kill-on-bad-exit=1`, which ends the whole step when one process fails.
             srun's own status is the highest of all processes', which says nothing: those that it ended because one
             failed say 75 or 137.  Its messages tell how each of them ended, in order, and the first is the cause.
             After 75 it asks for `scontrol requeue`, so that others may go first.  Its counts outlive that in a file.
    gke      in each pod, once: Kubernetes restarts.  A failure after a new checkpoint becomes 75, which the Job's
             pod failure policy does not count, and one without becomes 1, which JobSet counts.
    tpu, sky around the command on each host: when one process is lost the others end within the watchdog's time, and
             those that are started again wait for each other when they meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

PLATFORMS = ("slurm", "gke", "tpu", "sky", "local")
DONE, AGAIN, NEVER, FAILED = 0, 75, (2, 78), 1
IDLE_STOPS = 20  # times that a run may be stopped in a row without a new checkpoint
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PAUSE_SECONDS = (1, 5, 15, 60)  # before the first restart, the second, ...
# srun: error: node7: tasks 3,5: Exited with exit code 78  |  srun: error: node7: task 3: Killed
ENDED = re.compile(rb"srun: error: [^:]+: tasks? [-\d,\[\]]+: (?:Exited with exit code (\d+)|\w.*)\s*$")
CHECKPOINT = re.compile(r"\d{8}")
STATE = "supervisor.json"
PARENT = "TINYLLAMA_SWEEP"  # environment: the process id of the sweep, without which the run is to stop


@dataclass
class Counts:
    """What happened since the last new checkpoint."""

    checkpoint: str = ""
    failures: int = 0
    stops: int = 0


def newest_checkpoint(folder: str) -> str:
    """The name of the last committed checkpoint in a folder or bucket, or ''.  Damaged ones have another name.

    Raises OSError when a bucket cannot be asked.
    """
    if "://" in folder:
        from tinyllama_jax.launch.bucket import folders

        names = folders(folder)
    else:
        try:
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            names = []
    return max((name for name in names if CHECKPOINT.fullmatch(name)), default="")


def _relay(lines: IO[bytes]) -> int | None:
    """Copies what srun says to our own stderr until it ends.  The status of the process that failed first: of those
    that ended with 2 or 78 if there is one, as no other start helps then; 137 for a signal; None if none failed."""
    ended: list[int] = []
    for line in lines:
        with contextlib.suppress(OSError):  # a full disk, behind the job's log
            os.write(2, line)
        if found := ENDED.match(line):
            ended.append(int(found[1]) if found[1] else 137)
    return next((status for status in ended if status in NEVER), ended[0] if ended else None)


def slurm_job() -> str:
    """The job that this process belongs to, as Slurm's commands name it, or ''.

    A task of an array goes by the array and its number: one of the tasks has the array's own id, which would mean all.
    """
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return os.environ.get("SLURM_JOB_ID", "")


class Supervisor:
    """Runs `command` under the rules above; `run` gives the exit status."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        on: str = "local",
        max_restarts: int = 3,
        workdir: str = "",
        checkpoints: str = "",
        pause_seconds: Sequence[float] = PAUSE_SECONDS,
        say: Callable[[str], None] | None = None,
    ):
        self.command, self.on, self.max_restarts, self.workdir = list(command), on, max_restarts, workdir
        self.checkpoints = checkpoints or (str(Path(workdir) / "checkpoints") if workdir else "")
        self.pauses = pause_seconds
        self.say = say or (lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True))
        self.asked = threading.Event()  # to stop, by a signal to this process
        self.child: subprocess.Popen | None = None
        self.telling: list[subprocess.Popen] = []  # calls of scancel
        self.job = slurm_job() if on == "slurm" else ""
        self.counts = self._read()

    def run(self) -> int:
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        self._stop_with_parent()
        try:
            if count := os.environ.get("SLURM_RESTART_COUNT"):
                self.say(f"job {self.job} was restarted {count} times")
            while True:
                status = self._once()
                answer = self._after(status)
                if answer is not None:
                    return answer
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_with_parent(self) -> None:
        """When the sweep that started this is killed, its runs save and stop: nobody would watch them (Linux)."""
        parent = os.environ.pop(PARENT, "")
        if parent:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != int(parent):  # it was killed before
                self.asked.set()

    def _once(self) -> int:
        """Runs the command to its end: its exit status, 128 + n when signal n ended it, 127 when there is none."""
        step = self.on == "slurm" and Path(self.command[0]).name == "srun"
        try:
            self.child = subprocess.Popen(self.command, stderr=subprocess.PIPE if step else None)
        except OSError as error:
            self.say(f"{self.command[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        if self.asked.is_set():  # the signal came while the child was being made
            self._pass_on(signal.SIGTERM)
        first = _relay(self.child.stderr) if step else None
        status = self.child.wait()
        while self.telling:  # scancel tries again and again, and would find the job's next start
            self.telling.pop().kill()
        status = 128 - status if status < 0 else status
        return status if first is None or not status else first

    def _after(self, status: int) -> int | None:
        """What follows from an exit status: an exit status of our own, or None to run it again."""
        if status == DONE or status in NEVER:
            if status:
                self.say(f"ended with status {status}: starting it again would end the same way")
            return status
        newest = self._newest(self.counts.checkpoint)
        progress = newest != self.counts.checkpoint
        if progress:
            self.counts = Counts(newest)
        if self.on == "gke":
            self.say(f"ended with status {status}, {'after a new' if progress else 'without a new'} checkpoint")
            return AGAIN if progress else FAILED
        if status == AGAIN:
            self.counts.stops += 1
            exhausted = bool(self.checkpoints) and self.counts.stops > IDLE_STOPS
        else:
            self.counts.failures += 1
            exhausted = self.counts.failures > self.max_restarts
        self._write()
        if self.asked.is_set():
            self.say(f"asked to stop; ended with status {status}")
            return AGAIN if status == AGAIN else status
        if exhausted:
            times = self.counts.stops if status == AGAIN else self.counts.failures
            self.say(f"status {status} for the {times}th time without a new checkpoint; giving up")
            return NEVER[1] if status == AGAIN else status
        if status == AGAIN and self.job:
            return self._requeue()
        pause = self.pauses[min(self.counts.failures + self.counts.stops, len(self.pauses)) - 1]
        self.say(f"ended with status {status}; starting it again in {pause} s")
        self.asked.wait(pause)
        if self.asked.is_set():
            self.say("asked to stop")
            return AGAIN
        return None

    def _requeue(self) -> int | None:
        """Gives the nodes back and queues the job again, with the same id.  Slurm then ends this process."""
        try:
            done = subprocess.run(["scontrol", "requeue", self.job], capture_output=True, text=True)
            trouble = done.stderr.strip() if done.returncode else ""
        except OSError as error:
            trouble = str(error.strerror)
        if trouble:
            self.say(f"scontrol requeue {self.job}: {trouble}; starting it again here")
            return None
        self.say(f"ended with status {AGAIN}; job {self.job} is queued again")
        self.asked.wait(60)  # for Slurm to end this process: an end of our own might be taken for the job's
        return AGAIN

    def _forward(self, number: int, frame) -> None:
        if number != signal.SIGUSR1:
            self.asked.set()
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self.child is None or self.child.poll() is not None:
            return
        if self.job:
            # srun takes SIGTERM for an order to kill its tasks, so the tasks are told by Slurm.  When it is Slurm that
            # ends the job, they were told already, and are told again, which changes nothing.
            name = signal.Signals(number).name.removeprefix("SIG")
            with contextlib.suppress(OSError):
                tell = ["scancel", f"--signal={'TERM' if name == 'INT' else name}", self.job]
                self.telling.append(subprocess.Popen(tell))
            return
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)

    def _read(self) -> Counts:
        """The counts of the job's last start, or new ones, from the checkpoint that there is now."""
        if self.job and self.workdir:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                state = json.loads((Path(self.workdir) / STATE).read_text())
                if state.pop("job") == self.job:
                    return Counts(**state)
        return Counts(self._newest(""))

    def _newest(self, known: str) -> str:
        """The newest checkpoint, or the one that was known when that cannot be told now."""
        try:
            return newest_checkpoint(self.checkpoints) if self.checkpoints else ""
        except OSError as error:
            self.say(f"no checkpoint can be seen: {error}")
            return known

    def _write(self) -> None:
        if not (self.job and self.workdir):
            return  # one process of ours sees all restarts
        path = Path(self.workdir) / STATE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"job": self.job, **asdict(self.counts)}) + "\n")
            part.replace(path)
        except OSError as error:  # a full disk must not keep the run from starting again
            self.say(f"{path}: {error.strerror}; restarts before this one are forgotten when the job is queued again")
