import math
import time

import numpy as np
import pytest

from tinyllama_jax.errors import DataError
from tinyllama_jax.evaluate.ngram import fit

RNG = np.random.default_rng(0)


def markov_windows(n, length, vocab, *, seed=0):
    """Windows from a sparse first-order Markov chain: after token a comes one of three tokens."""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(99).integers(vocab, size=(vocab, 3))
    windows = np.empty((n, length), np.int32)
    windows[:, 0] = rng.integers(vocab, size=n)
    for t in range(1, length):
        windows[:, t] = followers[windows[:, t - 1], rng.choice(3, p=[0.7, 0.2, 0.1], size=n)]
    return windows


def test_probabilities_sum_to_one_after_seen_and_unseen_tokens():
    windows = RNG.zipf(1.5, size=(30, 41)).clip(max=60)  # ids 0 and 61..99 never occur
    model = fit([windows[:10], windows[10:]], 100)
    assert model.unigram_V.sum() == pytest.approx(1, abs=1e-12)
    for previous in range(100):
        probabilities = model.bigram_probabilities(previous)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert probabilities.min() > 0


@pytest.mark.parametrize("windows", [[[0, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 1, 0, 1, 2]], [[0, 1, 2, 3, 4, 5, 6]]])
def test_probabilities_sum_to_one_where_discounts_cannot_be_estimated(windows):
    model = fit([np.array(windows)], 8)
    for previous in range(8):
        probabilities = model.bigram_probabilities(previous)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert probabilities.min() > 0


def test_nll_is_that_of_the_distribution_and_of_the_right_neighbour():
    windows = RNG.integers(12, size=(8, 30))
    model = fit([windows], 12)
    fresh = RNG.integers(12, size=(3, 5))
    nll = model.bigram_nll(fresh)
    assert nll.shape == (3, 4)
    for i in range(3):
        for t in range(4):
            assert nll[i, t] == pytest.approx(-math.log(model.bigram_probabilities(fresh[i, t])[fresh[i, t + 1]]))
            assert model.unigram_nll(fresh)[i, t] == pytest.approx(-math.log(model.unigram_V[fresh[i, t + 1]]))


def test_counts_by_hand():
    # pairs 01 x2, 10, 12, 20 over the targets 1 0 1 2 0: n1 = 3, n2 = 1, Y = 3/5
    model = fit([np.array([[0, 1, 0, 1, 2, 0]])], 3)
    assert model.unigram_V == pytest.approx((np.array([2, 2, 1]) + 0.5) / 6.5)
    d1, d2 = 1 - 2 * 0.6 * 1 / 3, 2.0 - 0  # no count of 3: D2 = 2
    # contexts per token: 0 after {1, 2}, 1 after {0}, 2 after {1}: n1 = 2, n2 = 1, Y = 1/2, D1 = 1/2, D2 = 2
    continuation = (np.array([2 - 2, 1 - 0.5, 1 - 0.5]) + (2 + 0.5 + 0.5) / 3) / 4
    assert model.bigram_probabilities(0) == pytest.approx(np.array([0, 2 - d2, 0]) / 2 + d2 / 2 * continuation)
    assert model.bigram_probabilities(1) == pytest.approx(np.array([1 - d1, 0, 1 - d1]) / 2 + d1 * continuation)


def test_bigram_comes_near_the_entropy_of_a_markov_chain_and_beats_the_unigram():
    vocab = 50
    model = fit([markov_windows(400, 101, vocab)], vocab)
    held_out = markov_windows(50, 101, vocab, seed=1)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))  # a little less where two followers are the same token
    bigram, unigram = model.bigram_nll(held_out).mean(), model.unigram_nll(held_out).mean()
    assert entropy - 0.1 < bigram < entropy + 0.03
    assert unigram > bigram + 1


def test_a_second_epoch_changes_nothing():
    windows = markov_windows(20, 33, 30)
    once, twice = fit([windows], 30), fit([windows, windows[::-1], windows[5:9]], 30)
    assert once.fitted_on_tokens == twice.fitted_on_tokens == 20 * 32
    np.testing.assert_array_equal(once.pair_probabilities, twice.pair_probabilities)


def test_merging_in_parts_gives_the_same_counts(monkeypatch):
    windows = markov_windows(40, 65, 30)
    whole = fit([windows], 30)
    monkeypatch.setattr("tinyllama_jax.evaluate.ngram._PENDING_PAIRS", 100)
    parts = fit(iter(np.array_split(windows, 13)), 30)
    np.testing.assert_array_equal(whole.pair_codes, parts.pair_codes)
    np.testing.assert_array_equal(whole.pair_probabilities, parts.pair_probabilities)


def test_evaluate_gives_nats_per_token_and_bits_per_byte_over_valid_targets():
    windows = markov_windows(20, 33, 30)
    model = fit([windows], 30)
    fresh, token_bytes = markov_windows(4, 9, 30, seed=2), np.arange(30)
    scores = model.evaluate(fresh, token_bytes)
    nll = model.bigram_nll(fresh)
    assert scores["bigram"]["loss"] == pytest.approx(nll.mean())
    assert scores["bigram"]["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / fresh[:, 1:].sum())
    valid = np.zeros((4, 8), bool)
    valid[2, 3] = True
    assert model.evaluate(fresh, token_bytes, valid=valid)["bigram"]["loss"] == pytest.approx(nll[2, 3])
    nothing = model.evaluate(fresh, np.zeros(30, int), valid=valid & False)["unigram"]
    assert math.isnan(nothing["loss"]) and math.isnan(nothing["bits_per_byte"])


def test_ids_outside_the_vocabulary_and_empty_input_are_one_line_errors():
    for windows in ([np.array([[0, 7]])], [np.array([[-1, 0]])], [np.array([[0.5, 1.0]])], [], [np.array([[3]])]):
        with pytest.raises(DataError) as error:
            fit(windows, 5)
        assert "\n" not in str(error.value)


def test_three_million_tokens_of_a_large_vocabulary_take_seconds():
    windows = RNG.zipf(1.2, size=(3000, 1001)) % 32000
    begin = time.perf_counter()
    model = fit(np.array_split(windows, 100), 32000)
    model.bigram_nll(windows[:300])
    assert time.perf_counter() - begin < 10
    assert model.fitted_on_tokens == 3_000_000
