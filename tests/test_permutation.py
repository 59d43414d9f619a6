"""The shuffle: a bijection of any size, without a table, that looks like chance."""

import numpy as np
import pytest

from tinyllama_jax.data.permutation import ROUNDS, permute, round_keys


def column(seed, name="s", epoch=0):
    return round_keys(seed, name, epoch)[:, None]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 10, 63, 64, 65, 1000, 4095, 4097, 100_003])
def test_permutation_is_a_bijection(size):
    for seed in range(3):
        assert np.array_equal(np.sort(permute(np.arange(size), size, column(seed))), np.arange(size))


def test_small_permutations_are_all_reached():
    seen = {tuple(permute(np.arange(3), 3, column(seed)).tolist()) for seed in range(200)}
    assert len(seen) == 6


def test_permutation_of_mixed_sizes_equals_one_at_a_time():
    sizes = np.array([5, 1000, 3, 464_000_000, 1])
    index = np.array([4, 17, 0, 463_999_999, 0])
    keys = np.concatenate([column(s) for s in range(5)], axis=1)
    alone = [permute(index[i : i + 1], sizes[i], column(i))[0] for i in range(5)]
    assert permute(index, sizes, keys).tolist() == alone


def test_permutation_stays_inside_huge_sizes():
    size = 2**61 + 12345
    out = permute(np.arange(size - 1000, size), size, column(0))
    assert out.min() >= 0 and out.max() < size and len(np.unique(out)) == 1000 and out.std() > size / 5


@pytest.mark.parametrize("size", [2**20, 10_000_019, 463_600_000])
def test_shuffle_quality(size):
    """60k draws: neighbours do not correlate, and 64 bins fill as a random draw would."""
    draws = 60_000
    x = permute(np.arange(draws), size, column(3407)).astype(np.float64) / size
    centred = x - x.mean()
    correlation = [np.dot(centred[:-lag], centred[lag:]) / np.dot(centred, centred) for lag in range(1, 65)]
    assert np.abs(correlation).max() < 0.02
    counts = np.bincount((x * 64).astype(int), minlength=64)
    # Drawn without repeats, so the variance shrinks by the share that is still left.
    chi_square = ((counts - draws / 64) ** 2).sum() / (draws / 64) / (1 - draws / size)
    assert 32.46 < chi_square < 106.58  # the central 99.9 % of the chi-square distribution with 63 degrees of freedom
    batches = np.bincount((x[: 1024 * 58].reshape(58, 1024) * 64).astype(int).ravel() + 64 * np.arange(58).repeat(1024))
    per_batch = ((batches.reshape(58, 64) - 16) ** 2 / 16).sum(1)
    assert 58 < per_batch.mean() < 68  # 63 +- 3.2 standard errors


def test_shuffle_quality_check_would_catch_few_rounds():
    x = permute(np.arange(60_000), 2**20, column(3407)[:2]).astype(np.float64)
    centred = x - x.mean()
    correlation = [np.dot(centred[:-lag], centred[lag:]) / np.dot(centred, centred) for lag in range(1, 65)]
    assert np.abs(correlation).max() > 0.02


def test_keys_depend_on_seed_source_and_epoch():
    keys = [round_keys(*what).tobytes() for what in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1), (11, "a", 0)]]
    assert len(set(keys)) == 5 and len(round_keys(1, "a", 0)) == ROUNDS >= 16
