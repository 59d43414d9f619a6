"""The frozen base of an adapter run, from its checkpoint onto the mesh, a matrix of a layer at a time.

Of the checkpoint's float32 weights one array is in host memory at a time, and on each device its share of one layer of
one matrix: beside the base as it stays, a device of 4 GB needs some tens of MB for a model of 1.1B.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax import sharding
from tinyllama_jax.config import Model, Run
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.finetune import adapters, start
from tinyllama_jax.model import transformer
from tinyllama_jax.model.quantized import is_quantized
from tinyllama_jax.train import durable, fingerprint, named, restoring, saved
from tinyllama_jax.train.agree import together
from tinyllama_jax.train.state import abstract_frozen, keys
from tinyllama_jax.weights import AXES


def frozen(run: Run, mesh: Mesh, peers: Peers = ALONE) -> Any:
    """The weights of `run.start.checkpoint` as `adapters.freeze` makes them for run.adapter, laid out on `mesh`.

    The processes share the hashing; each reads all weights and keeps its devices' shares.
    Call under `jax.set_mesh(mesh)`.
    Raises CheckpointError for a checkpoint that is missing or damaged, ConfigError for a model of another form or for
    groups that do not divide a matrix.
    """
    path = saved.resolve(run.start.checkpoint)
    old = start.of_checkpoint(path, run.model)
    adapters.adapted(run.model, run.adapter)  # refuses before anything is read
    saved_as = _verified(path, old, peers, run.checkpoint.barrier_seconds)
    shapes = abstract_frozen(run, mesh)

    def one(at: tuple, target: Any) -> Any:
        names = tuple(entry.key for entry in at)
        weight = _read(path, names, saved_as)
        if names[0] != "layers":
            weight = start.adapt(
                {names[0]: {names[-1]: weight}}, old, run.model, run.start.new_words, keys(run.seed)[0]
            )
            weight = weight[names[0]][names[-1]]
        return _put(names, weight, target, run, mesh)

    return jax.tree_util.tree_map_with_path(one, shapes, is_leaf=is_quantized)


def _verified(path: Path, model: Model, peers: Peers, barrier_seconds: float) -> dict[str, dict]:
    """What is saved of every weight at `path`, whose files are as they were written and of this model."""
    checksums = durable.read_checksums(path)
    share = sorted({*checksums, "meta.json"})[peers.index :: peers.count]
    together(peers, "base verified", barrier_seconds, lambda: durable.compare(path, checksums, share))
    meta = durable.verify(path, only="meta.json")
    restoring.check_format(path, meta)
    leaves = meta["checkpoint"]["leaves"]
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    named.check_same(path, {"params": named.leaves(shapes)}, {"params": leaves["params"]})
    return leaves["params"]


def _read(path: Path, names: tuple[str, ...], saved_as: dict[str, dict]) -> np.ndarray:
    name = ".".join(names)
    array = restoring.read_arrays(path, path, "params", {name: named.in_host_memory(saved_as[name])})[name]
    if fingerprint.of_host(array) != saved_as[name]["fingerprint"]:
        raise durable.Damaged(f"{path}: params.{name} differs from its fingerprint")
    return array


def _put(names: tuple[str, ...], weight: np.ndarray, target: Any, run: Run, mesh: Mesh) -> Any:
    """`weight` frozen, as `target` describes it."""
    sizes, logical = dict(mesh.shape), AXES[names]
    place = lambda x, axes: sharding.place(x, mesh, sharding.partition(axes, x.shape, sizes))  # noqa: E731
    freeze = functools.partial(adapters.freeze_leaf, names, model=run.model, base_weights=run.adapter.base_weights)
    if names[0] != "layers":
        return jax.jit(freeze)(place(weight, logical))

    @functools.partial(jax.jit, donate_argnums=0)
    def put(stack: Any, layer: jax.Array, index: jax.Array) -> Any:
        insert = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0)  # noqa: E731
        return jax.tree.map(insert, stack, freeze(layer))

    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), target)
    for index, layer in enumerate(weight):
        made = put(made, place(layer, logical[1:]), sharding.place(np.int32(index), mesh, P()))
    return made
