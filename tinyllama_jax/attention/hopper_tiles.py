"""What the Hopper kernels share: tile sizes, shared memory layouts, and the few ways in which they are spelled."""

from __future__ import annotations

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tinyllama_jax.attention.documents import key_blocks
from tinyllama_jax.errors import ConfigError

CONSUMERS = 2  # warpgroups that compute; one more only copies
ROWS = 64  # rows of a tensor core instruction: what one consumer holds
GRANULE = CONSUMERS * ROWS  # rows of one thread block
PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
LOG2E, LN2 = math.log2(math.e), math.log(2.0)

# Of a block's 64 Ki registers a thread has 168 when it starts; the copying warpgroup gives most of its own away.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


class Tiles(NamedTuple):
    """Rows of a tile of the operand that is streamed through shared memory, and how many tiles are in flight."""

    forward: int  # keys
    dq: int  # keys
    dkv: int  # queries
    stages: int


# head_dim -> tiles; the largest that the compiler fits into the registers without spilling.
TILES = {64: Tiles(128, 128, 64, 3), 128: Tiles(64, 64, 32, 3)}


def tiles(kind: str, head_dim: int) -> Tiles:
    """The tiles for a GPU by its device_kind; all Hopper GPUs have the same multiprocessor, so there is one table.

    Raises ConfigError for a GPU before or after Hopper: its compiler would end the process at the first instruction
    that it does not know.
    """
    if kind.startswith("NVIDIA") and not any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        raise ConfigError(f"execution.attention='hopper' cannot run on {kind}; choose another, or auto")
    return TILES[head_dim]


def operand(shape: tuple[int, ...], dtype, block: int = 64):
    """Shared memory that the tensor cores read: tiles of 8 rows, swizzled over 128 bytes, or 64 for blocks of 32."""
    columns = min(block, 64)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    )


def multiply(acc, left: jax.Array, right, staging) -> None:
    """acc += left @ right, begun and not awaited, with `left` in registers.

    JAX's interpreter reads the operands of a product from shared memory only: there, and only there, `left` goes
    through `staging`, memory of this warpgroup's own.  It is the one difference between what is tested and what runs on
    a GPU; but the interpreter finishes every product where it begins, so it would not notice a wait left out.
    """
    if staging is not None:
        staging[...] = left
        plgpu.commit_smem()
        left = staging
    plgpu.wgmma(acc, left, right)


def staged(interpret, shape: tuple[int, ...], dtype) -> list:
    """Scratch for `multiply`, one per consumer: none on a GPU."""
    return [operand((CONSUMERS, *shape), dtype, shape[1])] if interpret else []


def per_row(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, (0,))


def per_column(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, (1,))


def positions() -> jax.Array:
    """0 .. ROWS - 1, one per row of a product."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)


def inside(shape: tuple[int, int], low: jax.Array | None, past: jax.Array | None) -> jax.Array:
    """Where a column's index is in [low, past) of its row; None: no bound.

    Both bounds are taken per row, not per element: the compiler would keep the latter in registers that are not there.
    """
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    bounds = [] if low is None else [column >= per_row(low, shape)]
    bounds += [] if past is None else [column < per_row(past, shape)]
    return functools.reduce(operator.and_, bounds)


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """Float32 in registers, laid out as a product of the tensor cores or as one value per row of it."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA if len(shape) == 2 else PER_ROW)


def product(left, right) -> jax.Array:
    """left @ right of two tiles in shared memory, awaited."""

    def compute(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((left.shape[0], right.shape[1])))


def fill_ring(steps, stages: int, place, copy, *free) -> None:
    """place = copy(place, slot) `steps` times, each once `free[slot]` says that what lay in the slot is done with.

    Ends when all of it is: a barrier should not outlive those who wait for it.
    """

    def fill(step, place):
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def wait():
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])

        return lax.cond(step < steps, lambda: copy(place, slot), lambda: place)

    lax.fori_loop(0, steps + stages, fill, place)


class QueryPairs:
    """Which two blocks of queries a thread block does, one from each end of the row, and the keys that they visit.

    Together they are the same work in every thread block, and what the second one reads is copied while the first one
    is computed.  The middle block of an odd number is alone.  All of it is computed where it is asked for, by each
    warpgroup for itself: the one that copies has no registers for what only the others need.
    """

    def __init__(self, T: int, block: int, first_ref):
        self.blocks, self.block, self.first_ref = T // GRANULE, block, first_ref

    @staticmethod
    def number(T: int) -> int:
        """The size of the grid's axis "pair"."""
        return pl.cdiv(T // GRANULE, 2)

    def count(self) -> jax.Array:
        pair = lax.axis_index("pair")
        return jnp.where(self.blocks - 1 - pair == pair, 1, 2)

    def query_block(self, n) -> jax.Array:
        """The n-th of the pair: the one near the end of the row, which has more to do, first."""
        pair = lax.axis_index("pair")
        return jnp.where(n == 0, self.blocks - 1 - pair, pair)

    def visited(self, n):
        """`key_blocks` of the n-th."""
        i, b = self.query_block(n), lax.axis_index("batch")
        rows = i * GRANULE, i * GRANULE + GRANULE - 1
        ends = (0, 0) if self.first_ref is None else (self.first_ref[b, row] for row in rows)
        return key_blocks(i, GRANULE, self.block, *map(jnp.int32, ends))

    def stream(self, stages: int, copy, *free) -> None:
        """copy(keys, slot) for all tiles of keys that the two visit, in their order: see `fill_ring`."""
        begin, _, _, end = self.visited(0)
        next_begin, _, _, next_end = self.visited(1)

        def copy_and_step(place, slot):
            j, last = place
            copy(pl.ds(j * self.block, self.block), slot)
            over = j + 1 == last
            return jnp.where(over, next_begin, j + 1), jnp.where(over, next_end, last)

        steps = end - begin + jnp.where(self.count() == 2, next_end - next_begin, 0)
        fill_ring(steps, stages, (begin, end), copy_and_step, *free)


def interpreter(interpret):
    """What plgpu.kernel takes as `interpret`: False, or the parameters of the interpreter."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret
