"""Few trained weights beside a frozen model: what they are, where they lie, and how the model computes with them.

LoRA (arXiv 2106.09685) adds to the matrix W of a layer, or of the head, scale A B with A [inputs, r], B [r, outputs],
A uniform and B zero at the start, as in PEFT.  A base in nf4 makes it QLoRA (arXiv 2305.14314).  Trained weights are
float32, stacked over layers as the base is:

    {"layers": {"attention": {"query": {"a": [L, D, r], "b": [L, r, H, K]}, ..., "out": {"a": [L, H, K, r], ...}},
                "mlp": {"gate": {"a": [L, D, r], "b": [L, r, F]}, ...}},
     "head": {"kernel": {"a": [D, r], "b": [r, V]}}}                  only of the matrices that are adapted

Of a prefix (model/prefix.py): {"layers": {"prefix": {"key" and "value" [L, P, G, K]}}}.
Everything here that computes runs under `jax.set_mesh`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from tinyllama_jax import sharding, weights
from tinyllama_jax.config import Adapter, Model
from tinyllama_jax.config_finetune import TARGETS
from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.finetune import prefixes
from tinyllama_jax.model import quantized
from tinyllama_jax.model.lowrank import Frozen, LowRank
from tinyllama_jax.model.quantized import Quantized

Tree = dict[str, Any]
Path = tuple[str, ...]

# Path of every matrix that can be adapted, and how many of its axes, after that of the layers, are inputs.
PATHS: dict[str, Path] = {
    name: ("head", "kernel") if name == "head" else ("layers", *name.split(".")) for name in TARGETS
}


def matches(adapter: Adapter) -> tuple[str, ...]:
    """The adapted matrices, in the order of TARGETS.  Raises ConfigError for a pattern that matches none."""
    for pattern in adapter.targets:
        if not any(fnmatchcase(name, pattern) for name in TARGETS):
            hint = nearest(pattern, TARGETS) or f" (there are: {', '.join(TARGETS)})"
            raise ConfigError(f"adapter.targets: {pattern!r} matches no matrix{hint}")
    return tuple(name for name in TARGETS if any(fnmatchcase(name, pattern) for pattern in adapter.targets))


def scale(adapter: Adapter) -> float:
    """What the product of A and B is multiplied with."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rank_stabilised else adapter.rank)


def adapted(model: Model, adapter: Adapter) -> dict[Path, str]:
    """Path -> name of the adapted matrices; none with a prefix.

    Raises ConfigError when the model has no such matrix of its own.
    """
    if adapter.method == "prefix":
        return {}
    names = matches(adapter)
    if model.tied_embeddings and "head" in names:
        raise ConfigError("adapter.targets: the head is the embedding (model.tied_embeddings); leave `head` out")
    return {PATHS[name]: name for name in names}


def axes(model: Model, adapter: Adapter) -> Tree:
    """Logical axes of every trained weight, in the tree of `init`."""
    if adapter.method == "prefix":
        return prefixes.axes()

    def both(path: Path) -> dict[str, tuple[str, ...]]:
        stack, inputs, outputs = _split(path, weights.AXES[path])
        return {"a": (*stack, *inputs, "rank"), "b": (*stack, "rank", *outputs)}

    return _tree({path: both(path) for path in adapted(model, adapter)})


