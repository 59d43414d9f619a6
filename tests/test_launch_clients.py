"""Rendered jobs in the hands of shells and clients: odd words, the life of a TPU slice, what each client is asked."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_cases import ODD, TINY, answer, render

from tinyllama_jax.cli import main
from tinyllama_jax.launch.job import TASK, quote

STAND_IN = """\
#!{python}
import json, os, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
    if os.environ.get("ODD"):
        calls.write(json.dumps(["ODD", os.environ["ODD"]]) + "\\n")
{rest}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(program, code): a program first on the PATH that writes down how it is called; calls()."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(program: str, code: str = "") -> None:
        (folder / program).write_text(STAND_IN.format(python=sys.executable, calls=str(record), rest=code))
        (folder / program).chmod(0o755)

    make.calls = lambda: [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return make


@pytest.mark.parametrize("on", ["slurm", "gke", "tpu", "sky"])
def test_odd_words_arrive_as_they_were_given(on, stand_in, tmp_path):
    """The real shell runs what is rendered, down to the supervisor's arguments."""
    stand_in("python")
    [text] = render(f"{on}-odd")
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_ON_NODE": "1"}
    if on == "gke":
        container = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        [container] = container["containers"]
        # Kubernetes' own replacement: $(NAME) of known variables, and $$ for $.
        variables = {entry["name"]: expanded(entry["value"]) for entry in container["env"]}
        command, environment = [expanded(word) for word in container["command"]], environment | variables
    elif on == "sky":
        task = yaml.safe_load(text)
        command, environment = ["bash", "-c", task["run"]], environment | task["envs"]
    elif on == "slurm":
        command = ["bash", "-c", text]
    else:
        (tmp_path / "code").mkdir()
        # gcloud hands the text of --command to the login shell of each host.
        code = "import subprocess\nfor word in sys.argv:\n    if word.startswith('--command='):\n"
        code += f"        sys.exit(subprocess.run(['bash', '-c', word[10:]], cwd={str(tmp_path)!r}).returncode)\n"
        stand_in("gcloud", code + "if 'describe' in sys.argv:\n    print('ACTIVE')\n")
        command = ["bash", "-c", text]
    assert subprocess.run(command, env=environment, timeout=60, stdout=subprocess.DEVNULL).returncode == 0
    calls = stand_in.calls()
    [call] = [call for call in calls if call[0] == "python"]
    assert call[call.index("--workdir") + 1] == ODD, "the supervisor's"
    inner = call[call.index("--") + 1 :]
    assert inner[inner.index("--workdir") + 1] == ODD, "training's"
    assert ["ODD", ODD] in calls
    if on == "slurm":
        assert "tracking.wandb_project=a b; c" in call


def expanded(text: str) -> str:
    """As k8s.io/kubernetes/third_party/forked/golang/expansion, where no variable is known."""
    result, position = "", 0
    while position < len(text):
        if text[position : position + 2] == "$$":
            result, position = result + "$", position + 2
        elif text[position : position + 2] == "$(" and ")" in text[position:]:
            raise AssertionError(f"Kubernetes would look for a variable at {text[position:]!r}")
        else:
            result, position = result + text[position], position + 1
    return result


def test_a_tasks_number_is_put_in_by_the_shell():
    word = f"it's {TASK}/4 $x"
    line = f"N=7; printf %s {quote(word, chr(34) + '$N' + chr(34))}"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == "it's 7/4 $x"


def test_the_slices_life_on_a_tpu(stand_in, tmp_path):
    """Asked for, used, taken away, asked for again, given back: as gcloud is called."""
    code = f"""
if "describe" in sys.argv:
    lost = os.path.exists({str(tmp_path / "lost")!r}) and not os.path.exists({str(tmp_path / "again")!r})
    print("SUSPENDED" if lost else "ACTIVE")
if "ssh" in sys.argv:
    first = not os.path.exists({str(tmp_path / "lost")!r})
    open({str(tmp_path / "lost")!r}, "w").close()
    sys.exit(255 if first else 0)
if "delete" in sys.argv and os.path.exists({str(tmp_path / "lost")!r}):
    open({str(tmp_path / "again")!r}, "w").close()
"""
    stand_in("gcloud", code)
    done = subprocess.run(["bash", "-c", render("tpu")[0]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "taken away (SUSPENDED); asking for another" in done.stderr, done.stderr
    words = [call[4] if call[3] == "queued-resources" else call[4] for call in stand_in.calls()]
    assert [word for word in words if word != "describe"] == ["create", "ssh", "delete", "create", "ssh", "delete"]
    create = next(call for call in stand_in.calls() if "create" in call)
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "v1-0", "--node-id=v1-0"),
        *("--project=my-project", "--zone=us-central2-b", "--accelerator-type=v4-16"),
        "--runtime-version=tpu-ubuntu2204-base",
    ]
    ssh = next(call for call in stand_in.calls() if "ssh" in call)
    assert ssh[:-1] == [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "v1-0", "--worker=all"),
        *("--project=my-project", "--zone=us-central2-b"),
    ]
    assert shlex.split(ssh[-1].splitlines()[-1])[:3] == ["sudo", "docker", "run"]


