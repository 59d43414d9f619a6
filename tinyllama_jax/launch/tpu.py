"""A job as a script that asks Google Cloud for a TPU slice by a queued resource, runs on all its hosts, gives it back.

The script runs on the machine that launches and lives as long as the job: queued resources have no scheduler of their
own.  A slice that is taken away (preempted, in maintenance) is asked for again, and training goes on from its last
checkpoint, which therefore has to lie in a bucket: `--workdir` below a mounted one, or `--set checkpoint.directory`.
"""

from __future__ import annotations

import shlex

from tinyllama_jax.errors import UsageError
from tinyllama_jax.launch.job import Job, exports, shell
from tinyllama_jax.launch.machine import Machine
from tinyllama_jax.preflight import targets

# https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# v4 and v5p are counted in cores, of which a chip has two: https://cloud.google.com/tpu/docs/v4 and /v5p
TYPES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
POLL_SECONDS = 30


def accelerator(machine: Machine) -> list[str]:
    """The options that name the slice: its type, and the shape where Google Cloud would choose another."""
    name, per_chip = TYPES[machine.kind]
    if machine.topology not in targets.TPUS[machine.kind].shapes:
        return [f"--type={machine.kind}", f"--topology={machine.topology}"]
    return [f"--accelerator-type={name}-{machine.devices * per_chip}"]


def create(job: Job) -> list[str]:
    """gcloud's command that asks for the slice."""
    words = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, f"--node-id={job.name}"]
    words += [*_where(job), *accelerator(job.machine), f"--runtime-version={RUNTIMES[job.machine.kind]}"]
    return [*words, "--spot"] if job.spot else words


def connect(job: Job) -> list[str]:
    """gcloud's command that runs the job on every host of the slice."""
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", job.name, "--worker=all", *_where(job)]
    return [*words, f"--command={remote(job)}"]


def remote(job: Job) -> str:
    """What each host runs."""
    command = shell(job.supervised("tpu", job.command))
    if not job.image:
        return "\n".join(["set -euo pipefail", *job.setup, *exports(job), command])
    docker = ["sudo", "docker", "run", "--rm", "--privileged", "--network=host", f"--name={job.name}"]
    docker += [f"--stop-timeout={job.grace_seconds}"]
    docker += [f"--volume={outside}:{inside}" for outside, inside in job.mounts]
    docker += [f"--env={key}={value}" for key, value in job.environment]
    # The last run's container is still there when only the connection broke.
    clear = f"sudo docker rm --force {job.name} >/dev/null 2>&1 || true"
    return "\n".join(["set -euo pipefail", *job.setup, clear, f"{shell((*docker, job.image))} {command}"])


def render(job: Job) -> str:
    """The script.  Raises UsageError for what a TPU cannot do, and without project, zone, or a way to get the code."""
    if job.machine.platform != "tpu":
        raise UsageError(f"--on tpu --target {job.machine.target}: not a TPU; write --target v5e:4x4 or another slice")
    for option in ("project", "zone"):
        if not getattr(job, option):
            raise UsageError(f"--on tpu needs --{option}")
    if job.processes == "device":
        raise UsageError("--processes-per-node gpus is for --on slurm; a TPU host has one process")
    if not (job.image or job.setup):
        raise UsageError(
            "--on tpu: the hosts of a slice start bare; name an --image (launch/Dockerfile makes one), or say with "
            "--setup how the code gets there"
        )
    job.check_outlives()
    where = shell(tuple(_where(job)))
    name = shlex.quote(job.name)
    limit = f"timeout --signal=TERM --kill-after={job.grace_seconds} {job.seconds} " if job.seconds else ""
    return f"""#!/bin/bash
# Asks for a TPU slice, runs on all its hosts, gives it back.  Asks again when the slice is taken away, at most
# {job.max_restarts} times.
set -uo pipefail

state() {{
    gcloud compute tpus queued-resources describe {name} {where} --format='value(state.state)' 2>/dev/null
}}

give_back() {{
    gcloud compute tpus queued-resources delete {name} {where} --force --quiet
}}
trap give_back EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

for ((taken = 0; taken <= {job.max_restarts}; taken++)); do
    {shell(tuple(create(job)))} || exit 1
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in
        FAILED | SUSPENDED) echo "{job.name}: no slice was given: $(state)" >&2 && exit 1 ;;
        esac
        sleep {POLL_SECONDS}
    done
    {limit}{shell(tuple(connect(job)))}
    status=$?
    if [ "$status" = 0 ] || [ "$(state)" = ACTIVE ]; then
        exit "$status" # done, or the supervisors gave up
    fi
    echo "{job.name}: the slice was taken away ($(state)); asking for another" >&2
    give_back
done
echo "{job.name}: the slice was taken away {job.max_restarts + 1} times" >&2
exit 75
"""


def command(job: Job, file: str) -> list[str]:
    return ["bash", file]


def _where(job: Job) -> list[str]:
    return [f"--project={job.project}", f"--zone={job.zone}"]
