"""Weights in eight or four bits, for generating only: what is multiplied and summed is in the compute dtype.

    int8   one scale per output: the largest magnitude of its inputs / 127; 1 byte a weight
    int4   one scale per output and group of 32 inputs, as in ggml's Q4_0: the value of largest magnitude becomes -8,
           so that the sixteen codes stand for -8 .. 7 scales; two codes a byte, 4.5 or 5 bits a weight with its scale

A layer's matrices and the head are stored so.  Norm scales are small and the embedding is read one row a token: both
stay as they are, and with tied embeddings so does the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError

Bits = Literal["int8", "int4"]
GROUP = 32

# Axes that a matrix sums over; the last of them is the one that groups lie along.
INPUTS = {
    "query": (0,),
    "key": (0,),
    "value": (0,),
    "out": (0, 1),
    "gate": (0,),
    "up": (0,),
    "down": (0,),
    "kernel": (0,),
}


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["axis"])
@dataclass(frozen=True)
class Quantized:
    """codes: int8 of the weight's shape; or uint8 with axis `axis` as [groups, 16], first halves in the low bits.
    scale: in the compute dtype, of codes' rank, broadcast along what it is shared by."""

    codes: jax.Array
    scale: jax.Array
    axis: int | None  # None: int8


def serving(params: dict[str, Any], cfg: Model, weights: Literal["dtype", "int8", "int4"] = "dtype"):
    """The parameters as generation reads them: layers apart, matrices in the compute dtype or in `weights`' bits.

    Raises ConfigError when int4's groups do not divide a matrix.
    """
    from tinyllama_jax.model import transformer  # whose layers multiply with what is defined here

    dtype = jnp.dtype(cfg.compute_dtype)
    params = transformer.working(params, cfg, Execution(scan_layers=False))
    params = params | {"embed": jax.tree.map(lambda table: table.astype(dtype), params["embed"])}
    if "head" in params:
        params = params | {"head": jax.tree.map(lambda kernel: kernel.astype(dtype), params["head"])}
    if weights == "dtype":
        return params

    def smaller(path: tuple, leaf: jax.Array) -> Any:
        name = path[-1].key
        return quantize(leaf, weights, INPUTS[name], name) if name in INPUTS else leaf

    return jax.tree_util.tree_map_with_path(smaller, params)


def quantize(weight: jax.Array, bits: Bits, inputs: tuple[int, ...], name: str = "a matrix") -> Quantized:
    """`weight` in so many bits, with scales in its dtype.  inputs: the axes that are summed over.

    A mesh axis that splits the last of them must divide its number of groups.
    """
    w = weight.astype(jnp.float32)
    if bits == "int8":
        scale = jnp.max(jnp.abs(w), axis=inputs, keepdims=True) / 127
        scale = jnp.where(scale == 0, 1, scale).astype(weight.dtype)
        codes = jnp.round(w / scale.astype(jnp.float32))
        return Quantized(jnp.clip(codes, -127, 127).astype(jnp.int8), scale, None)
    axis = inputs[-1]
    if weight.shape[axis] % GROUP:
        raise ConfigError(
            f"{name} {list(weight.shape)}: int4 shares scales among {GROUP} inputs, which do not divide "
            f"{weight.shape[axis]}; take int8"
        )
    w = _grouped(w, axis)
    largest = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=axis + 1, keepdims=True), axis + 1)
    scale = jnp.where(largest == 0, 1, largest / -8).astype(weight.dtype)
    codes = jnp.clip(jnp.round(w / scale.astype(jnp.float32)) + 8, 0, 15).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=axis + 1)
    return Quantized(low | high << 4, scale, axis)


def whole(tree: Any, dtype: jnp.dtype) -> Any:
    """`tree` with every Quantized of it as the array that it stands for, in `dtype`."""
    return jax.tree.map(lambda x: _array(x, dtype) if isinstance(x, Quantized) else x, tree, is_leaf=_is_quantized)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def _array(x: Quantized, dtype: jnp.dtype) -> jax.Array:
    if x.axis is None:
        return x.codes.astype(dtype) * x.scale.astype(dtype)
    codes = jnp.concatenate([x.codes & 15, x.codes >> 4], axis=x.axis + 1).astype(jnp.int8) - 8
    grouped = codes.astype(dtype) * x.scale.astype(dtype)
    spec = list(jax.typeof(grouped).sharding.spec)
    del spec[x.axis + 1]
    shape = list(grouped.shape)
    shape[x.axis : x.axis + 2] = [shape[x.axis] * GROUP]
    return jnp.reshape(grouped, shape, out_sharding=P(*spec))


def _grouped(w: jax.Array, axis: int) -> jax.Array:
    """[..., n, ...] as [..., n / 32, 32, ...]."""
    spec = list(jax.typeof(w).sharding.spec)
    spec.insert(axis + 1, None)
    shape = [*w.shape[:axis], w.shape[axis] // GROUP, GROUP, *w.shape[axis + 1 :]]
    return jnp.reshape(w, shape, out_sharding=P(*spec))
