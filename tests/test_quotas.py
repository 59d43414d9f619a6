"""A mixture's draws can be entered anywhere, and are those of a walk from the beginning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import MIXTURES, named_rows, order, random_curriculum, stage

from tinyllama_jax.data import quotas


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_entering_anywhere_gives_what_walking_there_gives(seed, sources):
    """Ramps and stages leave draws owed, so that some come late in the phase behind."""
    rng, windows = np.random.default_rng(seed), {f"s{i}": 1000 for i in range(sources)}
    curriculum = random_curriculum(rng, sources)
    walked, entered = order(curriculum, windows), order(curriculum, windows)
    everything = [(walked.counts(step), named_rows(walked, step)) for step in range(walked.plan.total_steps)]
    for step in rng.permutation(walked.plan.total_steps).tolist():
        assert (entered.counts(step), named_rows(entered, step)) == everything[step]


@pytest.mark.parametrize("name", ["TinyLlama v1.1", "forty alike", "falling by half"])
def test_entering_walks_no_further_back_than_the_rarest_source_waits(name, monkeypatch):
    weights, rows, step = MIXTURES[name], 512, 1_999_997
    expected = rows_of_a_whole_frame(
        order((stage("x", 2_000_000, rows, weights),), dict.fromkeys(weights, 10**9)), step
    )
    walked, walk = [], quotas._Frame._walk
    monkeypatch.setattr(quotas._Frame, "_walk", lambda frame, to: (walked.append(to - frame._walked), walk(frame, to)))
    o = order((stage("x", 2_000_000, rows, weights),), dict.fromkeys(weights, 10**9))
    assert named_rows(o, step) == expected
    rarest = sum(weights.values()) / min(weights.values())
    assert sum(walked) < rows + 2 * rarest + 10


def test_entering_where_draws_come_late():
    """Several draws are owed to a source, as no stage leaves them: what waits may be due already."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shares = (rng.dirichlet([0.7] * 4) * quotas.ONE).astype(int).tolist()
        owed = [int(draws * quotas.ONE) for draws in rng.normal(0, 4, 4)]
        pieces, owed[-1] = [(10**6, [quotas.ONE - sum(shares[1:]), *shares[1:]])], -sum(owed[:-1])
        walked = quotas.Phase(pieces, owed).sources(0, 300)
        for start in (1, 2, 5, 17, 150):
            assert np.array_equal(quotas.Phase(pieces, owed).sources(start, 300), walked[start:])
            drawn = np.bincount(walked[:start], minlength=4)
            assert np.array_equal(quotas.Phase(pieces, owed).counts(start), drawn)


def rows_of_a_whole_frame(o, step):
    """The rows of a step, after its frame was walked from border to border."""
    phase = o._phases[0].quotas
    frame = phase._frame(phase._frame_of(o.plan.windows_at(step)))
    frame.sources(frame.start, frame.stop)
    return named_rows(o, step)
