"""From an experiment, or a token store's plan, to jobs, checked before anybody waits in a queue for them."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence

from tinyllama_jax import configio
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.launch.job import PYTHON, TASK, Job, at
from tinyllama_jax.launch.machine import Machine


def train_command(experiment: str, workdir: str, settings: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    """The command that also trains on a laptop."""
    words = [*PYTHON, "train", experiment, "--workdir", workdir]
    words += [word for setting in settings for word in ("--set", setting)]
    return (*words, *(word for path in paths for word in ("--experiment-path", path)))


def training(
    experiment: str, workdir: str, settings: Sequence[str], paths: Sequence[str], **options
) -> tuple[Job, list[Run]]:
    """A job that trains the experiment, and its runs: one, or those of a sweep, as the tasks of an array.

    options: fields of Job.  Run n of a sweep goes to WORKDIR/n.  Raises ConfigError for a run that the machine's
    devices cannot share evenly, UsageError for a wrong name or setting.
    """
    # `name[3]` is one run of a sweep, and is launched like any other.
    made = (configio.load_experiment if experiment.endswith("]") else configio.load_runs)(experiment, paths)
    sweep = [made] if isinstance(made, Run) else made
    runs = [configio.override(run, settings) for run in sweep]
    for run in runs:
        check(run, options["machine"])
    directories = [run.checkpoint.directory for run in runs]
    if isinstance(made, Run):
        options["checkpoints"] = directories[0]
    else:
        if any(directories):
            raise ConfigError(
                f"{experiment}: checkpoint.directory is set, and a sweep's checkpoints go to {workdir}/n/checkpoints; "
                f"leave it out, or launch the runs one by one, such as {experiment}[0]"
            )
        experiment, workdir = f"{experiment}[{TASK}]", f"{workdir.rstrip('/')}/{TASK}"
        options["tasks"] = len(runs)
    return Job(command=train_command(experiment, workdir, settings, paths), workdir=workdir, **options), runs


def preparing(store: str, shares: int, workers: int, **options) -> Job:
    """A job that makes the items of a frozen plan in so many shares, and then the manifest."""
    if shares < 1:
        raise ConfigError(f"--items {shares}: must be 1 or more")
    run = [*PYTHON, "prepare", "run", "--out", store, "--items", f"{TASK}/{shares}"]
    if workers:
        run += ["--workers", str(workers)]
    then = (*PYTHON, "prepare", "finalize", "--out", store)
    return Job(command=tuple(run), then=then, tasks=shares, cpus=workers, **options)


def alone(job: Job) -> list[Job]:
    """The tasks of an array as jobs of their own, for platforms without arrays."""
    if not job.tasks:
        return [job]
    return [
        dataclasses.replace(
            job,
            name=f"{job.name}-{n}",
            command=at(job.command, n),
            workdir=at((job.workdir,), n)[0],
            tasks=0,
            then=(),
        )
        for n in range(job.tasks)
    ]


def check(run: Run, machine: Machine) -> None:
    """Raises ConfigError when the mesh does not make up the devices, or a batch cannot be shared out among them."""
    mesh, devices = run.mesh, machine.devices
    sizes = {"replica": mesh.replica, "data": mesh.data, "context": mesh.context, "tensor": mesh.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = devices // known if -1 in sizes.values() else 1
    asked = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if known * rest != devices:
        raise ConfigError(f"{run.name}: {asked} does not make up the {devices} devices of {machine.target}")
    ways = math.prod(rest if sizes[name] == -1 else sizes[name] for name in ("replica", "data"))
    for stage in run.curriculum:
        sequences = stage.batch_tokens // run.data.sequence_tokens
        together = min(sequences, run.execution.micro_batch_sequences or sequences)
        if together % ways:
            raise ConfigError(
                f"{run.name}, stage {stage.name!r}: {together} sequences at a time cannot be shared out among the "
                f"{ways} parts of {asked} on {machine.target}; change execution.micro_batch_sequences or the mesh"
            )


def check_cost(runs: Sequence[Run], target: str, dollars: float) -> float:
    """What the runs cost on the target, in dollars.  Raises ConfigError when that is more than `dollars`."""
    money = importlib.import_module("tinyllama_jax.preflight.money")
    total = sum(money.estimate(run, target)["cost_usd"]["total"] for run in runs)
    if total > dollars:
        raise ConfigError(
            f"{runs[0].name}: about ${total:,.0f} on {target}, more than --max-cost {dollars:,.0f}; nothing launched"
        )
    return total
