"""The next token: filters, penalty and draws, each row in its own way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import sampling
from tinyllama_jax.generate.sampling import Rows, Sampling

P4 = np.array([0.5, 0.3, 0.15, 0.05])
LOGITS = jnp.log(jnp.asarray(P4[None], jnp.float32))


def on(logits, *of):
    how, uses = sampling.rows(of)
    return sampling.filtered(jnp.tile(logits, (len(of), 1)), Rows(*map(jnp.asarray, how)), uses)


def kept(**how):
    return np.isfinite(np.asarray(on(LOGITS, Sampling(temperature=1.0, **how))))[0].tolist()


def test_filters():
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.79) == [True, True, False, False]
    assert kept(top_p=0.81) == [True, True, True, False]
    assert kept(top_p=1e-9) == [True, False, False, False]
    assert kept(top_k=9) == kept() == [True] * 4
    assert kept(min_p=0.29) == [True, True, True, False]
    assert kept(min_p=1.0) == [True, False, False, False]
    # The nucleus is of what top-k left: 0.5 / 0.95 of the first reach 0.52.
    assert kept(top_k=3, top_p=0.52) == [True, False, False, False] and kept(top_p=0.52) == [True, True, False, False]


def test_rows_are_filtered_each_in_its_own_way():
    rows = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.79)]
    rows += [Sampling(temperature=1.0, min_p=0.29), Sampling(temperature=0.5)]
    together = np.asarray(on(LOGITS, *rows))
    for got, row in zip(together, rows, strict=True):
        np.testing.assert_array_equal(got, np.asarray(on(LOGITS, row))[0])
    np.testing.assert_allclose(jax.nn.softmax(together[-1]), P4**2 / (P4**2).sum(), rtol=1e-5)


def test_a_wide_nucleus_loses_nothing_to_rounding():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5000)), jnp.float32)
    got = on(logits, Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5))
    assert np.isfinite(np.asarray(got)[0]).all() and not np.isfinite(np.asarray(got)[1]).all()


def test_the_penalty_is_for_what_the_row_holds():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False], [False] * 4])
    got = sampling.penalized(logits, seen, jnp.array([4.0, 4.0]))
    np.testing.assert_array_equal(got, [[0.5, -8.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]])


def draw(count, **how):
    """`count` draws, each of a row with a stream of its own."""
    arrays, uses = sampling.rows([Sampling(stream=i, **how) for i in range(count)])
    logits = jnp.tile(LOGITS, (count, 1))
    return np.asarray(sampling.pick(logits, Rows(*map(jnp.asarray, arrays)), uses, jnp.zeros(count, jnp.int32)))


def test_frequencies_follow_the_probabilities():
    assert np.allclose(np.bincount(draw(20_000, temperature=1.0), minlength=4) / 20_000, P4, atol=0.015)
    top = np.bincount(draw(20_000, temperature=1.0, top_k=2), minlength=4) / 20_000
    assert np.allclose(top, [0.625, 0.375, 0, 0], atol=0.015)
    assert set(draw(50, temperature=0.0)) == {0}


def test_a_draw_is_decided_by_seed_stream_and_number():
    def one(seed, stream, number):
        how, _ = sampling.rows([Sampling(seed=seed, stream=stream)])
        return tuple(
            np.asarray(jax.random.key_data(sampling.keys(Rows(*map(jnp.asarray, how)), jnp.array([number]))))[0]
        )

    keys = [one(0, 0, 0), one(1, 0, 0), one(0, 1, 0), one(0, 0, 1), one(2**32 - 1, 0, 0)]
    assert len(set(keys)) == 5 and one(0, 0, 0) == keys[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"sampling: {next(iter(wrong))} is "):
        Sampling(**wrong)
