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
    experiment: str,
    workdir: str,
    settings: Sequence[str],
    paths: Sequence[str],
    chosen: Sequence[int] | None = None,
    **options,
) -> tuple[list[Job], list[Run]]:
    """Jobs that train the experiment, and its runs: one, or those of a sweep, as the tasks of an array.

    A sweep whose runs fork from others of it makes several jobs, each of which can begin when the one before is done.
    chosen: numbers of the runs to train (all).  options: fields of Job.  Run n of a sweep goes to WORKDIR/n.  Raises
    ConfigError for a run that the machine's devices cannot share evenly, UsageError for a wrong name or setting.
    """
    # `name[3]` is one run of a sweep, and is launched like any other.
    made = (configio.load_experiment if experiment.endswith("]") else configio.load_runs)(experiment, paths)
    runs = [configio.override(run, settings) for run in ([made] if isinstance(made, Run) else made)]
    if chosen and (isinstance(made, Run) or max(chosen) >= len(runs)):
        raise UsageError(f"--runs: {experiment} is {len(runs)} run{'s, from 0 on' if len(runs) > 1 else ''}")
    numbers = list(range(len(runs))) if chosen is None else sorted(set(chosen))
    for number in numbers:
        check(runs[number], options["machine"])
    directories = [run.checkpoint.directory for run in runs]
    if isinstance(made, Run):
        command = train_command(experiment, workdir, settings, paths)
        return [Job(command=command, workdir=workdir, checkpoints=directories[0], **options)], runs
    if any(directories):
        raise ConfigError(
            f"{experiment}: checkpoint.directory is set, and a sweep's checkpoints go to {workdir}/n/checkpoints; "
            f"leave it out, or launch the runs one by one, such as {experiment}[0]"
        )
    experiment, workdir = f"{experiment}[{TASK}]", f"{workdir.rstrip('/')}/{TASK}"
    command, jobs = train_command(experiment, workdir, settings, paths), []
    for wave in waves(runs, numbers):
        name = options["name"] if not jobs else f"{options['name'][:36]}-{len(jobs) + 1}"
        more = options | {"name": name, "tasks": len(wave), "numbers": tuple(wave)}
        jobs.append(Job(command=command, workdir=workdir, **more))
    return jobs, [runs[number] for number in numbers]


def waves(runs: Sequence[Run], numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of runs in the order in which they can begin: a fork of "@NAME" after the run of that name.

    Raises ConfigError for a fork of a run that the sweep does not have.
    """
    named = {run.name: number for number, run in enumerate(runs)}

    def parent(number: int) -> int | None:
        fork = runs[number].fork
        if fork is None or not fork.run.startswith("@"):
            return None
        if fork.run[1:] not in named:
            raise ConfigError(f"{runs[number].name}: fork.run={fork.run}: no run of the sweep is called so")
        return named[fork.run[1:]]

    left, found = list(numbers), []
    while left:
        wave = [number for number in left if parent(number) not in left]
        if not wave:
            raise ConfigError(f"{runs[left[0]].name}: forks from itself, through {runs[left[0]].fork.run}")
        found.append(wave)
        left = [number for number in left if number not in wave]
    return found


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
            numbers=(),
            then=(),
        )
        for n in job.task_numbers
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
