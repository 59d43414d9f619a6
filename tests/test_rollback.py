"""Too many skipped steps in a row: back to the checkpoint before them, and past the batches that followed."""

import json

import pytest
from quick_experiment import quick, quick_command

from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.train import rollback
from tinyllama_jax.train.rollback import TooManySkips


@pytest.mark.parametrize(
    ("steps", "step", "count", "expected"),
    [
        ([5, 10, 15], 14, 3, 10),
        ([5, 10, 11], 11, 1, 10),  # the step at 11 was skipped, the checkpoint of step 10 is from before
        ([12, 14], 15, 5, 12),  # none from before: a skipped step leaves the weights as they were
        ([], 7, 2, 0),
    ],
)
def test_where_to(steps, step, count, expected):
    assert rollback.target(steps, TooManySkips(step, count)) == expected


def test_the_batches_since_are_left_out_stage_by_stage():
    run = quick()
    assert rollback.applied(run, []) == run
    changed = rollback.applied(run, [{"from": 11, "to": 6}, {"from": 14, "to": 12}])
    assert changed.data.skip_ranges == ((6, 8), (8, 11), (12, 14)), "steps 0-8 are the first stage"
    assert replace(changed, data=run.data) == run


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / rollback.NAME).write_text("{")
    with pytest.raises(ConfigError, match="rollbacks.json: not readable"):
        rollback.read(tmp_path)


def records(workdir, name):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def strict(sigma, rollbacks):
    """The guard takes every rise for a spike, so that steps are skipped in a row."""
    return (
        f"optimizer.skip_sigma={sigma}",
        "optimizer.skip_window_steps=4",
        "optimizer.max_skips=2",
        f"health.max_rollbacks={rollbacks}",
        "lr.peak=0.3",
        "lr.end=0.2",
    )


def test_a_run_goes_back_and_past_and_the_same_command_goes_on_from_there(small_store, tmp_path, capfd):
    workdir = tmp_path / "run"
    status = main(quick_command(small_store, workdir, *strict(1e-3, 1)))
    said = capfd.readouterr().err
    found = json.loads((workdir / rollback.NAME).read_text())["rollbacks"]
    assert len(found) == 1 and found[0]["to"] < found[0]["from"]
    assert f"back to step {found[0]['to']}" in said and "1 of health.max_rollbacks=1" in said
    config = json.loads((workdir / "run.json").read_text())["config"]
    assert config["data"]["skip_ranges"], "what was decided is part of the run"
    # With so strict a guard it fails again, now for good: status 1, and the reason.
    assert status == 1 and "after 1 rollback(s)" in said and "diverged" in said
    starts = [event for event in records(workdir, "events") if event["kind"] == "start"]
    assert [event["step"] for event in starts] == [0, found[0]["to"]]
    steps = [record["step"] for record in records(workdir, "metrics")]
    assert steps == list(range(1, len(steps) + 1)), "the records have each step once"
    # A more lenient guard finishes it, on the batches that were decided on.
    lenient = quick_command(small_store, workdir, *strict(0, 1))
    assert main([*lenient, "--allow-config-change"]) == 0
    assert "resumed at step" in capfd.readouterr().err
    assert json.loads((workdir / rollback.NAME).read_text())["rollbacks"] == found


def test_no_rollback_where_none_is_wanted(small_store, tmp_path, capfd):
    workdir = tmp_path / "run"
    assert main(quick_command(small_store, workdir, *strict(1e-3, 0))) == 1
    said = capfd.readouterr().err
    assert "diverged: the last 2 steps up to step" in said and "rollback(s)" not in said
    assert not (workdir / rollback.NAME).exists()
