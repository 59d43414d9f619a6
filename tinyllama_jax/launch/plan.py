"""From an experiment, or a token store's plan, to jobs, checked before anybody waits in a queue for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tinyllama_jax import configio, mesh_rules
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.launch.job import PYTHON, TASK, Job, at
from tinyllama_jax.launch.machine import Machine
from tinyllama_jax.preflight import money
from tinyllama_jax.schedules import Plan


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
    """Raises ConfigError when the mesh does not make up the devices, or cuts the model or a batch unevenly."""
    try:
        sizes = mesh_rules.sizes(run.mesh, machine.devices, f"of {machine.target}")
        mesh_rules.check(run, Plan(run.curriculum, run.data.sequence_tokens).stages, sizes)
    except ConfigError as error:
        raise ConfigError(f"{run.name}: {error}") from error


def estimates(runs: Sequence[Run], machine: Machine) -> list[dict[str, Any]]:
    """What `preflight` foretells of each run on the machine; nothing for a machine that it does not know."""
    if machine.platform == "cpu":
        return []
    return [money.estimate(run, machine.target) for run in runs]


def check_cost(experiment: str, found: Sequence[dict[str, Any]], machine: Machine, dollars: float | None) -> None:
    """Raises ConfigError when all runs together would cost more than `dollars`, UsageError when nobody knows."""
    if dollars is None:
        return
    if not found:
        raise UsageError(f"--max-cost {dollars:g}: there is no price for {machine.target}; leave it out")
    if not dollars > 0:
        raise UsageError(f"--max-cost {dollars:g}: must be positive")
    if len(found) == 1:
        return money.check(found[0], dollars, experiment)
    total = sum(value["cost_usd"]["total"] for value in found)
    if total > dollars:
        raise ConfigError(
            f"the {len(found)} runs of {experiment} on {machine.target} are estimated at ${total:,.0f}, more than "
            f"--max-cost {dollars:,.0f}; launch fewer of them, choose another target, or raise it"
        )


def estimate_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The estimates for a person, in one line for each run."""
    return [
        f"# estimated on {value['target']}: {value['tokens_per_s']:,.0f} tokens/s, {value['days']:,.1f} days, "
        f"${value['cost_usd']['total']:,.0f}"
        for value in found
    ]
