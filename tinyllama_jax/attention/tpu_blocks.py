"""What the three TPU passes share: sizes of tiles, which tiles are visited, the scores of one tile.

A tile holds scores transposed, keys along sublanes and queries along lanes (axes S and N).  N counts the queries of
one block for several query heads of one key/value head, side by side: they share the keys and the mask, and a block of
128 queries becomes a matmul 1024 wide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tinyllama_jax.attention import documents
from tinyllama_jax.attention.documents import Ranges

GRANULE = 128  # lanes of a vector register: the smallest block along the sequence
MOST_HEADS = 8  # side by side; what dkv fetches grows with them, and the blocks below were compiled with eight
LOG2_E = math.log2(math.e)
HIDDEN = -1e30  # a score no query gives; finite, so that hidden minus hidden is no NaN
OUTER, INNER = ((0,), (0,)), ((1,), (0,))  # contracted axes of dot: A^T B and A B
ROWS = ((1,), (1,))  # A B^T


class Blocks(NamedTuple):
    """Upper bounds on a pass's tiles; what runs also divides T (`fitting`)."""

    lanes: int  # queries times stacked heads of a tile
    queries: int  # queries of a tile, whatever the number of heads
    keys: int  # keys of a tile
    fetch: int  # positions of the side that is looped over, brought to VMEM at a time: several tiles


# Chosen by the schedules that the TPU compiler makes of the tiles (bundles per tile, 32 query heads over 4, T = 2048),
# not by measurements; every line compiles for every kind of its table within the VMEM that a kernel has without asking
# for more (tests/test_tpu.py).  Blocks of 256 visit an eighth more than causality needs at T = 2048, of 512 a quarter.
NARROW = {  # matrix units of 128 x 128
    ("forward", 64): Blocks(2048, 512, 128, 4096),
    ("forward", 128): Blocks(2048, 512, 128, 2048),
    ("dq", 64): Blocks(2048, 512, 256, 4096),
    ("dq", 128): Blocks(2048, 512, 256, 2048),
    ("dkv", 64): Blocks(2048, 512, 256, 2048),
    ("dkv", 128): Blocks(2048, 512, 256, 1024),
}
WIDE = {  # matrix units of 256 x 256
    **NARROW,
    ("forward", 64): Blocks(2048, 512, 256, 4096),
    ("forward", 128): Blocks(2048, 512, 256, 2048),
}
REVIEWED = {
    **dict.fromkeys(("TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p"), NARROW),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), WIDE),
}
# For a kind nobody compiled for, and for float32: twice the memory, and six passes of the matrix unit, which compile
# slowly in large tiles.
SAFE = Blocks(512, 128, 128, 512)


class Tiling(NamedTuple):
    """The tiles of one pass over given arrays."""

    heads: int  # query heads stacked in a tile
    queries: int
    keys: int
    fetch: int


def fitting(limit: int, size: int, step: int) -> int:
    """The largest multiple of `step` that divides `size` and is not over `limit`; `step` if none is."""
    return max((n for n in range(step, min(limit, size) + 1, step) if size % n == 0), default=step)


