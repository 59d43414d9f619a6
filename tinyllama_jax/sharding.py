"""The device mesh, and the one table that says which axis of which array lies on which mesh axis.

The mesh has Explicit axes: an array's sharding is part of its type, so a wrong layout is an error where it is
written, not a slow collective somewhere else.  Every entry point runs under `jax.set_mesh(mesh)`, with one
device too.

    replica   whole copies of the weights; only gradients cross it (HSDP over nodes or slices)
    data      batch rows, and weights and optimizer state in equal parts (FSDP / ZeRO-3, arXiv 1910.02054)

A new mesh axis (`tensor`, `context`) is a name in AXES and rows in TABLE, before the rows it takes precedence over.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config
from tinyllama_jax.errors import ConfigError

AXES = ("replica", "data")
BATCH = ("replica", "data")  # specs are compared literally, axes of size 1 included: use this constant everywhere

BatchAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axis, in order of precedence.  An array's axis takes the mesh axis when no earlier row gave
# that mesh axis to this array and its size divides; otherwise it stays whole.  `layers` and `norm` have no row:
# the layer scan needs its leading axis whole, and norm scales are too small to be worth a gather.
TABLE: tuple[tuple[str, str], ...] = (
    ("embed", "data"),
    ("mlp", "data"),
    ("vocab", "data"),
    ("heads", "data"),
    ("kv_heads", "data"),
    ("head_dim", "data"),
)

# Logical axes of every parameter, by its path.
PARAMETERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("layers", "attention_norm", "scale"): ("layers", "norm"),
    ("layers", "attention", "query"): ("layers", "embed", "heads", "head_dim"),
    ("layers", "attention", "key"): ("layers", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "value"): ("layers", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "out"): ("layers", "heads", "head_dim", "embed"),
    ("layers", "mlp_norm", "scale"): ("layers", "norm"),
    ("layers", "mlp", "gate"): ("layers", "embed", "mlp"),
    ("layers", "mlp", "up"): ("layers", "embed", "mlp"),
    ("layers", "mlp", "down"): ("layers", "mlp", "embed"),
    ("norm", "scale"): ("norm",),
    ("head", "kernel"): ("embed", "vocab"),
}


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> DeviceMesh:
    """The mesh (replica, data) over `devices` (default: all), with Explicit axis types.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(mesh, name) for name in AXES]
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        asked = " x ".join(f"mesh.{name}={getattr(mesh, name)}" for name in AXES)
        raise ConfigError(
            f"{asked} does not make up the {len(devices)} device(s) present; "
            "choose sizes whose product is that number (-1 takes what is left)"
        )
    # jax.make_mesh refuses axes that would cut through a dimension of a TPU's torus: 2 x 8 on a 4x4 slice.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return DeviceMesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@contextlib.contextmanager
def computing(mesh: DeviceMesh, dtype: str) -> Iterator[None]:
    """The context in which every command computes: on `mesh`, and in float32 where `dtype` says so.

    GPUs and TPUs multiply float32 matrices in fewer bits unless told otherwise (TF32, bfloat16).
    """
    precision = "highest" if dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        yield


def partition(
    logical: Sequence[str],
    shape: Sequence[int],
    sizes: dict[str, int],
    table: Sequence[tuple[str, str]] = TABLE,
) -> P:
    """Full-rank spec of an array with these logical axes and this shape on a mesh with these axis sizes.

    A mesh axis is used at most once per array.  Raises ValueError when `table` names an unknown mesh axis or
    gives one logical axis to the same mesh axis twice.
    """
    if len(set(table)) != len(table) or any(axis not in sizes for _, axis in table):
        raise ValueError(f"sharding table {table} repeats a row or names an axis that is not in the mesh {sizes}")
    if len(logical) != len(shape):
        raise ValueError(f"logical axes {tuple(logical)} do not describe an array of shape {tuple(shape)}")
    spec: list[str | None] = [None] * len(shape)
    for name, axis in table:
        for i, (have, size) in enumerate(zip(logical, shape, strict=True)):
            if have == name and spec[i] is None and axis not in spec and size % sizes[axis] == 0:
                spec[i] = axis
    return P(*spec)


def logical_axes(path: Sequence[Any]) -> tuple[str, ...]:
    """Logical axes of the parameter at a `jax.tree_util` key path.  Raises ValueError for an unknown parameter."""
    keys = tuple(str(getattr(entry, "key", entry)) for entry in path)
    if keys not in PARAMETERS:
        raise ValueError(f"parameter {'.'.join(keys)} has no row in sharding.PARAMETERS")
    return PARAMETERS[keys]


def param_shardings(abstract_params: Any, mesh: DeviceMesh) -> Any:
    """NamedShardings for a parameter tree (arrays or ShapeDtypeStructs): FSDP over `data`, norm scales replicated."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(logical_axes(path), leaf.shape, sizes)), abstract_params
    )


def batch_sharding(mesh: DeviceMesh, ndim: int = 2) -> NamedSharding:
    """Sharding of a batch array [B, ...]: rows over every mesh axis that splits the batch.  `device_put` with it."""
    return NamedSharding(mesh, P(BATCH, *[None] * (ndim - 1)))


def replicated(mesh: DeviceMesh, ndim: int = 0) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P(*[None] * ndim))


def batch_axes(x: jax.Array) -> BatchAxes:
    """Mesh axes over which the rows of `x` [B, ...] lie; None when every device holds them all."""
    return jax.typeof(x).sharding.spec[0]


def gather(x: jax.Array) -> jax.Array:
    """`x` whole on every device: FSDP's all-gather before use.  Its transpose is the gradient's reduce-scatter."""
    return reshard(x, P(*[None] * x.ndim))


def place(tree: Any, mesh: DeviceMesh, spec: P | None = None) -> Any:
    """Host arrays, the same in every process, as global arrays on `mesh`: replicated, or as `spec` says.

    `jax.device_put` would do it with one process; with several it first compares the values over the network.
    """

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        sharding = NamedSharding(mesh, P(*[None] * x.ndim) if spec is None else spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)
