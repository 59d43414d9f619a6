"""Which keys a query sees, as two integers per position instead of a T x T mask.

With causal attention, documents that lie one after the other and an optional sliding window, query t sees exactly the
keys `first[t] <= s <= t`, and key s is seen by exactly the queries `s <= t < end[s]`.  Both grow along the row, so a
kernel learns from the two ends of a block which blocks it must visit, and which of those need no mask.  The diagonal
is always visible: no row is ever empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding


class Ranges(NamedTuple):
    """int32 [B, T] each, non-decreasing along T, with first[t] <= t < end[t]."""

    first_BT: jax.Array  # the first key that query t sees; the last one is t
    end_BT: jax.Array  # one past the last query that sees key t; the first one is t


def ranges(documents_BT: jax.Array, window: int | None = None) -> Ranges:
    """Ranges of a packed row; a document is a run of equal ids, so an id that comes back later is another document.

    Made once per batch and passed to every layer.  window: as in `narrow`.  Tokens that `context` splits are striped;
    their ranges are of the whole row in its order, on every place of `context`.
    """
    B, T = documents_BT.shape
    tokens = sharding.token_axis(documents_BT)
    if tokens is not None:
        documents_BT = reshard(documents_BT, P(sharding.batch_axes(documents_BT), None))
        documents_BT = sharding.in_order(documents_BT, sharding.parts(tokens))
    if B == 1 and sharding.batch_axes(documents_BT) is not None:
        documents_BT = reshard(documents_BT, P(None, None))  # JAX 0.12 forgets axes of size 1 where a row is sliced
    position_T = jnp.arange(T, dtype=jnp.int32)
    # Slices of the row would need its axis unsharded by name; a roll and the known first position do not.
    begins_BT = (documents_BT != jnp.roll(documents_BT, 1, axis=1)) | (position_T == 0)
    first_BT = lax.cummax(jnp.where(begins_BT, position_T, 0), axis=1)
    next_begins_BT = jnp.roll(begins_BT, -1, axis=1) | (position_T == T - 1)
    end_BT = lax.cummin(jnp.where(next_begins_BT, position_T + 1, T), axis=1, reverse=True)
    found = Ranges(first_BT, end_BT)
    return found if window is None else narrow(found, window)


def narrow(given: Ranges, window: int) -> Ranges:
    """The ranges when a query sees at most itself and the window - 1 keys before it."""
    position_T = jnp.arange(given.first_BT.shape[1], dtype=jnp.int32)
    first_BT = jnp.maximum(given.first_BT, position_T - (window - 1))
    return Ranges(first_BT, jnp.minimum(given.end_BT, position_T + window))


def visible(given: Ranges) -> jax.Array:
    """The mask that the ranges stand for: bool [B, T, S]."""
    key_S = jnp.arange(given.first_BT.shape[1])
    return (key_S >= given.first_BT[:, :, None]) & (key_S <= key_S[:, None])


def key_blocks(i, block_q: int, block_k: int, first_of_first, first_of_last):
    """Blocks of keys that block i of queries visits: (begin, clear_begin, clear_end, end), int32 scalars.

    It sees something in every block of [begin, end) and nothing elsewhere; in [clear_begin, clear_end) everything is
    visible, so no mask is needed; begin <= clear_begin <= clear_end <= end.
    first_of_first, first_of_last: `first` of the block's first and last query; 0 and 0 without documents.
    """
    row = i * block_q
    begin = lax.div(first_of_first, jnp.int32(block_k))
    end = lax.div(row + block_q + block_k - 1, jnp.int32(block_k))
    clear_end = jnp.maximum(lax.div(row + 1, jnp.int32(block_k)), begin)  # keys up to the first query
    clear_begin = jnp.minimum(lax.div(first_of_last + block_k - 1, jnp.int32(block_k)), clear_end)
    return begin, jnp.maximum(clear_begin, begin), clear_end, end


def query_blocks(j, block_k: int, block_q: int, end_of_first, end_of_last):
    """Blocks of queries that block j of keys is visited by: (begin, clear_begin, clear_end, end), int32 scalars.

    The counterpart of `key_blocks`.  end_of_first, end_of_last: `end` of the block's first and last key; T and T
    without documents.
    """
    key = j * block_k
    begin = lax.div(key, jnp.int32(block_q))
    end = lax.div(end_of_last + block_q - 1, jnp.int32(block_q))
    clear_begin = jnp.minimum(lax.div(key + block_k - 1 + block_q - 1, jnp.int32(block_q)), end)  # past the last key
    clear_end = jnp.maximum(lax.div(end_of_first, jnp.int32(block_q)), clear_begin)
    return begin, clear_begin, jnp.minimum(clear_end, end), end
