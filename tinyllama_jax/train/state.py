"""The training state: parameters and optimizer state as plain pytrees, laid out by the one sharding table."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import optim
from tinyllama_jax.config import Run
from tinyllama_jax.finetune import adapters
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import param_shardings

# {"params": ..., "optimizer": ...}: what is trained and saved; with run.adapter also "frozen": what it adapts.
State = dict[str, Any]


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """(initialisation key, dropout key) of a run."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    return init_key, dropout_key


def abstract(run: Run, mesh: Mesh) -> State:
    """The shapes, dtypes and shardings on `mesh` of what is saved; allocates nothing.  Call under `jax.set_mesh(mesh)`.

    With run.adapter these are the adapters and their optimizer state.
    """
    # The key is made inside: outside it would be computed on a device, which a mesh to compile for need not have.
    shapes = jax.eval_shape(lambda: _fresh(run, keys(0)[0]))
    adapter = run.adapter
    laid_out = adapters.shardings(run.model, adapter, mesh) if adapter else param_shardings(shapes, mesh)
    params = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, laid_out
    )
    optimizer = jax.eval_shape(lambda p: optim.init(run.optimizer, p), params)
    return {"params": params, "optimizer": _on_mesh(optimizer, mesh)}


def abstract_frozen(run: Run, mesh: Mesh) -> Any:
    """The same of state["frozen"] of a run with an adapter."""
    shapes = jax.eval_shape(lambda: transformer.init(run.model, keys(0)[0]))
    params = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )
    frozen = jax.eval_shape(lambda p: adapters.freeze(p, run.model, run.adapter.base_weights), params)
    return _on_mesh(frozen, mesh)


def _fresh(run: Run, key: jax.Array) -> Any:
    return adapters.init(run.model, run.adapter, key) if run.adapter else transformer.init(run.model, key)


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    def one(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # eval_shape answers with shardings on an abstract mesh, and none for scalars; a checkpoint restored onto
        # those would silently keep the mesh it was saved from.
        spec = s.sharding.spec if s.sharding is not None else P(*[None] * len(s.shape))
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def init(run: Run, mesh: Mesh, params: Any = None) -> State:
    """The state of step 0.  Fresh weights from the run's seed, the same numbers on every mesh, each device making only
    its share; or `params`, if given."""
    target = jax.tree.map(lambda s: s.sharding, abstract(run, mesh))
    if params is None:
        key = keys(run.seed)[0]
        params = jax.jit(lambda k: _fresh(run, k), out_shardings=target["params"])(key)
    optimizer = jax.jit(lambda p: optim.init(run.optimizer, p), out_shardings=target["optimizer"])(params)
    return {"params": params, "optimizer": optimizer}