def tiling(blocks: Blocks, T: int, group: int, looped: str) -> Tiling:
    """Tiles for rows of T tokens and `group` query heads to a key/value head; looped: "keys" or "queries"."""
    if T % GRANULE:
        raise ValueError(f"attention on a TPU needs rows of a multiple of {GRANULE} tokens, not {T}")
    heads = fitting(min(blocks.lanes // GRANULE, MOST_HEADS), group, 1)
    queries = fitting(min(blocks.queries, blocks.lanes // heads), T, GRANULE)
    keys = fitting(blocks.keys, T, GRANULE)
    return Tiling(heads, queries, keys, fitting(blocks.fetch, T, keys if looped == "keys" else queries))


def blocks_for(name: str, head_dim: int, dtype, kind: str) -> Blocks:
    """The blocks of a pass ("forward", "dq" or "dkv") on devices of a kind."""
    return REVIEWED[kind][name, head_dim] if kind in REVIEWED and dtype == jnp.bfloat16 else SAFE


def bounds(tiles: Tiling, given: Ranges | None, T: int, looped: str) -> jax.Array:
    """Which tiles each block visits: (begin, clear_begin, clear_end, end) of block i of row b at 4 (b blocks + i).

    int32, in one line because rows of a scalar memory are padded; 16 bytes for each block of 128 tokens or more, so
    16 M tokens on a device would fill half of the megabyte there is.  Without documents there is one row for all.
    """
    own, other = (tiles.queries, tiles.keys) if looped == "keys" else (tiles.keys, tiles.queries)
    helper = documents.key_blocks if looped == "keys" else documents.query_blocks
    if given is None:
        edge_BT = jnp.full((1, T), 0 if looped == "keys" else T, jnp.int32)
    else:
        edge_BT = given.first_BT if looped == "keys" else given.end_BT
    edge_BNM = edge_BT.reshape(-1, T // own, own)
    i_N = jnp.arange(T // own, dtype=jnp.int32)
    per_row = jax.vmap(lambda i, first, last: jnp.stack(helper(i, own, other, first, last)))
    return jax.vmap(lambda edge_NM: per_row(i_N, edge_NM[:, 0], edge_NM[:, -1]))(edge_BNM).reshape(-1)


class Visits:
    """The tiles that a program of the grid visits, read from `bounds` in scalar memory.

    The looped side comes to VMEM in pieces of `fetch` positions, one per grid step: the pieces that hold something
    visible in the first steps; in the steps left over the last one again, which costs no copy, and nothing is computed.
    """

    def __init__(self, bounds_ref, block, step, tile: int, fetch: int):
        self.begin, self.clear_begin, self.clear_end, self.end = (bounds_ref[4 * block + n] for n in range(4))
        self.tile, self.per_piece = tile, fetch // tile
        first = lax.div(self.begin, jnp.int32(self.per_piece)) + step
        last = lax.div(self.end - 1, jnp.int32(self.per_piece))
        self.active = first <= last
        self.piece = jnp.minimum(first, last)

    def each(self, body, *, head: bool = True, tail: bool = True) -> None:
        """body(tile number, its place in the piece, whether it needs a mask) for every visible tile of the piece.

        head, tail: whether tiles before and after the clear ones can be at all; code is made only for those that can.
        """
        low = self.piece * self.per_piece

        def run(begin, end, masked: bool):
            def once(number, _):
                body(number, pl.ds(pl.multiple_of((number - low) * self.tile, self.tile), self.tile), masked)

            lax.fori_loop(jnp.maximum(begin, low), jnp.minimum(end, low + self.per_piece), once, None)

        @pl.when(self.active)
        def _():
            if head:
                run(self.begin, self.clear_begin, True)
            run(self.clear_begin, self.clear_end, False)
            if tail:
                run(self.clear_end, self.end, True)


class KeyLoop(NamedTuple):
    """The grid of forward and dq, (rows and stacks of query heads, query blocks, pieces of keys)."""

    tiles: Tiling
    tokens: int  # T
    stacks: int  # of query heads, in a row of the batch
    sharing: int  # stacks that read the same key/value head
    documents: bool

    def grid(self, batch: int) -> tuple[int, int, int]:
        return batch * self.stacks, self.tokens // self.tiles.queries, self.tokens // self.tiles.fetch

    def place(self, n):
        """Row of the batch and stack of heads.  lax.div: `//` cares for signs and asks which chip this is."""
        return lax.div(n, jnp.int32(self.stacks)), lax.rem(n, jnp.int32(self.stacks))

    def visits(self, bounds_ref, n, i, step) -> Visits:
        row = self.place(n)[0] if self.documents else 0
        block = row * (self.tokens // self.tiles.queries) + i
        return Visits(bounds_ref, block, step, self.tiles.keys, self.tiles.fetch)

    def queries(self, head_dim: int) -> pl.BlockSpec:  # of [B, H, K, T]
        shape = (1, self.tiles.heads, head_dim, self.tiles.queries)
        return pl.BlockSpec(shape, lambda n, i, step, _: (*self.place(n), 0, i))

    def numbers(self) -> pl.BlockSpec:  # one per query: of [B, stacks, R, T]
        shape = (1, 1, self.tiles.heads, self.tiles.queries)
        return pl.BlockSpec(shape, lambda n, i, step, _: (*self.place(n), 0, i))

    def first(self) -> pl.BlockSpec:  # of [B, 1, T]
        return pl.BlockSpec((1, 1, self.tiles.queries), lambda n, i, step, _: (self.place(n)[0], 0, i))

    def keys(self, head_dim: int) -> pl.BlockSpec:  # of [B, G, K, T]
        def index(n, i, step, bounds_ref):
            row, stack = self.place(n)
            return row, lax.div(stack, jnp.int32(self.sharing)), 0, self.visits(bounds_ref, n, i, step).piece

        return pl.BlockSpec((1, 1, head_dim, self.tiles.fetch), index)


def dot(a, b, axes) -> jax.Array:
    """Matmul that accumulates in float32; float32 operands are not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def beside(ref, place) -> jax.Array:
    """Heads of a [1, R, K, T] block next to each other along the lanes: [K, N]."""
    return jnp.concatenate([ref[0, r, :, place] for r in range(ref.shape[1])], axis=1)


def beside_rows(ref, place) -> jax.Array:
    """The same for a [1, 1, R, T] block of one number per query: [1, N]."""
    return jnp.concatenate([ref[0, 0, pl.ds(r, 1), place] for r in range(ref.shape[2])], axis=1)


def visible(first_ref, place, tiles: Tiling, i, j) -> jax.Array:
    """Mask [S, N] of key block j and query block i; first_ref [1, 1, T] says where documents begin, None without."""
    S, T = tiles.keys, tiles.queries
    key_SN = j * S + lax.broadcasted_iota(jnp.int32, (S, tiles.heads * T), 0)
    query_1T = i * T + lax.broadcasted_iota(jnp.int32, (1, T), 1)
    mask_SN = key_SN <= jnp.concatenate([query_1T] * tiles.heads, axis=1)
    if first_ref is not None:
        mask_SN &= key_SN >= jnp.concatenate([first_ref[0, :, place]] * tiles.heads, axis=1)
    return mask_SN


def scores(k_KS, q_KN, soft_cap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Scaled scores [S, N] in units of log(2), so that exp2 takes them, and d capped / d score if there is a cap."""
    raw_SN = dot(k_KS, q_KN, OUTER)
    scale = 1 / math.sqrt(k_KS.shape[0])
    if soft_cap is None:
        return raw_SN * (scale * LOG2_E), None
    squashed_SN = jnp.tanh(raw_SN * (scale / soft_cap))
    return squashed_SN * (soft_cap * LOG2_E), 1 - squashed_SN * squashed_SN


def compiler_params(parallel: int, arbitrary: int) -> pltpu.CompilerParams:
    # Chips with two cores split the first axis: batch and heads.
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",) * arbitrary)
