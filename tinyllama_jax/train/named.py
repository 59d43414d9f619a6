"""The arrays of a pytree by name, and what a checkpoint says of each: shape, dtype, and where it is to lie."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tinyllama_jax.errors import CheckpointError


def leaves(tree) -> dict[str, object]:
    """The leaves of a pytree, by the dotted path to each."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    assert len(named) == len(flat), "two leaves share a name"
    return named


def check_same(path, targets: dict[str, dict], saved: dict[str, dict]) -> None:
    """Raises CheckpointError, by item and name, unless the arrays asked for are the ones that were saved."""
    for item, wanted in targets.items():
        if item not in saved:
            raise CheckpointError(f"{path}: holds no {item!r}, only {', '.join(sorted(saved))}")
        for name in sorted(set(wanted) ^ set(saved[item])):
            side = "the checkpoint lacks it" if name in wanted else "only the checkpoint has it"
            raise CheckpointError(f"{path}: {item}.{name}: {side}; it was saved by another model or optimizer")
        for name, leaf in wanted.items():
            expected = tuple(leaf.shape), np.dtype(leaf.dtype).name
            found = tuple(saved[item][name]["shape"]), saved[item][name]["dtype"]
            if expected != found:
                raise CheckpointError(
                    f"{path}: {item}.{name}: expected {_text(expected)}, found {_text(found)}; it was saved by another "
                    "model or optimizer"
                )
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                raise CheckpointError(f"{path}: {item}.{name}: {found[1]} needs JAX_ENABLE_X64=1")


def _text(description: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = description
    return f"{dtype}[{', '.join(map(str, shape))}]"


def placed(leaf) -> jax.ShapeDtypeStruct:
    """The same target with a sharding: its own, else one on the current mesh (as after `jax.eval_shape`)."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _sharding(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, PartitionSpec() if sharding is None else sharding.spec)


def in_host_memory(about: dict) -> np.ndarray:
    """A target that says the form of an array, with memory that is taken only when it is filled."""
    return np.empty(about["shape"], np.dtype(about["dtype"]))
