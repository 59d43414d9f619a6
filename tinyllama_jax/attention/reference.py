"""Attention as the formula says it: every score exists, softmax in float32.  What faster kernels are held against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.attention import documents
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.names import LSE, OUTPUT

GRANULE = 1  # `forward` and `backward` take any number of tokens


def visible(queries: int, keys: int, ranges: Ranges | None, q_positions_BT: jax.Array | None) -> jax.Array:
    """Which keys each query sees: bool [1 or B, T, S].

    A key's position is its index; a query's is its index too unless `q_positions_BT` says otherwise.
    """
    if ranges is not None:
        return documents.visible(ranges)
    positions = jnp.arange(queries)[None] if q_positions_BT is None else q_positions_BT
    return jnp.arange(keys)[None, None, :] <= positions[:, :, None]


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    ranges: Ranges | None = None,
    q_positions_BT: jax.Array | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(K)) v per head, [B, T, H, K]; query head h reads key/value head h // (H/G).

    return_lse: also the log-sum-exp of each row of scores, float32 [B, H, T].
    """
    o_BTHK, lse_BHT = _attend(q_BTHK, k_BSGK, v_BSGK, ranges, q_positions_BT, soft_cap)
    o_BTHK = checkpoint_name(o_BTHK, OUTPUT)
    return (o_BTHK, checkpoint_name(lse_BHT, LSE)) if return_lse else o_BTHK


def _attend(q_BTHK, k_BSGK, v_BSGK, ranges, q_positions_BT, soft_cap):
    """The result and the log-sum-exp, without names for a remat policy."""
    B, T, H, K = q_BTHK.shape
    scores_BGRTS, mask, _ = _scores(q_BTHK, k_BSGK, ranges, q_positions_BT, soft_cap)
    # A finite floor: every query sees itself, so the masked weights are exactly zero after the exponential.
    scores_BGRTS = jnp.where(mask, scores_BGRTS, jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
    o_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK)
    return o_BTGRK.reshape(B, T, H, K), jax.nn.logsumexp(scores_BGRTS, axis=-1).reshape(B, H, T)


def _scores(q_BTHK, k_BSGK, ranges, q_positions_BT, soft_cap):
    """Scores [B, G, R, T, S] in float32, the mask over them, and the soft cap's slope at each."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)  # grouped: K and V are never repeated
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) / math.sqrt(K)
    slope = 1.0
    if soft_cap is not None:
        capped = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * capped, 1 - capped**2
    return scores, visible(T, S, ranges, q_positions_BT)[:, None, None], slope


def forward(q_BTHK, k_BTGK, v_BTGK, ranges, *, kind=None, soft_cap=None, interpret=False):
    """The formula as a kernel (see fused.py), for rows that `context` splits: (o [B, T, H, K], lse [B, H, T])."""
    del kind, interpret  # it is the same everywhere
    # No names: a policy would keep the results of every pair of stripes, not only those of the whole row.
    return _attend(q_BTHK, k_BTGK, v_BTGK, _with(ranges, q_BTHK), None, soft_cap)


def _with(ranges, q_BTHK):
    """`ranges`, as if they depended on q.  Else JAX sees that the masks are the same in every layer, and makes those of
    all pairs of stripes before the first one: T x T/C of them."""
    return None if ranges is None else jax.lax.optimization_barrier((ranges, q_BTHK))[0]


def backward(q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges, *, kind=None, soft_cap=None, interpret=False):
    """(dq, dk, dv), from the log-sum-exp and delta = sum(o do) of each row, which may be of more keys than these."""
    del kind, interpret
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    scores, mask, slope = _scores(q_BTHK, k_BTGK, _with(ranges, q_BTHK), None, soft_cap)
    of_row = lambda x_BHT: x_BHT.reshape(B, G, H // G, T)[..., None]  # noqa: E731
    p = jnp.where(mask, jnp.exp(scores - of_row(lse_BHT)), 0.0)
    q, do = (x.reshape(B, T, G, H // G, K) for x in (q_BTHK, do_BTHK))
    f32 = {"preferred_element_type": jnp.float32}
    dp = jnp.einsum("btgrk,bsgk->bgrts", do, v_BTGK, **f32)
    ds = (p * (dp - of_row(delta_BHT)) * slope / math.sqrt(K)).astype(q.dtype)
    dq = jnp.einsum("bgrts,bsgk->btgrk", ds, k_BTGK, **f32).reshape(q_BTHK.shape)
    dk = jnp.einsum("bgrts,btgrk->bsgk", ds, q, **f32)
    dv = jnp.einsum("bgrts,btgrk->bsgk", p.astype(do.dtype), do, **f32)
    return dq.astype(q_BTHK.dtype), dk.astype(k_BTGK.dtype), dv.astype(v_BTGK.dtype)
