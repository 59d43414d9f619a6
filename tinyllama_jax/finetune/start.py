"""Weights of a checkpoint as the beginning of another run: the same model but for what may change, laid out anew.

Free to change: RoPE, the length of the context, dropout, the compute dtype, the initialisation; and the vocabulary may
grow.  Rows of new words are the mean of the old ones, in the embedding and the head alike, as in sft/finetune.py of
github.com/jzhang38/TinyLlama, or fresh from the run's seed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Model, Run
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_extend import begins_with
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError
from tinyllama_jax.model import transformer
from tinyllama_jax.model.init import Initializer, initializers
from tinyllama_jax.sharding import param_shardings, partition
from tinyllama_jax.train import checkpoint, saved
from tinyllama_jax.train.state import keys
from tinyllama_jax.weights import AXES

FREE = ("rope", "context_tokens", "dropout", "compute_dtype", "init", "vocab_size")
TABLES = (("embed", "embedding"), ("head", "kernel"))  # what has a row or a column for each word


def weights(run: Run, mesh: Mesh, peers: Peers = ALONE) -> Any:
    """float32 parameters for `run.model` from the checkpoint that `run.start` names, on `mesh` as a state's lie.

    Only the tables of words are ever held twice, one after the other, and only when the vocabulary grows.
    Call under `jax.set_mesh(mesh)`.  Raises CheckpointError for a checkpoint that is missing or damaged or holds
    adapters only, ConfigError for a model of another form.
    """
    path = saved.resolve(run.start.checkpoint)
    old = of_checkpoint(path, run.model)
    shapes = jax.eval_shape(lambda: transformer.init(old, jax.random.key(0)))
    shardings = param_shardings(shapes, mesh) if old.vocab_size == run.model.vocab_size else _to_grow(shapes, mesh)
    target = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    wait = run.checkpoint.barrier_seconds
    params = checkpoint.load(path, {"params": target}, peers=peers, barrier_seconds=wait)["params"]
    return adapt(params, old, run.model, run.start.new_words, keys(run.seed)[0])


def of_checkpoint(path: Path, new: Model) -> Model:
    """The model in a checkpoint, which `new` can begin with.  Raises CheckpointError or ConfigError as `weights`."""
    meta = saved.read_meta(path)
    if saved.adapter_of(meta) is not None:
        raise CheckpointError(
            f"{path}: holds adapters only; merge them into a model first: `tinyllama finetune merge {path} --out CKPT`"
        )
    old = saved.model_of(meta)
    check_model(old, new, path)
    return old


def check_model(old: Model, new: Model, path: str | Path) -> None:
    """Raises ConfigError, by field, unless `new` can begin with the weights of `old`, which are in `path`."""
    for field in dataclasses.fields(Model):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in FREE and before != after:
            raise ConfigError(
                f"model.{field.name} is {after}, and {path}, where the run starts, has {before}; they must be the same"
            )
    if new.vocab_size < old.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {new.vocab_size}, and {path}, where the run starts, has {old.vocab_size}; the "
            "vocabulary may only grow"
        )


def check(run: Run, tokenizer: Tokenizer) -> None:
    """Raises DataError unless every id of the checkpoint's tokenizer means the same in `tokenizer`, the run's data's.

    A checkpoint without a tokenizer has nothing to compare with.  Raises CheckpointError and ConfigError as `weights`.
    """
    path = saved.resolve(run.start.checkpoint)
    of_checkpoint(path, run.model)
    folder = path / "tokenizer"
    if not folder.is_dir():
        return
    own = Tokenizer.load(folder)
    if tokenizer.sha256 != own.sha256 and not begins_with(tokenizer, own):
        raise DataError(
            f"{tokenizer.files[0]}: does not begin with the {own.vocab_size} words of {own.files[0]}, the tokenizer of "
            "the checkpoint that the run starts with; prepare the data with that one, or with one that extends it"
        )


def adapt(params: Any, old: Model, new: Model, new_words: Literal["mean", "init"], key: jax.Array) -> Any:
    """The parameters of `old` as those of `new`: the same but for rows of words that are new.

    params: arrays of NumPy, which give such, or of JAX, laid out as sharding.TABLE says for the longer tables.  Leaves
    that do not change are the very ones given.  key: of the fresh rows; the same numbers on every mesh.
    """
    more = new.vocab_size - old.vocab_size
    if not more:
        return params
    make = initializers(new)
    adapted = dict(params)
    for number, (group, name) in enumerate(TABLES):
        if group in params:
            fresh = None if new_words == "mean" else make["head" if group == "head" else name]
            adapted[group] = {
                name: _longer((group, name), params[group][name], more, fresh, jax.random.fold_in(key, number))
            }
    return adapted


def _longer(path: tuple[str, str], table: Any, more: int, fresh: Initializer | None, key: jax.Array) -> Any:
    """A table with `more` words: by `fresh`, or (None) the mean of those that are there."""
    axis = AXES[path].index("vocab")
    shape = tuple(more if i == axis else n for i, n in enumerate(table.shape))
    if isinstance(table, np.ndarray):
        mean = table.mean(axis, keepdims=True, dtype=np.float64).astype(table.dtype)
        added = np.broadcast_to(mean, shape) if fresh is None else np.asarray(fresh(key, shape), table.dtype)
        return np.concatenate([table, added], axis)
    mesh = table.sharding.mesh if isinstance(table.sharding, NamedSharding) else None

    def grow(table: jax.Array, key: jax.Array) -> jax.Array:
        if mesh is not None:
            table = reshard(table, _whole(jax.typeof(table).sharding.spec, axis))
        added = jnp.mean(table, axis, keepdims=True) if fresh is None else fresh(key, shape)
        if mesh is not None and fresh is not None:
            added = reshard(added, jax.typeof(table).sharding.spec)
        return jnp.concatenate([table, jnp.broadcast_to(added, shape)], axis)

    longer = jax.jit(grow)(table, key)
    if mesh is None:
        return longer
    return reshard(longer, NamedSharding(mesh, partition(AXES[path], longer.shape, dict(mesh.shape))))


def _to_grow(shapes: Any, mesh: Mesh) -> Any:
    """Shardings by the table, but for the tables of words, whose words are not divided: their number need not be what
    the mesh divides."""
    whole = dict(mesh.shape) | {"tensor": 1}
    found = param_shardings({name: leaf for name, leaf in shapes.items() if name not in dict(TABLES)}, mesh)
    for path in TABLES:
        group, name = path
        if group in shapes:
            spec = partition(AXES[path], shapes[group][name].shape, whole)
            found[group] = {name: NamedSharding(mesh, _whole(spec, AXES[path].index("vocab")))}
    return found


def _whole(spec: P, axis: int) -> P:
    return P(*(None if i == axis else entry for i, entry in enumerate(spec)))
