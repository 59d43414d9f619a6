"""Laws of repeated data, on made points and on 308 published runs (arXiv 2305.16264; data in tests/data)."""

import math
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.fit import chinchilla, repeated, repetition
from tinyllama_jax.lab.fit.points import Columns, Points, read_csv
from tinyllama_jax.lab.fit.profile import profile
from tinyllama_jax.lab.fit.robust import Problem, minimise

RUNS = Path(__file__).parent / "data" / "repetition_runs.csv"
COLUMNS = Columns(N="params", D="tokens", U="unique_tokens", L="val_loss")


@pytest.fixture(scope="module")
def published() -> Points:
    return read_csv(RUNS, COLUMNS, [("in_published_fit", "1")])


def made(noise: float = 0.0, r_d: float = 15.0, r_n: float = 5.0, seed: int = 0) -> Points:
    """Runs of one epoch and of up to 60, of the published surface."""
    rng = np.random.default_rng(seed)
    u = np.repeat([1e8, 1e9, 1e10, 1e11], 40)
    n = u / 20 * 10 ** rng.uniform(-1, 1.2, len(u))
    d = u * np.where(np.arange(len(u)) % 3 == 0, 1.0, 10 ** rng.uniform(0, 1.8, len(u)))
    points = Points.of(n, d, np.ones(len(u)), U=u)
    theta_SP = np.log([[r_d, r_n]])
    loss = np.exp(repeated.Effective(repeated.PUBLISHED).at(points)(theta_SP)[0][0])
    return Points.of(n, d, loss * np.exp(noise * rng.normal(size=len(u))), U=u)


def test_the_published_constants_have_the_published_objective(published):
    law = repeated.Effective(repeated.PUBLISHED)
    problem, theta_SP = Problem(law.at(published), np.log(published.L)), np.log([[15.387756, 5.309743]])
    assert len(published) == 182
    assert problem.objective(theta_SP, np.arange(1))[0] == pytest.approx(0.0158259353, abs=1e-9)
    predicted = np.exp(problem.law(theta_SP)[0][0])
    around = ((published.L - published.L.mean()) ** 2).sum()
    assert 1 - ((predicted - published.L) ** 2).sum() / around == pytest.approx(0.7722046085, abs=1e-9)
    one = Points.of([6.34e9], [242e9], [1.0], U=[25e9])
    assert math.exp(law.at(one)(theta_SP)[0][0, 0]) == pytest.approx(2.22564408900, abs=1e-10)


def test_their_valley_is_found_from_beside_it_and_the_pair_is_called_unidentified(published):
    found = repetition.fit(published, base=repeated.PUBLISHED, start={"R_D": 20, "R_N": 20}, draws=300)
    assert found.constants["R_D"] == pytest.approx(15.372, abs=0.01)
    assert found.constants["R_N"] == pytest.approx(5.315, abs=0.01)
    said = " ".join(found.warnings)
    assert "R_D is not identified" in said and "to its upper bound" in said and "R_N is not identified" in said
    assert found.profiles["R_D"]["interval"][1] is None
    assert found.ci95["R_D"][0] < 8 and found.ci95["R_D"][1] > 1e4
    assert found.quality["r2"] == pytest.approx(0.772, abs=1e-3)


@pytest.mark.parametrize("start", [(15.4, 5.3), (95.4, 1.7)])
def test_the_ends_of_a_profile_do_not_depend_on_its_grid(published, start):
    """From either of two valleys, whatever the steps of the grid and where it begins; they were 7.9 to 12.6 once."""
    law = repeated.Effective(repeated.PUBLISHED)
    problem = Problem(law.at(published), np.log(published.L))
    bounds = (law.lower_P, law.upper_P)
    theta_P = minimise(problem, np.log([start]), *bounds).theta_SP[0]
    grids = [(width, steps) for width in (0.1, 0.5, 2.0) for steps in (10, 24)]
    found = [[profile(problem, theta_P, *bounds, p, w, steps)["interval"] for p in (0, 1)] for w, steps in grids]
    for of_d, of_n in found:
        assert of_d[1] is None, "up to the bound the fit is as good"
        assert np.exp(of_d[0]) == pytest.approx(7.51, rel=0.012)
        assert np.exp(of_n) == pytest.approx([0.602, 10.64], rel=0.012)


def test_there_are_lower_minima_and_all_are_listed(published):
    found = repetition.fit(published, base=repeated.PUBLISHED, draws=20)
    assert found.objective < 0.0158259353 * (1 - 0.0012)
    listed = [(round(m["R_D"], 1), round(m["R_N"], 1)) for m in found.quality["minima"]]
    assert listed[0] == (95.4, 1.7) and (15.4, 5.3) in listed


