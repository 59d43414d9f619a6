"""Which checkpoints lack an evaluation, what is kept of one, how a report shows it; the harness is not needed."""

import json
import os
import shutil
import signal

import pytest
import synthetic_run

from tinyllama_jax.cli import main
from tinyllama_jax.errors import CheckpointError, DataError, Preempted
from tinyllama_jax.evaluate import records, schedule
from tinyllama_jax.evaluate.milestones import COMMON_SENSE
from tinyllama_jax.evaluate.records import due, label
from tinyllama_jax.lab.evaluations import evaluations, evaluations_figure
from tinyllama_jax.lab.report import write_report
from tinyllama_jax.lab.runs import Run
from tinyllama_jax.train import durable

EVERY = 1000


def test_due_is_the_first_checkpoint_behind_each_mark_that_has_no_result():
    kept = {5: 500, 10: 1000, 15: 1500, 20: 2000, 31: 3100, 39: 3900}
    assert due(kept, {}, EVERY, 40) == [10, 20, 31], "and nothing before the first mark"
    assert due(kept, {20: 2000}, EVERY, 40) == [10, 31]
    assert due(kept, {33: 3300}, EVERY, 40) == [10, 20], "of a checkpoint that has gone, behind the same mark"
    assert due(kept, {}, EVERY, 39) == [10, 20, 31, 39], "the last one in any case"
    assert due(kept, {10: 1000, 20: 2000, 31: 3100, 39: 3900}, EVERY, 39) == []
    assert due({5: 500}, {}, EVERY, 5) == [5] and due({}, {}, EVERY, 0) == []


def test_other_options_are_other_results():
    names = [label("tinyllama"), label("tinyllama, mine"), label("a", shots=0), label("a", shots=5, limit=10)]
    assert names == ["tinyllama", "tinyllama+mine", "a.0-shot", "a.5-shot.first-10"]
    assert label("../x/y") == "..+x+y", "one name in the folder"


@pytest.fixture
def run(tmp_path):
    """A run directory of 40 steps of 100 tokens, with the metadata of its checkpoints."""
    (tmp_path / "run.json").write_text(json.dumps({"plan": {"total_steps": 40}}))
    save(tmp_path, 10, 20)
    return tmp_path


def save(run, *steps):
    for step in steps:
        path = durable.path_of(run / "checkpoints", step)
        path.mkdir(parents=True)
        (path / "meta.json").write_text(json.dumps({"tokens": 100 * step}))
        durable.seal(path)


def evaluate(at: str) -> dict:
    step = int(at.rpartition("@")[2])
    return {"step": step, "tokens": 100 * step, "domains": {"prose": {"loss": 3.0, "bits_per_byte": 1.5}}}


def test_holes_are_filled_and_what_is_half_written_counts_for_nothing(run):
    calls = []

    def counted(at):
        calls.append(at)
        return evaluate(at)

    assert [(r["step"], r["new"]) for r in schedule.follow(run, "loss", EVERY, counted)] == [(10, True), (20, True)]
    folder = run / records.FOLDER
    (folder / ".00000010-loss.json.tmp-1").write_text("{")  # a process that was killed
    (folder / "00000010-loss.json").write_text((folder / "00000010-loss.json").read_text()[:20])
    (folder / "notes.txt").write_text("mine")
    save(run, 30)
    found = schedule.follow(run, "loss", EVERY, counted)
    assert [(r["step"], r["new"]) for r in found] == [(10, True), (20, False), (30, True)]
    assert calls == [f"{run}@{step}" for step in (10, 20, 10, 30)]
    other = schedule.follow(run, "other", EVERY, counted)
    assert [r["step"] for r in other if r["new"]] == [10, 20, 30]


