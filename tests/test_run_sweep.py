"""Running a sweep on this machine: order, slots, forks, failures, signals, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllama_jax import configio
from tinyllama_jax.config import Fork, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import run_sweep
from tinyllama_jax.lab.slots import Slot, slots

TESTS = Path(__file__).parent
ONE = [Slot()]
SLEEP = "import sys, time, pathlib; d = pathlib.Path(sys.argv[1]); d.mkdir(parents=True, exist_ok=True); "
EXPERIMENT = """
from quick_experiment import quick
from tinyllama_jax.config import replace
from tinyllama_jax.lab import sweep

def base():
    run = quick()
    stage = replace(run.curriculum[0], tokens=2048, batch_tokens=256)
    return replace(run, curriculum=(stage,), evaluation=replace(run.evaluation, prompts=(), seen_sequences=4))

def study():
    return sweep.checked(sweep.decays(replace(base(), name="small"), [1024, 2048], share=0.25))

def half_wrong():
    return sweep.checked(sweep.product(base(), {"curriculum.basic.mixture": [{"prose": 1.0}, {"poems": 1.0}]}))
"""


def runs(count: int) -> list:
    from quick_experiment import quick

    return [replace(quick(), name=f"run{n}", seed=n) for n in range(count)]


def started(tasks, workdir, code: str, places=ONE, **more):
    """Runs `code` for each task, with its directory as argument; what was said."""
    said = []
    going = run_sweep.Sweep(
        tasks, lambda task: [[sys.executable, "-c", SLEEP + code, str(task.directory)]], places, said.append, **more
    )
    going.run()
    return going, said


def test_runs_go_on_side_by_side_as_many_as_there_are_slots(tmp_path):
    code = (
        "(d/'began').write_text(str(time.monotonic())); time.sleep(.4); (d/'ended').write_text(str(time.monotonic()))"
    )
    tasks = run_sweep.tasks(runs(5), tmp_path)
    started(tasks, tmp_path, code, places=[Slot(), Slot()])
    spans = [tuple(float((t.directory / n).read_text()) for n in ("began", "ended")) for t in tasks]
    together = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
    assert max(together) == 2 and [t.state for t in tasks] == ["done"] * 5


def test_one_that_fails_does_not_stop_the_others_and_says_why(tmp_path):
    tasks = run_sweep.tasks(runs(3), tmp_path)
    code = "d.name == '1' and (print('tinyllama train: no such thing'), sys.exit(78))"
    _, said = started(tasks, tmp_path, code)
    assert [task.state for task in tasks] == ["done", "failed", "done"]
    assert said[3] == "run1: failed: status 78: tinyllama train: no such thing; 1 to go"


def test_a_fork_begins_as_soon_as_the_checkpoint_is_there(tmp_path):
    trunk, branch = runs(2)
    branch = replace(branch, fork=Fork(run="@run0", tokens=4 * 128))
    tasks = run_sweep.tasks([branch, trunk], tmp_path)
    code = (
        "(d/'began').write_text(str(time.monotonic())); time.sleep(.3);"
        "d.name == '1' and ((d/'checkpoints/00000004').mkdir(parents=True), time.sleep(.8));"
        "(d/'ended').write_text(str(time.monotonic()))"
    )
    started(tasks, tmp_path, code, places=[Slot(), Slot()])
    began, made, ended = (float((tmp_path / name).read_text()) for name in ("0/began", "1/began", "1/ended"))
    assert made + 0.3 <= began < ended and [task.state for task in tasks] == ["done", "done"]


def test_a_fork_of_what_never_comes_is_left_out(tmp_path):
    trunk, branch = runs(2)
    branch = replace(branch, fork=Fork(run="@run0", tokens=4 * 128))
    tasks = run_sweep.tasks([trunk, branch], tmp_path)
    _, said = started(tasks, tmp_path, "sys.exit(1)")
    assert tasks[1].state == "skipped" and "run1: skipped: run0, which it forks from, is failed" in said[-1]
    with pytest.raises(ConfigError, match="run1: fork.run=@run0: no run of the sweep is called run0"):
        run_sweep.tasks([branch], tmp_path / "other")


def test_a_signal_reaches_all_and_what_waited_still_waits(tmp_path):
    code = "import signal; signal.signal(15, lambda *a: sys.exit(75)); (d/'began').touch(); time.sleep(60)"
    tasks = run_sweep.tasks(runs(3), tmp_path)

    def begun(said: str) -> None:
        if said.startswith("run1"):
            while not all((tmp_path / n / "began").exists() for n in "01"):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    going = run_sweep.Sweep(
        tasks, lambda task: [[sys.executable, "-c", SLEEP + code, str(task.directory)]], [Slot(), Slot()], begun
    )
    begin = time.monotonic()
    going.run()
    assert going.signal == signal.SIGTERM and time.monotonic() - begin < 30
    assert [task.state for task in tasks] == ["waiting"] * 3 and not (tmp_path / "2").exists()


def test_commands_come_one_after_the_other_each_if_the_last_one_worked(tmp_path):
    tasks = run_sweep.tasks(runs(2), tmp_path)

    def commands(task):
        first = f"{SLEEP} sys.exit({task.index})"
        return [[sys.executable, "-c", code, str(task.directory)] for code in (first, SLEEP + "(d/'second').touch()")]

    run_sweep.Sweep(tasks, commands, [Slot()], lambda text: None).run()
    assert (tmp_path / "0/second").exists() and not (tmp_path / "1/second").exists()
    assert [task.state for task in tasks] == ["done", "failed"]


def test_two_sweeps_of_one_directory(tmp_path):
    with run_sweep.claimed(tmp_path, lambda text: None):
        with pytest.raises(ConfigError, match="another sweep is running there; wait for it"):
            with run_sweep.claimed(tmp_path, lambda text: None, seconds=0.3):
                pass
    with run_sweep.claimed(tmp_path, lambda text: None, seconds=0):
        pass


def test_what_a_table_says_is_done_is_not_done_again(tmp_path):
    several = runs(3)
    done = [configio.fingerprint(several[1])]
    assert [task.state for task in run_sweep.tasks(several, tmp_path, done)] == ["waiting", "done", "waiting"]
    branch = replace(several[0], name="branch", fork=Fork(run="@run1", tokens=512))
    needed = run_sweep.tasks([*several, branch], tmp_path, done)  # its checkpoint is not here
    assert [task.state for task in needed] == ["waiting"] * 4


def test_cores_are_divided_and_gpus_given_one_by_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert [slot.gpus for slot in slots()] == [("4",), ("6",), ("7",)]
    assert [slot.gpus for slot in slots(1, 2)] == [("4", "6")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots() == [Slot()]
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        first, second = slots(2)
        assert set(first.cores) | set(second.cores) == cores and not set(first.cores) & set(second.cores)
        with first.taken():
            inherited = subprocess.run(
                [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"], capture_output=True
            )
        assert json.loads(inherited.stdout) == list(first.cores) and os.sched_getaffinity(0) == cores


# -- with real training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "my_study.py").write_text(EXPERIMENT)
    return folder


def command(module, small_store, what: str, workdir, *more) -> list[str]:
    words = [sys.executable, "-m", "tinyllama_jax", "sweep", f"my_study:{what}", "--workdir", str(workdir)]
    words += ["--experiment-path", str(module), "--experiment-path", str(TESTS), "--set", f"data.store={small_store}"]
    return [*words, *map(str, more)]


@pytest.fixture(scope="module")
def swept(module, small_store, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A trunk and two branches; killed in the middle, with the runs that it had started, and begun again."""
    workdir = tmp_path_factory.mktemp("swept") / "sweep"
    words = command(module, small_store, "study", workdir, "--json", "--slots", 2)
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (workdir / "0/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    first.kill()
    first.wait()
    return workdir, subprocess.run(words, capture_output=True, text=True)


def test_a_killed_sweep_goes_on_and_ends(swept, module, small_store):
    workdir, done = swept
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert [run["state"] for run in value["runs"]] == ["done"] * 3
    table = [json.loads(line) for line in (workdir / "runs.jsonl").read_text().splitlines()]
    assert [row["name"] for row in table] == ["small-trunk", "small-d1.02e+03", "small-d2.05e+03"]
    assert {row["status"] for row in table} == {"finished"}
    assert [row["tokens"] for row in table] == [1536, 1024, 2048]
    assert [row["own_tokens"] for row in table] == [1536, 256, 512]
    assert {row["group"] for row in table} == {"small-trunk"}
    listed = json.loads((workdir / "sweep.json").read_text())["runs"]
    assert [entry["fingerprint"] for entry in listed] == [row["fingerprint"] for row in table]
    again = subprocess.run(command(module, small_store, "study", workdir), capture_output=True, text=True)
    assert again.returncode == 0 and "0 runs to go" in again.stderr and "started" not in again.stderr
    more = command(module, small_store, "half_wrong", workdir.parent / "none", "--dry-run", "--json")
    assert "seconds_here" not in json.loads(subprocess.check_output(more))["totals"]
    plan = json.loads(subprocess.check_output([*more, "--table", workdir / "runs.jsonl"]))
    assert plan["totals"]["seconds_here"] > 0 and [run["state"] for run in plan["runs"]] == ["new", "new"]


def test_a_branch_is_the_run_that_it_stands_for(swept, module, small_store, tmp_path):
    """The same schedule without a fork: the same losses from the fork on."""
    workdir, _ = swept
    words = [sys.executable, "-m", "tinyllama_jax", "train", "my_study:study[1]", "--workdir", str(tmp_path / "whole")]
    words += ["--experiment-path", str(module), "--experiment-path", str(TESTS)]
    words += ["--set", f"data.store={small_store}", "--set", "fork=none"]
    subprocess.run(words, check=True, capture_output=True)

    def losses(directory: Path) -> dict[int, float]:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}

    whole, branch = losses(tmp_path / "whole"), losses(workdir / "1")
    assert branch and branch == {step: whole[step] for step in branch}


def test_the_gap_between_seen_and_fresh_text_is_measured(swept):
    workdir, _ = swept
    records = [json.loads(line) for line in (workdir / "0/validation.jsonl").read_text().splitlines()]
    assert "seen" not in records[0] and records[0]["step"] == 0
    assert records[-1]["seen"]["prose"]["tokens"] == 4 * 32
    assert records[-1]["seen"]["prose"]["loss"] != records[-1]["domains"]["prose"]["loss"]


def test_a_run_that_cannot_be_is_named_and_the_others_are_done(module, small_store, tmp_path):
    done = subprocess.run(command(module, small_store, "half_wrong", tmp_path / "s"), capture_output=True, text=True)
    assert done.returncode == 78
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tinyllama sweep: ") and "1 of 2 runs failed" in last and "no source 'poems'" in last
    assert json.loads((tmp_path / "s/sweep.json").read_text())["failed"]["1"].startswith("status 78: tinyllama train")


def test_a_directory_of_another_run_is_left_alone(swept, module, small_store):
    workdir, _ = swept
    words = command(module, small_store, "study", workdir, "--set", "seed=9")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 78 and f"{workdir}/0 holds another run (small-trunk) than small-trunk" in done.stderr