def test_the_three_laws_are_compared_where_they_were_not_fitted(published):
    table = repetition.compare(published, repeated.PUBLISHED)
    assert list(table) == ["effective", "penalty", "saturating"]
    for row in table.values():
        for what in ("most_epochs", "largest_budget"):
            assert 0.01 < row[what]["mean_relative_error"] < 0.2 and row[what]["points"] >= 5
    assert table["saturating"]["r2"] > table["effective"]["r2"], "it may rise with parameters, as these runs do"


@pytest.mark.parametrize("given", [True, False])
def test_made_points_give_their_constants_back(given):
    base = repeated.PUBLISHED if given else None
    found = repetition.fit(made(), base=base, draws=50)
    assert found.constants["R_D"] == pytest.approx(15.0, rel=1e-4)
    assert found.constants["R_N"] == pytest.approx(5.0, rel=1e-4)
    assert not [w for w in found.warnings if "identified" in w]
    assert found.derived["base"]["E"] == pytest.approx(repeated.PUBLISHED["E"], rel=1e-5)
    assert found.derived["base_from"] == "given" if given else "deserve" in found.derived["base_from"]
    noisy = repetition.fit(made(0.003, seed=1), base=base, draws=200)
    low, high = noisy.ci95["R_D"]
    assert low < 15 < high and high / low < 2


def test_a_surface_that_misses_the_few_tokens_gives_way_to_one_of_all_runs():
    """Where the tokens are few, losses lie below the surface of the long runs: that of all runs is then the better."""
    points = made()
    few = points.U < 2e8
    points.L[few] *= 0.9
    found = repetition.fit(points, draws=10)
    assert found.derived["base_from"].startswith("all ")
    _, repeats = repeated.unique(points)
    surfaces = repetition._surfaces(points, repetition.DELTA)
    assert len(surfaces) == 2
    objectives = [repetition.fit(points, base=base, draws=5).objective for base, _ in surfaces]
    assert found.objective == pytest.approx(min(objectives)) and objectives[1] < objectives[0]
    once = few & (repeats == 0)
    assert once.sum() > 5
    points.L[np.flatnonzero(once)[0]] *= 1.5
    (warning,) = [w for w in repetition.fit(points, draws=10).warnings if "runs of one epoch are missed" in w]
    assert "does not hold" in warning


def test_effective_epochs_are_as_published():
    worth = repeated.effective_epochs([1, 2, 4, 8, 16, 32, 1e9], 15.387756)
    np.testing.assert_allclose(worth, [1, 1.97, 3.73, 6.6, 10.6, 14.3, 16.4], atol=0.05)
    u = 25e9
    n = repeated.optimal_parameters(repeated.PUBLISHED, u)
    best = chinchilla.optimum(repeated.PUBLISHED, 6 * n * u)
    assert best["N"] == pytest.approx(n) and best["D"] == pytest.approx(u)


@pytest.mark.parametrize("name", repeated.LAWS)
def test_derivatives_are_those_of_the_law(published, name):
    law = repeated.LAWS[name](repeated.PUBLISHED)
    predict, theta_SP = law.at(published), law.starts(published)[:4] + 0.01
    derivative_SNP = predict(theta_SP)[1]
    for p in range(theta_SP.shape[1]):
        h_P = np.eye(theta_SP.shape[1])[p] * 1e-6
        numeric_SN = (predict(theta_SP + h_P)[0] - predict(theta_SP - h_P)[0]) / 2e-6
        np.testing.assert_allclose(derivative_SNP[..., p], numeric_SN, atol=1e-8)


def test_repeating_nothing_costs_nothing(published):
    once = Points.of([1e8, 1e9], [1e9, 1e10], [1, 1], U=[1e9, 1e11])
    for name in ("effective", "penalty"):
        law = repeated.LAWS[name](repeated.PUBLISHED)
        predicted = np.exp(law.at(once)(law.starts(once)[:1])[0][0])
        if name == "penalty":
            np.testing.assert_allclose(predicted, chinchilla.loss(repeated.PUBLISHED, once.N, once.D), rtol=1e-12)
        else:  # parameters beyond those that the unique tokens deserve are worth less
            assert (predicted >= chinchilla.loss(repeated.PUBLISHED, once.N, once.D) * (1 - 1e-12)).all()


def test_what_cannot_be_done_is_one_line(published):
    with pytest.raises(ConfigError, match="not one of effective, penalty, saturating"):
        repetition.fit(published, law="other")
    with pytest.raises(ConfigError, match="the constants are R_D, R_N"):
        repetition.fit(published, base=repeated.PUBLISHED, start={"R": 3})
    with pytest.raises(DataError, match="0 runs of several epochs"):
        repetition.fit(Points.of(published.N, published.D, published.L))
    with pytest.raises(DataError, match="runs of one epoch cannot determine"):
        repetition.fit(published.take(published.D > 2 * published.U))
