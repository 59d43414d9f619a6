"""jax.nn.dot_product_attention, XLA implementation: the library's baseline."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.names import OUTPUT
from tinyllama_jax.attention.reference import visible


def xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    ranges: Ranges | None = None,
    q_positions_BT: jax.Array | None = None,
) -> jax.Array:
    """As `reference`, [B, T, H, K].  Ranges and query positions are passed as a [B, 1, T, S] mask."""
    if ranges is None and q_positions_BT is None:
        o_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation="xla")
    else:
        mask_BTS = visible(q_BTHK.shape[1], k_BSGK.shape[1], ranges, q_positions_BT)
        o_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None], implementation="xla")
    return checkpoint_name(o_BTHK, OUTPUT)
