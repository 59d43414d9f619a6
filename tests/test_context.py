"""Rows whose tokens `context` splits: attention by pairs of stripes, and what reads a model on such a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import NAMES, kernel_calls, packed, problem, run, truth
from quick_experiment import quick
from test_mesh import batch, mesh_of, run_of

from tinyllama_jax import sharding
from tinyllama_jax.attention import Call, attention, choose
from tinyllama_jax.config import Execution, replace
from tinyllama_jax.data.store import Windows
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.evaluate.loss import Validator
from tinyllama_jax.generate.sample import generate
from tinyllama_jax.generate.score import score
from tinyllama_jax.model import transformer
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step

T, H, G, K = 128, 4, 2, 64
LENGTHS = [1, 2, 3, 5, 30, 1, 1, 50, 35]  # shorter than a stride, longer, and across many of them
ONE = (1, 1, 1, 1)


def place(mesh, *arrays, tokens=1):
    """Arrays [B, T, H, ...] or, with tokens=2, [B, H, T], striped, on the mesh."""
    _, _, context, tensor = mesh.devices.shape
    heads = "tensor" if tensor > 1 else None
    spec = {1: P(sharding.BATCH, "context", heads, None), 2: P(sharding.BATCH, heads, "context")}[tokens]
    return [jax.device_put(sharding.striped(x, context, tokens), NamedSharding(mesh, spec)) for x in arrays]


CASES = [
    ("reference", (1, 1, 8, 1), {}),
    ("reference", (1, 1, 4, 2), dict(soft_cap=5.0)),
    ("reference", (1, 1, 4, 1), dict(window=9)),
    ("blocks", (1, 1, 4, 2), dict(window=9)),
    ("interpret:triton", (1, 1, 4, 2), {}),
    ("interpret:triton", (1, 1, 2, 1), dict(window=9)),
    ("interpret:triton", (1, 1, 4, 1), dict(soft_cap=5.0)),
    ("interpret:tpu", (1, 1, 2, 2), {}),
]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["causal", "documents"])
@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_pairs_of_stripes_are_the_row(name, shape, options, lengths):
    """Result, log-sum-exp and all gradients, the log-sum-exp's own cotangent too."""
    given = problem(1, T, H, G, K)
    ids = None if lengths is None else packed(lengths, T)
    dlse = jnp.asarray(np.random.default_rng(9).normal(size=(1, H, T)), jnp.float32)
    with jax.set_mesh(mesh_of(ONE)):
        want = jax.device_get(truth(*given, ids, dlse=dlse, **options))
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        if ids is not None:
            ids = jax.device_put(sharding.striped(ids, shape[2]), sharding.token_sharding(mesh))
        (dlse,) = place(mesh, dlse, tokens=2)
        got = run(*place(mesh, *given), ids, dlse=dlse, implementation=name, **options)
        assert got[0].sharding.spec[1] == got[1].sharding.spec[2] == "context"
    for what, a, b in zip(NAMES, jax.device_get(got), want, strict=True):
        a = sharding.in_order(a, shape[2], 2 if what == "lse" else 1)
        np.testing.assert_allclose(a, b, atol=5e-6 * max(1.0, np.abs(b).max()), rtol=0, err_msg=what)


@pytest.mark.parametrize("name", ["reference", "interpret:triton"])
def test_bfloat16_stays_within_its_rounding(name):
    given = problem(1, T, H, G, K, jnp.bfloat16)
    with jax.set_mesh(mesh_of(ONE)):
        want = jax.device_get(truth(*given))
        whole = jax.device_get(run(*given, implementation=name))
    mesh = mesh_of((1, 1, 4, 1))
    with jax.set_mesh(mesh):
        got = jax.device_get(run(*place(mesh, *given), implementation=name))
    for what, a, b, exact in zip(NAMES, got, whole, want, strict=True):
        assert a.dtype == b.dtype, what
        a = sharding.in_order(a, 4, 2 if what == "lse" else 1).astype(np.float32)
        # Each part is rounded on its own before they are added.
        allowed = 2 * np.linalg.norm(b.astype(np.float32) - exact) + 1e-5 * np.linalg.norm(exact)
        assert np.linalg.norm(a - exact) <= allowed, what


def sizes(text):
    """Shapes of all arrays in a program's text."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|pred)\[([\d,]+)\]", text)}


@pytest.mark.parametrize("name", ["reference", "interpret:triton"])
def test_a_long_row_has_scores_of_one_pair_only(name):
    """Eight places: nothing in the step is T x T or T x T/8, in either dimension's order."""
    tokens, parts = 1024, 8
    base = run_of(True, heads=2, kv_heads=1, head_dim=16, context_tokens=tokens)
    stage = replace(base.curriculum[0], tokens=2 * tokens, batch_tokens=2 * tokens)
    run = replace(
        base,
        data=replace(base.data, sequence_tokens=tokens),
        curriculum=(stage,),
        execution=Execution(attention=name, remat="save_dots_and_attention", loss_chunk_tokens=64),
    )
    mesh = mesh_of((1, 1, parts, 1))
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct((1, 2, tokens), np.int32, sharding=sharding.token_sharding(mesh, leading=1))
        placed = {name: rows for name in ("tokens", "targets", "documents")}
        placed["valid"] = jax.ShapeDtypeStruct(rows.shape, bool, sharding=rows.sharding)
        lr, number = (jax.ShapeDtypeStruct((), d, sharding=sharding.replicated(mesh)) for d in (np.float32, np.int32))
        lowered = step.make_train_step(run).lower(train_state.abstract(run, mesh), placed, lr, number)
        found = sizes(lowered.compile().as_text())
    local = tokens // parts
    large = {s for s in found if sum(n >= tokens for n in s) > 1 or (max(s) >= tokens and local in s)}
    assert not large, large
    # The scores of one pair of stripes are T/8 x T/8, for two rows of two heads.
    assert max(math.prod(s) for s in found) <= 4 * local * local, max(found, key=math.prod)


