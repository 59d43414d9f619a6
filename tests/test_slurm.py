"""Launching for real: a Slurm of two nodes on this machine runs what `launch` renders."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import free_port
from launch_cases import CASES, render
from many_hosts import lines, same_run, steps_done

from tinyllama_jax.launch import slurm as renderer
from tinyllama_jax.launch.job import Job
from tinyllama_jax.launch.machine import Machine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
CPU = Machine("cpu", "cpu", 1, 0)
# As on a cluster whose nodes have the environment of the login node.
SETUP = (f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}",)

CHILD = """\
import os, signal, sys, time
folder, how = sys.argv[1:]
me, restarts = os.environ.get("SLURM_PROCID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
signal.signal(signal.SIGTERM, lambda *_: (print("saved", me, flush=True), os._exit(75)))
failed = os.path.join(folder, "failed")
first, records = not os.path.exists(failed), os.path.join(folder, "starts")
with open(records, "a") as starts:
    starts.write(f"{me} {restarts}\\n")
count = len(open(records).readlines())
if how == "stopped once":
    sys.exit(0 if restarts else 75)
if how == "progress":  # a new checkpoint before each of six crashes
    os.makedirs(os.path.join(folder, "checkpoints", f"{count:08d}"))
    sys.exit(1 if count < 7 else 0)
if how == "one of two" and first:
    while me == "1" and len(open(records).readlines()) < 2:
        time.sleep(0.1)
    if me == "1":
        open(failed, "w").close()
        sys.exit(1)
    time.sleep(600)
if how == "wrong on one":
    while me == "1" and len(open(records).readlines()) < 2:
        time.sleep(0.1)
    if me == "1":
        sys.exit(78)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # srun's own status is then 143
    time.sleep(600)
if how == "waits" and not restarts:
    time.sleep(600)
sys.exit(int(how) if how.isdigit() else 0)
"""


def launch(cluster, *argv, **more):
    """The answer of `tinyllama launch ...` on the login node."""
    done = cluster.run(
        [sys.executable, "-m", "tinyllama_jax", "launch", *argv, "--json"],
        env={"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"},
        **more,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def submitted(slurm, tmp_path):
    """submitted(how, ...): the id of a job whose command is CHILD under the supervisor."""

    def submit(how: str, nodes: int = 1, restarts: int = 2) -> str:
        (tmp_path / "child.py").write_text(CHILD)
        job = Job(
            name="child",
            command=("python", str(tmp_path / "child.py"), str(tmp_path), how),
            machine=dataclasses.replace(CPU, nodes=nodes),
            workdir=str(tmp_path),
            setup=SETUP,
            max_restarts=restarts,
        )
        (tmp_path / "job.sbatch").write_text(renderer.render(job))
        done = slurm.run(["sbatch", "--parsable", tmp_path / "job.sbatch"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def starts(folder: Path) -> list[str]:
    path = folder / "starts"
    return path.read_text().splitlines() if path.is_file() else []


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on == "slurm"])
def test_slurm_itself_would_take_every_script(slurm, name, tmp_path):
    for number, text in enumerate(render(name)):
        script = tmp_path / f"{number}.sbatch"
        script.write_text(text)
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        done = slurm.run(["sbatch", "--test-only", script])
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_a_stopped_run_is_queued_again_and_goes_on(slurm, submitted, tmp_path):
    job = submitted("stopped once")
    assert slurm.wait(job, seconds=90) == ["COMPLETED"]
    assert starts(tmp_path) == ["0 0", "0 1"] and slurm.show(job)["Restarts"] == "1"
    assert f"job {job} is queued again" in slurm.log(job) and "restarts: 1" in slurm.log(job)


def test_a_wrong_configuration_is_never_started_again(slurm, submitted, tmp_path):
    job = submitted("78")
    assert slurm.wait(job) == ["FAILED"]
    assert starts(tmp_path) == ["0 0"] and slurm.show(job)["ExitCode"] == "78:0"


def test_a_crash_is_started_again_a_bounded_number_of_times(slurm, submitted, tmp_path):
    job = submitted("1")
    assert slurm.wait(job) == ["FAILED"]
    assert len(starts(tmp_path)) == 3 and slurm.show(job)["ExitCode"] == "1:0"


def test_one_process_that_fails_ends_and_restarts_the_whole_step(slurm, submitted, tmp_path):
    job = submitted("one of two", nodes=2)
    assert slurm.wait(job) == ["COMPLETED"], slurm.log(job)
    assert sorted(starts(tmp_path)) == ["0 0", "0 0", "1 0", "1 0"]


def test_a_wrong_configuration_on_one_node_ends_all_and_is_never_started_again(slurm, submitted, tmp_path):
    job = submitted("wrong on one", nodes=2)
    assert slurm.wait(job) == ["FAILED"]
    assert sorted(starts(tmp_path)) == ["0 0", "1 0"] and slurm.show(job)["ExitCode"] == "78:0", slurm.log(job)


def test_new_checkpoints_begin_the_count_anew(slurm, submitted, tmp_path):
    job = submitted("progress", restarts=1)
    assert slurm.wait(job) == ["COMPLETED"], slurm.log(job)
    assert len(starts(tmp_path)) == 7


@pytest.mark.parametrize("who", ["the time limit's signal", "scontrol requeue"])
def test_processes_are_told_to_save_and_the_job_comes_back(slurm, submitted, tmp_path, who):
    job = submitted("waits", nodes=2)
    until(lambda: len(starts(tmp_path)) == 2)
    command = ["scontrol", "requeue", job] if who == "scontrol requeue" else ["scancel", "--signal=TERM", job]
    assert slurm.run(command).returncode == 0
    assert slurm.wait(job, seconds=120) == ["COMPLETED"], slurm.log(job)
    assert "saved 0" in slurm.log(job) and "saved 1" in slurm.log(job)
    assert sorted(starts(tmp_path)) == ["0 0", "0 1", "1 0", "1 1"]


def test_a_cancelled_job_stays_cancelled(slurm, submitted, tmp_path):
    job = submitted("waits")
    until(lambda: len(starts(tmp_path)) == 1)
    assert slurm.run(["scancel", job]).returncode == 0
    until(lambda: "saved" in slurm.log(job))
    time.sleep(8)  # longer than a requeued job waits here
    assert slurm.states(job) == ["CANCELLED"] and starts(tmp_path) == ["0 0"]


def test_items_are_prepared_by_an_array_and_finished_by_the_job_after_it(slurm, tales, tmp_path):
    from tinyllama_jax.cli import main

    recipe = ["--vocab-size", "300", "--window-tokens", "17", "--item-bytes", "2500", "--validation-share", "0.2"]
    assert main(["prepare", str(tales), *recipe, "--out", str(tmp_path / "alone"), "--workers", "1"]) == 0
    assert main(["prepare", "plan", str(tales), *recipe, "--out", str(tmp_path / "array")]) == 0
    setup = ["--setup", SETUP[0]]
    value = launch(
        slurm, "prepare", "--out", tmp_path / "array", "--items", "3", "--on", "slurm", "--workers", "1", *setup
    )
    items, then = [job["id"] for job in value["jobs"]]
    assert slurm.wait(items, seconds=180) == ["COMPLETED"] * 3, slurm.log(items)
    assert slurm.wait(then, seconds=90) == ["COMPLETED"], slurm.log(then)

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    alone, array = contents(tmp_path / "alone"), contents(tmp_path / "array")
    assert alone == array and "manifest.json" in alone


# The demo's model, data and stages, shorter.
SHORT = (
    "curriculum.basic.tokens=122880",
    "curriculum.continual.tokens=81920",
    "curriculum.continual.ramp_tokens=40960",
    "curriculum.cooldown.tokens=40960",
    "evaluation.every_tokens=0",
    "evaluation.sequences=8",
    "evaluation.sample_tokens=8",
    "checkpoint.temporary_steps=20",
    "health.watchdog_seconds=60",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the run by one process on one node, settings of both)."""
    folder = tmp_path_factory.mktemp("one-node")
    settings = (*SHORT, f"data.store={folder}/store")
    sets = [word for s in settings for word in ("--set", s)]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    command = [sys.executable, "-m", "tinyllama_jax", "train", "experiments.smoke:demo", "--workdir", folder / "run"]
    done = subprocess.run([*command, *sets], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run", sets


@pytest.mark.parametrize("how", ["scontrol requeue", "scancel --signal"])
def test_the_demo_on_two_nodes_is_interrupted_and_ends_as_on_one(slurm, undisturbed, tmp_path, how):
    whole, sets = undisturbed
    workdir = tmp_path / "run"
    address = f"127.0.0.1:{free_port()}"  # the nodes' names do not resolve; all else the processes find out themselves
    value = launch(
        slurm,
        *("experiments.smoke:demo", "--on", "slurm", "--target", "cpu", "--nodes", "2", "--time", "20m"),
        *("--workdir", workdir, "--env", f"JAX_COORDINATOR_ADDRESS={address}", "--setup", SETUP[0]),
        *("--experiment-path", ROOT, *sets),
    )
    job = value["job_id"]
    try:
        until(lambda: steps_done(workdir) >= 70 or slurm.states(job)[0] in ("FAILED", "COMPLETED"), 240)
        assert slurm.states(job) == ["RUNNING"], slurm.log(job)
        interrupt = ["scontrol", "requeue", job] if how == "scontrol requeue" else ["scancel", "--signal=TERM", job]
        assert slurm.run(interrupt).returncode == 0
        assert slurm.wait(job, seconds=300) == ["COMPLETED"], slurm.log(job)
        log, shown = slurm.log(job), slurm.show(job)
    finally:
        slurm.run(["scancel", job])
    assert shown["NumNodes"] == "2" and shown["Restarts"] == "1"
    assert "stopped by SIGTERM at step" in log and "resumed at step" in log
    starts = [event for event in lines(workdir / "events.jsonl") if event["kind"] == "start"]
    stopped = [event for event in lines(workdir / "events.jsonl") if event["kind"] == "stopped"]
    if " hung: " not in log:  # see hosts.Hung; the supervisor has started it again
        assert [event["step"] for event in starts] == [0, stopped[0]["step"]], "not a step is lost"
    about = json.loads((workdir / "run.json").read_text())["devices"]
    assert about["processes"] == 2 and about["count"] == 2
    same_run(workdir, whole)
