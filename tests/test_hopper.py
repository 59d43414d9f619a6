"""The Hopper kernels, interpreted with a watch for races, against the formula; compiled for an H200 (aot)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import formula

from tinyllama_jax.attention import hopper
from tinyllama_jax.attention.documents import ranges, visible
from tinyllama_jax.errors import ConfigError

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
OLD = hopper.refuses(head_dim=64, dtype=BF16, soft_cap=None)
needs_new_jax = pytest.mark.skipif(OLD is not None, reason=str(OLD))
NAMES = ("o", "lse", "dq", "dk", "dv")


def case(T, H, G, K, dtype, cuts=None, window=None, B=1, seed=0):
    """q, k, v; cotangents of o and lse; ranges of documents that begin at `cuts`, or None."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, T, heads, K)), dtype) for heads in (H, G, G, H))
    dlse = jnp.asarray(rng.normal(size=(B, H, T)), F32)
    ids = jnp.searchsorted(jnp.asarray(cuts or [T]), jnp.arange(T), side="right")
    given = None if cuts is None and window is None else ranges(jnp.broadcast_to(ids, (B, T)), window)
    return (q, k, v), (do, dlse), given


def everything(arrays, cotangents, given):
    """o, lse, dq, dk, dv of the kernels; an access that nothing orders, or out of bounds, raises."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    call = {"kind": "cpu", "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    do, dlse = cotangents
    o, lse = jax.block_until_ready(hopper.forward(*arrays, given, **call))  # why: kernel_cases.run
    delta = jnp.einsum("bthk,bthk->bht", o.astype(F32), do.astype(F32), precision="highest") - dlse
    return o, lse, *jax.block_until_ready(hopper.backward(*arrays, do, lse, delta, given, **call))


def expected(arrays, cotangents, given):
    """The same in float32 by the formula."""
    B, T = arrays[0].shape[:2]
    mask_BTS = jnp.tril(jnp.ones((B, T, T), bool)) if given is None else visible(given)
    out, pull = jax.vjp(lambda *x: formula(*x, mask_BTS), *(x.astype(F32) for x in arrays))
    do, dlse = cotangents
    return *out, *pull((do.astype(F32), dlse))


def error(ours, theirs):
    return float(jnp.linalg.norm(ours.astype(F32) - theirs) / jnp.linalg.norm(theirs))


CASES = {
    "group-of-4-edges": dict(T=256, H=4, G=1, K=64, dtype=BF16, cuts=[127, 128, 129, 200]),
    "group-of-8": dict(T=128, H=8, G=1, K=64, dtype=BF16, cuts=[64]),
    "long": dict(T=512, H=1, G=1, K=64, dtype=BF16),  # the ring in shared memory goes round
    "window": dict(T=256, H=1, G=1, K=64, dtype=BF16, cuts=[130], window=100),
    "head-dim-128": dict(T=128, H=2, G=2, K=128, dtype=BF16, B=2),
    "head-dim-128-edges": dict(T=256, H=2, G=1, K=128, dtype=F16, cuts=[1, 63, 128, 255]),
}


@needs_new_jax
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_interpreted_agrees_with_the_formula_and_nothing_races(shape):
    given = case(**shape)
    tolerance = {BF16: 4e-3, F16: 6e-4}[shape["dtype"]]  # that of the rounded result, P and dS
    for name, ours, theirs in zip(NAMES, everything(*given), expected(*given), strict=True):
        assert ours.dtype == (F32 if name == "lse" else shape["dtype"]), name
        assert ours.shape == theirs.shape, name
        assert error(ours, theirs) < (1e-6 if name == "lse" else tolerance), (name, error(ours, theirs))


@needs_new_jax
def test_hidden_tiles_are_not_read():
    """NaN times zero is NaN: what is finite beside NaN was skipped, not masked."""
    arrays, (do, dlse), given = case(256, 1, 1, 64, BF16, cuts=[128])
    first = jnp.arange(256)[None, :, None, None] < 128
    for hidden, watched in ((first, slice(128, 256)), (~first, slice(0, 128))):
        spoilt = [jnp.where(hidden, jnp.nan, x).astype(x.dtype) for x in (*arrays, do)]
        got = everything(spoilt[:3], (spoilt[3], dlse), given)
        for name, ours, theirs in zip(NAMES, got, expected(arrays, (do, dlse), given), strict=True):
            ours, theirs = (x[:, :, watched] if name == "lse" else x[:, watched] for x in (ours, theirs))
            assert error(ours, theirs) < 4e-3, name


@needs_new_jax
def test_the_calls_are_named():
    arrays, (do, _), given = case(128, 2, 1, 64, BF16, cuts=[7])
    rows = jnp.zeros((1, 2, 128), F32)

    def both(*arrays):
        forward = hopper.forward(*arrays, given, kind="NVIDIA H200")
        return forward, hopper.backward(*arrays, do, rows, rows, given, kind="NVIDIA H200")

    calls = re.findall(r"name=(attn_\w+)", str(jax.make_jaxpr(both)(*arrays)))
    assert sorted(calls) == ["attn_dkv", "attn_dq", "attn_fwd"]


@needs_new_jax
def test_another_gpu_is_refused_before_its_compiler_ends_the_process():
    arrays, _, _ = case(128, 1, 1, 64, BF16)
    with pytest.raises(ConfigError, match="cannot run on NVIDIA A100"):
        hopper.forward(*arrays, None, kind="NVIDIA A100-SXM4-40GB")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (dict(head_dim=80, dtype=BF16, soft_cap=None), "head_dim 80 is not one of 64, 128"),
        (dict(head_dim=64, dtype=F32, soft_cap=None), "float32 is not bfloat16 or float16"),
        (dict(head_dim=64, dtype=BF16, soft_cap=30.0), "the Hopper kernel has no soft cap"),
    ],
)
def test_refusals_say_why(asked, reason):
    assert hopper.refuses(**asked) == (OLD or reason)


@needs_new_jax
@pytest.mark.aot
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", [(32, 4, 64), (16, 8, 128)], ids=["K64", "K128"])
def test_compiles_for_an_h200_within_the_registers(shape, documents):
    heads, groups, head_dim = shape
    command = [sys.executable, Path(__file__).parent / "gpu_compile.py", "hopper", "h200"]
    command += ["--heads", str(heads), "--groups", str(groups), "--head-dim", str(head_dim)]
    command += ["--documents"] * documents
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["forward"]["temp_bytes"] < 1024 and report["backward"]["temp_bytes"] < 1024
    assert report["forward"]["serialized"] == report["backward"]["serialized"] == []
    kernels = report["forward"]["kernels"] | report["backward"]["kernels"]
    found = {name: next(k for k in kernels if k.startswith(name)) for name in ("attn_fwd", "attn_dq", "attn_dkv")}
    for name, full_name in found.items():
        assert kernels[full_name]["spill_bytes"] == 0, (name, kernels[full_name])
        # 65536 registers, 384 threads: a block that asks for more cannot be launched.
        assert kernels[full_name]["registers"] <= 168, (name, kernels[full_name])
