"""The TPU attention kernels: interpreted against the formula on the CPU, compiled for TPUs that are not there."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import formula

from tinyllama_jax.attention import documents, tpu
from tinyllama_jax.attention import tpu_blocks as tb

ROOT = Path(__file__).parent.parent
SMALL = tb.Blocks(512, 128, 128, 128)  # several blocks, pieces and, for 8 heads, stacks in a row of 384 tokens
KIND = "TPU v5 lite"


def documents_of(T: int, *rows: list[int]) -> jax.Array:
    """Document numbers [B, T] of rows given by where their documents begin."""
    return jnp.asarray([[np.searchsorted(cuts, t, side="right") for t in range(T)] for cuts in rows], jnp.int32)


# Documents that begin one before, on and one after a border of tiles; one document; documents of one token.
EDGES = documents_of(384, [127, 256], [128, 255], [129, 257], [], list(range(384)), [5, 100, 101, 380])


def inputs(B: int, T: int, H: int, G: int, K: int, dtype) -> list[jax.Array]:
    """q, k, v, and gradients of o and of the log-sum-exp."""
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)]
    random = [np.random.default_rng(n).standard_normal(shape) for n, shape in enumerate([*shapes, (B, H, T)])]
    return [jnp.asarray(x, dtype) for x in random[:4]] + [jnp.asarray(random[4], jnp.float32)]


@functools.cache
def jitted(**options):
    """One program for all tests of the same shapes."""

    def both(q, k, v, do, dlse, given):
        o, lse = tpu.forward(q, k, v, given, **options)
        delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1).transpose(0, 2, 1) - dlse
        return o, lse, *tpu.backward(q, k, v, do, lse, delta, given, **options)

    return jax.jit(both)


def run(*arrays, **options):
    """(o, lse, dq, dk, dv) of the kernels."""
    return jitted(**{"kind": KIND, "interpret": True, "blocks": SMALL, "soft_cap": None} | options)(*arrays)


def expected(q, k, v, do, dlse, given, soft_cap=None):
    mask_BTS = documents.visible(documents.ranges(jnp.zeros(q.shape[:2], int)) if given is None else given)

    @jax.jit
    def both(*x):
        results, vjp = jax.vjp(lambda *x: formula(*x, mask_BTS, soft_cap), *x[:3])
        return *results, *vjp((x[3], dlse))

    return both(*(x.astype(jnp.float32) for x in (q, k, v, do)))


def assert_close(found, wanted, limit: float):
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        error = np.linalg.norm(np.float32(x) - np.float32(y)) / np.linalg.norm(np.float32(y))
        assert error < (1e-6 if name == "lse" else limit), (name, error)


CASES = {
    # heads, key/value heads, K, dtype, documents, soft cap, blocks
    "two stacks of four heads": (8, 1, 64, jnp.float32, True, None, SMALL),
    "one stack of four heads": (8, 2, 64, jnp.bfloat16, True, None, SMALL),
    "every head its own keys": (2, 2, 128, jnp.float32, True, None, SMALL),
    "causal only": (8, 1, 64, jnp.float32, False, None, SMALL),
    "causal only, reviewed blocks": (4, 1, 128, jnp.bfloat16, False, None, None),
    "reviewed blocks": (8, 1, 64, jnp.bfloat16, True, None, None),
    "blocks for float32": (2, 1, 64, jnp.float32, True, None, None),
    "three heads, capped": (3, 1, 64, jnp.float32, True, 2.0, tb.Blocks(512, 128, 384, 384)),
    "wide query blocks": (2, 2, 64, jnp.float32, True, None, tb.Blocks(384, 384, 128, 384)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_follow_the_formula(case):
    H, G, K, dtype, packed, soft_cap, blocks = case
    arrays = inputs(len(EDGES) if packed else 2, 384, H, G, K, dtype)
    given = documents.ranges(EDGES) if packed else None
    found = run(*arrays, given, soft_cap=soft_cap, blocks=blocks)
    assert [x.dtype for x in found] == [dtype, jnp.float32, dtype, dtype, dtype]
    # In bfloat16 the probabilities, dS and the results are rounded, each by up to one part in 512.
    assert_close(found, expected(*arrays, given, soft_cap), 2e-6 if dtype == jnp.float32 else 5e-3)


def test_a_window_hides_keys_too():
    arrays = inputs(1, 384, 2, 1, 64, jnp.float32)
    given = documents.ranges(EDGES[:1], window=130)
    assert_close(run(*arrays, given), expected(*arrays, given), 2e-6)


def test_memory_is_written_before_it_is_read_and_by_one_core_at_a_time(capfd):
    """The interpreter with teeth: scratch begins as NaN, reads out of bounds raise, programs come in any order."""
    arrays = inputs(2, 384, 4, 1, 64, jnp.float32)
    given = documents.ranges(EDGES[jnp.array([0, 5])])
    blocks = tb.Blocks(256, 128, 128, 128)  # two stacks, three pieces
    teeth = pltpu.InterpretParams(
        uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True, random_seed=7
    )
    found = run(*arrays, given, interpret=teeth, blocks=blocks)
    assert_close(found, expected(*arrays, given), 2e-6)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_tiles_hidden_by_documents_are_not_read():
    """NaN in a document that fills tiles of its own reaches no other document: 0 x NaN would."""
    given = documents.ranges(documents_of(384, [128, 256]))
    arrays = inputs(1, 384, 2, 1, 64, jnp.float32)
    clean = run(*arrays, given)
    poisoned = [x.at[:, 128:256].set(jnp.nan) for x in arrays[:4]] + [arrays[4].at[:, :, 128:256].set(jnp.nan)]
    others = np.r_[0:128, 256:384]
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), clean, run(*poisoned, given), strict=True):
        axis = 2 if name == "lse" else 1
        kept, hit = (np.take(np.asarray(z), others, axis) for z in (x, y))
        assert np.isfinite(hit).all() and np.array_equal(kept, hit), name
        assert np.isnan(np.take(np.asarray(y), range(128, 256), axis)).all(), name


def test_the_future_is_not_read():
    arrays = inputs(1, 384, 2, 1, 64, jnp.float32)
    clean = run(*arrays, None)
    poisoned = run(arrays[0], *(x.at[:, 256:].set(jnp.nan) for x in arrays[1:3]), *arrays[3:], None)
    for x, y in zip((clean[0][:, :256], clean[2][:, :256]), (poisoned[0][:, :256], poisoned[2][:, :256]), strict=True):
        assert np.array_equal(x, y)


def test_rows_do_not_touch_each_other_and_two_runs_agree_bit_by_bit():
    arrays, order = inputs(3, 384, 2, 1, 64, jnp.bfloat16), jnp.array([2, 0, 1])
    given = documents.ranges(EDGES[:3])
    once, twice = run(*arrays, given), run(*arrays, given)
    turned = run(*(x[order] for x in arrays), documents.Ranges(*(x[order] for x in given)))
    for x, y, z in zip(once, twice, turned, strict=True):
        assert np.array_equal(x, y) and np.array_equal(x[order], z)


@pytest.mark.parametrize("blocks", [SMALL, None])
def test_query_heads_read_the_key_value_head_of_their_group(blocks):
    H, G = 16, 2
    q, k, *_ = inputs(1, 256, H, G, 64, jnp.float32)
    v = jnp.broadcast_to(jnp.arange(G, dtype=jnp.float32)[:, None], (1, 256, G, 64))
    o, _ = tpu.forward(q, k, v, None, kind=KIND, interpret=True, blocks=blocks)
    np.testing.assert_allclose(o, np.broadcast_to((np.arange(H) // (H // G))[:, None], o.shape), atol=1e-6)


@pytest.mark.parametrize("looped", ["keys", "queries"])
@pytest.mark.parametrize("sizes", [(128, 128, 128), (128, 256, 512), (256, 128, 256), (512, 128, 1024)])
def test_every_visible_tile_is_visited_once_and_pieces_left_over_cost_no_copy(looped, sizes):
    queries, keys, fetch = sizes
    T = 1024
    cuts = np.random.default_rng(0).integers(1, T, (3, 5))
    given = documents.ranges(documents_of(T, *map(sorted, cuts), [128, 256, 512], []))
    mask_BTS = np.asarray(documents.visible(given))
    tiles = tb.Tiling(8, queries, keys, fetch)
    bounds = np.asarray(tb.bounds(tiles, given, T, looped))
    own, other = (queries, keys) if looped == "keys" else (keys, queries)
    for b in range(len(mask_BTS)):
        mask = mask_BTS[b] if looped == "keys" else mask_BTS[b].T
        tiled = mask.reshape(T // own, own, T // other, other)
        for i in range(T // own):
            some, every = (np.flatnonzero(f(tiled[i], axis=(0, 2))) for f in (np.any, np.all))
            begin, clear_begin, clear_end, end = bounds[4 * (b * (T // own) + i) :][:4]
            assert list(some) == list(range(begin, end)) and list(every) == list(range(clear_begin, clear_end))
            steps = [tb.Visits(bounds, b * (T // own) + i, s, other, fetch) for s in range(T // fetch)]
            pieces = [int(visits.piece) for visits in steps if visits.active]
            assert pieces == sorted({tile * other // fetch for tile in some})
            assert {int(visits.piece) for visits in steps if not visits.active} <= {pieces[-1]}


@pytest.mark.parametrize("T", [128, 384, 640, 1920, 2048, 4096, 8192])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 32])
def test_tiles_divide_what_they_cover(T, group):
    for (name, _), blocks in [*tb.NARROW.items(), *tb.WIDE.items(), (("dq", 64), tb.SAFE), (("dkv", 64), tb.SAFE)]:
        looped = "queries" if name == "dkv" else "keys"
        tiles = tb.tiling(blocks, T, group, looped)
        assert T % tiles.queries == T % tiles.keys == T % tiles.fetch == group % tiles.heads == 0
        assert tiles.fetch % (tiles.keys if looped == "keys" else tiles.queries) == 0
        assert tiles.queries % tb.GRANULE == tiles.keys % tb.GRANULE == 0
        assert tiles.heads * tiles.queries <= blocks.lanes


def test_what_cannot_run_is_refused():
    assert tpu.refuses(head_dim=64, dtype=jnp.bfloat16, soft_cap=None) is None
    assert tpu.refuses(head_dim=128, dtype=jnp.float32, soft_cap=30.0) is None
    assert tpu.refuses(head_dim=80, dtype=jnp.bfloat16, soft_cap=None) == "head_dim 80 is not one of 64, 128"
    assert "float16" in tpu.refuses(head_dim=64, dtype=jnp.float16, soft_cap=None)
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 192"):
        tpu.forward(*inputs(1, 192, 1, 1, 64, jnp.float32)[:3], None, kind=KIND, interpret=True)


def compiled(*combinations: str) -> list[dict]:
    # A cached program would not have been compiled.
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/tpu_compile.py", *combinations]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["combination"] for line in found] == list(combinations)
    print(*found, sep="\n")
    return found


QUADRATIC = 4 * 2048 * 2048  # a byte for each query and key of the rows that tpu_compile.py compiles for


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e"])
def test_the_kernels_compile_without_quadratic_memory(target):
    combinations = [f"{target}:{d}:{p}:64:bfloat16" for d in ("forward", "backward") for p in ("causal", "documents")]
    for found in compiled(*combinations):
        assert found["ok"], found
        assert found["kind"] in tb.REVIEWED  # the blocks that ran are the reviewed ones
        assert found["kernels"] == (1 if ":forward:" in found["combination"] else 2)
        assert found["temp_bytes"] < QUADRATIC


@pytest.mark.aot
def test_wide_heads_and_float32_compile_and_the_formula_shows_as_quadratic():
    *kernels, formula = compiled(
        *(f"{t}:{d}:documents:128:bfloat16" for t in ("v4", "v5e", "v5p", "v6e") for d in ("forward", "backward")),
        "v4:backward:documents:64:float32",
        "v5e:reference:causal:64:bfloat16",
    )
    assert all(found["ok"] for found in kernels), kernels
    assert not formula["ok"] or formula["temp_bytes"] > 32 * QUADRATIC


@pytest.mark.aot
def test_projections_make_and_take_the_kernels_layout_without_copies():
    (found,) = compiled("v5e:layer:documents:64:bfloat16")
    assert found["ok"] and found["kernels"] == 3 and found["copies"] == 0, found
