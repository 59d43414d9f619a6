import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from tinyllama_jax.lab import compare

LOSSES = st.lists(st.floats(2.0, 4.0), min_size=2, max_size=6)


def by_seed(values, first=0):
    return {first + i: value for i, value in enumerate(values)}


def test_a_paired_difference_has_the_p_value_of_the_paired_t_test():
    a, b = [3.10, 3.14, 3.08, 3.12], [3.13, 3.155, 3.10, 3.16]
    found = compare.difference(by_seed(a), by_seed(b))
    expected = stats.ttest_rel(b, a)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.method, found.n) == ("paired", 4)
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert found.se == pytest.approx(np.std(np.subtract(b, a), ddof=1) / 2)


def test_without_seeds_in_common_it_is_welchs():
    a, b = [3.10, 3.14, 3.08], [3.20, 3.155, 3.30, 3.16]
    found = compare.difference(by_seed(a), by_seed(b, first=100))
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.method, found.n) == ("Welch", 3)


@given(LOSSES, LOSSES)
def test_welch_agrees_with_scipy(a, b):
    assume(np.std(a) > 1e-6 and np.std(b) > 1e-6)
    found = compare.difference(by_seed(a), by_seed(b, first=100))
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-8, abs=1e-300)


def test_seeds_of_one_side_only_take_no_part_in_a_paired_difference():
    found = compare.difference({0: 3.0, 1: 3.2, 2: 9.0}, {0: 3.1, 1: 3.28, 7: 1.0})
    assert (found.method, found.n) == ("paired", 2) and found.value == pytest.approx(0.09)


@pytest.mark.parametrize(("a", "b"), [({0: 3.0}, {0: 3.1}), ({0: 3.0, 1: 3.2}, {5: 3.1})])
def test_one_run_makes_no_claim(a, b):
    found = compare.difference(a, b)
    assert found.note == "one seed: no standard error, no claim" and found.method == "none"
    assert math.isnan(found.p) and math.isnan(found.se) and found.n == 1
    assert found.value == pytest.approx(np.mean(list(b.values())) - np.mean(list(a.values())))


def test_equal_differences_have_no_noise_to_test_against():
    found = compare.difference({0: 3.0, 1: 3.2, 2: 3.1}, {0: 3.1, 1: 3.3, 2: 3.2})
    assert found.se == 0 and math.isnan(found.p) and "no noise" in found.note
    same = compare.difference({0: 3.0, 1: 3.2}, {0: 3.0, 1: 3.2})
    assert same.value == 0 and math.isnan(same.p)


def test_a_mean_has_a_standard_error_from_two_values_on():
    found = compare.mean([1.0, 2.0, 4.0])
    assert found.n == 3 and found.se == pytest.approx(stats.sem([1, 2, 4]))
    assert math.isnan(compare.mean([1.0]).se)
    with pytest.raises(ValueError):
        compare.mean([])


def test_chance_alone_gives_p_below_a_tenth_in_a_tenth_of_the_cases():
    rng = np.random.default_rng(0)
    p = [
        compare.difference(by_seed(a), by_seed(b)).p
        for a, b in zip(rng.normal(3, 0.01, (2000, 3)), rng.normal(3, 0.01, (2000, 3)), strict=True)
    ]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.02)
