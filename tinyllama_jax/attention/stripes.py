"""Attention over rows whose tokens the mesh's `context` splits, by the same kernels, one pair of stripes at a time.

Place c of C holds the tokens c, c + C, c + 2C, ... of a row (Striped Attention, arXiv 2311.09431).  So query i of
stripe a sees the keys 0 .. i of stripe b where b <= a, and 0 .. i - 1 where b > a: ordinary causal attention over T/C
tokens, in the second case with the queries moved up by one.  Every place has the same work at the same time, and
documents are ranges of keys within a pair as they are in the whole row.

Keys and values are gathered over `context` once per layer and pass: with grouped heads they are small beside the
queries, and one collective can run ahead of the kernels, which a ring would make wait for its slowest member at every
pair.  Results over parts of the keys are merged by their log-sum-exp.  The backward pass needs no merging: given the
log-sum-exp over all keys, each pair makes its own part of the gradients (arXiv 2205.14135, appendix B.4).

Everything here is local to a device, inside fused.py's `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tinyllama_jax.attention.documents import Ranges

FLOOR = -1e30  # log-sum-exp of a row that sees nothing: finite, so that the difference of two is no NaN
CEILING = 1e30  # in the backward pass it makes every weight of such a row exp(score - CEILING) = 0


class Context(NamedTuple):
    """How a row is split: over which mesh axis, and into how many stripes."""

    axis: str
    stripes: int


class _Pair(NamedTuple):
    """Queries of one stripe against keys of one stripe."""

    moved: jax.Array  # int32, 1 where queries are moved up by one, else 0
    ranges: Ranges | None  # within the pair, moved; no row is empty
    empty_BN: jax.Array | None  # rows that see nothing in truth

    def up(self, x: jax.Array, axis: int = 1, fill: float = 0.0) -> jax.Array:
        """Queries as the kernel takes them: the first one left out and `fill` behind the last, if they are moved."""
        pad = jnp.full_like(lax.slice_in_dim(x, 0, 1, axis=axis), fill)
        return lax.dynamic_slice_in_dim(lax.concatenate([x, pad], axis), self.moved, x.shape[axis], axis)

    def down(self, x: jax.Array, axis: int = 1, fill: float = 0.0) -> jax.Array:
        """The inverse of `up` for the kernel's results; a query that was left out gets `fill`."""
        pad = jnp.full_like(lax.slice_in_dim(x, 0, 1, axis=axis), fill)
        return lax.dynamic_slice_in_dim(lax.concatenate([pad, x], axis), 1 - self.moved, x.shape[axis], axis)

    def seen(self, lse_BHN: jax.Array, otherwise: float) -> jax.Array:
        return lse_BHN if self.empty_BN is None else jnp.where(self.empty_BN[:, None], otherwise, lse_BHN)


def _pair(queries: jax.Array, keys: jax.Array, stripes: int, given: Ranges | None) -> _Pair:
    """Stripe `queries` against stripe `keys`, both traced.  given: of the whole row, in the order of its tokens."""
    moved = (keys > queries).astype(jnp.int32)
    if given is None:
        return _Pair(moved, None, None)
    B, T = given.first_BT.shape
    N = T // stripes

    def of_stripe(x_BT, stripe):
        return lax.dynamic_index_in_dim(x_BT.reshape(B, N, stripes), stripe, axis=2, keepdims=False)

    def first_at_or_after(token_BN, stripe):
        """Index within `stripe` of its first token that is not before `token_BN` of the row."""
        return lax.div(token_BN - stripe + (stripes - 1), jnp.int32(stripes))

    first_BN = first_at_or_after(of_stripe(given.first_BT, queries), keys)
    end_BN = first_at_or_after(of_stripe(given.end_BT, keys), queries) - moved
    first_BN = _Pair(moved, None, None).up(first_BN, fill=N)
    index_N = jnp.arange(N, dtype=jnp.int32)
    # A document that begins between key i and query i hides both from all; kernels want each to see the other.
    seen = Ranges(jnp.minimum(first_BN, index_N), jnp.maximum(end_BN, index_N + 1))
    return _Pair(moved, seen, first_BN > index_N)


