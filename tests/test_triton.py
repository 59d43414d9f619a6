"""The Triton kernels, interpreted, against the formula in float32; compiled for GPUs that are not there (aot)."""

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
from kernel_cases import formula

from tinyllama_jax.attention import triton
from tinyllama_jax.attention.documents import Ranges, ranges, visible

KIND = "NVIDIA A100-SXM4-40GB"


def lengths(B: int, T: int) -> Ranges:
    """Packed rows: documents that end before, at and after the edges of blocks, of one token, of many blocks."""
    cuts = [[63, 64, 65, 129, 130, T // 2 + 7], [1, 2, 128, T - 1]]
    begins = np.zeros((B, T), np.int32)
    for b in range(B):
        begins[b, [c for c in cuts[b % 2] if c < T]] = 1
    return ranges(jnp.asarray(begins.cumsum(axis=1)))


def case(B, T, G, R, K, *, documents, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q, k, v, do, dlse = (
        draw(B, T, G * R, K),
        draw(B, T, G, K),
        draw(B, T, G, K),
        draw(B, T, G * R, K),
        draw(B, G * R, T),
    )
    return (q, k, v), (do, dlse), lengths(B, T) if documents else None


@functools.partial(jax.jit, static_argnames=("kind", "soft_cap"))
def everything(arrays, cotangents, given, *, kind=KIND, soft_cap=None):
    """o, lse, dq, dk, dv of the kernels."""
    call = {"kind": kind, "soft_cap": soft_cap, "interpret": True}
    q, k, v = arrays
    do, dlse = cotangents
    o, lse = triton.forward(q, k, v, given, **call)
    delta = jnp.einsum("bthk,bthk->bht", o.astype(jnp.float32), do.astype(jnp.float32), precision="highest") - dlse
    return o, lse, *triton.backward(q, k, v, do, lse, delta, given, **call)


def expected(arrays, cotangents, given, soft_cap=None):
    B, T = arrays[0].shape[:2]
    mask_BTS = jnp.tril(jnp.ones((B, T, T), bool)) if given is None else visible(given)

    @jax.jit
    def run(arrays, cotangents):
        out, pull = jax.vjp(functools.partial(formula, mask_BTS=mask_BTS, soft_cap=soft_cap), *arrays)
        return *out, *pull(cotangents)

    return run(arrays, cotangents)


NAMES = ("o", "lse", "dq", "dk", "dv")


def distance(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def check(got, want, tolerance):
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        assert distance(ours, theirs) < tolerance, name


@pytest.mark.parametrize(
    ("programs", "B", "T", "G", "R", "K", "documents"),
    [
        (1, 2, 256, 2, 4, 16, True),  # dk, dv: whole groups
        (10**6, 1, 320, 1, 8, 64, True),  # every head of a group apart, then summed
        (16, 1, 128, 1, 4, 64, False),  # pairs of heads
        (256, 1, 192, 2, 3, 32, True),  # groups that are no power of two
        (256, 2, 64, 2, 1, 128, False),  # one query head per kv head
    ],
)
def test_float32_agrees_with_the_formula(monkeypatch, programs, B, T, G, R, K, documents):
    monkeypatch.setattr(triton, "PROGRAMS", programs)
    everything.clear_cache()
    given = case(B, T, G, R, K, documents=documents)
    check(everything(*given), expected(*given), 1e-6)


def test_soft_cap():
    (q, k, v), *rest = case(1, 128, 1, 2, 64, documents=True)
    given = ((4 * q, k, v), *rest)  # scores well into the bend
    got, want = everything(*given, soft_cap=1.5), expected(*given, soft_cap=1.5)
    check(got, want, 2e-6)
    assert distance(got[0], expected(*given)[0]) > 0.01  # it is not a no-op


@pytest.mark.parametrize(("kind", "documents"), [("NVIDIA A100-SXM4-40GB", False), ("NVIDIA H200", True)])
def test_bfloat16_is_as_good_as_the_formula_in_bfloat16(kind, documents):
    """No further from float32 than twice what the formula is when it rounds as XLA does, weights included."""
    arrays, (do, dlse), given = case(1, 320 if documents else 256, 1, 2, 64, documents=documents)
    small = [x.astype(jnp.bfloat16) for x in arrays]
    do = do.astype(jnp.bfloat16)
    dlse = jnp.zeros_like(dlse)
    got = everything(small, (do, dlse), given, kind=kind)
    want = expected([x.astype(jnp.float32) for x in small], (do.astype(jnp.float32), dlse), given)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    mask_BTS = jnp.tril(jnp.ones((1, 256, 256), bool)) if given is None else visible(given)

    def rounded(q, k, v):
        scores = jnp.einsum("bthk,bsgk->bhts", q, k, preferred_element_type=jnp.float32) / 8
        weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -1e30), axis=-1).astype(jnp.bfloat16)
        return jnp.einsum("bhts,bsgk->bthk", weights, v)

    out, pull = jax.vjp(rounded, *small)
    for name, ours, plain, exact in zip(
        ("o", "dq", "dk", "dv"), (got[0], *got[2:]), (out, *pull(do)), (want[0], *want[2:]), strict=True
    ):
        assert distance(ours, exact) <= 2 * distance(plain, exact), name


def test_hidden_blocks_are_never_read():
    """NaN in one of two documents, which end at a block's edge: the other one's results do not change by a bit."""
    T, half = 256, 128
    arrays, cotangents, _ = case(1, T, 1, 2, 64, documents=False)
    arrays, cotangents = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (arrays, cotangents))
    given = ranges(jnp.asarray(np.arange(T)[None] >= half, jnp.int32))
    clean = everything(arrays, cotangents, given, kind="NVIDIA H200")
    for poisoned, other in ((slice(0, half), slice(half, T)), (slice(half, T), slice(0, half))):
        bad = [x.at[:, poisoned].set(jnp.nan) for x in arrays]
        do, dlse = cotangents
        got = everything(bad, (do.at[:, poisoned].set(jnp.nan), dlse), given, kind="NVIDIA H200")
        for name, ours, theirs in zip(NAMES, got, clean, strict=True):
            axis = 2 if name == "lse" else 1
            ours, theirs = (np.moveaxis(np.asarray(x, np.float32), axis, 0)[other] for x in (ours, theirs))
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_blocks_divide_every_row():
    for (architecture, head_dim), kind in [
        (key, "NVIDIA H200" if key[0] == "sm90" else "NVIDIA A100") for key in triton.BLOCKS
    ]:
        for tokens in (64, 192, 2048):
            for block in triton._blocks(kind, head_dim, jnp.bfloat16, tokens):
                assert tokens % block.held == tokens % block.walked == 0, architecture
                assert min(block.held, block.walked) >= 64
    assert triton._blocks("NVIDIA H200", 64, jnp.bfloat16, 2048) == triton.BLOCKS["sm90", 64]
    assert triton._blocks("a GPU of tomorrow", 16, jnp.bfloat16, 2048) == triton.BLOCKS["sm80", 64]


def test_refuses():
    fine = {"head_dim": 64, "dtype": jnp.bfloat16, "soft_cap": None}
    assert triton.refuses(**fine) is None
    assert triton.refuses(**fine | {"soft_cap": 30.0, "dtype": jnp.float32}) is None
    assert triton.refuses(**fine | {"head_dim": 80}) == "head_dim 80 is not one of 16, 32, 64, 128"
    assert triton.refuses(**fine | {"dtype": jnp.float16}) == "dtype float16 is not bfloat16 or float32"
    assert triton.refuses(**fine | {"soft_cap": 0.0}) == "soft_cap 0.0 is not positive"


ROOT = Path(__file__).parent.parent


@pytest.mark.aot
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("target", ["a100", "h200"])
def test_compiles_without_spills(target, documents):
    """TinyLlama's layer: 8 x 2048 tokens, 32 query and 4 kv heads of 64, bfloat16."""
    command = [sys.executable, "-W", "error:The Pallas Triton backend", ROOT / "tests/gpu_compile.py", "triton", target]
    result = subprocess.run(
        command + ["--documents"] * documents,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    print(report)
    kernels = report["forward"]["kernels"] | report["backward"]["kernels"]
    assert set(kernels) == {"attn_fwd", "attn_dq", "attn_dkv"}  # and no other: nothing is copied or transposed
    assert {name: kernel["spill_bytes"] for name, kernel in kernels.items()} == dict.fromkeys(kernels, 0)
    assert max(report[half]["temp_bytes"] for half in report) < 2048 * 2048