def test_submission_to_slurm(stand_in, tmp_path, capsys, monkeypatch):
    stand_in("sbatch", "print('4711;cluster')")
    monkeypatch.chdir(tmp_path)
    value = answer(capsys, *TINY, "--on", "slurm", "--nodes", "2")
    assert (value["name"], value["job_id"], value["file"]) == ("tiny", "4711", "runs/launched/tiny.sbatch")
    assert stand_in.calls() == [
        ["sbatch", "--test-only", value["file"]],
        ["sbatch", "--parsable", value["file"]],
    ]
    assert "#SBATCH --nodes=2\n" in Path(value["file"]).read_text()
    value = answer(capsys, "launch", "prepare", "--out", "s", "--items", "9", "--on", "slurm", "--json")
    assert [job["id"] for job in value["jobs"]] == ["4711", "4711"]
    assert stand_in.calls()[-1][1:4] == ["--parsable", "--dependency=afterok:4711", "--kill-on-invalid-dep=yes"]


def test_submission_to_the_others(stand_in, tmp_path, capsys, monkeypatch):
    stand_in("kubectl", "print('jobset.jobset.x-k8s.io/tiny created')")
    stand_in("sky", "print('Job submitted, ID: 12\\n\\x1b[1mManaged Job ID: \\x1b[0m34')")
    monkeypatch.chdir(tmp_path)
    value = answer(capsys, *TINY, "--on", "gke", "--image", "i", "--mount", "r:/r")
    assert value["job_id"] == "jobset.jobset.x-k8s.io/tiny"
    value = answer(capsys, *TINY, "--on", "sky")
    assert value["job_id"] == "34"
    assert stand_in.calls() == [
        ["kubectl", "apply", "-f", "runs/launched/tiny.yaml"],
        ["sky", "jobs", "launch", "--yes", "--detach-run", "runs/launched/tiny.yaml"],
    ]


def test_a_client_that_refuses_is_quoted_in_one_line(stand_in, tmp_path, capsys, monkeypatch):
    stand_in("sbatch", "sys.exit('sbatch: error: invalid partition specified: nowhere')")
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--on", "slurm", "--partition", "nowhere"]) == 78
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "status 1: sbatch: error: invalid partition specified: nowhere" in said


@pytest.mark.parametrize("on, client", [("slurm", "sbatch"), ("gke", "kubectl"), ("tpu", "bash"), ("sky", "sky")])
def test_a_missing_client_gets_one_line(on, client, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    more = {
        "gke": ["--image", "i", "--mount", "r:/r"],
        "tpu": ["--image", "i", "--mount", "r:/r", "--project", "p", "--zone", "z", "--target", "v5e:2x2"],
    }
    words = [*TINY, "--on", on, *more.get(on, [])]
    assert main(words) == 78
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--on {on}: no {client} on this machine: " in said
    assert not list(tmp_path.iterdir()), "nothing was written"
