import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Model
from tinyllama_jax.model import init, layers

CFG = Model(
    vocab_size=16, d_model=12, layers=4, heads=4, kv_heads=2, head_dim=6, d_ff=20, compute_dtype="float32", dropout=0.5
)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        yield


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def test_rms_norm_by_the_formula_and_in_float32():
    x, scale = normal(2, 3, 12), normal(12)
    x64 = np.asarray(x, np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-5), want, rtol=1e-6)
    # eps lies inside the root: a zero row stays zero and a tiny one is damped.
    tiny = layers.rms_norm(jnp.full((1, 1, 12), 1e-3), jnp.ones(12), 1e-5)
    np.testing.assert_allclose(tiny, 1e-3 / math.sqrt(1e-6 + 1e-5), rtol=1e-5)
    # Squares of 300 in bf16 would be off by a per cent when summed in bf16.
    large = jnp.full((1, 1, 4096), 300, jnp.bfloat16)
    normed = layers.rms_norm(large, jnp.ones(4096), 1e-5)
    assert normed.dtype == jnp.bfloat16 and jnp.all(normed == 1)


def test_linear_contracts_as_einsum_does():
    x, w = normal(2, 3, 4, 6), normal(4, 6, 12)
    np.testing.assert_allclose(layers.linear(x, w, inputs=2), jnp.einsum("bthk,hkd->btd", x, w), rtol=1e-5, atol=1e-5)
    x, w = normal(2, 3, 12), normal(12, 4, 6)
    np.testing.assert_allclose(layers.linear(x, w), jnp.einsum("btd,dhk->bthk", x, w), rtol=1e-5, atol=1e-5)
    assert layers.linear(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_mlp_is_swiglu():
    mlp = layers.Mlp(CFG, nnx.Rngs(0))
    x = normal(2, 3, 12)
    gate, up, down = (np.asarray(w[...]) for w in (mlp.gate, mlp.up, mlp.down))
    hidden = np.asarray(x) @ gate
    want = (hidden / (1 + np.exp(-hidden)) * (np.asarray(x) @ up)) @ down
    np.testing.assert_allclose(mlp(x), want, rtol=1e-5, atol=1e-7)


def test_block_is_sequential_pre_norm():
    block = layers.Block(CFG, nnx.Rngs(0))
    x, rope = normal(2, 3, 12), jnp.zeros((3, 0))

    def attend(q, k, v):
        return q

    middle = x + block.attention(block.attention_norm(x), rope, rope, attend)
    want = middle + block.mlp(block.mlp_norm(middle))
    assert jnp.array_equal(block(x, rope, rope, attend), want)


def test_dropout_scales_what_it_keeps_and_needs_a_key_to_drop():
    x = jnp.ones((64, 64, 8))
    dropped = layers.dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(jnp.mean(dropped)) == pytest.approx(1, abs=0.02)
    assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x


def test_block_drops_in_both_branches():
    block = layers.Block(CFG, nnx.Rngs(0))
    x, rope = normal(2, 3, 12), jnp.zeros((3, 0))
    # Zero one branch's output weights: whatever still differs comes from the other branch.
    for silent in (block.attention.out, block.mlp.down):
        kept = silent[...]
        silent[...] = jnp.zeros_like(kept)
        runs = [block(x, rope, rope, lambda q, k, v: q, key) for key in (None, jax.random.key(1))]
        assert not jnp.allclose(*runs)
        silent[...] = kept


WIDE = Model(vocab_size=600, d_model=256, layers=4, heads=4, kv_heads=2, head_dim=32, d_ff=512)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "tinyllama",
            dict(
                embedding=math.sqrt(2 / 1280),
                query=math.sqrt(2 / 1280),
                out=1 / 64,
                down=1 / 64,
                head=math.sqrt(2 / 1280),
            ),
        ),
        (
            "tinyllama_start",
            dict(
                embedding=math.sqrt(2 / 1280),
                gate=math.sqrt(2 / 1280),
                out=math.sqrt(2 / 640),  # fan-in is heads * head_dim = 128
                down=1 / (math.sqrt(512) * 4),
            ),
        ),
        (
            "torch_default",
            dict(embedding=1.0, query=1 / 16 / math.sqrt(3), out=1 / math.sqrt(128 * 3), down=1 / math.sqrt(512 * 3)),
        ),
    ],
)
def test_initial_standard_deviations(kind, expected):
    make = init.initializers(config.replace(WIDE, init=kind))
    for name, stddev in expected.items():
        weights = make[name](jax.random.key(1), (400, 500))
        assert float(jnp.std(weights)) == pytest.approx(stddev, rel=0.01), name
        bounded = kind == "torch_default" and name != "embedding"
        assert (float(jnp.max(jnp.abs(weights))) <= stddev * math.sqrt(3) * 1.001) == bounded, name


def test_numbers_of_the_documented_recipe_at_full_size():
    cfg = Model(vocab_size=32000, d_model=2048, layers=22, heads=32, kv_heads=4, head_dim=64, d_ff=5632)
    for kind, name, stddev in (
        ("tinyllama", "query", 0.013975),
        ("tinyllama", "out", 0.0010044),
        ("tinyllama", "down", 0.0010044),
        ("tinyllama_start", "out", 0.013975),
        ("tinyllama_start", "down", 0.000606),
        ("torch_default", "query", 0.01276),
    ):
        weights = init.initializers(config.replace(cfg, init=kind))[name](jax.random.key(0), (500, 500))
        assert float(jnp.std(weights)) == pytest.approx(stddev, rel=0.01), (kind, name)
