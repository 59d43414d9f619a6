"""Attention as the formula says it: every score exists, softmax in float32.  What faster kernels are held against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.attention import documents
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.names import LSE, OUTPUT


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
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    mask_BTS = visible(T, S, ranges, q_positions_BT)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)  # grouped: K and V are never repeated
    scores_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) / math.sqrt(K)
    if soft_cap is not None:
        scores_BGRTS = soft_cap * jnp.tanh(scores_BGRTS / soft_cap)
    # A finite floor: every query sees itself, so the masked weights are exactly zero after the exponential.
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
    o_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK)
    o_BTHK = checkpoint_name(o_BTGRK.reshape(B, T, H, K), OUTPUT)
    if not return_lse:
        return o_BTHK
    return o_BTHK, checkpoint_name(jax.nn.logsumexp(scores_BGRTS, axis=-1).reshape(B, H, T), LSE)
