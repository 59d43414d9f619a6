"""Causal grouped-query attention for NVIDIA GPUs by Pallas' Triton backend: FlashAttention-2 that skips documents.

One program holds a block of queries and walks over the blocks of keys it sees (forward, dq), or holds a block of keys
and walks over the queries that see it, of all heads of its group (dk, dv: written once, no atomics, so two runs agree
to the bit).  The walk has three parts, after documents.py: blocks at the edge of a document, blocks where everything
is visible and no mask is built, blocks at the diagonal.  Scores are exponentiated in base 2, which is what the
hardware does; the running maximum stays in units of the raw product, so that scaling costs one fused multiply-add.

q, k, v and the results are read and written as [B, T, heads, K] by their strides: nothing is transposed or copied.

Sources: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.attention.documents import Ranges, key_blocks

# JAX 0.11 deprecates this backend and says so at every compilation.  It is the only one that serves an A100.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

GRANULE = 64
HEAD_DIMS = (16, 32, 64, 128)  # Triton's arrays have powers of two as sizes
LOG2E = math.log2(math.e)
FLOOR = -1e30  # under every score and finite: a row that has seen nothing yet has this maximum, never inf - inf


class Block(NamedTuple):
    """How one pass is cut: the block a program holds, the block it walks by, warps, stages of the load pipeline."""

    held: int
    walked: int
    warps: int = 4
    stages: int = 3


class Blocks(NamedTuple):
    fwd: Block
    dq: Block
    dkv: Block


BLOCKS = {
    ("sm80", 64): Blocks(Block(64, 64), Block(64, 64), Block(64, 64)),
    ("sm80", 128): Blocks(Block(64, 64), Block(64, 64), Block(64, 64)),
    ("sm90", 64): Blocks(Block(128, 64), Block(64, 64), Block(64, 64)),
    ("sm90", 128): Blocks(Block(128, 64), Block(64, 64), Block(64, 64)),
}


def refuses(*, head_dim: int, dtype, soft_cap: float | None) -> str | None:
    """Why these kernels cannot be run so, as a clause, or None."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is not bfloat16 or float32"
    if soft_cap is not None and not soft_cap > 0:
        return f"soft_cap {soft_cap} is not positive"
    return None


def _blocks(kind: str, head_dim: int, dtype, tokens: int) -> Blocks:
    table = BLOCKS["sm90" if any(name in kind for name in ("H100", "H200")) else "sm80", max(head_dim, 64)]
    # Powers of two: the greatest common divisor is the largest smaller block that divides the row.
    return Blocks(*(b._replace(held=math.gcd(b.held, tokens), walked=math.gcd(b.walked, tokens)) for b in table))


def _dot(a, b, contract: tuple[int, int] = (1, 0)):
    """a b in float32; `contract` are the summed axes.  float32 inputs are multiplied as float32, not as TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _walk(bounds, step, carry, *, edges: bool):
    """step(masked)(j, carry) over the three parts of `bounds` (see documents.py); the first is empty without edges."""
    begin, clear_begin, clear_end, end = bounds
    if edges:
        carry = lax.fori_loop(begin, clear_begin, step(True), carry)
    carry = lax.fori_loop(clear_begin, clear_end, step(False), carry)
    return lax.fori_loop(clear_end, end, step(True), carry)


def _scores(dot, head_dim: int, soft_cap: float | None):
    """(raw, unit): scores are raw * unit, in natural units."""
    scale = 1 / math.sqrt(head_dim)
    return (dot, scale) if soft_cap is None else (jnp.tanh(dot * (scale / soft_cap)), soft_cap)


def attn_fwd(*refs, block: Block, tokens, soft_cap, documents: bool):
    first_ref, (q_ref, k_ref, v_ref, o_ref, lse_ref) = (refs[0], refs[1:]) if documents else (None, refs)
    M, N, K = block.held, block.walked, q_ref.shape[-1]
    i = tokens // M - 1 - pl.program_id(1)  # late queries see most keys: they start first
    rows = pl.ds(i * M, M)
    q_MK = q_ref[...]
    query_M = i * M + jnp.arange(M)
    if documents:
        first_M = first_ref[rows]
        bounds = key_blocks(i, M, N, first_ref[i * M], first_ref[i * M + M - 1])
    else:
        bounds = key_blocks(i, M, N, 0, 0)
    unit = _scores(0.0, K, soft_cap)[1] * LOG2E

    def step(masked):
        def body(j, carry):
            m_M, l_M, o_MK = carry
            keys = pl.ds(j * N, N)
            raw_MN, _ = _scores(_dot(q_MK, k_ref[keys, :], (1, 1)), K, soft_cap)
            if masked:
                key_N = j * N + jnp.arange(N)
                seen_MN = key_N[None, :] <= query_M[:, None]
                if documents:
                    seen_MN &= key_N[None, :] >= first_M[:, None]
                raw_MN = jnp.where(seen_MN, raw_MN, -jnp.inf)
            new_M = jnp.maximum(m_M, jnp.max(raw_MN, axis=1))
            p_MN = jnp.exp2(raw_MN * unit - (new_M * unit)[:, None])
            shrink_M = jnp.exp2((m_M - new_M) * unit)
            l_M = l_M * shrink_M + jnp.sum(p_MN, axis=1)
            v_NK = v_ref[keys, :]
            return new_M, l_M, o_MK * shrink_M[:, None] + _dot(p_MN.astype(v_NK.dtype), v_NK)

        return body

    zeros_M = jnp.zeros((M,), jnp.float32)
    carry = (zeros_M + FLOOR, zeros_M, jnp.zeros((M, K), jnp.float32))
    m_M, l_M, o_MK = _walk(bounds, step, carry, edges=documents)
    o_ref[...] = (o_MK / l_M[:, None]).astype(o_ref.dtype)
    lse_ref[...] = (m_M * unit + jnp.log2(l_M)) / LOG2E


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
    B, T, H, K = q_BTHK.shape
    R = H // k_BTGK.shape[2]
    block = _blocks(kind, K, q_BTHK.dtype, T).fwd
    blocks = T // block.held
    documents = ranges is not None
    queries = pl.BlockSpec((None, block.held, None, K), lambda h, i, b: (b, blocks - 1 - i, h, 0))
    keys = pl.BlockSpec((None, T, None, K), lambda h, i, b: (b, 0, h // R, 0))
    bounds = pl.BlockSpec((None, T), lambda h, i, b: (b, 0))
    return pl.pallas_call(
        functools.partial(attn_fwd, block=block, tokens=T, soft_cap=soft_cap, documents=documents),
        grid=(H, blocks, B),  # the first axis runs fastest: heads that share keys run together
        in_specs=[bounds] * documents + [queries, keys, keys],
        out_specs=[queries, pl.BlockSpec((None, None, block.held), lambda h, i, b: (b, h, blocks - 1 - i))],
        out_shape=[jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        name="attn_fwd",
        interpret=interpret,
    )(*([ranges.first_BT] if documents else []), q_BTHK, k_BTGK, v_BTGK)
