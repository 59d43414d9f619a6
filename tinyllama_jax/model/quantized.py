"""Weights in eight or four bits, which nothing trains: what is multiplied and summed is in the compute dtype.

    int8   one scale per output: the largest magnitude of its inputs / 127; 1 byte a weight
    int4   one scale per output and group of 32 inputs, as in ggml's Q4_0: the value of largest magnitude becomes -8,
           so that the sixteen codes stand for -8 .. 7 scales; two codes a byte, 4.5 or 5 bits a weight with its scale
    nf4    one scale per output and group of 64 inputs, the largest magnitude; the codes stand for 16 quantiles of a
           normal distribution (NF4 below); two codes a byte, 4.25 or 4.5 bits a weight

For generating a layer's matrices and the head are stored so (`serving`), for QLoRA the layers' matrices.  Norm scales
are small and the embedding is read one row a token: both stay as they are, and with tied embeddings so does the head.

The library qwix has such arrays too.  Measured with its 0.1.8: its nf4 can be neither quantised nor dequantised on a
mesh with Explicit axes (codebooks are searched after a reshape across shards: ShardingTypeError), and its int4 is
symmetric, with an error on normal weights a tenth above Q4_0's.  So it is the referee (tests/test_parity_lora.py): its
codes and values for nf4 are these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError

Bits = Literal["int8", "int4", "nf4"]
GROUPS = {"int4": 32, "nf4": 64}

# NormalFloat of QLoRA (arXiv 2305.14314, appendix E): between -1 and 0 seven steps, between 0 and 1 eight, equally many
# values of a normal distribution in each, whose outermost quantiles are at 0.9677083.  tests/test_lora.py makes them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# Axes of a layer's matrix that it sums over, from its last; the last of them is the one that groups lie along.
INPUTS = {
    "query": (-3,),
    "key": (-3,),
    "value": (-3,),
    "out": (-3, -2),
    "gate": (-2,),
    "up": (-2,),
    "down": (-2,),
    "kernel": (-2,),
}


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["bits", "axis"])
@dataclass(frozen=True)
class Quantized:
    """codes: int8 of the weight's shape; or uint8 with axis `axis` as [groups, half a group], first halves in the low
    bits.  scale: of codes' rank, broadcast along what it is shared by.

    axis: counted from the last, so that it is the same for layers that are stacked and for one of them.
    """

    codes: jax.Array
    scale: jax.Array
    bits: Bits
    axis: int


def serving(params: dict[str, Any], cfg: Model, weights: Literal["dtype", "int8", "int4", "nf4"] = "dtype"):
    """The parameters as generation reads them: layers apart, matrices in the compute dtype or in `weights`' bits.

    Raises ConfigError when groups do not divide a matrix.
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
        if name not in INPUTS or path[-2].key == "prefix":
            return leaf
        return quantize(leaf, weights, INPUTS[name], name)

    return jax.tree_util.tree_map_with_path(smaller, params)


def quantize(
    weight: jax.Array,
    bits: Bits,
    inputs: tuple[int, ...],
    name: str = "a matrix",
    scale_dtype: jax.typing.DTypeLike | None = None,
) -> Quantized:
    """`weight` in so many bits.  inputs: the axes that are summed over, all of one sign.

    scale_dtype: of the scales; None: the weight's.  Codes are found with the scales as they are stored.
    A mesh axis that splits the last of the inputs must divide its number of groups.  Raises ConfigError when groups do
    not divide that axis.
    """
    inputs = tuple(axis % weight.ndim - weight.ndim for axis in inputs)
    axis = inputs[-1]
    w = weight.astype(jnp.float32)
    if bits == "int8":
        scale = jnp.max(jnp.abs(w), axis=inputs, keepdims=True) / 127
        scale = jnp.where(scale == 0, 1, scale).astype(scale_dtype or weight.dtype)
        codes = jnp.round(w / scale.astype(jnp.float32))
        return Quantized(jnp.clip(codes, -127, 127).astype(jnp.int8), scale, bits, axis)
    if weight.shape[axis] % GROUPS[bits]:
        raise ConfigError(
            f"{name} {list(weight.shape)}: {bits} shares scales among {GROUPS[bits]} inputs, which do not divide "
            f"{weight.shape[axis]}; take int8"
        )
    w = _grouped(w, axis, GROUPS[bits])
    if bits == "int4":
        largest = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=axis, keepdims=True), axis) / -8
    else:
        largest = jnp.max(jnp.abs(w), axis=axis, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest).astype(scale_dtype or weight.dtype)
    w /= scale.astype(jnp.float32)
    if bits == "int4":
        codes = jnp.clip(jnp.round(w) + 8, 0, 15).astype(jnp.uint8)
    else:  # the nearest quantile: how many of the middles between two lie below
        codes = sum((w > (low + high) / 2).astype(jnp.uint8) for low, high in pairwise(NF4))
    low, high = jnp.split(codes, 2, axis=axis)
    return Quantized(low | high << 4, scale, bits, axis)


def whole(tree: Any, dtype: jnp.dtype) -> Any:
    """`tree` with every Quantized of it as the array that it stands for, in `dtype`."""
    return jax.tree.map(lambda x: _array(x, dtype) if isinstance(x, Quantized) else x, tree, is_leaf=is_quantized)


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def _array(x: Quantized, dtype: jnp.dtype) -> jax.Array:
    if x.bits == "int8":
        return x.codes.astype(dtype) * x.scale.astype(dtype)
    codes = jnp.concatenate([x.codes & 15, x.codes >> 4], axis=x.axis)
    if x.bits == "int4":
        grouped = (codes.astype(jnp.int8) - 8).astype(dtype) * x.scale.astype(dtype)
    else:  # quantiles are not exact in bfloat16: rounded once
        grouped = (_quantiles(codes) * x.scale.astype(jnp.float32)).astype(dtype)
    groups, member = grouped.ndim + x.axis - 1, grouped.ndim + x.axis
    spec, shape = list(jax.typeof(grouped).sharding.spec), list(grouped.shape)
    del spec[member]
    shape[groups : member + 1] = [shape[groups] * shape[member]]
    return jnp.reshape(grouped, shape, out_sharding=P(*spec))


def _quantiles(codes: jax.Array) -> jax.Array:
    """NF4[codes], float32, by selects, which are part of the loops around them on every device; a gather is not.

    Without the barrier XLA takes the 16 constants, each broadcast to the shape of a matrix, out of the loop over layers
    and keeps them all: 1.4 GB for a model of 1.1B.
    """
    quantiles, codes = jax.lax.optimization_barrier((jnp.asarray(NF4, jnp.float32), codes))
    values = list(quantiles)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _grouped(w: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n, ...] as [..., n / size, size, ...]; axis is counted from the last, and is that of `size` afterwards."""
    at = w.ndim + axis
    spec = list(jax.typeof(w).sharding.spec)
    spec.insert(at + 1, None)
    shape = [*w.shape[:at], w.shape[at] // size, size, *w.shape[at + 1 :]]
    return jnp.reshape(w, shape, out_sharding=P(*spec))
