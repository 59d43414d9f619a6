"""Causal grouped-query attention for TPUs (v4, v5e, v5p, v6e), written in Pallas for Mosaic: the forward pass.

The sequence lies along the lanes: q, k, v, o are [B, heads, K, T] in memory, because with K = 64 as the last axis half
of the 128 lanes would hold nothing, in HBM and in VMEM.  The transposes to and from [B, T, heads, K] at the border are
XLA's, which may fold them into the projections before and after.  A tile computes S^T = K Q^T: the softmax reduces over
sublanes, which is elementwise maxima and sums of registers, and a query's statistics are a row of lanes, in HBM too.

One program takes one block of queries for all query heads of a key/value head that fit side by side (tpu_blocks.py).
Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), with tiles that documents hide left out.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tinyllama_jax.attention import tpu_blocks as tb
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.tpu_backward import backward
from tinyllama_jax.attention.tpu_blocks import GRANULE

__all__ = ["GRANULE", "backward", "forward", "refuses"]

HEAD_DIMS = (64, 128)


def refuses(*, head_dim: int, dtype, soft_cap: float | None) -> str | None:
    """None, or one clause saying why these kernels cannot run it."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"dtype {jnp.dtype(dtype).name} is not one of bfloat16, float32"
    if soft_cap is not None and not soft_cap > 0:
        return f"soft_cap {soft_cap} is not positive"
    return None


def _forward(bounds_ref, *refs, loop: tb.KeyLoop, soft_cap: float | None):
    first_ref = refs[0] if loop.documents else None
    q_ref, k_ref, v_ref, o_ref, lse_ref, max_ref, sum_ref, out_ref = refs[loop.documents :]
    n, i, step = (pl.program_id(axis) for axis in range(3))
    steps, tiles = pl.num_programs(2), loop.tiles

    @pl.when(step == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, tb.HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    def tile(j, place, masked: bool):
        s_SN, _ = tb.scores(k_ref[0, 0, :, place], tb.beside(q_ref, slice(None)), soft_cap)
        if masked:
            # A query that sees nothing in its first tiles sums up exp2(HIDDEN - HIDDEN) = 1 there; its first visible
            # key multiplies that by exp2(HIDDEN - s) = 0.
            s_SN = jnp.where(tb.visible(first_ref, slice(None), tiles, i, j), s_SN, tb.HIDDEN)
        old_1N = max_ref[...]
        new_1N = jnp.maximum(old_1N, jnp.max(s_SN, axis=0, keepdims=True))
        shrink_1N = jnp.exp2(old_1N - new_1N)
        p_SN = jnp.exp2(s_SN - new_1N)
        max_ref[...] = new_1N
        sum_ref[...] = sum_ref[...] * shrink_1N + jnp.sum(p_SN, axis=0, keepdims=True)
        out_ref[...] = out_ref[...] * shrink_1N + tb.dot(v_ref[0, 0, :, place], p_SN.astype(v_ref.dtype), tb.INNER)

    loop.visits(bounds_ref, n, i, step).each(tile, head=loop.documents)

    @pl.when(step == steps - 1)
    def _():
        out_KN = out_ref[...] * (1 / sum_ref[...])
        lse_1N = max_ref[...] * math.log(2) + jnp.log(sum_ref[...])
        for r in range(tiles.heads):
            head = slice(r * tiles.queries, (r + 1) * tiles.queries)
            o_ref[0, r] = out_KN[:, head].astype(o_ref.dtype)
            lse_ref[0, 0, pl.ds(r, 1)] = lse_1N[:, head]


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    ranges: Ranges | None,
    *,
    kind: str,
    soft_cap: float | None = None,
    interpret=False,
    blocks: tb.Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, T, H, K] in q's dtype, log-sum-exp of the scaled scores [B, H, T] float32, natural logarithm).

    Query t sees keys ranges.first_BT[t] .. t, or 0 .. t where `ranges` is None; query head h reads key/value head
    h // (H/G).  kind: the device's kind, which chooses the blocks unless `blocks` gives them.  interpret: as in
    pallas_call.  Raises ValueError if T is not a multiple of GRANULE.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BTGK.shape[2]
    tiles = tb.tiling(blocks or tb.blocks_for("forward", K, q_BTHK.dtype, kind), T, H // G, "keys")
    stacks, lanes = H // tiles.heads, tiles.heads * tiles.queries
    loop = tb.KeyLoop(tiles, T, stacks, stacks // G, ranges is not None)
    arrays = [x.transpose(0, 2, 3, 1) for x in (q_BTHK, k_BTGK, v_BTGK)]
    specs = [loop.queries(K), loop.keys(K), loop.keys(K)]
    if ranges is not None:
        arrays, specs = [ranges.first_BT[:, None], *arrays], [loop.first(), *specs]
    o_BHKT, lse_BCRT = pl.pallas_call(
        functools.partial(_forward, loop=loop, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=loop.grid(B),
            in_specs=specs,
            out_specs=[loop.queries(K), loop.numbers()],
            scratch_shapes=[pltpu.VMEM((n, lanes), jnp.float32) for n in (1, 1, K)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, K, T), q_BTHK.dtype),
            jax.ShapeDtypeStruct((B, stacks, tiles.heads, T), jnp.float32),
        ],
        compiler_params=tb.compiler_params(2, 1),
        interpret=interpret,
        name="attn_fwd",
    )(tb.bounds(tiles, ranges, T, "keys"), *arrays)
    return o_BHKT.transpose(0, 3, 1, 2), lse_BCRT.reshape(B, H, T)