def test_a_kernel_is_called_once_per_pass_for_all_pairs():
    mesh = mesh_of((1, 1, 4, 1))
    with jax.set_mesh(mesh):
        q, k, v, _ = place(mesh, *problem(1, T, H, G, K))
        loss = lambda q: attention(q, k, v, implementation="interpret:triton").sum()  # noqa: E731
        assert kernel_calls(jax.grad(loss), q) == dict(attn_fwd=1, attn_dq=1, attn_dkv=1)


def test_who_cannot_merge_parts_is_refused_and_auto_says_whom_it_passed_over():
    call = Call(head_dim=64, dtype=jnp.bfloat16, queries=2048, context=4)
    for name, kind in (("xla", "cpu"), ("cudnn", "NVIDIA H200"), ("splash", "TPU v4")):
        platform = {"NVIDIA H200": "gpu", "TPU v4": "tpu"}.get(kind, "cpu")
        with pytest.raises(ConfigError, match="mesh.context splits") as error:
            choose(name, call, platform, kind)
        assert "\n" not in str(error.value)
    name, reason = choose("auto", call, "gpu", "NVIDIA A100-SXM4-40GB")
    assert name == "reference" and "not cudnn: it returns no log-sum-exp" in reason
    assert choose("triton", call, "gpu", "NVIDIA A100-SXM4-40GB")[0] == "triton"
    with jax.set_mesh(mesh_of((1, 1, 4, 1))):
        assert Call.of(run_of()).context == 4


def test_a_cache_cannot_be_striped():
    mesh = mesh_of((1, 1, 4, 1))
    with jax.set_mesh(mesh):
        q, k, v, _ = place(mesh, *problem(1, T, H, G, K))
        with pytest.raises(ConfigError, match="mesh.context splits these"):
            attention(q, k, v, q_positions_BT=jnp.zeros((1, T), jnp.int32))


READERS = [(1, 1, 4, 2), (2, 2, 2, 1), (1, 4, 1, 2)]


def weights(mesh, model):
    """As after some training: sharper than fresh ones, so that greedy choices are not near ties."""
    fresh = jax.tree.map(
        lambda leaf: 3 * np.asarray(leaf), jax.jit(lambda: transformer.init(model, jax.random.key(1)))()
    )
    return jax.device_put(fresh, sharding.param_shardings(fresh, mesh))


def on_mesh(shape, f):
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        return f(mesh, weights(mesh, quick().model))


@pytest.mark.slow
@pytest.mark.parametrize("shape", READERS, ids=str)
def test_generation_on_a_mesh_is_that_on_one_device(shape):
    def answers(mesh, params):
        prompts = [[5, 6, 7], [9], [11, 3, 200, 17, 45]]
        greedy = generate(params, quick().model, Execution(), prompts, max_new_tokens=6, temperature=0.0)
        options = dict(temperature=1.0, top_k=50, top_p=0.9, seed=3)
        return greedy, generate(params, quick().model, Execution(), prompts, max_new_tokens=6, **options)

    assert on_mesh(shape, answers) == on_mesh(ONE, answers)


@pytest.mark.parametrize("shape", READERS, ids=str)
def test_scores_come_back_in_the_order_of_the_tokens(shape):
    rows = np.random.default_rng(0).integers(0, 512, (3, 20)).astype(np.int32)  # 19 predictions: padded to stripes
    scores = lambda mesh, params: score(params, quick().model, Execution(loss_chunk_tokens=7), mesh, rows)  # noqa: E731
    got, want = on_mesh(shape, scores), on_mesh(ONE, scores)
    assert got.shape == (3, 19)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("shape", READERS, ids=str)
def test_validation_measures_the_same(shape):
    given = batch(0)
    tokens = np.concatenate([given["tokens"], given["targets"][:, -1:]], axis=1)[:6]
    documents = np.concatenate([given["documents"], given["documents"][:, -1:]], axis=1)[:6]
    held_out = {"prose": Windows(tokens, documents, np.array([33, 33, 20, 33, 33, 9]))}

    def measure(mesh, params):
        options = dict(batch_sequences=4, document_masking=True)
        return Validator(held_out, np.ones(512, np.int64), quick().model, Execution(), mesh, **options)(params)["prose"]

    got, want = on_mesh(shape, measure), on_mesh(ONE, measure)
    assert got["tokens"] == want["tokens"] and got["bytes"] == want["bytes"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)


def test_logits_of_a_striped_row_lie_as_its_tokens():
    tokens = batch(0)["tokens"]

    def all_logits(mesh, params):
        context = mesh.shape["context"]
        placed = jax.device_put(sharding.striped(tokens, context), sharding.token_sharding(mesh))
        run = jax.jit(lambda p, t: transformer.logits(p, t, quick().model, Execution()))
        return sharding.in_order(np.asarray(run(params, placed)), context, axis=1)

    np.testing.assert_allclose(on_mesh((1, 2, 2, 2), all_logits), on_mesh(ONE, all_logits), atol=2e-3)