def forward(
    kernel: Callable, q_BNHK: jax.Array, k_BNGK: jax.Array, v_BNGK: jax.Array, ranges: Ranges | None, context: Context
) -> tuple[jax.Array, jax.Array]:
    """This place's share of the result [B, N, H, K] and of its log-sum-exp float32 [B, H, N], of N = T/C tokens.

    kernel(q, k, v, ranges) -> (o, lse) is causal attention over N tokens; ranges: of the whole row.
    """
    mine = lax.axis_index(context.axis)
    theirs = (jnp.arange(context.stripes), *lax.all_gather((k_BNGK, v_BNGK), context.axis))
    B, N, H, _ = q_BNHK.shape

    def add(total, stripe):
        (o_BNHK, lse_BHN), (keys, k_BNGK, v_BNGK) = total, stripe
        pair = _pair(mine, keys, context.stripes, ranges)
        part_BNHK, part_BHN = kernel(pair.up(q_BNHK), k_BNGK, v_BNGK, pair.ranges)
        part_BNHK, part_BHN = pair.down(part_BNHK), pair.down(pair.seen(part_BHN, FLOOR), axis=2, fill=FLOOR)
        both_BHN = jnp.logaddexp(lse_BHN, part_BHN)
        share, other = (jnp.exp(x - both_BHN).transpose(0, 2, 1)[..., None] for x in (lse_BHN, part_BHN))
        return (o_BNHK * share + part_BNHK.astype(jnp.float32) * other, both_BHN), None

    nothing = jnp.zeros(q_BNHK.shape, jnp.float32), jnp.full((B, H, N), FLOOR, jnp.float32)
    (o_BNHK, lse_BHN), _ = lax.scan(add, nothing, theirs)
    return o_BNHK.astype(q_BNHK.dtype), lse_BHN


def backward(
    kernel: Callable,
    q_BNHK: jax.Array,
    k_BNGK: jax.Array,
    v_BNGK: jax.Array,
    do_BNHK: jax.Array,
    lse_BHN: jax.Array,
    delta_BHN: jax.Array,
    ranges: Ranges | None,
    context: Context,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This place's share of dq, dk and dv.  kernel(q, k, v, do, lse, delta, ranges) -> (dq, dk, dv) over N tokens."""
    mine = lax.axis_index(context.axis)
    theirs = (jnp.arange(context.stripes), *lax.all_gather((k_BNGK, v_BNGK), context.axis))

    def add(dq_BNHK, stripe):
        keys, k_BNGK, v_BNGK = stripe
        pair = _pair(mine, keys, context.stripes, ranges)
        part_BNHK, dk_BNGK, dv_BNGK = kernel(
            pair.up(q_BNHK),
            k_BNGK,
            v_BNGK,
            pair.up(do_BNHK),
            pair.seen(pair.up(lse_BHN, axis=2, fill=CEILING), CEILING),
            pair.up(delta_BHN, axis=2),
            pair.ranges,
        )
        return dq_BNHK + pair.down(part_BNHK).astype(jnp.float32), (dk_BNGK, dv_BNGK)

    dq_BNHK, by_stripe = lax.scan(add, jnp.zeros(q_BNHK.shape, jnp.float32), theirs)
    # Each place has a part of every key's gradient; their sum is made in float32, and each place keeps its own keys'.
    dk_BNGK, dv_BNGK = (lax.psum_scatter(x.astype(jnp.float32), context.axis, scatter_dimension=0) for x in by_stripe)
    return dq_BNHK.astype(q_BNHK.dtype), dk_BNGK.astype(k_BNGK.dtype), dv_BNGK.astype(v_BNGK.dtype)
