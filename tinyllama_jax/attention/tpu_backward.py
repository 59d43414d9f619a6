"""Causal grouped-query attention for TPUs: the backward pass, in the layout of the forward (tpu.py).

Two kernels, each of which computes the probabilities anew from the saved log-sum-exp: one per block of queries adds up
dq over the keys, one per block of keys adds up dk and dv over the queries of all heads that share them.  What a program
adds up stays in VMEM in float32 and is written once, so that nothing is added twice in another order: two runs give
the same bits.  With P the probabilities and delta = rowsum(o do) - dlse:

    dv = P^T do      dS = P (do v^T - delta) (d capped / d score)      dq = dS k / sqrt(K)      dk = dS^T q / sqrt(K)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tinyllama_jax.attention import tpu_blocks as tb
from tinyllama_jax.attention.documents import Ranges


def backward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    do_BTHK: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    ranges: Ranges | None,
    *,
    kind: str,
    soft_cap: float | None = None,
    interpret=False,
    blocks: tb.Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq [B, T, H, K], dk [B, T, G, K], dv [B, T, G, K]) in the dtypes of q, k, v.

    do: gradient of o; lse: what the forward returned; delta: rowsum(o do) less the gradient of lse, float32.
    The other arguments, and the errors, are the forward's.
    """
    first_B1T = () if ranges is None else (ranges.first_BT[:, None],)
    inputs = [x.transpose(0, 2, 3, 1) for x in (q_BTHK, do_BTHK, k_BTGK, v_BTGK)]
    statistics = (lse_BHT, delta_BHT)
    shared = {"soft_cap": soft_cap, "interpret": interpret}
    chosen = (blocks or tb.blocks_for(name, q_BTHK.shape[3], q_BTHK.dtype, kind) for name in ("dq", "dkv"))
    blocks_dq, blocks_dkv = chosen
    dq_BHKT = _dq(first_B1T, *inputs, *statistics, ranges, blocks_dq, **shared)
    dk_BGKT, dv_BGKT = _dkv(first_B1T, *inputs, *statistics, ranges, blocks_dkv, **shared)
    return tuple(x.transpose(0, 3, 1, 2) for x in (dq_BHKT, dk_BGKT, dv_BGKT))


def _gradients(k_KS, v_KS, q_KN, do_KN, lse_1N, delta_1N, mask_SN, soft_cap) -> tuple[jax.Array, jax.Array]:
    """P and dS of one tile, [S, N] float32; a mask of None hides nothing."""
    s_SN, slope_SN = tb.scores(k_KS, q_KN, soft_cap)
    p_SN = jnp.exp2(s_SN - lse_1N * tb.LOG2_E)
    if mask_SN is not None:
        # Not the scores: a hidden one may lie so far above its row's log-sum-exp that exp2 is infinite.
        p_SN = jnp.where(mask_SN, p_SN, 0.0)
    ds_SN = p_SN * (tb.dot(v_KS, do_KN, tb.OUTER) - delta_1N)
    return p_SN, ds_SN if slope_SN is None else ds_SN * slope_SN


def _dq_kernel(bounds_ref, *refs, loop: tb.KeyLoop, soft_cap: float | None):
    first_ref = refs[0] if loop.documents else None
    q_ref, do_ref, k_ref, v_ref, lse_ref, delta_ref, dq_ref, sum_ref = refs[loop.documents :]
    n, i, step = (pl.program_id(axis) for axis in range(3))
    steps, tiles, whole = pl.num_programs(2), loop.tiles, slice(None)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def tile(j, place, masked: bool):
        k_KS, v_KS = k_ref[0, 0, :, place], v_ref[0, 0, :, place]
        queries = [tb.beside(ref, whole) for ref in (q_ref, do_ref)]
        numbers = [tb.beside_rows(ref, whole) for ref in (lse_ref, delta_ref)]
        mask_SN = tb.visible(first_ref, whole, tiles, i, j) if masked else None
        _, ds_SN = _gradients(k_KS, v_KS, *queries, *numbers, mask_SN, soft_cap)
        sum_ref[...] += tb.dot(k_KS, ds_SN.astype(k_KS.dtype), tb.INNER)

    loop.visits(bounds_ref, n, i, step).each(tile, head=loop.documents)

    @pl.when(step == steps - 1)
    def _():
        dq_KN = sum_ref[...] * (1 / math.sqrt(sum_ref.shape[0]))
        for r in range(tiles.heads):
            dq_ref[0, r] = dq_KN[:, r * tiles.queries : (r + 1) * tiles.queries].astype(dq_ref.dtype)


