import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax import config, sharding
from tinyllama_jax.attention import IMPLEMENTATIONS, attention, choose
from tinyllama_jax.config import ConfigError

B, T, H, G, K = 2, 12, 6, 2, 8


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


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_against_loops(name, groups, documents):
    q, k, v = qkv(groups=groups)
    got = attention(q, k, v, documents_BT=None if documents is None else jnp.asarray(documents), implementation=name)
    np.testing.assert_allclose(got, by_loops(q, k, v, documents), atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("documents", [None, DOCUMENTS[:1]], ids=["causal", "documents"])
def test_a_batch_of_one_row(name, groups, documents):
    q, k, v = (x[:1] for x in qkv(groups=groups))
    laid_out = jax.device_put((q, k, v), sharding.batch_sharding(jax.sharding.get_mesh(), 4))
    got = jax.jit(attention, static_argnames="implementation")(*laid_out, documents_BT=documents, implementation=name)
    assert got.sharding.spec == laid_out[0].sharding.spec
    np.testing.assert_allclose(got, by_loops(q, k, v, documents), atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_cache_positions_against_loops(name):
    q, k, v = qkv(queries=3)
    positions = np.array([[0, 4, 11], [2, 3, 7]])
    got = attention(q, k, v, q_positions_BT=jnp.asarray(positions), implementation=name)
    np.testing.assert_allclose(got, by_loops(q, k, v, positions=positions), atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
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


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_documents_never_see_each_other_not_even_in_gradients(name):
    q, k, v = qkv()
    documents = jnp.asarray(DOCUMENTS)

    def second_of_row_0(q, k, v):
        return jnp.sum(attention(q, k, v, documents_BT=documents, implementation=name)[0, 5:] ** 2)

    _, dk, dv = jax.grad(second_of_row_0, (0, 1, 2))(q, k, v)
    assert not jnp.any(dk[0, :5]) and not jnp.any(dv[0, :5]) and not jnp.any(dv[1])
    assert jnp.all(jnp.any(dv[0, 5:] != 0, axis=(1, 2)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
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


def test_the_choice_is_said_with_its_reason():
    name, reason = choose("auto", "tpu")
    assert name in IMPLEMENTATIONS and "tpu" in reason
    assert choose("xla") == ("xla", "named in execution.attention")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="flash3"), "choose one of auto, reference, xla"),
        (dict(heads=5), "2 key/value heads do not divide 5"),
        (dict(queries=3), "3 queries against 12 keys"),
        (dict(keys_of_v=10), "do not fit together"),
        (dict(both=True), "cannot be combined"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(change, words):
    q, k, v = qkv(heads=change.get("heads", H), queries=change.get("queries", T))
    v = v[:, : change.get("keys_of_v", T)]
    zeros = jnp.zeros((B, T), jnp.int32)
    extra = dict(documents_BT=zeros, q_positions_BT=zeros) if "both" in change else {}
    with pytest.raises(ConfigError, match=words) as error:
        attention(q, k, v, implementation=change.get("implementation", "auto"), **extra)
    assert "\n" not in str(error.value)
