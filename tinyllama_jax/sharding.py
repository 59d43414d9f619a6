"""The device mesh, and the one table that says which axis of which array lies on which mesh axis.

The mesh has Explicit axes: an array's sharding is part of its type, so a wrong layout is an error where it is
written, not a slow collective somewhere else.  Every entry point runs under `jax.set_mesh(mesh)`, with one
device too.

    replica   whole copies of the weights; only gradients cross it (HSDP over nodes or slices)
    data      batch rows, and weights and optimizer state in equal parts (FSDP / ZeRO-3, arXiv 1910.02054)
    context   the tokens of a row, in stripes: token t lies on place t mod C (Striped Attention, arXiv 2311.09431)
    tensor    heads, MLP columns and vocabulary; a product over them is summed over it (Megatron-LM, arXiv 1909.08053)

The order is from the slowest network to the fastest.  A `context` or `tensor` of size 1 is named in no spec, so that
programs for meshes without them are those of a mesh (replica, data).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config, mesh_rules, weights
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.mesh_rules import AXES

CPU, GPU, TPU = "cpu", "gpu", "tpu"  # platforms, as `device` tells them
FSDP, CONTEXT, TENSOR = "data", "context", "tensor"
BATCH = ("replica", "data")  # specs are compared literally, axes of size 1 included: use this constant everywhere

BatchAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axis, in order of precedence.  A row for `tensor` is a demand: the layers compute on that part
# and nothing else would be right.  Rows for `data` are offers: an array's axis takes it when no earlier row gave it to
# this array, no other mesh axis lies there and its size divides; otherwise it stays whole.  `layers` and `norm` have
# no row: the layer scan needs its leading axis whole, and norm scales are too small to be worth a gather.
TABLE: tuple[tuple[str, str], ...] = (
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("embed", "data"),
    ("mlp", "data"),
    ("vocab", "data"),
    ("heads", "data"),
    ("kv_heads", "data"),
    ("head_dim", "data"),
)


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> DeviceMesh:
    """The mesh (replica, data, context, tensor) over `devices` (default: all), with Explicit axis types.

    Slices of TPUs, between which the network is slow, are told apart by `replica`.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(mesh_rules.sizes(mesh, len(devices)).values())
    return DeviceMesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _grid(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    # JAX numbers partitions of GPUs in the same way; their order, by process, needs no help.
    tpus = [device for device in devices if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", 0) for device in tpus})
    if slices <= 1:
        # jax.make_mesh refuses axes that would cut through a dimension of a TPU's torus: 2 x 8 on a 4x4 slice.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ConfigError(f"mesh.replica={sizes[0]} is not a multiple of the {slices} slices that the devices are in")
    within, between = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def device() -> tuple[str, str]:
    """(platform, kind) of the devices of the mesh in use: (GPU, "NVIDIA H200"), (TPU, "TPU v5 lite"), (CPU, "cpu")."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is None:
        of_mesh = jax.devices()[0]
    platform = GPU if of_mesh.platform in ("cuda", "gpu") else of_mesh.platform
    return platform, of_mesh.device_kind


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

    A mesh axis is used at most once per array.  Raises ValueError when `table` names an unknown mesh axis, gives one
    logical axis to the same mesh axis twice, or demands `tensor` for two axes of this array; ConfigError when `tensor`
    does not divide the axis that it is demanded for.
    """
    if len(set(table)) != len(table) or any(axis not in sizes for _, axis in table):
        raise ValueError(f"sharding table {table} repeats a row or names an axis that is not in the mesh {sizes}")
    if len(logical) != len(shape):
        raise ValueError(f"logical axes {tuple(logical)} do not describe an array of shape {tuple(shape)}")
    spec: list[str | None] = [None] * len(shape)
    for name, axis in table:
        for i, (have, size) in enumerate(zip(logical, shape, strict=True)):
            if have != name or (axis == TENSOR and sizes[axis] == 1):
                continue
            if axis == TENSOR and axis in spec:
                raise ValueError(f"{have} and {logical[spec.index(axis)]} of one array collide: both demand {axis}")
            if axis == TENSOR and size % sizes[axis]:
                raise ConfigError(f"mesh.{axis}={sizes[axis]} does not divide the {size} {have} of the model")
            if spec[i] is None and axis not in spec and size % sizes[axis] == 0:
                spec[i] = axis
    return P(*spec)


def logical_axes(path: Sequence[Any]) -> tuple[str, ...]:
    """Logical axes of the parameter at a `jax.tree_util` key path.  Raises ValueError for an unknown parameter."""
    keys = tuple(str(getattr(entry, "key", entry)) for entry in path)
    if keys not in weights.AXES:
        raise ValueError(f"parameter {'.'.join(keys)} has no row in weights.AXES")
    return weights.AXES[keys]


def param_shardings(abstract_params: Any, mesh: DeviceMesh) -> Any:
    """NamedShardings for a parameter tree (arrays or ShapeDtypeStructs), by TABLE; norm scales are replicated."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(logical_axes(path), leaf.shape, sizes)), abstract_params
    )


def batch_sharding(mesh: DeviceMesh, ndim: int = 2) -> NamedSharding:
    """Sharding of a batch array [B, ...]: rows over every mesh axis that splits the batch.  `device_put` with it."""
    return NamedSharding(mesh, P(BATCH, *[None] * (ndim - 1)))


def token_sharding(mesh: DeviceMesh, leading: int = 0) -> NamedSharding:
    """Sharding of an array [..., B, T] with `leading` axes before its rows, and its tokens `striped`, over `mesh`."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH, CONTEXT if mesh.shape[CONTEXT] > 1 else None))


def replicated(mesh: DeviceMesh, ndim: int = 0) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P(*[None] * ndim))


def row_share(mesh: DeviceMesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): process `process` (default: this one) feeds share `index` of `count` equal shares of the rows.

    Processes that hold other tokens or other heads of the same rows have the same share.  Raises ConfigError when the
    rows of a process are no such share.
    """
    process = jax.process_index() if process is None else process
    by_place = mesh.devices.reshape(mesh.shape["replica"] * mesh.shape["data"], -1)
    places = [i for i, there in enumerate(by_place) if any(device.process_index == process for device in there)]
    index, rest = divmod(places[0], len(places))
    if rest or len(by_place) % len(places) or places != list(range(places[0], places[0] + len(places))):
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: the rows of process {process} lie at places {places} of {len(by_place)}, which "
            "is no equal share; choose sizes of mesh.context and mesh.tensor that divide a process's devices"
        )
    return index, len(by_place) // len(places)


def batch_axes(x: jax.Array) -> BatchAxes:
    """Mesh axes over which the rows of `x` [B, ...] lie; None when every device holds them all."""
    return jax.typeof(x).sharding.spec[0]


def token_axis(x: jax.Array) -> str | None:
    """Mesh axis over which the tokens of `x` [B, T, ...] lie, in stripes; None when they are whole and in order."""
    return jax.typeof(x).sharding.spec[1]


def axes_of(*entries: BatchAxes) -> tuple[str, ...]:
    """The mesh axes that these entries of a spec name, one after the other."""
    return tuple(a for entry in entries if entry for a in ((entry,) if isinstance(entry, str) else entry))


def parts(axis: str | None) -> int:
    """Size of one axis of the mesh in use; 1 for None, and for an axis that it does not have."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def striped(x, count: int, axis: int = -1):
    """`x`, an array of numpy or JAX, with tokens along `axis` in the order in which `count` places of `context` hold
    them: 0, C, 2C, ..., then 1, C + 1, ...  With causal attention every place then has the same work."""
    return _regroup(x, (x.shape[axis] // count, count), axis)


def in_order(x, count: int, axis: int = -1):
    """The inverse of `striped`."""
    return _regroup(x, (count, x.shape[axis] // count), axis)


def _regroup(x, cut: tuple[int, int], axis: int):
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *cut, *x.shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(x.shape)


def gather(x: jax.Array, over: tuple[str, ...] = ()) -> jax.Array:
    """A weight whole but for its share of `tensor`: FSDP's all-gather before use.

    Its transpose is the gradient's reduce-scatter.  over: the mesh axes over which what the weight is multiplied with
    lies, and its gradient is summed.  Where these are more than `data`, XLA would sum whole gradients over all devices
    at once; told of them, each device gets the sum of its part over `data`, and only parts cross the other axes.
    """
    spec = jax.typeof(x).sharding.spec
    if FSDP in spec and FSDP in over and any(parts(axis) > 1 for axis in over if axis != FSDP):
        return _gather_in_parts(x, spec, over)
    return reshard(x, whole_but_for_tensor(spec))


def whole_but_for_tensor(spec: P, **sums: set[str]) -> P:
    return P(*(axis if axis == TENSOR else None for axis in spec), **sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_in_parts(x: jax.Array, spec: P, over: tuple[str, ...]) -> jax.Array:
    return reshard(x, whole_but_for_tensor(spec, reduced=set(over)))  # so that its cotangent is not summed yet


def _scatter(spec: P, over: tuple[str, ...], _, gradient: jax.Array) -> tuple[jax.Array]:
    def local(gradient):
        part = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=list(spec).index(FSDP), tiled=True)
        return jax.lax.psum(part, tuple(axis for axis in over if axis != FSDP))

    unsummed = whole_but_for_tensor(spec, unreduced=set(over))
    return (jax.shard_map(local, in_specs=(unsummed,), out_specs=spec)(gradient),)


_gather_in_parts.defvjp(lambda x, spec, over: (_gather_in_parts(x, spec, over), None), _scatter)


def place(tree: Any, mesh: DeviceMesh, spec: P | None = None) -> Any:
    """Host arrays, the same in every process, as global arrays on `mesh`: replicated, or as `spec` says.

    `jax.device_put` would do it with one process; with several it first compares the values over the network.
    """

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        sharding = NamedSharding(mesh, P(*[None] * x.ndim) if spec is None else spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)
