import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from quick_experiment import quick_command

from tinyllama_jax import config, sharding
from tinyllama_jax.attention import Call, attention, choice, choose, ranges
from tinyllama_jax.cli import main
from tinyllama_jax.errors import ConfigError

B, T, H, G, K = 2, 12, 6, 2, 8
ROOT = Path(__file__).parent.parent
EVERYWHERE = ("reference", "blocks", "xla")  # what runs on any device; the kernels: test_kernels.py


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        yield


def qkv(heads=H, groups=G, queries=T, keys=T):
    rng = np.random.default_rng(0)
    shapes = (B, queries, heads, K), (B, keys, groups, K), (B, keys, groups, K)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def by_loops(q, k, v, documents=None, positions=None):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        last = t if positions is None else positions[b, t]
        seen = [s for s in range(k.shape[1]) if s <= last and (documents is None or documents[b, s] == documents[b, t])]
        g = h // (q.shape[2] // k.shape[2])
        scores = k[b, seen, g] @ q[b, t, h] / math.sqrt(K)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


DOCUMENTS = np.array([[0] * 5 + [1] * 7, [3] * 1 + [4] * 2 + [5] * 9])


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_against_loops(name, groups, documents):
    q, k, v = qkv(groups=groups)
    got = attention(q, k, v, documents=None if documents is None else jnp.asarray(documents), implementation=name)
    np.testing.assert_allclose(got, by_loops(q, k, v, documents), atol=2e-6)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("documents", [None, DOCUMENTS[:1]], ids=["causal", "documents"])
def test_a_batch_of_one_row(name, groups, documents):
    q, k, v = (x[:1] for x in qkv(groups=groups))
    laid_out = jax.device_put((q, k, v), sharding.batch_sharding(jax.sharding.get_mesh(), 4))
    got = jax.jit(attention, static_argnames="implementation")(*laid_out, documents=documents, implementation=name)
    assert got.sharding.spec == laid_out[0].sharding.spec
    np.testing.assert_allclose(got, by_loops(q, k, v, documents), atol=2e-6)


def test_ranges_of_one_row_under_every_layout():
    spread = jax.device_put(DOCUMENTS[:1], sharding.batch_sharding(jax.sharding.get_mesh()))
    for given in (spread, jnp.asarray(DOCUMENTS[:1])):
        first, end = jax.jit(ranges)(given)
        np.testing.assert_array_equal(first, [[0] * 5 + [5] * 7])
        np.testing.assert_array_equal(end, [[5] * 5 + [12] * 7])


@pytest.mark.parametrize("name", ("reference", "xla"))
def test_cache_positions_against_loops(name):
    q, k, v = qkv(queries=3)
    positions = np.array([[0, 4, 11], [2, 3, 7]])
    got = attention(q, k, v, q_positions_BT=jnp.asarray(positions), implementation=name)
    np.testing.assert_allclose(got, by_loops(q, k, v, positions=positions), atol=2e-6)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_gradients_of_a_shared_head_are_sums_over_its_group(name):
    q, k, v = qkv()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(weights * attention(q, k, v, implementation=name))

    repeat = H // G
    grouped = jax.grad(loss, (0, 1, 2))(q, k, v)
    full = jax.grad(loss, (0, 1, 2))(q, jnp.repeat(k, repeat, 2), jnp.repeat(v, repeat, 2))
    np.testing.assert_allclose(grouped[0], full[0], atol=1e-5)
    for a, b in zip(grouped[1:], full[1:], strict=True):
        np.testing.assert_allclose(a, b.reshape(B, T, G, repeat, K).sum(3), atol=1e-5)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_documents_never_see_each_other_not_even_in_gradients(name):
    q, k, v = qkv()
    documents = jnp.asarray(DOCUMENTS)

    def second_of_row_0(q, k, v):
        return jnp.sum(attention(q, k, v, documents=documents, implementation=name)[0, 5:] ** 2)

    _, dk, dv = jax.grad(second_of_row_0, (0, 1, 2))(q, k, v)
    assert not jnp.any(dk[0, :5]) and not jnp.any(dv[0, :5]) and not jnp.any(dv[1])
    assert jnp.all(jnp.any(dv[0, 5:] != 0, axis=(1, 2)))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_bf16_softmax_is_in_float32(name):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv())
    got = attention(q, k, v, implementation=name)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), by_loops(q, k, v), atol=2e-2)


def test_reference_keeps_scores_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv())
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, implementation="reference"))(q, k, v))
    exponential = next(line for line in jaxpr.splitlines() if "= exp " in line)
    assert "f32" in exponential


CALL = Call(head_dim=64, dtype=jnp.bfloat16, queries=2048)


