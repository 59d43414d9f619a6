"""A job as a batch script for SLURM.  The supervisor is the batch script's process; `srun` starts the processes.

Who is told to stop.  `--signal=TERM@120` (without `B:`) goes to the processes of the step, not to the batch script, so
that training saves and ends with 75 while the supervisor lives and asks for a requeue.  At a preemption, a requeue or a
cancellation Slurm signals all of them and waits for KillWait (30 s unless the site's slurm.conf says otherwise); the
supervisor is signalled too then, and asks for nothing.
"""

from __future__ import annotations

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.launch.job import TASK, Job, exports, lines, quote, ranges

MAX_ARRAY = 1001  # MaxArraySize, the default of slurm.conf
TASK_ID = '"$SLURM_ARRAY_TASK_ID"'


def render(job: Job) -> str:
    """The batch script.  Raises ConfigError for what Slurm's own parser of directives cannot hold."""
    if max(job.task_numbers, default=0) >= MAX_ARRAY - 1:
        raise ConfigError(f"{job.tasks} tasks: a SLURM array holds {MAX_ARRAY - 1} by default; use fewer, larger ones")
    return _script(job, job.command, tasks=ranges(job.task_numbers), nodes=job.machine.nodes, name=job.name)


def render_then(job: Job) -> str:
    """The batch script of the command that comes after all tasks."""
    return _script(job, job.then, tasks="", nodes=1, name=f"{job.name}-then")


def _script(job: Job, command: tuple[str, ...], *, tasks: str, nodes: int, name: str) -> str:
    machine = job.machine
    each = max(1, machine.devices_per_node) if job.processes == "device" else 1
    text = ["#!/bin/bash"]

    def directive(option: str, value: object = None) -> None:
        text.append(f"#SBATCH --{option}" + ("" if value is None else f"={_directive(str(value), option)}"))

    directive("job-name", name)
    directive("nodes", nodes)
    directive("ntasks-per-node", each)
    if tasks:
        directive("array", tasks)
    if machine.platform == "gpu":
        directive("gpus-per-node", machine.devices_per_node)
        directive("exclusive")
    if job.cpus and command != job.then:
        directive("cpus-per-task", job.cpus)
    for option in ("partition", "account"):
        if getattr(job, option):
            directive(option, getattr(job, option))
    if job.seconds:
        directive("time", _time(job.seconds))
    directive("requeue")
    directive("open-mode", "append")
    directive("signal", f"TERM@{job.grace_seconds}")
    # Slurm makes no folder for the log, and fails without a word when there is none: the current one is there.
    directive("output", f"{name}-%{'A_%a' if tasks else 'j'}.log")

    text += ["", "set -euo pipefail"]
    text += ['echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${SLURM_RESTART_COUNT:-0}"']
    text += [*job.setup, *exports(job)]
    if machine.platform == "gpu" and job.processes == "node":
        # Otherwise JAX takes the local number of the process for that of its only GPU.
        text.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(machine.devices_per_node)))}")
    # srun asks for one core of a task otherwise, whatever the batch script was given.
    text.append("export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE" + (f" / {each}))" if each > 1 else "))"))
    step = ["srun", "--kill-on-bad-exit=1"]
    if job.image:
        step.append(f"--container-image={job.image}")
        if job.mounts:
            step.append("--container-mounts=" + ",".join(f"{outside}:{inside}" for outside, inside in job.mounts))
        text.append("# The image is the step's; the supervisor runs beside it and needs Python 3.11 and this package.")
    words = job.supervised("slurm", (*step, *command))
    return "\n".join([*text, "", "exec " + lines(words, TASK_ID), ""])


def command(job: Job, file: str) -> list[str]:
    """What submits the script; prints the job id."""
    return ["sbatch", "--parsable", file]


def command_then(job: Job, file: str, job_id: str) -> list[str]:
    # Without the second option it would wait for ever for an array of which a task has failed.
    return ["sbatch", "--parsable", f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes", file]


def _directive(value: str, option: str) -> str:
    """A value in a directive line, quoted as sbatch reads it."""
    if "\n" in value or TASK in value:
        raise ConfigError(f"--{option} {value!r}: SLURM's directives hold no line break")
    return quote(value)


def _time(seconds: int) -> str:
    minutes = -(-seconds // 60)
    days, minutes = divmod(minutes, 1440)
    return f"{days}-{minutes // 60:02d}:{minutes % 60:02d}:00"
