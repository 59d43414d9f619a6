"""What runs of a sweep share: a GPU for each, or on processors a part of the cores."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tinyllama_jax.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """Where one run goes at a time."""

    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them
    cores: tuple[int, ...] = ()  # () = all

    @contextlib.contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """The environment for a process; one that is started inside inherits the cores."""
        before = os.sched_getaffinity(0) if self.cores else None
        try:
            if before is not None:
                os.sched_setaffinity(0, self.cores)
            yield {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)


def slots(runs_at_a_time: int = 0, devices_per_run: int = 0) -> list[Slot]:
    """One slot for each run that may go on at a time.

    With GPUs: `devices_per_run` (one) for each, and as many slots as that makes, or `runs_at_a_time`.  Without: one run
    with all cores, or `runs_at_a_time` that divide the cores among them, which is faster for models too small to keep
    several cores busy.  Raises UsageError for more slots than there are devices or cores.
    """
    gpus = _gpus()
    if gpus:
        each = devices_per_run or 1
        there = len(gpus) // each
        if not there or runs_at_a_time > there:
            raise UsageError(
                f"--slots {max(runs_at_a_time, 1)} of {each} GPUs each: there are {len(gpus)}; ask for fewer"
            )
        return [Slot(gpus=tuple(gpus[i * each : (i + 1) * each])) for i in range(runs_at_a_time or there)]
    if devices_per_run:
        raise UsageError(f"--gpus-per-run {devices_per_run}: there is no GPU here; leave it out")
    if runs_at_a_time <= 1 or not hasattr(os, "sched_setaffinity"):
        return [Slot() for _ in range(max(1, runs_at_a_time))]
    cores = sorted(os.sched_getaffinity(0))
    if runs_at_a_time > len(cores):
        raise UsageError(f"--slots {runs_at_a_time}: there are {len(cores)} cores; ask for fewer")
    return [Slot(cores=tuple(cores[i::runs_at_a_time])) for i in range(runs_at_a_time)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]
