"""Gradients of the Hopper kernels: one pass for the queries, one for keys and values.

Both compute the probabilities again from the scores and the saved logarithm of their sum, P = exp(S - lse), and
dS = P (dP - delta) with dP = dO V^T (Dao 2023, arXiv:2307.08691, section 3.1.2).  Two passes cost two products more
than a fused one; in return nothing is added up in memory, and two runs agree to the bit.

The last products of a tile, whose left operand is P or dS in registers, are begun together with the first products of
the next tile and run while that one's exponentials are taken.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tinyllama_jax.attention.documents import Ranges, query_blocks
from tinyllama_jax.attention.hopper_tiles import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    GRANULE,
    LOG2E,
    PER_COLUMN,
    PER_ROW,
    PRODUCER_REGISTERS,
    ROWS,
    QueryPairs,
    fill_ring,
    inside,
    interpreter,
    multiply,
    operand,
    per_column,
    per_row,
    positions,
    staged,
    tiles,
)


def dq(
    q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges: Ranges | None, *, kind: str, interpret
) -> jax.Array:
    """The gradient of q, [B, T, H, K]: a thread block does two blocks of 128 queries of one head."""
    (B, T, H, K), G, dtype = q_BTHK.shape, k_BTGK.shape[2], q_BTHK.dtype
    block, stages = tiles(kind, K).dq, tiles(kind, K).stages
    scale = 1 / math.sqrt(K)
    score = (ROWS, block)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        first_ref = refs[0] if ranges is not None else None
        dq_ref, q_smem4, do_smem4, k_smem, v_smem, own, *refs = refs if ranges is None else refs[1:]
        k_full, v_full, free, *staging = refs
        b, h, wg = place = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        pairs = QueryPairs(T, block, first_ref)

        @pl.when(wg == CONSUMERS)
        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def copy(keys, slot):
                tile = (b, keys, lax.div(h, jnp.int32(H // G)))
                plgpu.copy_gmem_to_smem(k_ref.at[tile], k_smem.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[tile], v_smem.at[slot], v_full.at[slot])

            pairs.stream(stages, copy, free)

        @pl.when(wg < CONSUMERS)
        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            left = staging[0].at[wg] if staging else None

            def copy_queries(n, _):
                rows = pl.ds(pairs.query_block(n) * GRANULE + wg * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem4.at[n, wg], own.at[n * CONSUMERS + wg])
                plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_smem4.at[n, wg], own.at[n * CONSUMERS + wg])

            lax.fori_loop(0, pairs.count(), copy_queries, None)

            def differentiate(n, steps):
                """Query block n of the pair; `steps` tiles of keys came before."""
                # Hidden from the compiler, which would work out every address once and keep it in registers throughout.
                b, h, wg = lax.optimization_barrier(place)
                q_smem, do_smem = q_smem4.at[n, wg], do_smem4.at[n, wg]
                row = pairs.query_block(n) * GRANULE + wg * ROWS
                begin, clear_begin, clear_end, end = pairs.visited(n)
                lse2 = plgpu.load(lse_ref.at[b, h, pl.ds(row, ROWS)], layout=PER_ROW, optimized=False) * LOG2E
                delta = plgpu.load(delta_ref.at[b, h, pl.ds(row, ROWS)], layout=PER_ROW, optimized=False)
                if first_ref is not None:
                    first = plgpu.load(first_ref.at[b, pl.ds(row, ROWS)], layout=PER_ROW, optimized=False)

                base = steps - begin

                def slot_of(j):
                    return lax.rem(base + j, jnp.int32(stages))

                def gradient_of_scores(j, bounds, dq_acc, older_ds):
                    """dS of block j; meanwhile dQ of block j - 1, if there is one."""
                    slot, before = slot_of(j), slot_of(j - 1)
                    older = 0 if older_ds is None else 1

                    plgpu.barrier_wait(v_full.at[slot])

                    def compute(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, q_smem, k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_acc, do_smem, v_smem.at[slot].transpose((1, 0)))
                        if older:
                            multiply(dq_acc, older_ds, k_smem.at[before], left)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1 + older)
                        p = jnp.exp2(s * (scale * LOG2E) - per_row(lse2, score))
                        if bounds:
                            low = first - j * block if "document" in bounds else None
                            past = positions() + (row + 1 - j * block) if "diagonal" in bounds else None
                            p = jnp.where(inside(score, low, past), p, 0.0)
                        # As in the forward pass: only a branch keeps all this in front of the wait for dP or dQ.
                        p = lax.optimization_barrier(p)
                        pl.when(j + 1 < end)(lambda: plgpu.barrier_wait(k_full.at[slot_of(j + 1)]))
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=older)
                        ds = p * (dp - per_row(delta, score))
                        if older:
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(free.at[before])
                        return ds.astype(dtype)

                    return pl.run_scoped(compute, plgpu.ACC(score), plgpu.ACC(score))

                def accumulate(dq_acc):
                    plgpu.barrier_wait(k_full.at[slot_of(begin)])
                    document = () if first_ref is None else ("document",)
                    ds = gradient_of_scores(begin, (*document, "diagonal"), dq_acc, None)
                    start = begin + 1
                    clear_start = jnp.maximum(clear_begin, start)
                    diagonal = jnp.maximum(clear_end, clear_start)

                    def visit(*bounds):
                        return lambda j, ds: gradient_of_scores(j, bounds, dq_acc, ds)

                    if document:
                        ds = lax.fori_loop(start, clear_start, visit(*document), ds)
                    ds = lax.fori_loop(clear_start, diagonal, visit(), ds)
                    ds = lax.fori_loop(diagonal, end, visit(*document, "diagonal"), ds)
                    slot = slot_of(end - 1)
                    multiply(dq_acc, ds, k_smem.at[slot], left)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return dq_acc[...]

                plgpu.barrier_wait(own.at[n * CONSUMERS + wg])
                q_smem[...] = (pl.run_scoped(accumulate, plgpu.ACC((ROWS, K))) * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[b, pl.ds(row, ROWS), h])
                return base + end

            lax.fori_loop(0, pairs.count(), differentiate, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_BTHK.shape, dtype),
        scratch_types=[
            operand((2, CONSUMERS, ROWS, K), dtype),
            operand((2, CONSUMERS, ROWS, K), dtype),
            operand((stages, block, K), dtype),
            operand((stages, block, K), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * CONSUMERS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            *staged(interpret, score, dtype),
        ],
        grid=(QueryPairs.number(T), B, H),
        grid_names=("pair", "batch", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attn_dq",
        interpret=interpreter(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, *(() if ranges is None else (ranges.first_BT,)))


def dkv(
    q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges: Ranges | None, *, kind: str, interpret
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v, [B, T, G, K]: a thread block owns 128 keys and streams the queries of all its heads.

    Scores are computed with keys in rows, S^T = K Q^T: so P^T and dS^T lie in registers as dV += P^T dO and
    dK += dS^T Q want them, and what belongs to a query (lse, delta) comes per column.
    """
    (B, T, H, K), G, dtype = q_BTHK.shape, k_BTGK.shape[2], q_BTHK.dtype
    block, stages, R = tiles(kind, K).dkv, tiles(kind, K).stages, H // G
    scale = 1 / math.sqrt(K)
    score = (ROWS, block)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        end_ref = refs[0] if ranges is not None else None
        dk_ref, dv_ref, k_smem2, v_smem2, q_smem, do_smem, *refs = refs if ranges is None else refs[1:]
        lse_smem, delta_smem, own, full, free, *staging = refs
        wg = lax.axis_index("warpgroup")

        def place():
            """Row, head of keys and block of this thread block, and the blocks it is visited by."""
            b, g, j = (lax.axis_index(axis) for axis in ("batch", "group", "block"))
            top, bottom = j * GRANULE, j * GRANULE + GRANULE - 1
            ends = (T, T) if end_ref is None else (end_ref[b, top], end_ref[b, bottom])
            return b, g, j, query_blocks(j, GRANULE, block, *map(jnp.int32, ends))

        @pl.when(wg == CONSUMERS)
        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            b, g, _, (begin, _, _, end) = place()

            def copy(queries, slot):
                h, i = queries
                rows = pl.ds(i * block, block)
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_smem.at[slot], full.at[slot])
                over = i + 1 == end
                return jnp.where(over, h + 1, h), jnp.where(over, begin, i + 1)

            fill_ring(R * (end - begin), stages, (g * R, begin), copy, free)

        @pl.when(wg < CONSUMERS)
        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            b, g, j, (begin, clear_begin, clear_end, end) = place()
            count = end - begin
            row = j * GRANULE + wg * ROWS
            k_smem, v_smem = k_smem2.at[wg], v_smem2.at[wg]
            left_p, left_ds = (s.at[wg] for s in staging) if staging else (None, None)
            plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(row, ROWS), g], k_smem, own.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[b, pl.ds(row, ROWS), g], v_smem, own.at[wg])
            if end_ref is not None:
                past_last = plgpu.load(end_ref.at[b, pl.ds(row, ROWS)], layout=PER_ROW, optimized=False)
            plgpu.barrier_wait(own.at[wg])

            def tile(r, i, bounds, dk_acc, dv_acc, older_ds):
                """dV and dS^T of queries i of head r; meanwhile dK of the tile before, if there is one."""
                step = r * count + i - begin
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])

                def compute(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, k_smem, q_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, v_smem, do_smem.at[slot].transpose((1, 0)))
                    older = 0 if older_ds is None else 1
                    if older:
                        before = lax.rem(step - 1, jnp.int32(stages))
                        multiply(dk_acc, older_ds, q_smem.at[before], left_ds)
                    lse2 = plgpu.load(lse_smem.at[slot], layout=PER_COLUMN) * LOG2E
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1 + older)
                    p = jnp.exp2(s * (scale * LOG2E) - per_column(lse2, score))
                    if bounds:
                        low = positions() + (row - i * block) if "diagonal" in bounds else None
                        past = past_last - i * block if "document" in bounds else None
                        p = jnp.where(inside(score, low, past), p, 0.0)
                    multiply(dv_acc, p.astype(dtype), do_smem.at[slot], left_p)
                    delta = plgpu.load(delta_smem.at[slot], layout=PER_COLUMN)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1 + older)
                    ds = p * (dp - per_column(delta, score))
                    plgpu.wgmma_wait(0)
                    if older:
                        plgpu.barrier_arrive(free.at[before])
                    return ds.astype(dtype)

                return pl.run_scoped(compute, plgpu.ACC(score), plgpu.ACC(score))

            def accumulate(dk_acc, dv_acc):
                def queries(r, start, ds):
                    clear_start = jnp.maximum(clear_begin, start)
                    clear_stop = jnp.maximum(clear_end, clear_start)

                    def visit(*bounds):
                        return lambda i, ds: tile(r, i, bounds, dk_acc, dv_acc, ds)

                    ds = lax.fori_loop(start, clear_start, visit("diagonal", *document), ds)
                    ds = lax.fori_loop(clear_start, clear_stop, visit(), ds)
                    if document:
                        ds = lax.fori_loop(clear_stop, end, visit(*document), ds)
                    return ds

                document = () if end_ref is None else ("document",)
                ds = tile(0, begin, ("diagonal", *document), dk_acc, dv_acc, None)
                ds = lax.fori_loop(0, R, lambda r, ds: queries(r, begin + jnp.where(r == 0, 1, 0), ds), ds)
                slot = lax.rem(R * count - 1, jnp.int32(stages))
                multiply(dk_acc, ds, q_smem.at[slot], left_ds)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(accumulate, plgpu.ACC((ROWS, K)), plgpu.ACC((ROWS, K)))
            k_smem[...] = (dk * scale).astype(dtype)
            v_smem[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[b, pl.ds(row, ROWS), g])
            plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[b, pl.ds(row, ROWS), g])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(k_BTGK.shape, dtype)] * 2,
        scratch_types=[
            operand((CONSUMERS, ROWS, K), dtype, block),
            operand((CONSUMERS, ROWS, K), dtype, block),
            operand((stages, block, K), dtype, block),
            operand((stages, block, K), dtype, block),
            plgpu.SMEM((stages, block), jnp.float32),
            plgpu.SMEM((stages, block), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            *(staged(interpret, score, dtype) * 2),
        ],
        grid=(T // GRANULE, B, G),
        grid_names=("block", "batch", "group"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attn_dkv",
        interpret=interpreter(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, *(() if ranges is None else (ranges.end_BT,)))