def _dq(first_B1T, q_BHKT, do_BHKT, k_BGKT, v_BGKT, lse_BHT, delta_BHT, ranges, blocks, *, soft_cap, interpret):
    (B, H, K, T), G = q_BHKT.shape, k_BGKT.shape[1]
    tiles = tb.tiling(blocks, T, H // G, "keys")
    stacks = H // tiles.heads
    loop = tb.KeyLoop(tiles, T, stacks, stacks // G, ranges is not None)
    numbers = [x.reshape(B, stacks, tiles.heads, T) for x in (lse_BHT, delta_BHT)]
    return pl.pallas_call(
        functools.partial(_dq_kernel, loop=loop, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=loop.grid(B),
            in_specs=[loop.first()] * len(first_B1T)
            + [loop.queries(K), loop.queries(K), loop.keys(K), loop.keys(K), loop.numbers(), loop.numbers()],
            out_specs=loop.queries(K),
            scratch_shapes=[pltpu.VMEM((K, tiles.heads * tiles.queries), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BHKT.shape, q_BHKT.dtype),
        compiler_params=tb.compiler_params(2, 1),
        interpret=interpret,
        name="attn_dq",
    )(tb.bounds(tiles, ranges, T, "keys"), *first_B1T, q_BHKT, do_BHKT, k_BGKT, v_BGKT, *numbers)


class QueryLoop(NamedTuple):
    """The grid of dkv, (rows and key/value heads, key blocks, stacks of query heads, pieces of queries)."""

    tiles: tb.Tiling
    tokens: int  # T
    heads: int  # key/value heads
    stacks: int  # of query heads that read the same key/value head
    documents: bool

    def grid(self, batch: int) -> tuple[int, int, int, int]:
        return batch * self.heads, self.tokens // self.tiles.keys, self.stacks, self.tokens // self.tiles.fetch

    def place(self, n):
        """Row of the batch and key/value head."""
        return lax.div(n, jnp.int32(self.heads)), lax.rem(n, jnp.int32(self.heads))

    def visits(self, bounds_ref, n, j, step) -> tb.Visits:
        row = self.place(n)[0] if self.documents else 0
        block = row * (self.tokens // self.tiles.keys) + j
        return tb.Visits(bounds_ref, block, step, self.tiles.queries, self.tiles.fetch)

    def keys(self, head_dim: int) -> pl.BlockSpec:  # of [B, G, K, T]
        return pl.BlockSpec((1, 1, head_dim, self.tiles.keys), lambda n, j, stack, step, _: (*self.place(n), 0, j))

    def _of_stack(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(n, j, stack, step, bounds_ref):
            row, head = self.place(n)
            return row, head * self.stacks + stack, 0, self.visits(bounds_ref, n, j, step).piece

        return pl.BlockSpec(shape, index)

    def queries(self, head_dim: int) -> pl.BlockSpec:  # of [B, H, K, T]
        return self._of_stack((1, self.tiles.heads, head_dim, self.tiles.fetch))

    def numbers(self) -> pl.BlockSpec:  # one per query: of [B, all stacks, R, T]
        return self._of_stack((1, 1, self.tiles.heads, self.tiles.fetch))

    def first(self) -> pl.BlockSpec:  # of [B, 1, T]
        def index(n, j, stack, step, bounds_ref):
            return self.place(n)[0], 0, self.visits(bounds_ref, n, j, step).piece

        return pl.BlockSpec((1, 1, self.tiles.fetch), index)


def _dkv_kernel(bounds_ref, *refs, loop: QueryLoop, soft_cap: float | None):
    first_ref = refs[0] if loop.documents else None
    q_ref, do_ref, k_ref, v_ref, lse_ref, delta_ref, dk_ref, dv_ref, sum_k_ref, sum_v_ref = refs[loop.documents :]
    n, j, stack, step = (pl.program_id(axis) for axis in range(4))
    stacks, steps = pl.num_programs(2), pl.num_programs(3)

    @pl.when((stack == 0) & (step == 0))
    def _():
        sum_k_ref[...] = jnp.zeros_like(sum_k_ref)
        sum_v_ref[...] = jnp.zeros_like(sum_v_ref)

    def tile(i, place, masked: bool):
        q_KN, do_KN = (tb.beside(ref, place) for ref in (q_ref, do_ref))
        numbers = [tb.beside_rows(ref, place) for ref in (lse_ref, delta_ref)]
        mask_SN = tb.visible(first_ref, place, loop.tiles, i, j) if masked else None
        p_SN, ds_SN = _gradients(k_ref[0, 0], v_ref[0, 0], q_KN, do_KN, *numbers, mask_SN, soft_cap)
        # One contraction over the queries of all stacked heads adds the heads up.
        sum_v_ref[...] += tb.dot(p_SN.astype(do_KN.dtype), do_KN, tb.ROWS)
        sum_k_ref[...] += tb.dot(ds_SN.astype(q_KN.dtype), q_KN, tb.ROWS)

    loop.visits(bounds_ref, n, j, step).each(tile, tail=loop.documents)

    @pl.when((stack == stacks - 1) & (step == steps - 1))
    def _():
        dk_ref[0, 0] = (sum_k_ref[...] * (1 / math.sqrt(sum_k_ref.shape[1]))).T.astype(dk_ref.dtype)
        dv_ref[0, 0] = sum_v_ref[...].T.astype(dv_ref.dtype)


def _dkv(first_B1T, q_BHKT, do_BHKT, k_BGKT, v_BGKT, lse_BHT, delta_BHT, ranges, blocks, *, soft_cap, interpret):
    (B, H, K, T), G = q_BHKT.shape, k_BGKT.shape[1]
    tiles = tb.tiling(blocks, T, H // G, "queries")
    loop = QueryLoop(tiles, T, G, H // G // tiles.heads, ranges is not None)
    numbers = [x.reshape(B, H // tiles.heads, tiles.heads, T) for x in (lse_BHT, delta_BHT)]
    return pl.pallas_call(
        functools.partial(_dkv_kernel, loop=loop, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=loop.grid(B),
            in_specs=[loop.first()] * len(first_B1T)
            + [loop.queries(K), loop.queries(K), loop.keys(K), loop.keys(K), loop.numbers(), loop.numbers()],
            out_specs=[loop.keys(K), loop.keys(K)],
            scratch_shapes=[pltpu.VMEM((tiles.keys, K), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BGKT, v_BGKT)],
        compiler_params=tb.compiler_params(2, 2),
        interpret=interpret,
        name="attn_dkv",
    )(tb.bounds(tiles, ranges, T, "queries"), *first_B1T, q_BHKT, do_BHKT, k_BGKT, v_BGKT, *numbers)
