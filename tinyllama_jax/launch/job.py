"""What is launched, whoever runs it: one frozen `Job`, which every platform's renderer turns into its own text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.launch.machine import Machine

# Stands inside a word of a command for the number of the task, from 0.  No argument of a process can hold a NUL, so
# nothing that a person writes is ever taken for it.
TASK = "\0"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # a DNS label, with room for what Kubernetes appends
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PYTHON = ("python", "-m", "tinyllama_jax")
COORDINATOR_PORT = 8476


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command for some machines.  With `tasks` it is an array: as many independent jobs of one node each or more,
    in whose words TASK stands for their number; `then` is a command for one node after all of them."""

    name: str
    command: tuple[str, ...]  # what each process runs, such as python -m tinyllama_jax train ...
    machine: Machine
    processes: str = "node"  # one process per `node` with all its devices, or one per `device`
    tasks: int = 0  # 0 = one job
    numbers: tuple[int, ...] = ()  # of the tasks; empty = 0, 1, 2, ...
    then: tuple[str, ...] = ()
    workdir: str = ""  # the run directory, in which the supervisor looks for checkpoints; empty = none are made
    checkpoints: str = ""  # where they are; empty = WORKDIR/checkpoints
    image: str = ""  # container image
    mounts: tuple[tuple[str, str], ...] = ()  # (path or volume outside, path inside)
    environment: tuple[tuple[str, str], ...] = ()  # the flag profile's and the user's, in this order
    cpus: int = 0  # of a task on SLURM; 0 = one, and with GPUs all of the node
    setup: tuple[str, ...] = ()  # shell lines before the command
    seconds: int = 0  # time limit; 0 = the platform's
    grace_seconds: int = 120  # between the request to stop and the end
    max_restarts: int = 3  # after failures without a new checkpoint in between
    partition: str = ""  # SLURM
    account: str = ""  # SLURM
    queue: str = ""  # Kueue's LocalQueue
    project: str = ""  # Google Cloud
    zone: str = ""
    spot: bool = False  # cheaper machines that may be taken away

    def __post_init__(self):
        _require(NAME.fullmatch(self.name), f"job name {self.name!r}: write it as a-z, 0-9 and -, at most 40 long")
        _require(len(self.numbers) in (0, self.tasks), f"{self.tasks} tasks have {len(self.numbers)} numbers")
        _require(self.processes in ("node", "device"), f"processes {self.processes!r} is neither node nor device")
        for key, value in self.environment:
            _require(VARIABLE.fullmatch(key), f"environment variable {key!r}: not a name; write --env NAME=VALUE")
            _require("\n" not in value and "\0" not in value, f"environment variable {key}: its value has a line break")
        for label in ("workdir", "image", "partition", "account", "queue", "project", "zone"):
            _require("\n" not in getattr(self, label), f"{label} {getattr(self, label)!r} has a line break")
        _require(self.seconds >= 0, f"time limit of {self.seconds} s; it must be positive")
        _require(self.grace_seconds > 0, f"grace of {self.grace_seconds} s; it must be positive")
        _require(self.max_restarts >= 0, f"max restarts is {self.max_restarts}; it must be 0 or more")
        _require(
            not self.seconds or self.seconds > self.grace_seconds,
            f"a time limit of {self.seconds} s leaves nothing beside {self.grace_seconds} s of grace",
        )

    @property
    def task_numbers(self) -> tuple[int, ...]:
        return self.numbers or tuple(range(self.tasks))

    def check_outlives(self) -> None:
        """Raises ConfigError when the run's checkpoints would be lost together with the machines."""
        _require(
            not self.workdir or "://" in self.checkpoints or self.mounts or self.setup,
            f"checkpoints in {self.checkpoints or self.workdir} would be lost with the machines; write them to a "
            "bucket (--set checkpoint.directory=gs://...), or --mount a disk that stays",
        )

    def supervised(self, platform: str, command: tuple[str, ...]) -> tuple[str, ...]:
        """The command under the supervisor that restarts it by its exit status."""
        where = ("--workdir", self.workdir) if self.workdir else ()
        where += ("--checkpoints", self.checkpoints) if self.checkpoints else ()
        bound = ("--max-restarts", str(self.max_restarts))
        return (*PYTHON, "launch", "supervise", "--on", platform, *bound, *where, "--", *command)


def _require(condition, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def ranges(numbers: tuple[int, ...]) -> str:
    """0-3,7 from 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def at(words: tuple[str, ...], task: int) -> tuple[str, ...]:
    """The words of one task."""
    return tuple(word.replace(TASK, str(task)) for word in words)


def quote(word: str, task: str = "") -> str:
    """One word for a shell, safely; TASK becomes the shell expression `task`, such as "$SLURM_ARRAY_TASK_ID"."""
    if TASK not in word:
        return shlex.quote(word)
    return task.join(shlex.quote(part) if part else "" for part in word.split(TASK))


def shell(words: tuple[str, ...], task: str = "") -> str:
    """A command line for a shell."""
    return " ".join(quote(word, task) for word in words)


def lines(words: tuple[str, ...], task: str = "") -> str:
    """A command line over several: each option begins one, and each command that another one starts."""
    text = ""
    for before, word in zip(("", *words), words, strict=False):
        if text:
            begins = (
                word.startswith("--") and word != "--" or before == "--" or (word == PYTHON[0] and before[:1] == "-")
            )
            text += " \\\n    " if begins else " "
        text += quote(word, task)
    return text


def exports(job: Job) -> list[str]:
    """Shell lines that set the environment."""
    return [f"export {key}={shlex.quote(value)}" for key, value in job.environment]
