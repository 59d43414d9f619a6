"""The modules of a block: parameters and `__call__`, nothing else (flax.nnx used narrowly; see transformer.py).

Weights are float32 and sharded; each is cast to the compute dtype and gathered right before its use, so that the
gather moves half the bytes and at most one layer's weights are whole at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from tinyllama_jax import sharding
from tinyllama_jax.config import Model
from tinyllama_jax.model import init, quantized, rope
from tinyllama_jax.model.lowrank import Frozen, LowRank
from tinyllama_jax.model.quantized import Quantized

Weight = jax.Array | Quantized | Frozen | LowRank

# (q_BTHK, k_BTGK, v_BTGK) -> [B, T, H, K]: the caller's attention, with its mask, kernel and cache bound.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def whole(weight: jax.Array | Quantized, dtype: jnp.dtype) -> jax.Array:
    """`weight` in `dtype`, whole on every device but for its share of `tensor`; what is gathered is small: codes."""
    if isinstance(weight, Quantized):
        return quantized.whole(jax.tree.map(sharding.gather, weight), dtype)
    return sharding.gather(weight.astype(dtype))


def terms(x_BT: jax.Array, weight: Weight, inputs: int = 1) -> list[tuple[jax.Array, jax.Array | Quantized, bool]]:
    """[(x, w, frozen), ...] with x `weight` = sum of x w; x [B, T, ...] is contracted as in `linear`.

    frozen: w shall have no gradient.
    """
    if isinstance(weight, LowRank):
        low_BTr = linear(dropout(x_BT, weight.rate, weight.key), weight.a, inputs) * weight.scale
        return [(x_BT, weight.base, True), (low_BTr, weight.b, False)]
    if isinstance(weight, Frozen):
        return [(x_BT, weight.weight, True)]
    return [(x_BT, weight, isinstance(weight, Quantized))]


def linear(x_BT: jax.Array, weight: Weight, inputs: int = 1) -> jax.Array:
    """Contract the axes of x [B, T, ...] after T with the first `inputs` axes of `weight`, gathered in x's dtype.

    A low-rank part has inputs of its own, of one axis.
    """
    parts = terms(x_BT, weight, inputs)
    products = [
        _frozen(x, w, n) if frozen else _linear(x, w, n) for n, (x, w, frozen) in zip((inputs, 1), parts, strict=False)
    ]
    return functools.reduce(jnp.add, products)


def _frozen(x_BT: jax.Array, weight: jax.Array | Quantized, inputs: int) -> jax.Array:
    """`linear` without a gradient by the weight, which is kept for the backward pass as it is stored.

    Autodiff would keep what was multiplied: under remat=none a whole model in the compute dtype.
    """
    kind = jax.typeof(x_BT)

    def product(x_BT, weight):
        return _linear(x_BT, whole(weight, x_BT.dtype), inputs)

    def backward(weight, gradient):
        (gradient_BT,) = jax.linear_transpose(lambda x_BT: product(x_BT, weight), kind)(gradient)
        return gradient_BT, None

    with_gradient = jax.custom_vjp(product)
    with_gradient.defvjp(lambda x_BT, weight: (product(x_BT, weight), weight), backward)
    return with_gradient(x_BT, weight)


def _linear(x_BT: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """`linear` with an array.

    Where `tensor` splits the weight's outputs, so it does the result's; where it splits the inputs, of x and weight
    alike, the result is summed over it.

    Rows and tokens are one axis during the product.  It is the same arithmetic, but with two axes to contract in
    the weight's gradient XLA's CPU backend transposes activations element by element: twice the time of an MLP.
    They stay two where both are split, for no device has a run of the one axis then.
    """
    (rows, tokens, *features), (B, T) = jax.typeof(x_BT).sharding.spec, x_BT.shape[:2]
    outputs = sharding.whole_but_for_tensor(jax.typeof(weight).sharding.spec)[inputs:]
    weight = sharding.gather(weight.astype(x_BT.dtype), sharding.axes_of(rows, tokens))
    if tokens is not None:
        return _contract(x_BT, weight, inputs, P(rows, tokens, *outputs))
    x_N = jnp.reshape(x_BT, (B * T, *x_BT.shape[2:]), out_sharding=P(rows, *features))
    y_N = _contract(x_N, weight, inputs, P(rows, *outputs))
    return jnp.reshape(y_N, (B, T, *y_N.shape[1:]), out_sharding=P(rows, None, *outputs))


def _contract(x: jax.Array, weight: jax.Array, inputs: int, spec: P) -> jax.Array:
    """Sum over the last axes of x and the first of weight; the result lies as `spec` says."""
    axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    return jax.lax.dot_general(x, weight, (axes, ((), ())), out_sharding=spec)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in x's dtype (arXiv 1910.07467)."""
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (normed * scale_D).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; nothing is dropped without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)  # drawn in the order of the tokens, however they lie
    keep = sharding.striped(keep, sharding.parts(sharding.token_axis(x)), axis=1)
    keep = jax.sharding.reshard(keep, jax.typeof(x).sharding.spec)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


class RMSNorm(nnx.Module):
    def __init__(self, cfg: Model, rngs: nnx.Rngs):
        self.eps = cfg.norm_eps
        self.scale = nnx.Param(init.ones(rngs.params(), (cfg.d_model,)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.scale[...], self.eps)


class Attention(nnx.Module):
    def __init__(self, cfg: Model, rngs: nnx.Rngs):
        make, D, H, G, K = init.initializers(cfg), cfg.d_model, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.query = nnx.Param(make["query"](rngs.params(), (D, H, K)))
        self.key = nnx.Param(make["key"](rngs.params(), (D, G, K)))
        self.value = nnx.Param(make["value"](rngs.params(), (D, G, K)))
        self.out = nnx.Param(make["out"](rngs.params(), (H, K, D)))

    def __call__(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> jax.Array:
        q_BTHK = rope.rotate(linear(x_BTD, self.query.get_value()), cos, sin)
        k_BTGK = rope.rotate(linear(x_BTD, self.key.get_value()), cos, sin)
        v_BTGK = linear(x_BTD, self.value.get_value())
        return linear(attend(q_BTHK, k_BTGK, v_BTGK), self.out.get_value(), inputs=2)


class Mlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, cfg: Model, rngs: nnx.Rngs):
        make, D, F = init.initializers(cfg), cfg.d_model, cfg.d_ff
        self.gate = nnx.Param(make["gate"](rngs.params(), (D, F)))
        self.up = nnx.Param(make["up"](rngs.params(), (D, F)))
        self.down = nnx.Param(make["down"](rngs.params(), (F, D)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = linear(x_BTD, self.gate.get_value()), linear(x_BTD, self.up.get_value())
        return linear(jax.nn.silu(gate_BTF) * up_BTF, self.down.get_value())


class Block(nnx.Module):
    """Sequential pre-norm block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, cfg: Model, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.attention_norm = RMSNorm(cfg, rngs)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg, rngs)
        self.mlp = Mlp(cfg, rngs)

    def __call__(
        self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        branch = self.attention(self.attention_norm(x_BTD), cos, sin, attend)
        x_BTD = x_BTD + dropout(branch, self.dropout, keys[0])
        return x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, keys[1])
