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
import struct
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.attention.documents import Ranges, key_blocks, query_blocks

# JAX 0.11 deprecates this backend and says so at every compilation.  It is the only one that serves an A100.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

GRANULE = 64
HEAD_DIMS = (16, 32, 64, 128)  # Triton's arrays have powers of two as sizes
LOG2E = math.log2(math.e)
PROGRAMS = 256  # about two for each multiprocessor of an A100 (108) or H200 (132)
FLOOR = -1e30  # under every score and finite: a row that has seen nothing yet has this maximum, never inf - inf


class Block(NamedTuple):
    """How one pass is cut: the block a program holds, the block it walks by, warps, stages of the load pipeline."""

    held: int
    walked: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    fwd: Block
    dq: Block
    dkv: Block


# Chosen by what the compiler reports (tests/gpu_compile.py), not by timing: of the cuts that FlashAttention kernels use
# those without a spilled register and with at least 8 warps on a multiprocessor, what 255 registers a thread allow.
# Up to head_dim 64, 64 x 64 by 4 warps needs 120 to 255 registers; twice the held block spills up to 3 KB a thread in
# dkv.  Hopper's forward holds 128 queries (230 registers), as its products read their operands from shared memory.
# head_dim 128 doubles the accumulators: 8 warps share them where 4 would stand at the limit.
BLOCKS = {
    ("sm80", 64): Blocks(fwd=Block(64, 64, 4, 3), dq=Block(64, 64, 4, 3), dkv=Block(64, 64, 4, 3)),
    ("sm80", 128): Blocks(fwd=Block(64, 64, 4, 2), dq=Block(64, 64, 8, 2), dkv=Block(64, 64, 8, 2)),
    ("sm90", 64): Blocks(fwd=Block(128, 64, 4, 3), dq=Block(64, 64, 4, 3), dkv=Block(64, 64, 4, 3)),
    ("sm90", 128): Blocks(fwd=Block(128, 64, 8, 2), dq=Block(64, 64, 4, 2), dkv=Block(64, 64, 8, 2)),
}
# Twice the bytes and no tensor cores: for comparisons, not for speed; dkv spills at head_dim 128.
FLOAT32 = Blocks(*[Block(32, 32, 4, 2)] * 3)
HOPPER = ("H100", "H200", "GH200")


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
    """The reviewed cut; a GPU not in the table gets the A100's, which needs the least shared memory."""
    architecture = "sm90" if any(name in kind for name in HOPPER) else "sm80"
    table = FLOAT32 if dtype == jnp.float32 else BLOCKS[architecture, max(head_dim, 64)]
    # Powers of two: the greatest common divisor is the largest block, up to the table's, that divides the row.
    return Blocks(*(b._replace(held=math.gcd(b.held, tokens), walked=math.gcd(b.walked, tokens)) for b in table))


