"""Cross-entropy of a linear head without holding all logits: [B*T, V] in float32 would be the largest array by far.

Tokens are taken a chunk at a time, per device, inside one `shard_map`.  For training the gradients are made in the
same pass as the loss (the cotangent of a scalar is only a factor), so each chunk's logits are computed once and
forgotten, and the head's gradient crosses devices once, after the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding


def cross_entropy(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, valid_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log softmax(x w)[target] over valid tokens, in nats, float32; and the number of valid tokens, int32.

    x_BTD: hidden states in the compute dtype, w_DV: float32 head.  The products run in x's dtype and accumulate in
    float32; log-sum-exp is float32.  Invalid targets may have any value and contribute exactly nothing, to the loss
    and to the gradients.  chunk_tokens: tokens whose logits exist at the same time on a device.
    Reverse-mode differentiation only, once.
    """
    spec = P(sharding.batch_axes(x_BTD), None)
    targets_BT, valid_BT = reshard(targets_BT, spec), reshard(valid_BT, spec)
    return _sum_nll(x_BTD, w_DV, targets_BT, valid_BT, chunk_tokens), jnp.sum(valid_BT, dtype=jnp.int32)


def token_nll(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int) -> jax.Array:
    """-log softmax(x w)[target] of every token, in nats, float32 [B, T]: for scoring.

    Differentiable in x and w; the backward pass computes each chunk's logits again.
    """
    rows = sharding.batch_axes(x_BTD)

    def local(x_BTD, w_DV, targets_BT):
        def chunk(_, x_CD, targets_C):
            return None, _nll(x_CD, w_DV, targets_C)[0]

        _, nll_C = _over_chunks(jax.checkpoint(chunk), None, chunk_tokens, x_BTD, targets_BT)
        return nll_C.reshape(targets_BT.shape)

    specs = (P(rows, None, None), P(None, None), P(rows, None))
    run = jax.shard_map(local, in_specs=specs, out_specs=P(rows, None), check_vma=False)
    return run(x_BTD, sharding.gather(w_DV.astype(x_BTD.dtype)), reshard(targets_BT, P(rows, None)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_nll(x_BTD, w_DV, targets_BT, valid_BT, chunk_tokens):
    rows = sharding.batch_axes(x_BTD)

    def local(x_BTD, w_DV, targets_BT, valid_BT):
        def chunk(total, x_CD, targets_C, valid_C):
            nll_C, _, _ = _nll(x_CD, w_DV, jnp.where(valid_C, targets_C, 0))
            return total + jnp.sum(jnp.where(valid_C, nll_C, 0.0)), ()

        total, _ = _over_chunks(chunk, jnp.float32(0), chunk_tokens, x_BTD, targets_BT, valid_BT)
        return jax.lax.psum(total, rows) if rows else total

    specs = (P(rows, None, None), P(None, None), P(rows, None), P(rows, None))
    run = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)
    return run(x_BTD, sharding.gather(w_DV.astype(x_BTD.dtype)), targets_BT, valid_BT)


def _sum_nll_forward(x_BTD, w_DV, targets_BT, valid_BT, chunk_tokens):
    """The loss, and as residuals the gradients of x (in x's dtype) and w (float32, sharded as w)."""
    rows, w_spec = sharding.batch_axes(x_BTD), jax.typeof(w_DV).sharding.spec
    row_axes = () if rows is None else (rows,) if isinstance(rows, str) else tuple(rows)
    # The dimension of w that lies on an axis of the batch gets its sum over that axis already cut in shares.
    scattered = [(axis, dim) for dim, axis in enumerate(w_spec) if axis in row_axes]

    def local(x_BTD, w_DV, targets_BT, valid_BT):
        def chunk(carry, x_CD, targets_C, valid_C):
            total, dw_DV = carry
            targets_C = jnp.where(valid_C, targets_C, 0)
            nll_C, logits_CV, lse_C = _nll(x_CD, w_DV, targets_C)
            p_CV = jnp.exp(logits_CV - lse_C[:, None])
            is_target_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
            dlogits_CV = jnp.where(is_target_CV, p_CV - 1, p_CV)
            dlogits_CV = jnp.where(valid_C[:, None], dlogits_CV, 0.0).astype(x_CD.dtype)
            dx_CD = jnp.matmul(dlogits_CV, w_DV.T)
            dw_DV += jnp.matmul(x_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
            return (total + jnp.sum(jnp.where(valid_C, nll_C, 0.0)), dw_DV), dx_CD

        start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
        (total, dw_DV), dx_CD = _over_chunks(chunk, start, chunk_tokens, x_BTD, targets_BT, valid_BT)
        for axis, dim in scattered:
            dw_DV = jax.lax.psum_scatter(dw_DV, axis, scatter_dimension=dim, tiled=True)
        summed = tuple(a for a in row_axes if a not in dict(scattered))
        dw_DV = jax.lax.psum(dw_DV, summed) if summed else dw_DV
        return jax.lax.psum(total, row_axes) if row_axes else total, dx_CD.reshape(x_BTD.shape), dw_DV

    x_spec, by_token, dw_spec = P(rows, None, None), P(rows, None), [None, None]
    for axis, dim in scattered:
        dw_spec[dim] = axis
    run = jax.shard_map(
        local,
        in_specs=(x_spec, P(None, None), by_token, by_token),
        out_specs=(P(), x_spec, P(*dw_spec)),
        check_vma=False,
    )
    total, dx_BTD, dw_DV = run(x_BTD, sharding.gather(w_DV.astype(x_BTD.dtype)), targets_BT, valid_BT)
    return total, (dx_BTD, reshard(dw_DV, w_spec))


def _sum_nll_backward(chunk_tokens, gradients, cotangent):
    dx_BTD, dw_DV = gradients
    return (cotangent * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype), cotangent * dw_DV, None, None


_sum_nll.defvjp(_sum_nll_forward, _sum_nll_backward)


def _nll(x_CD: jax.Array, w_DV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss per token [C], the logits [C, V] and their log-sum-exp [C], all float32."""
    logits_CV = jnp.matmul(x_CD, w_DV, preferred_element_type=jnp.float32)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0], logits_CV, lse_C


def _over_chunks(
    f: Callable, carry: Any, chunk_tokens: int, x_BTD: jax.Array, *by_token_BT: jax.Array
) -> tuple[Any, Any]:
    """carry, y = f(carry, x_CD, *by_token_C) over chunks of at most chunk_tokens tokens; last carry, y by token [BT].

    The chunks are of equal size; what fills the last one up is zero, so `valid` is false there.
    """
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    chunks = -(-tokens // chunk_tokens)
    size = -(-tokens // chunks)

    def cut(a):
        a = a.reshape(tokens, *a.shape[2:])
        padding = [(0, chunks * size - tokens)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding).reshape(chunks, size, *a.shape[1:])

    arrays = (x_BTD, *by_token_BT)
    if chunks == 1:  # a loop of one would keep XLA from fusing across its border
        return f(carry, *(a.reshape(tokens, *a.shape[2:]) for a in arrays))
    carry, ys = jax.lax.scan(lambda carry, chunk: f(carry, *chunk), carry, tuple(cut(a) for a in arrays))
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], ys)
