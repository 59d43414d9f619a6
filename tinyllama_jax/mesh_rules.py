"""Which meshes a run can have: the arithmetic of sizes, the same for training, `preflight` and `launch`.

No device is asked and no jax imported: a launcher refuses in a second what a job would refuse after a night in a queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tinyllama_jax.config import Mesh, Run
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import PlannedStage

AXES = ("replica", "data", "context", "tensor")  # the slowest network first, as devices are numbered


def sizes(mesh: Mesh, devices: int, where: str = "present") -> dict[str, int]:
    """Axis -> size on that many devices, -1 resolved, in the order of AXES.

    where: what the devices are, for the message.  Raises ConfigError when the sizes do not multiply to their number.
    """
    found = {axis: getattr(mesh, axis) for axis in AXES}
    known = math.prod(size for size in found.values() if size != -1)
    found = {axis: devices // known if size == -1 else size for axis, size in found.items()}
    if math.prod(found.values()) != devices:
        asked = " x ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in AXES)
        raise ConfigError(
            f"{asked} does not make up the {devices} device(s) {where}; "
            "choose sizes whose product is that number (-1 takes what is left)"
        )
    return found


def accumulation_steps(run: Run, batch_sequences: int) -> int:
    """Micro-batches per optimizer step."""
    micro = run.execution.micro_batch_sequences
    return 1 if micro == 0 or batch_sequences <= micro else batch_sequences // micro


def rows_per_place(run: Run, stage: PlannedStage, sizes: Mapping[str, int]) -> int:
    """Sequences of a micro-batch at each place of (replica, data).  Raises ConfigError when they are not whole."""
    rows = stage.batch_sequences // accumulation_steps(run, stage.batch_sequences)
    places = sizes["replica"] * sizes["data"]
    if rows % places:
        raise ConfigError(
            f"stage {stage.name!r}: a micro-batch of {rows} sequences cannot be spread over {places} devices; "
            "choose execution.micro_batch_sequences or batch_tokens so that it divides"
        )
    return rows // places


def check(run: Run, stages: Iterable[PlannedStage], sizes: Mapping[str, int]) -> None:
    """Raises ConfigError when the mesh would cut something of the model, of a row or of a batch into unequal parts."""
    model = run.model
    for axis, name, count in (
        ("tensor", "model.heads", model.heads),
        ("tensor", "model.kv_heads", model.kv_heads),  # cut as the query heads, so that each finds its own
        ("tensor", "model.d_ff", model.d_ff),
        ("tensor", "model.vocab_size", model.vocab_size),
        ("context", "data.sequence_tokens", run.data.sequence_tokens),
    ):
        if count % sizes[axis]:
            raise ConfigError(f"mesh.{axis}={sizes[axis]} does not divide {name}={count}; choose one that does")
    for stage in stages:
        rows_per_place(run, stage, sizes)