@pytest.mark.parametrize(
    ("platform", "kind", "call", "name", "words"),
    [
        ("cpu", "cpu", CALL, "blocks", "no kernel of ours is proven on cpu"),
        ("gpu", "NVIDIA A100-SXM4-40GB", CALL, "cudnn", "no kernel of ours is proven on NVIDIA A100-SXM4-40GB"),
        ("gpu", "NVIDIA H200", CALL._replace(ranges=True), "xla", "not cudnn: it would need documents"),
        ("gpu", "NVIDIA H200", CALL._replace(dtype=jnp.float32), "xla", "bfloat16 or float16, not float32"),
        ("gpu", "NVIDIA H200", CALL._replace(soft_cap=30.0), "reference", "not xla: it has no soft cap"),
        ("gpu", "NVIDIA H200", CALL._replace(cache=True), "xla", "not cudnn: it does not read a key/value cache"),
        ("tpu", "TPU v5 lite", CALL._replace(ranges=True), "splash", "no kernel of ours is proven on TPU v5 lite"),
        ("tpu", "TPU v4", CALL._replace(queries=100), "xla", "100 tokens are not a multiple of 128"),
        ("tpu", "TPU v4", CALL._replace(lse=True), "reference", "does not return a float32 log-sum-exp"),
    ],
)
def test_the_choice_is_said_with_its_reason(platform, kind, call, name, words):
    if choice.PROVEN:  # what the library would take is still what must be taken where nothing is proven
        assert not any(word in kind for word in choice.PROVEN)
    chosen, reason = choose("auto", call, platform, kind)
    assert chosen == name and words in reason


def test_a_proven_kernel_is_taken_and_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(choice, "PROVEN", {"A100": "triton"})
    assert choose("auto", CALL, "gpu", "NVIDIA A100-SXM4-80GB") == ("triton", "proven on NVIDIA A100-SXM4-80GB")
    assert choose("auto", CALL, "gpu", "NVIDIA H200")[0] == "cudnn"
    name, reason = choose("auto", CALL._replace(head_dim=80), "gpu", "NVIDIA A100-SXM4-80GB")
    assert name == "cudnn" and "not triton: " in reason and "80" in reason


def test_what_is_proven_has_its_measurement_committed():
    results = [json.loads(p.read_text()) for p in (ROOT / "benchmarks/results").glob("attention-*.json")]
    for word, name in choice.PROVEN.items():
        assert any(word in r["device_kind"] and r["parity"][name]["passed"] for r in results), word


def test_the_device_is_the_meshs():
    assert sharding.device() == ("cpu", "cpu")
    gpus = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"))
    with jax.sharding.use_abstract_mesh(gpus):
        assert sharding.device() == ("gpu", "NVIDIA H200")


@pytest.mark.parametrize(
    ("name", "kind", "call", "words"),
    [
        ("cudnn", "cpu", CALL, "it runs on GPUs and this is a cpu"),
        ("tpu", "NVIDIA H200", CALL, "it runs on TPUs and this is a gpu"),
        ("hopper", "NVIDIA A100-SXM4-40GB", CALL, "it runs on Hopper GPUs and this is NVIDIA A100-SXM4-40GB"),
        ("cudnn", "NVIDIA H200", CALL._replace(ranges=True), "documents or a window as a T x T bias"),
        ("cudnn", "NVIDIA H200", CALL._replace(head_dim=136), "head_dim 136 is not a multiple of 8 up to 128"),
        ("cudnn", "NVIDIA H200", CALL._replace(lse=True), "does not return a float32 log-sum-exp"),
        ("triton", "NVIDIA H200", CALL._replace(head_dim=80), "head_dim 80"),
        ("triton", "NVIDIA H200", CALL._replace(cache=True), "does not read a key/value cache"),
        ("xla", "cpu", CALL._replace(soft_cap=30.0), "it has no soft cap"),
        ("splash", "TPU v4", CALL._replace(window=True, ranges=True), "fixed masks"),
    ],
)
def test_a_named_implementation_that_cannot_serve_the_call_is_refused(name, kind, call, words):
    platform = "gpu" if "NVIDIA" in kind else kind.split()[0].lower()
    with pytest.raises(ConfigError, match=words) as error:
        choose(name, call, platform, kind)
    assert "\n" not in str(error.value) and f"execution.attention={name!r}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="flash3"), "choose one of auto, reference, blocks, xla"),
        (dict(heads=5), "2 key/value heads do not divide 5"),
        (dict(queries=3), "3 queries against 12 keys"),
        (dict(keys_of_v=10), "do not fit together"),
        (dict(both=True), "goes with neither documents nor window"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(change, words):
    q, k, v = qkv(heads=change.get("heads", H), queries=change.get("queries", T))
    v = v[:, : change.get("keys_of_v", T)]
    zeros = jnp.zeros((B, T), jnp.int32)
    extra = dict(documents=zeros, q_positions_BT=zeros) if "both" in change else {}
    with pytest.raises(ConfigError, match=words) as error:
        attention(q, k, v, implementation=change.get("implementation", "auto"), **extra)
    assert "\n" not in str(error.value)


def test_a_run_with_an_attention_that_cannot_serve_it_writes_nothing(small_store, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(quick_command(small_store, workdir, "execution.attention=hopper")) == 78
    assert capsys.readouterr().err.splitlines()[-1].endswith("it runs on GPUs and this is a cpu; try auto")
    assert not [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