def _dot(a, b, contract: tuple[int, int] = (1, 0)):
    """a b in float32; `contract` are the summed axes.  float32 inputs are multiplied as float32, not as TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _exp2(x, unit: float, minus, interpret: bool):
    """2 ** (x * unit - minus), in float32."""
    minus = jnp.broadcast_to(minus, x.shape)
    if interpret:
        return jnp.exp2(x * unit - minus)
    # Left to itself the backend rounds the product before it subtracts, and guards the exponential against denormal
    # results: six instructions per score where two do, in a loop that has one score for every 128 multiply-adds.
    constant = struct.pack(">f", unit).hex()
    return plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, 0f{constant}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, -minus],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )[0]


def _walk(bounds, step, carry, *, first: bool = True, last: bool = True):
    """step(masked)(j, carry) over the three parts of `bounds` (see documents.py); the caller may know one is empty."""
    begin, clear_begin, clear_end, end = bounds
    if first:
        carry = lax.fori_loop(begin, clear_begin, step(True), carry)
    carry = lax.fori_loop(clear_begin, clear_end, step(False), carry)
    return lax.fori_loop(clear_end, end, step(True), carry) if last else carry


class Scores(NamedTuple):
    """Scores are raw * unit, where raw is the product q k or, with a soft cap, the tanh of it."""

    head_dim: int
    soft_cap: float | None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def unit(self) -> float:
        return self.scale if self.soft_cap is None else self.soft_cap

    def raw(self, product):
        return product if self.soft_cap is None else jnp.tanh(product * (self.scale / self.soft_cap))

    def slope(self, raw, ds):
        """The cotangent of scale * product, from that of the score."""
        return ds if self.soft_cap is None else ds * (1 - raw * raw)


class Static(NamedTuple):
    """What a kernel is compiled for."""

    block: Block
    tokens: int
    scores: Scores
    documents: bool
    interpret: bool


def attn_fwd(*refs, static: Static):
    """o and lse of one block of queries of one head."""
    block, T, scores, documents, interpret = static
    first_ref, (q_ref, k_ref, v_ref, o_ref, lse_ref) = _bounds_ref(refs, documents)
    M, N, K = block.held, block.walked, scores.head_dim
    i = T // M - 1 - pl.program_id(1)
    q_MK = q_ref[...]
    seen, bounds = _keys_seen(first_ref, i, M, N)
    unit = scores.unit * LOG2E

    def step(masked):
        def body(j, carry):
            m_M, l_M, o_MK = carry
            keys = pl.ds(j * N, N)
            raw_MN = scores.raw(_dot(q_MK, k_ref[keys, :], (1, 1)))
            if masked:
                raw_MN = jnp.where(seen(j), raw_MN, -jnp.inf)
            new_M = jnp.maximum(m_M, jnp.max(raw_MN, axis=1))
            p_MN = _exp2(raw_MN, unit, (new_M * unit)[:, None], interpret)
            shrink_M = _exp2(m_M - new_M, unit, 0.0, interpret)  # the difference first: FLOOR - FLOOR is exactly 0
            v_NK = v_ref[keys, :]
            o_MK = o_MK * shrink_M[:, None] + _dot(p_MN.astype(v_NK.dtype), v_NK)
            return new_M, l_M * shrink_M + jnp.sum(p_MN, axis=1), o_MK

        return body

    zeros_M = jnp.zeros((M,), jnp.float32)
    m_M, l_M, o_MK = _walk(bounds, step, (zeros_M + FLOOR, zeros_M, jnp.zeros((M, K), jnp.float32)), first=documents)
    o_ref[...] = (o_MK / l_M[:, None]).astype(o_ref.dtype)
    lse_ref[...] = m_M * scores.unit + jnp.log(l_M)


def attn_dq(*refs, static: Static):
    """dq of one block of queries of one head."""
    block, T, scores, documents, interpret = static
    first_ref, (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref) = _bounds_ref(refs, documents)
    M, N, K = block.held, block.walked, scores.head_dim
    i = T // M - 1 - pl.program_id(1)
    q_MK, do_MK, delta_M1 = q_ref[...], do_ref[...], delta_ref[...][:, None]
    lse_M1 = (lse_ref[...] * LOG2E)[:, None]
    seen, bounds = _keys_seen(first_ref, i, M, N)

    def step(masked):
        def body(j, dq_MK):
            keys = pl.ds(j * N, N)
            k_NK = k_ref[keys, :]
            raw_MN = scores.raw(_dot(q_MK, k_NK, (1, 1)))
            p_MN = _exp2(raw_MN, scores.unit * LOG2E, lse_M1, interpret)
            if masked:
                p_MN = jnp.where(seen(j), p_MN, 0.0)  # not the score: of a hidden key it may be above the lse
            dp_MN = _dot(do_MK, v_ref[keys, :], (1, 1))
            ds_MN = scores.slope(raw_MN, p_MN * (dp_MN - delta_M1))
            return dq_MK + _dot(ds_MN.astype(k_NK.dtype), k_NK)

        return body

    dq_MK = _walk(bounds, step, jnp.zeros((M, K), jnp.float32), first=documents)
    dq_ref[...] = (dq_MK * scores.scale).astype(dq_ref.dtype)


def attn_dkv(*refs, static: Static):
    """dk and dv of one block of keys, from the queries of the heads that q_ref holds."""
    block, T, scores, documents, interpret = static
    end_ref, (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref) = _bounds_ref(refs, documents)
    M, N, K, R = block.walked, block.held, scores.head_dim, q_ref.shape[1]
    j = pl.program_id(1)  # early keys are seen by most queries: they start first
    keys = pl.ds(j * N, N)
    k_NK, v_NK = k_ref[...], v_ref[...]
    key_N = j * N + jnp.arange(N)
    if documents:
        end_N = end_ref[keys]
        bounds = query_blocks(j, N, M, end_ref[j * N], end_ref[j * N + N - 1])
    else:
        bounds = query_blocks(j, N, M, T, T)

    def step(masked):
        def body(x, carry):
            dk_NK, dv_NK = carry
            i, r = lax.div(x, jnp.int32(R)), lax.rem(x, jnp.int32(R))
            queries = pl.ds(i * M, M)
            q_MK, do_MK = q_ref[queries, r, :], do_ref[queries, r, :]
            # Keys as rows: p and ds then lie in registers as the next products want them.
            raw_NM = scores.raw(_dot(k_NK, q_MK, (1, 1)))
            p_NM = _exp2(raw_NM, scores.unit * LOG2E, (lse_ref[r, queries] * LOG2E)[None, :], interpret)
            if masked:
                query_M = i * M + jnp.arange(M)
                seen_NM = query_M[None, :] >= key_N[:, None]
                if documents:
                    seen_NM &= query_M[None, :] < end_N[:, None]
                p_NM = jnp.where(seen_NM, p_NM, 0.0)
            dv_NK += _dot(p_NM.astype(do_MK.dtype), do_MK)
            dp_NM = _dot(v_NK, do_MK, (1, 1))
            ds_NM = scores.slope(raw_NM, p_NM * (dp_NM - delta_ref[r, queries][None, :]))
            return dk_NK + _dot(ds_NM.astype(q_MK.dtype), q_MK), dv_NK

        return body

    # One walk over (block of queries, head), heads fastest: the loads of the next are under way at every turn.
    zeros_NK = jnp.zeros((N, K), jnp.float32)
    dk_NK, dv_NK = _walk([bound * R for bound in bounds], step, (zeros_NK, zeros_NK), last=documents)
    dk_ref[...] = (dk_NK * scores.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_NK.astype(dv_ref.dtype)


def _bounds_ref(refs, documents: bool):
    return (refs[0], refs[1:]) if documents else (None, refs)


def _keys_seen(first_ref, i, M: int, N: int):
    """Of block i of M queries: j -> mask [M, N] of block j of N keys, and the bounds of the walk."""
    query_M = i * M + jnp.arange(M)
    first_M = None if first_ref is None else first_ref[pl.ds(i * M, M)]
    ends = (0, 0) if first_ref is None else (first_ref[i * M], first_ref[i * M + M - 1])

    def seen(j):
        key_N = j * N + jnp.arange(N)
        causal_MN = key_N[None, :] <= query_M[:, None]
        return causal_MN if first_M is None else causal_MN & (key_N[None, :] >= first_M[:, None])

    return seen, key_blocks(i, M, N, *ends)


def _call(name: str, kernel, static: Static, grid, in_specs, out_specs, out_shape, bounds_BT, arguments):
    if bounds_BT is not None:
        in_specs = [pl.BlockSpec((None, static.tokens), lambda x, y, b: (b, 0)), *in_specs]
        arguments = [bounds_BT, *arguments]
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=static.block.warps, num_stages=static.block.stages),
        name=name,
        interpret=static.interpret,
    )(*arguments)


def _query_specs(block: Block, T: int, R: int, K: int):
    """Grid (heads, blocks, batch): a block of queries of [B, T, H, K] and [B, H, T], the keys of their group.

    The first axis of the grid runs fastest, so heads that share keys run together; late queries, which see most keys,
    start first.
    """
    late = T // block.held - 1
    queries = pl.BlockSpec((None, block.held, None, K), lambda h, i, b: (b, late - i, h, 0))
    rows = pl.BlockSpec((None, None, block.held), lambda h, i, b: (b, h, late - i))
    keys = pl.BlockSpec((None, T, None, K), lambda h, i, b: (b, 0, h // R, 0))
    return queries, rows, keys


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
    """o [B, T, H, K] in q's dtype and the log-sum-exp of each row's scores, float32 [B, H, T].

    Query t of head h sees keys first[t] .. t (0 .. t without ranges) of kv head h // (H/G).
    """
    B, T, H, K = q_BTHK.shape
    block = _blocks(kind, K, q_BTHK.dtype, T).fwd
    queries, rows, keys = _query_specs(block, T, H // k_BTGK.shape[2], K)
    o_lse = [jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
    static = Static(block, T, Scores(K, soft_cap), ranges is not None, bool(interpret))
    first_BT = None if ranges is None else ranges.first_BT
    grid, arguments = (H, T // block.held, B), [q_BTHK, k_BTGK, v_BTGK]
    return _call("attn_fwd", attn_fwd, static, grid, [queries, keys, keys], [queries, rows], o_lse, first_BT, arguments)


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
    """dq, dk, dv like q, k, v.  delta is rowsum(o do) - dlse, float32 [B, H, T], lse as `forward` gave it."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    R = H // G
    blocks = _blocks(kind, K, q_BTHK.dtype, T)
    static = Static(blocks.dq, T, Scores(K, soft_cap), ranges is not None, bool(interpret))
    first_BT, end_BT = ranges or (None, None)
    arguments = [q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT]

    queries, rows, keys = _query_specs(blocks.dq, T, R, K)
    specs, dq = [queries, keys, keys, queries, rows, rows], jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype)
    dq_BTHK = _call("attn_dq", attn_dq, static, (H, T // blocks.dq.held, B), specs, queries, dq, first_BT, arguments)

    N = blocks.dkv.held
    # A small batch has too few blocks of keys for the device: then parts of a group work apart and are summed.
    parts = 1
    while R % (2 * parts) == 0 and B * G * (T // N) * parts < PROGRAMS:
        parts *= 2
    heads = pl.BlockSpec((None, T, R // parts, K), lambda p, j, b: (b, 0, p, 0))
    rows = pl.BlockSpec((None, R // parts, T), lambda p, j, b: (b, p, 0))
    keys = pl.BlockSpec((None, N, None, K), lambda p, j, b: (b, j, p // parts, 0))
    out = pl.BlockSpec((None, N, None, K), lambda p, j, b: (b, j, p, 0))
    dk, dv = (
        jax.ShapeDtypeStruct((B, T, G * parts, K), x.dtype if parts == 1 else jnp.float32) for x in (k_BTGK, v_BTGK)
    )
    grid, specs = (G * parts, T // N, B), [heads, keys, keys, heads, rows, rows]
    static = static._replace(block=blocks.dkv)
    dk, dv = _call("attn_dkv", attn_dkv, static, grid, specs, [out, out], [dk, dv], end_BT, arguments)
    if parts > 1:
        dk, dv = (x.reshape(B, T, G, parts, K).sum(axis=3).astype(k_BTGK.dtype) for x in (dk, dv))
    return dq_BTHK, dk, dv
