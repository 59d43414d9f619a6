"""A job as a SkyPilot task, for `sky jobs launch`: a managed job, which is recovered when its machines are taken away.

The supervisor stands around the command on each node.  SkyPilot starts the job anew when it is preempted, and after
status 75, which the supervisor gives when it was asked to stop.
"""

from __future__ import annotations

from tinyllama_jax.errors import UsageError
from tinyllama_jax.launch.job import COORDINATOR_PORT, Job, shell
from tinyllama_jax.launch.yaml_text import dump

GPUS = {"a100-40g": "A100", "a100-80g": "A100-80GB", "h100": "H100", "h200": "H200"}
# SkyPilot's machines have `uv`, and a Python older than ours.
INSTALL = ("uv venv --python 3.11 .venv", "uv pip install --python .venv/bin/python -e '.[gpu]'")
ACTIVATE = "source .venv/bin/activate"


def render(job: Job) -> str:
    """The task.  Raises UsageError for TPUs, one process per device, and a time limit, which SkyPilot has not."""
    machine = job.machine
    if machine.platform == "tpu":
        raise UsageError(f"--on sky --target {machine.target}: use --on tpu or --on gke for TPUs")
    if job.processes == "device":
        raise UsageError("--processes-per-node gpus is for --on slurm; elsewhere a node has one process")
    if job.seconds:
        raise UsageError("--time: managed jobs of SkyPilot have no limit of their own; leave it out")
    resources: dict = {}
    if machine.platform == "gpu":
        resources["accelerators"] = f"{GPUS[machine.kind]}:{machine.devices_per_node}"
    if job.zone:
        resources["infra"] = job.zone
    if job.spot:
        resources["use_spot"] = True
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    resources["job_recovery"] = {"max_restarts_on_errors": job.max_restarts, "recover_on_exit_codes": [75]}
    task: dict = {"name": job.name, "num_nodes": machine.nodes, "resources": resources}
    task["envs"] = dict(job.environment)
    bare = not (job.image or job.setup)
    if not job.image:
        task["workdir"] = "."
    if job.mounts:
        task["file_mounts"] = {inside: outside for outside, inside in job.mounts}
    # SkyPilot runs `setup` in a shell of its own, once; what the command needs in its environment belongs to `run`.
    lines = ["set -euo pipefail", *([ACTIVATE] if bare else job.setup)]
    if machine.nodes > 1:
        lines += [
            f'export JAX_COORDINATOR_ADDRESS="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{COORDINATOR_PORT}"',
            'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
        ]
    if bare:
        task["setup"] = "\n".join([*INSTALL, ""])
    task["run"] = "\n".join([*lines, "exec " + shell(job.supervised("sky", job.command)), ""])
    return dump("sky jobs launch <this>", task)


def command(job: Job, file: str) -> list[str]:
    return ["sky", "jobs", "launch", "--yes", "--detach-run", file]
