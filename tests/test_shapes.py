"""Shapes near a wanted size: close to it, buildable, and alike along a ladder."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax import flops
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import shapes
from tinyllama_jax.presets import preset


@given(
    size=st.floats(7.0, 10.5).map(lambda x: 10**x),
    vocab_size=st.sampled_from([512, 32_000]),
    count=st.sampled_from(["non_embedding", "matmul", "total"]),
)
@settings(max_examples=60, deadline=None)
def test_a_shape_is_within_the_tolerance_and_can_be_built(size, vocab_size, count):
    try:
        model = shapes.near(size, vocab_size=vocab_size, context_tokens=2048, count=count, tolerance=0.15)
    except ConfigError as error:
        # heads of 64 and a large vocabulary leave no small model
        assert vocab_size == 32_000 and size < 3e7 and "give a smaller head_dim" in str(error)
        return
    assert flops.parameter_counts(model)[count] == pytest.approx(size, rel=0.151)
    assert model.d_model == model.heads * model.head_dim and model.head_dim == 64
    assert model.heads % model.kv_heads == 0
    assert model.d_ff % 64 == 0 and 0.8 < model.d_ff / (8 * model.d_model / 3) < 1.2
    assert (model.vocab_size, model.context_tokens) == (vocab_size, 2048)


@given(size=st.floats(5.0, 6.5).map(lambda x: 10**x))
@settings(max_examples=25, deadline=None)
def test_small_heads_make_small_models(size):
    model = shapes.near(size, vocab_size=512, context_tokens=128, head_dim=16, tolerance=0.25)
    assert flops.parameter_counts(model)["non_embedding"] == pytest.approx(size, rel=0.26)


@pytest.mark.parametrize("name", ["t37", "t79", "t150", "t331", "t1100"])
def test_the_ladders_sizes_are_found_again(name):
    """The table of the ladder: within 2 % of its N without embeddings, and not far from its width."""
    wanted = preset(name)
    model = shapes.near(
        flops.parameter_counts(wanted)["non_embedding"], vocab_size=32_000, context_tokens=2048, width_per_layer=48
    )
    found, there = (flops.parameter_counts(m)["non_embedding"] for m in (model, wanted))
    assert found == pytest.approx(there, rel=0.10) and 0.6 < model.d_model / wanted.d_model < 1.6


def test_what_cannot_be_built_is_said_and_fields_pass_through():
    with pytest.raises(ConfigError, match="no shape of 1e\\+03 parameters .*give a smaller head_dim"):
        shapes.near(1e3, vocab_size=512, context_tokens=128)
    assert shapes.near(1e8, vocab_size=512, context_tokens=128, tied_embeddings=True).tied_embeddings
