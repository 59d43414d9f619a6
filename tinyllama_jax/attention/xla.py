"""jax.nn.dot_product_attention, XLA implementation: the library's baseline."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.attention.names import OUTPUT
from tinyllama_jax.attention.reference import visible


def xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    documents_BT: jax.Array | None,
    q_positions_BT: jax.Array | None,
) -> jax.Array:
    """As `reference`, [B, T, H, K].  Documents and query positions are passed as a [B, 1, T, S] mask."""
    if documents_BT is None and q_positions_BT is None:
        out = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation="xla")
    else:
        mask_BTS = visible(q_BTHK.shape[1], k_BSGK.shape[1], documents_BT, q_positions_BT)
        out = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None], implementation="xla")
    return checkpoint_name(out, OUTPUT)
