"""The training state: parameters and optimizer state as plain pytrees, laid out by the one sharding table."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import optim
from tinyllama_jax.config import Run
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import param_shardings

State = dict[str, Any]  # {"params": ..., "optimizer": ...}


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """(initialisation key, dropout key) of a run."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    return init_key, dropout_key


def abstract(run: Run, mesh: Mesh) -> State:
    """The state's shapes, dtypes and shardings on `mesh`; allocates nothing.  Call under `jax.set_mesh(mesh)`."""
    # The key is made inside: outside it would be computed on a device, which a mesh to compile for need not have.
    shapes = jax.eval_shape(lambda: transformer.init(run.model, keys(0)[0]))
    params = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )

    def on_mesh(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # eval_shape answers with shardings on an abstract mesh, and none for scalars; a checkpoint restored onto
        # those would silently keep the mesh it was saved from.
        spec = s.sharding.spec if s.sharding is not None else P(*[None] * len(s.shape))
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

    optimizer = jax.tree.map(on_mesh, jax.eval_shape(lambda p: optim.init(run.optimizer, p), params))
    return {"params": params, "optimizer": optimizer}


def init(run: Run, mesh: Mesh) -> State:
    """Fresh weights from the run's seed, the same numbers on every mesh, each device making only its share."""
    target = jax.tree.map(lambda s: s.sharding, abstract(run, mesh))
    key = keys(run.seed)[0]
    params = jax.jit(lambda k: transformer.init(run.model, k), out_shardings=target["params"])(key)
    optimizer = jax.jit(lambda p: optim.init(run.optimizer, p), out_shardings=target["optimizer"])(params)
    return {"params": params, "optimizer": optimizer}
