"""Which process of how many this is, and where they meet."""

from __future__ import annotations

import os
from typing import NamedTuple

from tinyllama_jax.errors import ConfigError

DETECT_SECONDS = 300


class Place(NamedTuple):
    """Where a process stands among the others."""

    coordinator: str  # host:port that process 0 opens
    count: int
    index: int
    local_devices: list[int] | None  # None = all of this machine
    how: str


def place(coordinator: str = "", processes: int = 0, process: int = -1) -> Place | None:
    """This process's place; None when there is only one process.

    Raises ConfigError when options or environment say something incomplete or impossible.
    """
    given = {"coordinator": coordinator, "processes": processes or None, "process": None if process < 0 else process}
    how = "options"
    if not any(value is not None and value != "" for value in given.values()):
        how = "environment"
        given = {
            "coordinator": os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
            "processes": _number("JAX_NUM_PROCESSES"),
            "process": _number("JAX_PROCESS_ID"),
        }
        if given["processes"] is None and given["process"] is None:
            return _detected(given["coordinator"] or None)
    address, count, index = given["coordinator"], given["processes"], given["process"]
    if count == 1:
        return None
    if not address or count is None or index is None:
        missing = [name for name, value in given.items() if value is None or value == ""]
        raise ConfigError(
            f"several processes need an address, a number and an index; {', '.join(missing)} missing ({how}: "
            "--coordinator HOST:PORT --processes N --process I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
            "JAX_PROCESS_ID)"
        )
    if ":" not in address or not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"coordinator {address!r} is not HOST:PORT ({how})")
    if not 0 <= index < count:
        raise ConfigError(f"process {index} of {count} does not exist ({how}); processes are counted from 0")
    return Place(address, count, index, None, how)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ConfigError(f"{variable}={text!r} is not a number")
    return int(text) if text else None


def _detected(coordinator: str | None) -> Place | None:
    from jax._src import clusters

    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    kind = next((kind for kind in kinds if kind.is_env_present()), None)
    if kind is None or kind.get_process_count() == 1:
        return None
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, None, None, None, None, DETECT_SECONDS
    )
    address, count, index, local = found
    # jax takes one process per device for granted where it knows the place on the machine; a process that has the
    # machine for itself drives all of its devices.
    if _tasks_here() == 1:
        local = None
    return Place(address, count, index, local, kind.name or kind.__name__)


def _tasks_here() -> int:
    """Processes of this job on this machine; 0 = not known."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 8(x2) or 2,1
    if slurm:
        return max(int(part.partition("(")[0]) for part in slurm.split(","))
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
