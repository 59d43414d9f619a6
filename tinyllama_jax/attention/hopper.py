"""FlashAttention-3 for Hopper GPUs in Pallas Mosaic: causal, grouped-query, and blocks of other documents are skipped.

A thread block does two blocks of 128 queries of one head.  Two warpgroups compute, 64 queries each; a third one copies
tiles of keys and values into a ring in shared memory.  While one warpgroup is at its softmax the other one has the
tensor cores, and inside a warpgroup the product with the values of one tile runs under the softmax of the next (Shah et
al. 2024, arXiv:2407.08608, sections 3.1 and 3.2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tinyllama_jax.attention import hopper_backward
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.hopper_tiles import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    GRANULE,
    LN2,
    LOG2E,
    PER_ROW,
    PRODUCER_REGISTERS,
    ROWS,
    TILES,
    QueryPairs,
    filled,
    inside,
    interpreter,
    multiply,
    operand,
    per_row,
    positions,
    product,
    staged,
    tiles,
)

__all__ = ["GRANULE", "backward", "forward", "refuses"]

# Where the running maximum starts: finite, because -inf - -inf in a block that hides everything from a row is NaN.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


def refuses(*, head_dim: int, dtype, soft_cap: float | None) -> str | None:
    """None, or one clause that says why these kernels cannot compute this."""
    if jax.__version_info__ < (0, 11):
        return f"the Hopper kernel needs jax 0.11 or newer; this is {jax.__version__}"
    if head_dim not in TILES:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, TILES))}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"{jnp.dtype(dtype).name} is not bfloat16 or float16"
    if soft_cap is not None:
        return "the Hopper kernel has no soft cap"
    return None


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    ranges: Ranges | None,
    *,
    kind: str,
    soft_cap: float | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHK in q's dtype and lse_BHT, float32, the natural logarithm of the sum over exp(q.k / sqrt(K)).

    T is a multiple of GRANULE.  kind: the device_kind of the GPU.  interpret: True, or parameters of JAX's interpreter
    for Mosaic kernels, whose results are to be waited for: with 32 operations queued behind them it cannot go on.
    Raises ConfigError for a GPU that is not a Hopper.
    """
    assert refuses(head_dim=q_BTHK.shape[3], dtype=q_BTHK.dtype, soft_cap=soft_cap) is None
    assert q_BTHK.shape[1] % GRANULE == 0, q_BTHK.shape
    (B, T, H, K), G, dtype = q_BTHK.shape, k_BTGK.shape[2], q_BTHK.dtype
    block, _, _, stages = tiles(kind, K)
    scale2 = LOG2E / math.sqrt(K)  # to base 2, in float32: exp2 is what the hardware has
    score = (ROWS, block)

    def kernel(q_ref, k_ref, v_ref, *refs):
        first_ref = refs[0] if ranges is not None else None
        o_ref, lse_ref, qo_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn, *staging = (
            refs if ranges is None else refs[1:]
        )
        b, h, wg = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        pairs = QueryPairs(T, block, first_ref)

        @pl.when(wg == CONSUMERS)
        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def copy(keys, slot):
                tile = (b, keys, lax.div(h, jnp.int32(H // G)))
                plgpu.copy_gmem_to_smem(k_ref.at[tile], k_smem.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[tile], v_smem.at[slot], v_full.at[slot])

            pairs.stream(stages, copy, k_free, v_free)

        @pl.when(wg < CONSUMERS)
        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            left = staging[0].at[wg] if staging else None

            def copy_queries(n, _):
                rows = pl.ds(pairs.query_block(n) * GRANULE + wg * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], qo_smem.at[n, wg], q_full.at[n * CONSUMERS + wg])

            lax.fori_loop(0, pairs.count(), copy_queries, None)

            def take_turn():
                plgpu.barrier_wait(turn.at[wg])

            def give_turn():
                plgpu.barrier_arrive(turn.at[1 - wg])

            def attend(n, steps):
                """Query block n of the pair; `steps` tiles of keys came before."""
                q_smem, row = qo_smem.at[n, wg], pairs.query_block(n) * GRANULE + wg * ROWS
                begin, clear_begin, clear_end, end = pairs.visited(n)
                document = () if first_ref is None else ("document",)  # what bounds a row, beside the diagonal
                if document:
                    first = plgpu.load(first_ref.at[b, pl.ds(row, ROWS)], layout=PER_ROW, optimized=False)

                base = steps - begin

                def slot_of(j):
                    return lax.rem(base + j, jnp.int32(stages))

                def softmax(s, j, m, total, bounds):
                    """p of one block, the factor by which older results shrink, and the new maximum and sum."""
                    if bounds:
                        low = first - j * block if "document" in bounds else None
                        past = positions() + (row + 1 - j * block) if "diagonal" in bounds else None
                        s = jnp.where(inside(score, low, past), s, -jnp.inf)
                    new_m = jnp.maximum(m, s.max(axis=1) * scale2)
                    shrink = jnp.exp2(m - new_m)
                    p = jnp.exp2(s * scale2 - per_row(new_m, score))
                    return p, shrink, new_m, total * shrink + p.sum(axis=1)

                def first_block():
                    slot = slot_of(begin)
                    plgpu.barrier_wait(k_full.at[slot])
                    take_turn()
                    s = product(q_smem, k_smem.at[slot].transpose((1, 0)))
                    give_turn()
                    plgpu.barrier_arrive(k_free.at[slot])
                    none = filled((ROWS,), LOWEST), filled((ROWS,), 0.0)
                    p, _, m, total = softmax(s, begin, *none, (*document, "diagonal"))
                    plgpu.barrier_wait(v_full.at[slot])
                    return filled((ROWS, K), 0.0), p.astype(dtype), filled((ROWS,), 0.0), m, total

                def next_block(j, carry, bounds):
                    """Scores of block j, and meanwhile the values of block j - 1."""
                    acc, p, shrink, m, total = carry
                    slot, before = slot_of(j), slot_of(j - 1)
                    plgpu.barrier_wait(k_full.at[slot])
                    take_turn()

                    def compute(s_acc, o_acc):
                        plgpu.wgmma(s_acc, q_smem, k_smem.at[slot].transpose((1, 0)))
                        multiply(o_acc, p, v_smem.at[before], left)
                        give_turn()
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[slot])
                        new_p, *new = softmax(s, j, m, total, bounds)
                        # The assembler would move the wait for the values up, before the exponentials that it is to
                        # run beside; it does not move them over the branch of a barrier, and this one is needed anyway.
                        new_p, *new = lax.optimization_barrier((new_p, *new))
                        plgpu.barrier_wait(v_full.at[slot])
                        o = o_acc[...]
                        plgpu.barrier_arrive(v_free.at[before])
                        return acc * per_row(shrink, acc.shape) + o, new_p.astype(dtype), *new

                    return pl.run_scoped(compute, plgpu.ACC(score), plgpu.ACC((ROWS, K)))

                def last_values(acc, p, shrink):
                    slot = slot_of(end - 1)

                    def compute(o_acc):
                        multiply(o_acc, p, v_smem.at[slot], left)
                        o = o_acc[...]
                        plgpu.barrier_arrive(v_free.at[slot])
                        return o

                    return acc * per_row(shrink, acc.shape) + pl.run_scoped(compute, plgpu.ACC((ROWS, K)))

                plgpu.barrier_wait(q_full.at[n * CONSUMERS + wg])
                carry = first_block()
                start = begin + 1
                clear_start = jnp.maximum(clear_begin, start)
                diagonal = jnp.maximum(clear_end, clear_start)

                def visit(*bounds):
                    return lambda j, carry: next_block(j, carry, bounds)

                if document:
                    carry = lax.fori_loop(start, clear_start, visit(*document), carry)
                carry = lax.fori_loop(clear_start, diagonal, visit(), carry)
                acc, p, shrink, m, total = lax.fori_loop(diagonal, end, visit(*document, "diagonal"), carry)
                acc = last_values(acc, p, shrink)

                q_smem[...] = (acc * per_row(1.0 / total, acc.shape)).astype(dtype)
                lse_smem.at[n, wg][...] = (m + jnp.log2(total)) * LN2
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem, o_ref.at[b, pl.ds(row, ROWS), h])
                plgpu.copy_smem_to_gmem(lse_smem.at[n, wg], lse_ref.at[b, h, pl.ds(row, ROWS)])
                return base + end

            pl.when(wg == 1)(give_turn)
            lax.fori_loop(0, pairs.count(), attend, jnp.int32(0))
            pl.when(wg == 0)(take_turn)  # the other one's last
            plgpu.wait_smem_to_gmem(0)

    ring = plgpu.Barrier(num_barriers=stages)
    freed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(q_BTHK.shape, dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        scratch_types=[
            operand((2, CONSUMERS, ROWS, K), dtype),
            operand((stages, block, K), dtype),
            operand((stages, block, K), dtype),
            plgpu.SMEM((2, CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2 * CONSUMERS),
            ring,
            ring,
            freed,
            freed,
            plgpu.Barrier(num_barriers=CONSUMERS),
            *staged(interpret, score, dtype),
        ],
        grid=(QueryPairs.number(T), B, H),
        grid_names=("pair", "batch", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attn_fwd",
        interpret=interpreter(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q_BTHK, k_BTGK, v_BTGK, *(() if ranges is None else (ranges.first_BT,)))


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq_BTHK, dk_BTGK and dv_BTGK in the dtypes of q, k and v; delta = sum(o * do) - dlse per query, in float32.

    The other arguments and what is raised are those of `forward`.
    """
    assert refuses(head_dim=q_BTHK.shape[3], dtype=q_BTHK.dtype, soft_cap=soft_cap) is None
    assert q_BTHK.shape[1] % GRANULE == 0, q_BTHK.shape
    given = (q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges)
    dq_BTHK = hopper_backward.dq(*given, kind=kind, interpret=interpret)
    return dq_BTHK, *hopper_backward.dkv(*given, kind=kind, interpret=interpret)
