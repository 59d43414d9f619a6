"""Going back after too many skipped steps: to the checkpoint before them, and past the batches that followed.

Started again from a checkpoint, a run would meet the same batches and fail the same way.  PaLM's remedy (arXiv
2204.02311, section 5.1) was to restart earlier and to leave out the batches around the spike; here that is a skip range
of the data order (data.skip_ranges).  What was decided is kept in RUN/rollbacks.json and applied at every later start,
so that the run stays a function of its command and that file.
"""

from __future__ import annotations

import json
from pathlib import Path

from tinyllama_jax.config import Run, replace
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan

NAME = "rollbacks.json"


class TooManySkips(Exception):
    """`count` steps in a row up to `step` were skipped; caught by whoever can go back."""

    def __init__(self, step: int, count: int):
        super().__init__(f"the last {count} steps up to step {step} were skipped")
        self.step, self.count = step, count


def read(workdir: Path) -> list[dict]:
    """The rollbacks of a run so far: [{"from": step, "to": step}], `from` the step at which it had failed."""
    path = workdir / NAME
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())["rollbacks"]
        return [{"from": int(r["from"]), "to": int(r["to"])} for r in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not readable ({error}); put it back, it decides the order of the data") from error


def write(workdir: Path, rollbacks: list[dict]) -> None:
    write_json(workdir / NAME, {"rollbacks": rollbacks})


def applied(run: Run, rollbacks: list[dict]) -> Run:
    """The run with the batches of its rollbacks left out; cut at stage borders, for a skip lies in one stage."""
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    ranges = [
        (max(rollback["to"], stage.start_step), min(rollback["from"], stage.end_step))
        for rollback in rollbacks
        for stage in plan.stages
    ]
    ranges = tuple((first, end) for first, end in ranges if first < end)
    if not ranges:
        return run
    return replace(run, data=replace(run.data, skip_ranges=(*run.data.skip_ranges, *ranges)))


def target(steps: list[int], failed: TooManySkips) -> int:
    """The checkpoint to go back to: the newest from before the skipped steps; else the oldest there is, for skipped
    steps leave the weights as they were; else 0, the beginning."""
    before = [step for step in steps if step <= failed.step - failed.count]
    return max(before) if before else min(steps, default=0)