def test_a_watch_waits_for_the_last_checkpoint(run, monkeypatch):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        save(run, *{1: (30,), 2: (), 3: (40,)}[len(waited)])

    monkeypatch.setattr(schedule.time, "sleep", sleep)
    found = schedule.follow(run, "loss", EVERY, evaluate, watch=True, poll_seconds=0.5)
    assert [r["step"] for r in found] == [10, 20, 30, 40] and waited == [0.5] * 3


def test_one_bad_checkpoint_keeps_none_of_the_others_from_being_evaluated(run):
    save(run, 30, 40)

    def failing(at):
        if at.endswith("@10"):
            raise CheckpointError("a flipped bit")
        if at.endswith("@20"):  # the training clears it away meanwhile
            shutil.rmtree(durable.path_of(run / "checkpoints", 20))
            raise CheckpointError("no such checkpoint")
        return evaluate(at)

    with pytest.raises(CheckpointError, match="1 of the due checkpoints.*step 10: a flipped bit"):
        schedule.follow(run, "loss", EVERY, failing, watch=True)
    assert [r["step"] for r in records.read(run)] == [30, 40]


def test_sigterm_ends_it_with_75_and_keeps_what_was_done(run):
    def stopped(at):
        if at.endswith("@20"):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(at)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        schedule.follow(run, "loss", EVERY, stopped)
    assert caught.value.exit_status == 75 and signal.getsignal(signal.SIGTERM) is before
    assert [r["step"] for r in records.read(run)] == [10]
    with pytest.raises(DataError, match="run.json"):
        schedule.follow(run / "checkpoints", "loss", EVERY, evaluate)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--limit", "3"], "--limit goes with --tasks"),
        (["--seed", "3"], "--seed goes with --tasks"),
        (["--tasks", "piqa", "--corpus", "x"], "--corpus goes not with --tasks"),
        (["--watch"], "--watch goes with --every-tokens"),
        (["--tasks", "piqa", "--batch-rows", "0"], "--batch-rows 0: must be at least 1"),
        (["--tasks", "piqa", "--samples", "x", "--every-tokens", "5"], "--samples is of one checkpoint"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, words, said, capsys):
    assert main(["eval", str(run), *words]) == 2
    assert said in capsys.readouterr().err


def test_without_the_package_one_line_says_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", str(run), "--tasks", "tinyllama"]) == 78
    assert "not installed: pip install 'tinyllama_jax[eval]'" in capsys.readouterr().err


def test_loss_at_marks_of_a_finished_run(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    words = ["eval", str(run), "--every-tokens", "3000", "--sequences", "2", "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    steps = {int(p.name) for p in (run / "checkpoints").iterdir()}
    assert value["evaluations"] and {e["step"] for e in value["evaluations"]} <= steps
    last = json.loads((run / f"evaluations/{max(steps):08d}-loss.json").read_text())
    assert last["step"] == max(steps) and {"prose", "code"} <= last["domains"].keys()
    assert "Evaluations of checkpoints" in write_report(run).read_text()


def test_a_report_shows_results_over_tokens_beside_the_published_ones(tmp_path):
    run = synthetic_run.write_run(tmp_path / "run", steps=60, validation_every=20)
    assert evaluations(Run(run)) == "" and evaluations_figure(Run(run)) is None
    for step in (20, 40, 60):
        scores = {
            task: {"metric": "acc", "value": 0.25 + step / 1000 + i / 100, "stderr": 0.01, "shots": 0, "samples": 9}
            for i, task in enumerate(COMMON_SENSE)
        }
        mean = sum(s["value"] for s in scores.values()) / 7
        records.put(run, "tinyllama", {"step": step, "tokens": step * 1000, "results": scores, "mean": mean})
    page = write_report(run).read_text()
    assert (run / "plots/evaluations.png").stat().st_size > 5000
    assert "27.00 <small>± 1.00</small>" in page and "step 60" in page and "34.00" in page
    assert "TinyLlama 1431k" in page and "52.97" in page and "possibly a copy" in page and "Pythia-1.0B" in page
