"""A run that is killed at any instant and started again with the same command ends up as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import smoke
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.faults, pytest.mark.slow]

# The same program, held for a while between the end of the temporary write and the commit, so that a kill can be
# aimed at that instant.  What is written, and how, is not touched.
HELD_BEFORE_COMMIT = """
import sys, time
from tinyllama_jax.train import durable
commit = durable.commit
def held(temporary, final):
    time.sleep(30)
    commit(temporary, final)
durable.commit = held
from tinyllama_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "python-1024"


def environment():
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}  # one device, as a user has
    return env | {"JAX_PLATFORMS": "cpu"}


def command(workdir, store, *more, program=("-m", "tinyllama_jax")):
    experiment = ["train", "experiments.smoke:tiny", "--workdir", str(workdir), "--set", f"data.store={store}"]
    return [sys.executable, *program, *experiment, *more]


def run_to_the_end(workdir, store, *more):
    done = subprocess.run(command(workdir, store, *more), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(path):
    return [{k: v for k, v in record.items() if k != "timing"} for record in lines(path)]


def weights(workdir, step):
    return checkpoint.read_meta(workdir / "checkpoints" / f"{step:08d}")["checkpoint"]["leaves"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, store):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_to_the_end(workdir, store)
    return workdir


def kill_when(process, condition, what, seconds=120, delay=0.0):
    """SIGKILL `delay` seconds after `condition()` begins to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}: {process.stderr.read()}"
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.002)
    time.sleep(delay)
    assert process.poll() is None, f"ended by itself after {what}"
    process.send_signal(signal.SIGKILL)
    process.wait()


def start(workdir, store, program=("-m", "tinyllama_jax")):
    return subprocess.Popen(
        command(workdir, store, program=program),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def test_five_kills_leave_no_trace(uninterrupted, store, tmp_path):
    run = smoke.tiny()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    total, workdir = plan.total_steps, tmp_path / "killed"
    metrics = workdir / "metrics.jsonl"
    chance = random.Random()
    # Four kills at random moments spread over the run: before the batch change and after it.
    for quarter in range(4):
        low = max(2, quarter * total // 4)
        step = chance.randrange(low, (quarter + 1) * total // 4 - 5)

        def reached(step=step):
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= step

        process = start(workdir, store)
        kill_when(process, reached, f"step {step}", delay=chance.random() * 0.1)
    # The fifth between the temporary write and the commit.
    checkpoints = workdir / "checkpoints"
    before = {p.name for p in checkpoints.iterdir() if p.name.isdigit()}
    starts = sum(e["kind"] == "start" for e in lines_so_far(workdir / "events.jsonl"))
    process = start(workdir, store, program=("-c", HELD_BEFORE_COMMIT))

    def written():
        events = lines_so_far(workdir / "events.jsonl")
        places = [i for i, e in enumerate(events) if e["kind"] == "start"]
        return len(places) > starts and any(e["kind"] == "checkpoint_written" for e in events[places[-1] :])

    kill_when(process, written, "a checkpoint written but not committed")
    left = [p for p in checkpoints.iterdir() if ".tmp-" in p.name]
    assert len(left) == 1 and (left[0] / "checksums.json").exists(), "complete under its temporary name"
    assert {p.name for p in checkpoints.iterdir() if p.name.isdigit()} == before, "and not committed"

    said = run_to_the_end(workdir, store)
    assert "resumed at step" in said
    assert not [p for p in checkpoints.iterdir() if ".tmp-" in p.name]
    killed, whole = without_timing(metrics), without_timing(uninterrupted / "metrics.jsonl")
    assert [r["step"] for r in killed] == list(range(1, total + 1))
    assert killed == whole
    for name in ("validation.jsonl", "samples.jsonl"):
        assert without_timing(workdir / name) == without_timing(uninterrupted / name)
    assert weights(workdir, total) == weights(uninterrupted, total)
    assert sum(e["kind"] == "start" for e in lines(workdir / "events.jsonl")) >= 5


def lines_so_far(path):
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_finished_run_ends_at_once_and_changes_nothing(uninterrupted, store):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file() and p.name != ".lock"}
    assert "nothing left to do" in run_to_the_end(uninterrupted, store)
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_fork_with_the_same_mixture_is_the_parents_continuation(uninterrupted, store, tmp_path):
    run = smoke.tiny()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    border = plan.stages[0]
    child = tmp_path / "fork"
    said = run_to_the_end(
        child, store, "--set", f"fork.run={uninterrupted}", "--set", f"fork.tokens={border.end_tokens}"
    )
    assert f"forked from {uninterrupted}" in said
    assert without_timing(child / "metrics.jsonl") == without_timing(uninterrupted / "metrics.jsonl")[border.end_step :]
    assert weights(child, plan.total_steps) == weights(uninterrupted, plan.total_steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_started_again(uninterrupted, store, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(workdir, store)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 7):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    said = process.stderr.read()
    assert process.wait() == 75, said
    assert "start again with the same command" in said and "Traceback" not in said
    steps = len(lines(metrics))
    assert (workdir / "checkpoints" / f"{steps:08d}").is_dir(), "not a step is lost"
    run_to_the_end(workdir, store)
    assert without_timing(metrics) == without_timing(uninterrupted / "metrics.jsonl")