def init(model: Model, adapter: Adapter, key: jax.Array) -> Tree:
    """Fresh float32 weights: A ~ U(-1/sqrt(inputs), 1/sqrt(inputs)), B = 0; a prefix ~ N(0, 0.02).

    That is PyTorch's kaiming_uniform with a = sqrt(5), which PEFT draws A from.  A matrix starts the same whichever
    others are adapted.  PEFT's prefix ~ N(0, 1) would begin farther from the model's own answers.
    """
    if adapter.method == "prefix":
        return prefixes.init(model, adapter, key)
    shapes = weights.shapes(model)

    def both(path: Path, name: str) -> dict[str, jax.Array]:
        stack, inputs, outputs = _split(path, shapes[path])
        bound = 1 / math.sqrt(math.prod(inputs))
        own = jax.random.fold_in(key, TARGETS.index(name))
        return {
            "a": jax.random.uniform(own, (*stack, *inputs, adapter.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((*stack, adapter.rank, *outputs), jnp.float32),
        }

    return _tree({path: both(path, name) for path, name in adapted(model, adapter).items()})


def shardings(model: Model, adapter: Adapter, mesh: Mesh) -> Tree:
    """Where every trained weight lies on `mesh`, by sharding.TABLE; neither rank nor prefix is split."""
    shapes = jax.eval_shape(lambda: init(model, adapter, jax.random.key(0)))
    of = lambda names, s: NamedSharding(mesh, sharding.partition(names, s.shape, dict(mesh.shape)))  # noqa: E731
    return jax.tree.map(of, axes(model, adapter), shapes, is_leaf=lambda x: isinstance(x, tuple))


def freeze(params: Tree, model: Model, base_weights: str) -> Tree:
    """Weights of transformer.py as a base that is only read: layers' matrices as `base_weights` says, embedding and
    head in the compute dtype, norm scales float32.

    Raises ConfigError when the groups of a quantised form do not divide a matrix.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: freeze_leaf(tuple(entry.key for entry in path), leaf, model, base_weights), params
    )


def freeze_leaf(path: Path, leaf: jax.Array, model: Model, base_weights: str) -> jax.Array | Quantized:
    """One weight of `freeze`, stacked over layers or of one layer."""
    if path[-1] == "scale":
        return leaf
    if path[0] != "layers":
        return leaf.astype(model.compute_dtype)
    if base_weights in ("float32", "bfloat16"):
        return leaf.astype(base_weights)
    name = path[-1]
    if base_weights in quantized.GROUPS:  # a group must not lie on two devices
        axis, size = quantized.INPUTS[name][-1], quantized.GROUPS[base_weights]
        parts = jax.typeof(leaf).sharding.spec[axis]
        if parts is not None and leaf.shape[axis] % (size * sharding.parts(parts)):
            if parts == sharding.TENSOR:
                raise ConfigError(
                    f"adapter.base_weights={base_weights}: mesh.tensor={sharding.parts(parts)} would cut groups of "
                    f"{size} among the {leaf.shape[axis]} inputs of {'.'.join(path)}; take int8"
                )
            spec = list(jax.typeof(leaf).sharding.spec)
            spec[axis] = None
            leaf = reshard(leaf, P(*spec))
    inputs = quantized.INPUTS[name]
    return quantized.quantize(leaf, base_weights, inputs, ".".join(path), scale_dtype=model.compute_dtype)


def attach(frozen: Tree, trained: Tree, model: Model, adapter: Adapter, key: jax.Array | None = None) -> Tree:
    """The parameters with which transformer.py, loss.py and cached.py compute: the frozen ones, adapted.

    key: of the dropout of this micro-batch; without one nothing is dropped.
    """
    names = adapted(model, adapter)
    if not adapter.dropout:
        key = None

    def one(path: Path, base: Any) -> Any:
        if path[-1] == "scale" or path[0] == "embed":
            return base
        if path not in names:
            return Frozen(base)
        weight, own = _at(trained, path), None
        if key is not None:
            own = jax.random.fold_in(key, TARGETS.index(names[path]))
            own = jax.random.split(own, model.layers) if path[0] == "layers" else own
        return LowRank(base, weight["a"], weight["b"], own, scale(adapter), adapter.dropout)

    params = _map(one, frozen)
    return prefixes.beside(params, trained) if adapter.method == "prefix" else params


def merge(base: Tree, trained: Tree, model: Model, adapter: Adapter) -> Tree:
    """Float32 parameters of an ordinary model, W + scale A B, sharded as the base is.  A prefix stays beside them.

    base: of `freeze`, or of transformer.py.
    """
    names = adapted(model, adapter)

    def one(path: Path, leaf: Any) -> jax.Array:
        w = quantized.whole(leaf, jnp.dtype(jnp.float32)).astype(jnp.float32)
        if path not in names:
            return w
        a, b = (sharding.gather(_at(trained, path)[which]) for which in ("a", "b"))
        stack = len(_split(path, w.shape)[0])
        dims = (((a.ndim - 1,), (stack,)), ((0,) * stack, (0,) * stack))
        return w + scale(adapter) * jax.lax.dot_general(a, b, dims, out_sharding=jax.typeof(w).sharding)

    params = _map(one, base)
    return prefixes.beside(params, trained) if adapter.method == "prefix" else params


def _split(path: Path, of: tuple) -> tuple[tuple, tuple, tuple]:
    """What there is of each axis of a matrix, of those of its layers, inputs and outputs."""
    stack = 1 if path[0] == "layers" else 0
    inputs = len(quantized.INPUTS[path[-1]])
    return of[:stack], of[stack : stack + inputs], of[stack + inputs :]


def _tree(leaves: dict[Path, Any]) -> Tree:
    tree: Tree = {}
    for path, leaf in leaves.items():
        functools.reduce(lambda at, name: at.setdefault(name, {}), path[:-1], tree)[path[-1]] = leaf
    return tree


def _at(tree: Tree, path: Path) -> Any:
    return functools.reduce(lambda at, name: at[name], path, tree)


def _map(f: Callable[[Path, Any], Any], tree: Tree) -> Tree:
    """f(path, leaf) over a tree of parameters, whose leaves are arrays or Quantized."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(tuple(entry.key for entry in path), leaf), tree, is_leaf=quantized.is_quantized
    )
