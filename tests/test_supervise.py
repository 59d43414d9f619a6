"""The supervisor with real children: what it starts again, how often, and what reaches the child."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllama_jax.launch.supervise import STATE, Supervisor, newest_checkpoint

ROOT = Path(__file__).parent.parent

# Ends with the statuses given in turn; `+` before one: after a new checkpoint.  Writes a line at each start.
CHILD = """\
import os, signal, sys
folder, statuses = sys.argv[1], sys.argv[2:]
with open(os.path.join(folder, "starts"), "a+") as starts:
    starts.write("x\\n"); starts.flush(); starts.seek(0)
    count = len(starts.readlines())
word = statuses[min(count, len(statuses)) - 1]
if word[0] == "+":
    os.makedirs(os.path.join(folder, "checkpoints", f"{count:08d}"))
status = int(word)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""

# Says what it is told, and ends with 75 when told to stop.
EAR = """\
import os, signal, sys, time
def told(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number != signal.SIGUSR1:
        time.sleep(0.3); print("saved", flush=True); sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, told)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """supervise(statuses...): (exit status, starts, what was said)."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def run(*statuses, **options):
        said = []
        command = [sys.executable, "-c", CHILD, str(tmp_path), *map(str, statuses)]
        options = {"workdir": str(tmp_path), "pause_seconds": (0,), "say": said.append} | options
        status = Supervisor(command, **options).run()
        return status, len((tmp_path / "starts").read_text().splitlines()), said

    return run


@pytest.mark.parametrize(
    "statuses, expected",
    [
        ([0], (0, 1)),
        ([78], (78, 1)),
        ([2], (2, 1)),
        ([75, 0], (0, 2)),
        ([1, 0], (0, 2)),
        ([1], (1, 3)),
        ([139], (139, 3)),
        ([-9], (137, 3)),
        ([1, -9, 75, 0], (0, 4)),
        ([1, 78], (78, 2)),
        (["+1", "+1", "+1", "+1", "+1", 0], (0, 6)),
        ([1, 1, "+1", 1, 1], (1, 5)),
        ([75] * 30, (78, 21)),
        ([*["+75"] * 25, 0], (0, 26)),
    ],
)
def test_the_exit_status_decides(supervise, statuses, expected):
    assert supervise(*statuses, max_restarts=2)[:2] == expected


def test_without_a_run_directory_a_stopped_command_goes_on_for_ever(supervise):
    """Work such as `prepare run` says 75 as long as other machines are not done, and has no checkpoints."""
    assert supervise(*[75] * 30, 0, workdir="")[:2] == (0, 31)


def test_a_missing_program_is_a_failure(tmp_path):
    said = []
    supervisor = Supervisor(["/nowhere/program"], max_restarts=1, pause_seconds=(0,), say=said.append)
    assert supervisor.run() == 127 and "/nowhere/program: No such file or directory" in said


@pytest.mark.parametrize(
    "status, expected", [(0, 0), (2, 2), (78, 78), (1, 1), ("+1", 75), ("+75", 75), (75, 1), (-9, 1), ("+137", 75)]
)
def test_in_a_pod_it_says_what_kubernetes_shall_do(supervise, status, expected):
    assert supervise(status, on="gke")[:2] == (expected, 1)


