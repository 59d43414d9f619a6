import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.config import Model, Rope
from tinyllama_jax.model import rope


def model(head_dim=64, **kwargs):
    return Model(vocab_size=8, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=head_dim, d_ff=8, rope=Rope(**kwargs))


def scaled(factor, **kwargs):
    return dict(factor=factor, original_context_tokens=2048, **kwargs)


KINDS = {
    "default": dict(),
    "none": dict(kind="none"),
    "partial": dict(kind="partial", fraction=0.25),
    "linear": dict(kind="linear", factor=4.0),
    "ntk": dict(kind="ntk", factor=4.0),
    "yarn": dict(kind="yarn", **scaled(4.0)),
    "llama3": dict(kind="llama3", **scaled(8.0)),
}


def test_default_frequencies():
    frequencies, scale = rope.inverse_frequencies(model())
    np.testing.assert_allclose(frequencies, [10000 ** (-2 * i / 64) for i in range(32)], rtol=1e-7)
    assert (scale, frequencies.dtype) == (1.0, np.float32)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(kind):
    plain, _ = rope.inverse_frequencies(model())
    same, scale = rope.inverse_frequencies(model(kind=kind, factor=1.0))
    np.testing.assert_allclose(same, plain, rtol=1e-7)
    assert scale == 1.0


def test_linear_is_position_interpolation():
    stretched = rope.tables(model(kind="linear", factor=4.0), jnp.arange(0, 64, 4))
    plain = rope.tables(model(), jnp.arange(16))
    np.testing.assert_allclose(stretched, plain, atol=1e-6)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    plain, _ = rope.inverse_frequencies(model())
    ntk, _ = rope.inverse_frequencies(model(kind="ntk", factor=4.0))
    np.testing.assert_allclose(ntk[[0, -1]], plain[[0, -1]] / [1, 4], rtol=1e-6)
    assert np.all(np.diff(ntk / plain) < 0)


def test_yarn_ramp_runs_between_whole_pairs():
    # Head of 64, theta 10000, 2048 tokens: 32 turns at pair 8.06, one turn at pair 20.1; rounded outwards to 8 and 21.
    plain, _ = rope.inverse_frequencies(model())
    yarn, scale = rope.inverse_frequencies(model(kind="yarn", **scaled(4.0)))
    np.testing.assert_allclose(yarn[:9], plain[:9], rtol=1e-6)
    np.testing.assert_allclose(yarn[21:], plain[21:] / 4, rtol=1e-6)
    np.testing.assert_allclose(yarn[12] / plain[12], 1 - 4 / 13 * 3 / 4, rtol=1e-6)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    assert rope.inverse_frequencies(model(kind="yarn", **scaled(4.0, attention_factor=1.25)))[1] == 1.25


def test_llama3_bands():
    frequencies, scale = rope.inverse_frequencies(model(kind="llama3", **scaled(8.0)))
    plain, _ = rope.inverse_frequencies(model())
    wavelengths = 2 * np.pi / plain
    for got, old, wavelength in zip(frequencies, plain, wavelengths, strict=True):
        smooth = (2048 / wavelength - 1) / 3
        middle = (1 - smooth) * old / 8 + smooth * old
        want = old if wavelength < 2048 / 4 else old / 8 if wavelength > 2048 else middle
        assert got == pytest.approx(want, rel=1e-6)
    assert scale == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_distance_only(kind):
    cfg = model(head_dim=16, **KINDS[kind])
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in "qk")

    def score(q_position, k_position):
        turned = [rope.rotate(x, *rope.tables(cfg, jnp.array([p]))) for x, p in ((q, q_position), (k, k_position))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    moved = abs(score(7, 3) - score(7, 6))
    assert moved == 0 if kind == "none" else moved > 1e-2


def test_half_split_pairing():
    cfg = model(head_dim=8)
    cos, sin = rope.tables(cfg, jnp.array([3]))
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    turned = rope.rotate(x, cos, sin)[0, 0, 0]
    angle = 3 * 10000 ** (-2 / 8)
    np.testing.assert_allclose(turned[jnp.array([1, 5])], [math.cos(angle), math.sin(angle)], atol=1e-6)
    assert float(jnp.abs(turned).sum() - jnp.abs(turned[jnp.array([1, 5])]).sum()) == 0


def test_partial_leaves_the_rest_alone_and_none_everything():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.float32)
    turned = rope.rotate(x, *rope.tables(model(16, kind="partial", fraction=0.25), jnp.arange(5)))
    assert jnp.array_equal(turned[..., 4:], x[..., 4:]) and not jnp.array_equal(turned[:, 1:, :, :4], x[:, 1:, :, :4])
    assert jnp.array_equal(rope.rotate(x, *rope.tables(model(16, kind="none"), jnp.arange(5))), x)


def test_constant_tables_are_those_that_the_program_computes(monkeypatch):
    cfg, positions = model(64, kind="yarn", factor=4.0, original_context_tokens=2048), np.arange(4096)
    constant = rope.tables(cfg, positions)
    for made in (rope.tables(cfg, jnp.asarray(positions)), jax.jit(lambda x: rope.tables(cfg, x))(positions)):
        np.testing.assert_allclose(made, constant, atol=4e-7)  # two ulp of values up to 1.14
    monkeypatch.setattr(rope, "LARGEST_CONSTANT", positions.size)
    assert "cosine" in jax.jit(lambda: rope.tables(cfg, positions)).lower().as_text()


def test_bf16_heads_are_turned_in_float32():
    cos, sin = rope.tables(model(64), jnp.arange(2040, 2048))
    assert cos.dtype == sin.dtype == jnp.float32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 1, 64)), jnp.bfloat16)
    turned = rope.rotate(x, cos, sin)
    exact = rope.rotate(x.astype(jnp.float32), cos, sin)
    assert turned.dtype == jnp.bfloat16
    assert jnp.array_equal(turned, exact.astype(jnp.bfloat16))


HF = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, KINDS["linear"]),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        KINDS["yarn"],
    ),
    "yarn, own factors": (
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        dict(
            kind="yarn",
            factor=16.0,
            original_context_tokens=4096,
            attention_factor=1.5,
            beta_fast=16.0,
            beta_slow=2.0,
        ),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        KINDS["llama3"],
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("theirs", "ours"), HF.values(), ids=HF)
def test_frequencies_as_in_transformers(theirs, ours, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = theirs | {"rope_theta": theta}
    hf = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=parameters)
    frequencies, scale = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](hf, "cpu")
    got, got_scale = rope.inverse_frequencies(model(64, theta=theta, **ours))
    np.testing.assert_allclose(got, frequencies.numpy(), rtol=2e-6)
    assert got_scale == pytest.approx(scale)
