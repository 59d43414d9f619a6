"""Evaluating a run's checkpoints at marks of tokens, while it trains or afterwards, as a program beside the training.

What is done is what stands in RUN/evaluations, and what is due follows from the checkpoints that are there
(records.due): nothing else is remembered, so a killed evaluation is repeated and a hole is filled by the same command.
Checkpoints stay where checkpoint.permanent_tokens keeps them; of others the last few are there for a while only.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinyllama_jax.errors import CheckpointError, Preempted
from tinyllama_jax.evaluate import records
from tinyllama_jax.lab.runs import Run
from tinyllama_jax.terminal import say
from tinyllama_jax.train import durable, saved

POLL_SECONDS = 20


def follow(
    run: str | Path,
    label: str,
    every_tokens: int,
    evaluate: Callable[[str], dict[str, Any]],
    *,
    watch: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> list[dict[str, Any]]:
    """Evaluates what is due; returns all results of this label, each with `new`.

    evaluate: gets RUN@STEP, answers with a dictionary that has `step` and `tokens`.
    watch: go on until the run's last checkpoint is there and nothing is due.
    Raises DataError for what is no run directory, Preempted on SIGTERM, and CheckpointError in the end when
    checkpoints could not be read; the others are evaluated first.
    """
    directory = Path(run)
    last = int(Run(directory).plan.get("total_steps", 0))  # or else DataError: no run
    tokens: dict[int, int] = {}
    new, failed = set(), {}
    with _stoppable():
        while True:
            kept = _kept(directory, tokens)
            ended = last in kept  # looked at before what is due, so that the last one is not missed
            done = {r["step"]: r["tokens"] for r in records.read(directory) if r["label"] == label}
            due = [step for step in records.due(kept, done, every_tokens, last) if step not in failed]
            if due:
                step = due[0]
                say(f"step {step}, {kept[step]:,} tokens: {label} ({len(due)} due)")
                try:
                    records.put(directory, label, evaluate(f"{directory}@{step}"))
                    new.add(step)
                except CheckpointError as error:
                    if durable.path_of(directory / "checkpoints", step).is_dir():
                        failed[step] = str(error)
                        say(f"step {step} is left out: {error}")
                    # else the run has deleted it meanwhile
            elif watch and not ended and last not in failed:
                time.sleep(poll_seconds)
            else:
                break
    if failed:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in failed.items())
        raise CheckpointError(f"{directory}: {len(failed)} of the due checkpoints could not be evaluated: {reasons}")
    return [r | {"new": r["step"] in new} for r in records.read(directory) if r["label"] == label]


def _kept(directory: Path, tokens: dict[int, int]) -> dict[int, int]:
    """{step: tokens} of the checkpoints that are there; `tokens` remembers what was read."""
    folder = directory / "checkpoints"
    steps = durable.steps(folder) if folder.is_dir() else []
    for step in steps:
        if step not in tokens:
            with contextlib.suppress(CheckpointError, KeyError):  # deleted, or damaged, which is said by the training
                tokens[step] = saved.read_meta(durable.path_of(folder, step))["tokens"]
    return {step: tokens[step] for step in steps if step in tokens}


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM raises Preempted meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Preempted("stopped; what was evaluated is kept, and the same command goes on with the rest")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