def test_only_committed_checkpoints_count(tmp_path):
    folder = str(tmp_path / "checkpoints")
    assert newest_checkpoint(folder) == ""
    for name in ("00000010", "00000120", "00000130.corrupt", "00000140.orbax-checkpoint-tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "99999999").touch()
    assert newest_checkpoint(folder) == "00000120"


def test_checkpoints_may_be_in_a_bucket(tmp_path):
    import fsspec

    bucket = "memory://supervised/run"
    assert newest_checkpoint(bucket) == ""
    for name in ("00000010", "00000120", "00000130.corrupt"):
        fsspec.filesystem("memory").pipe_file(f"/supervised/run/{name}/manifest.json", b"{}")
    assert newest_checkpoint(bucket) == "00000120"
    said = []
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    options = {"max_restarts": 1, "pause_seconds": (0,), "say": said.append}
    assert Supervisor(command, checkpoints="nowhere://bucket", **options).run() == 1
    assert any("no checkpoint can be seen: nowhere://bucket" in line for line in said)


def test_pauses_grow(tmp_path):
    begin = time.monotonic()
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    assert Supervisor(command, max_restarts=2, pause_seconds=(0.2, 0.6), say=lambda text: None).run() == 1
    assert time.monotonic() - begin > 0.8


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Slurm's commands, which write down how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\nkill -TERM $PPID\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "calls"


def test_on_slurm_a_stopped_run_is_queued_again(supervise, programs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert supervise(75, on="slurm")[0] == 75
    assert programs.read_text() == "scontrol requeue 41\n"


def test_a_task_of_an_array_is_queued_again_alone(supervise, programs, monkeypatch):
    for name, value in {"JOB_ID": "41", "ARRAY_JOB_ID": "41", "ARRAY_TASK_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    supervise(75, on="slurm")
    assert programs.read_text() == "scontrol requeue 41_7\n"


def test_on_slurm_the_counts_outlive_a_requeue_and_belong_to_the_job(supervise, programs, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert supervise(1, 75, on="slurm", max_restarts=2)[:2] == (75, 2)
    assert json.loads((tmp_path / STATE).read_text()) == {"job": "41", "checkpoint": "", "failures": 1, "stops": 1}
    assert supervise(1, on="slurm", max_restarts=2)[:2] == (1, 4), "two more and no three"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert supervise(1, on="slurm", max_restarts=2)[:2] == (1, 7), "a new job begins anew"


def test_counts_that_cannot_be_read_are_new_ones(supervise, tmp_path, programs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    for text in ("", "{", "[]", '{"job": "41", "other": 1}', '{"checkpoint": ""}'):
        (tmp_path / STATE).write_text(text)
        assert supervise(0, on="slurm")[0] == 0


SAID = [
    (["s2: task 1: Exited with exit code 1", "s1: task 0: Exited with exit code 75"], 75, 1),
    (["s2: task 1: Killed", "s1: task 0: Exited with exit code 75"], 137, 137),
    (["s1: tasks 0-3,5: Exited with exit code 75", "s2: task 4: Killed"], 137, 75),
    (["s2: task 1: Terminated", "s1: task 0: Exited with exit code 78"], 143, 78),
    (["s1: task 0: Segmentation fault (core dumped)"], 139, 137),
    (["Unable to create step for job 4: Requested nodes are busy"], 1, 1),
    ([], 0, 0),
]


@pytest.mark.parametrize("said, status, expected", SAID)
def test_the_process_that_failed_first_decides(said, status, expected, tmp_path, monkeypatch, capfd):
    """srun's own status is the highest one.  The messages are those of Slurm 22.05; test_slurm.py has the real ones."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    lines = "\n".join(f"echo 'srun: error: {line}' >&2" for line in said)
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho training >&2\n{lines}\nexit {status}\n")
    (tmp_path / "srun").chmod(0o755)
    supervisor = Supervisor([str(tmp_path / "srun")], on="slurm", max_restarts=0)
    assert supervisor._once() == expected
    assert capfd.readouterr().err == "training\n" + "".join(f"srun: error: {line}\n" for line in said)


def test_when_slurm_does_not_queue_it_again_it_starts_here(supervise, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("PATH", str(tmp_path))
    status, starts, said = supervise(75, 0, on="slurm")
    assert (status, starts) == (0, 2) and "starting it again here" in "".join(said)


def verb(*words, **options) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, "-m", "tinyllama_jax", "launch", "supervise", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_child_and_is_waited_for(number):
    process = verb("--", sys.executable, "-c", EAR)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(number)
    output, said = process.communicate(timeout=60)
    assert output == f"{number.name}\nsaved\n" and process.returncode == 75
    assert "asked to stop" in said


def test_a_request_to_stop_ends_the_pause():
    process = verb("--", sys.executable, "-c", "print('ran', flush=True); raise SystemExit(75)")
    lines = [process.stdout.readline() for _ in range(3)]  # the next pause is of 15 seconds
    assert lines == ["ran\n"] * 3
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and time.monotonic() - begin < 10


def test_the_verb_passes_words_on_as_they_are(tmp_path):
    words = ["--workdir", "a b", "--", "--set", "x=$(y)", "'"]
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    process = verb("--max-restarts", "0", "--workdir", str(tmp_path), "--", sys.executable, "-c", code, *words)
    output, said = process.communicate(timeout=60)
    assert json.loads(output) == words and process.returncode == 0, said


def test_what_is_wrong_gets_one_line():
    for words, line in [
        (("--on", "slum", "--", "true"), "--on slum: not one of slurm, gke, tpu, sky, local (did you mean 'slurm'?)"),
        (("--max-restarts", "-1", "--", "true"), "--max-restarts -1: must be 0 or more"),
    ]:
        process = verb(*words)
        _, said = process.communicate(timeout=60)
        assert said == f"tinyllama launch supervise: {line}\n" and process.returncode == 2
