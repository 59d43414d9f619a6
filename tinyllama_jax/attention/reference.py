"""Attention as the formula says it: every score exists, softmax in float32.  What faster kernels are held against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.attention.names import OUTPUT


def visible(
    queries: int, keys: int, documents_BT: jax.Array | None = None, q_positions_BT: jax.Array | None = None
) -> jax.Array:
    """Which keys each query sees: bool [1 or B, T, S], true for keys at or before it and, with documents, in its own.

    A key's position is its index; a query's is its index too unless `q_positions_BT` says otherwise.
    """
    positions = jnp.arange(queries)[None] if q_positions_BT is None else q_positions_BT
    mask = jnp.arange(keys)[None, None, :] <= positions[:, :, None]
    if documents_BT is not None:
        mask &= documents_BT[:, :, None] == documents_BT[:, None, :]
    return mask


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    documents_BT: jax.Array | None,
    q_positions_BT: jax.Array | None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v per head, [B, T, H, K]; query head h reads key/value head h // (H/G)."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    mask_BTS = visible(T, S, documents_BT, q_positions_BT)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)  # grouped: K and V are never repeated
    scores_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    # A finite floor: every query sees itself, so the masked weights are exactly zero after the exponential.
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS / math.sqrt(K), jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
    out_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK)
    return checkpoint_name(out_BTGRK.reshape(B, T, H, K), OUTPUT)
