"""The proof of the fits at a fifth of its size, and that it fails where a claim does not hold."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import proof_fits

from tinyllama_jax.lab.fit import chinchilla, repeated
from tinyllama_jax.lab.fit.robust import minimise


def from_beside_the_truth(points) -> np.ndarray:
    """A twentieth of the search: the proof itself looks from everywhere."""
    true = np.array([np.log(482.01), np.log(2085.43), np.log(1.8172), 0.3478, 0.3658])
    surface = chinchilla.Surface()
    starts_SP = true + np.array([[0, 0, 0, 0, 0], [-0.5, 0.5, -0.1, -0.03, 0.03], [0.5, -0.5, 0.1, 0.03, -0.03]])
    found = minimise(surface.problem(points), starts_SP, surface.lower_P, surface.upper_P, enough=1e-9)
    return found.theta_SP[found.best]


def test_intervals_cover_the_truth():
    covered = proof_fits.coverage(0.01, 20, 100, from_beside_the_truth)
    assert proof_fits.covers(covered, 20, (0.75, 1.0)), covered


def test_intervals_around_another_place_do_not():
    wrong = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])

    def around_the_wrong_place(self, points, theta_P, draws, seed):
        return wrong + 1e-3 * np.random.default_rng(seed).normal(size=(draws, 5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chinchilla.Surface, "resampled", around_the_wrong_place)
        covered = proof_fits.coverage(0.01, 5, 20, from_beside_the_truth)
    assert not proof_fits.covers(covered, 5, (0.75, 1.0))


def test_without_noise_it_is_exact():
    assert proof_fits.exactness(2) < 1e-6


def test_published_figures_come_out_and_others_are_refused(monkeypatch):
    found = proof_fits.published_repetition(20)
    assert proof_fits.as_published(found)
    assert not proof_fits.as_published(found | {"objective": found["objective"] * 1.0001})
    monkeypatch.setitem(repeated.PUBLISHED, "B", 1500.0)
    assert not proof_fits.as_published(proof_fits.published_repetition(20))


def test_the_committed_record_holds_every_claim():
    record = json.loads((proof_fits.RESULTS / "proof_fits.json").read_text())
    assert record["failed"] == [] and record["command"] == "python benchmarks/proof_fits.py"
    for row in record["coverage"]:
        assert row["surfaces"] == 100 and proof_fits.covers(row["covered"], 100)
    assert record["without_noise"]["largest_relative_error"] < 1e-6
    assert record["whole_fit"]["seconds"] < 120 and record["whole_fit"]["resamples"] == 1000
    assert proof_fits.as_published(record["published_repetition"])
