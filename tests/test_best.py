"""Which step was the best, and when it is time to stop."""

import json

import pytest

from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import best, saved


def line(step, **losses):
    return {"step": step, "domains": {name: {"loss": loss} for name, loss in losses.items()}}


def write(run, *lines):
    run.mkdir(exist_ok=True)
    (run / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_mean_is_over_what_is_not_replayed():
    assert best.mean_loss({"domains": {"a": {"loss": 2.0}, "b": {"loss": 4.0}, "replay/c": {"loss": 90.0}}}) == 3.0
    assert best.mean_loss({"domains": {"replay/c": {"loss": 90.0}}}) == 90.0, "nothing else is there"


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    write(tmp_path / "r", line(0, a=3.0), line(5, a=None), line(10, a=2.0))
    found = best.losses(tmp_path / "r")
    assert best.best(found) == 10
    assert best.best(found, steps=[5]) is None


def test_of_equals_the_first(tmp_path):
    assert best.best([(1, 2.0), (2, 2.0), (3, 2.5)]) == 1


def test_only_lines_up_to_the_step_that_a_run_continues_from_count(tmp_path):
    write(tmp_path / "r", line(0, a=3.0), line(5, a=1.0), line(10, a=2.0))
    assert best.losses(tmp_path / "r", until=0) == [(0, 3.0)]
    assert best.losses(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "losses, waited",
    [([3.0], 0), ([3.0, 3.0], 1), ([3.0, 4.0, 2.0], 0), ([3.0, 4.0, 3.5], 2), ([1.0, 2.0, 0.5, 0.5, 0.5], 2), ([], 0)],
)
def test_waiting_counts_validations_since_the_best(losses, waited):
    assert best.waited(list(enumerate(losses))) == waited


def test_run_at_best_is_the_best_step_that_has_a_checkpoint(tmp_path):
    run = tmp_path / "r"
    write(run, line(0, a=0.5), line(5, a=2.0), line(10, a=1.0), line(15, a=1.5))
    with pytest.raises(CheckpointError, match="r@best: no checkpoint there has a validation loss"):
        saved.resolve(f"{run}@best")
    for step in (5, 15):
        (run / "checkpoints" / f"{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"{step:08d}" / "checksums.json").write_text("{}")
    assert saved.resolve(f"{run}@best").name == "00000015", "steps 0 and 10 have none"
    with pytest.raises(CheckpointError, match="no such directory"):
        saved.resolve(f"{tmp_path}/other@best")
