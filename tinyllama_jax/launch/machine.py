"""The machines of a job: `--target` as `preflight` reads it, or `cpu`, and how many hosts that is."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_jax.errors import UsageError
from tinyllama_jax.preflight import targets

TPU_CHIPS_PER_HOST = 4  # of a slice of several hosts
# Slices up to this many chips are one host: https://cloud.google.com/tpu/docs/v5e and /v6e; 4 for v4 and v5p.
SINGLE_HOST_CHIPS = {"v5e": 8, "v6e": 8, "v4": 4, "v5p": 4}
DEFAULT_TARGETS = {"slurm": "a100-40g", "gke": "a100-40g", "sky": "a100-40g", "tpu": "v5e:4x4"}


@dataclass(frozen=True)
class Machine:
    kind: str  # a100-40g, v5e, cpu, ...
    platform: str  # gpu, tpu, cpu
    nodes: int  # hosts
    devices_per_node: int  # GPUs or TPU chips; 0 for the processors of a host
    topology: str = ""  # of a TPU slice, such as 2x2x2

    @property
    def devices(self) -> int:
        """As JAX counts them; a CPU host is one device."""
        return self.nodes * max(1, self.devices_per_node)

    @property
    def target(self) -> str:
        """As `--target` writes it."""
        if self.platform == "cpu":
            return "cpu"
        return f"{self.kind}:{self.topology or f'{self.nodes}x{self.devices_per_node}'}"


def parse(target: str, nodes: int | None, on: str) -> Machine:
    """The machines that `--target` and `--nodes` name together; either may be left out.

    Raises UsageError for an unknown target, for two numbers of nodes, and for a slice that has another.
    """
    target = target or DEFAULT_TARGETS[on]
    if nodes is not None and nodes < 1:
        raise UsageError(f"--nodes {nodes}: must be 1 or more")
    if target == "cpu":
        return Machine("cpu", "cpu", nodes or 1, 0)
    known = targets.parse(target)
    kind, _, shape = target.partition(":")
    if known.platform == "tpu":
        single = known.count <= SINGLE_HOST_CHIPS[kind]
        hosts = 1 if single else known.count // TPU_CHIPS_PER_HOST
        if nodes not in (None, hosts):
            raise UsageError(f"--nodes {nodes}: {target} is {hosts} host(s); the slice's shape decides how many")
        return Machine(kind, "tpu", hosts, known.count // hosts, shape)
    machines, each = known.shape
    if "x" in shape and nodes not in (None, machines):
        raise UsageError(f"--nodes {nodes} and --target {target} name two numbers of machines; leave one out")
    if not shape:
        each = targets.GPUS_PER_MACHINE
    return Machine(kind, "gpu", nodes or machines, each)
