"""What `launch` renders: committed examples, schemas, quoting, refusals, and how clients are called."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from launch_cases import CASES, ODD, render
from launch_schemas import JOBSET, KUEUE, SKY

from tinyllama_jax.cli import main
from tinyllama_jax.launch import gke
from tinyllama_jax.launch.job import TASK, quote

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
COMMITTED = {case.committed: name for name, case in CASES.items() if case.committed}


def written(name: str) -> str:
    """What launch/NAME holds by rights."""
    if name == "kueue.yaml":
        return gke.kueue("research", "a100-40g", 16)
    [text] = render(COMMITTED[name])
    argv = (
        " ".join(f"python -m tinyllama_jax launch {case.argv} --on {case.on}".split())
        if (case := CASES[COMMITTED[name]])
        else ""
    )
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    return (first + "\n" if first else "") + f"# {argv}\n" + rest


@pytest.mark.parametrize("name", [*COMMITTED, "kueue.yaml"])
def test_the_committed_files_are_what_is_rendered(name, request):
    if request.config.getoption("--update-golden"):
        (LAUNCH / name).write_text(written(name))
    assert (LAUNCH / name).read_text() == written(name), "pytest tests/test_launch.py --update-golden"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on == "gke"])
def test_jobsets_have_only_known_fields(name):
    for text in render(name):
        jsonschema.validate(yaml.safe_load(text), JOBSET)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on == "sky"])
def test_skypilots_tasks_have_only_known_fields(name):
    for text in render(name):
        jsonschema.validate(yaml.safe_load(text), SKY)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on == "sky"])
def test_skypilot_itself_reads_them(name, tmp_path, monkeypatch):
    sky = pytest.importorskip("sky", reason="pip install skypilot, in an environment of its own")
    monkeypatch.chdir(tmp_path)
    for text in render(name):
        (tmp_path / "task.yaml").write_text(text)
        task = sky.Task.from_yaml(str(tmp_path / "task.yaml"))
        assert task.num_nodes == yaml.safe_load(text)["num_nodes"] and "supervise --on sky" in task.run


def test_kueues_forms_have_only_known_fields():
    documents = list(yaml.safe_load_all((LAUNCH / "kueue.yaml").read_text()))
    assert len(documents) == len(KUEUE)
    for document, schema in zip(documents, KUEUE, strict=True):
        jsonschema.validate(document, schema)


def test_the_schemas_refuse_a_slip():
    document = yaml.safe_load(render("gke")[0])
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(document, JOBSET)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on in ("slurm", "tpu")])
def test_scripts_are_bash(name, tmp_path):
    for text in render(name):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        if subprocess.run(["which", "shellcheck"], capture_output=True).returncode == 0:
            found = subprocess.run(
                ["shellcheck", "-e", "SC1091,SC2016", "-"], input=text, text=True, capture_output=True
            )
            assert found.returncode == 0, found.stdout


def test_no_rendered_text_knows_this_machine():
    here = {str(ROOT), str(Path.home()), sys.prefix, os.uname().nodename}
    for name in CASES:
        for text in render(name):
            assert not [word for word in here if len(word) > 5 and word in text]


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


def answer(capsys, *argv) -> dict:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return json.loads(capsys.readouterr().out)


TINY = ("launch", "experiments.smoke:tiny", "--target", "cpu", "--workdir", "run", "--json")


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
    value = answer(capsys, *TINY, "--on", "gke", "--image", "i")
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
    more = {"gke": ["--image", "i"], "tpu": ["--image", "i", "--project", "p", "--zone", "z", "--target", "v5e:2x2"]}
    words = [*TINY, "--on", on, *more.get(on, [])]
    assert main(words) == 78
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--on {on}: no {client} on this machine: " in said
    assert not list(tmp_path.iterdir()), "nothing was written"


SWEEP = (
    "from experiments.smoke import tiny\nfrom tinyllama_jax.config import replace\n"
    "def sweep():\n    return [replace(tiny(), seed=n) for n in range(3)]\n"
)


@pytest.mark.parametrize("on", ["slurm", "gke", "tpu", "sky"])
def test_a_sweep_is_an_array_or_a_job_for_each_run(on, tmp_path, capsys, monkeypatch):
    (tmp_path / f"sweep_on_{on}.py").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    more = {"gke": ["--image", "i"], "tpu": ["--image", "i", "--project", "p", "--zone", "z"]}
    target = "v5e:2x2" if on == "tpu" else "cpu"
    words = [
        "launch",
        f"sweep_on_{on}:sweep",
        "--on",
        on,
        "--target",
        target,
        "--workdir",
        "runs/s",
        "--dry-run",
        "--json",
    ]
    jobs = answer(capsys, *words, *more.get(on, []))["jobs"]
    if on == "slurm":
        [job] = jobs
        assert "#SBATCH --array=0-2\n" in job["text"]
        assert f"train 'sweep_on_slurm:sweep['\"$SLURM_ARRAY_TASK_ID\"']'" in job["text"].replace("\\\n    ", "")
        assert 'runs/s/"$SLURM_ARRAY_TASK_ID"' in job["text"]
    else:
        assert [job["name"] for job in jobs] == [f"sweep-{n}" for n in range(3)]
        for number, job in enumerate(jobs):
            assert f"sweep_on_{on}:sweep[{number}]" in job["text"] and f"runs/s/{number}" in job["text"]
    [one] = answer(capsys, *words[:1], f"sweep_on_{on}:sweep[2]", *words[2:], *more.get(on, []))["jobs"]
    assert "array" not in one["text"] and f"sweep_on_{on}:sweep[2]" in one["text"]


@pytest.mark.parametrize("on", ["slurm", "gke", "tpu", "sky"])
def test_items_are_prepared_everywhere(on, capsys):
    more = {"gke": ["--image", "i"], "tpu": ["--image", "i", "--project", "p", "--zone", "z"]}.get(on, [])
    value = answer(capsys, "launch", "prepare", "--out", "d", "--items", "3", "--on", on, "--dry-run", "--json", *more)
    finish = "python -m tinyllama_jax prepare finalize --out d"
    if on == "slurm":
        assert '--items "$SLURM_ARRAY_TASK_ID"/3' in value["jobs"][0]["text"] and not value["then"]
        assert "prepare finalize" in value["jobs"][1]["text"]
    elif on == "gke":
        items, then = yaml.safe_load(value["jobs"][0]["text"])["spec"]["replicatedJobs"]
        assert items["template"]["spec"]["completions"] == 3 and then["template"]["spec"]["completions"] == 1
        assert then["dependsOn"] == [{"name": "items", "status": "Complete"}] and not value["then"]
        assert '--items "$JOB_COMPLETION_INDEX"/3' in value["jobs"][0]["text"]
    else:
        assert [f"--items {n}/3" in job["text"] for n, job in enumerate(value["jobs"])] == [True] * 3
        assert value["then"] == finish


def test_one_process_for_each_gpu():
    text = render("slurm-gpus")[0].replace("2x1", "2x8")
    assert "JAX_LOCAL_DEVICE_IDS" not in text
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in render("slurm")[0]


REFUSALS = [
    (["--on", "slum"], 2, "--on slum: not one of slurm, gke, tpu, sky (did you mean 'slurm'?)"),
    (["--on", "slurm", "--queue", "q"], 2, "--queue is for --on gke; leave it out for slurm"),
    (["--on", "gke", "--partition", "q", "--image", "i"], 2, "--partition is for --on slurm; leave it out for gke"),
    (["--on", "slurm", "--spot"], 2, "--spot is for --on gke or tpu or sky; leave it out for slurm"),
    (["--on", "gke"], 2, "--on gke runs a container: name it with --image (launch/Dockerfile makes one)"),
    (["--on", "tpu", "--project", "p", "--zone", "z"], 2, "--on tpu --target cpu: not a TPU; write --target v5e:4x4"),
    (["--on", "sky", "--time", "2h"], 2, "--time: managed jobs of SkyPilot have no limit of their own; leave it out"),
    (["--on", "slurm", "--time", "2 hours"], 2, "--time 2 hours: write it as 90m, 24h or 7d"),
    (["--on", "slurm", "--time", "2m"], 78, "a time limit of 120 s leaves nothing beside 120 s of grace"),
    (["--on", "slurm", "--nodes", "0"], 2, "--nodes 0: must be 1 or more"),
    (["--on", "slurm", "--nodes", "3"], 78, "tiny, stage 'basic': 8 sequences at a time cannot be shared out among"),
    (["--on", "slurm", "--target", "a100-40g:2x8", "--nodes", "3"], 2, "name two numbers of machines; leave one out"),
    (["--on", "slurm", "--target", "a1000"], 2, "--target a1000: not a target"),
    (["--on", "tpu", "--target", "v4:2x2x2", "--nodes", "3"], 2, "--nodes 3: v4:2x2x2 is 2 host(s)"),
    (["--on", "slurm", "--processes-per-node", "gpus"], 2, "--processes-per-node gpus: cpu has none"),
    (["--on", "slurm", "--profile", "a100-40"], 2, "did you mean 'a100-40g'?"),
    (["--on", "slurm", "--mount", "a:/b"], 2, "--mount: only a container has mounts; name its --image too"),
    (["--on", "gke", "--mount", "a:b", "--image", "i"], 2, "--mount a:b: write it as OUTSIDE:INSIDE"),
    (["--on", "slurm", "--env", "A"], 2, "--env A: write it as NAME=VALUE"),
    (["--on", "slurm", "--env", "A-B=c"], 78, "environment variable 'A-B': not a name"),
    (["--on", "slurm", "--env", "XLA_FLAGS=--xla_gpu_graph_level=0"], 78, "--xla_gpu_graph_level: replaced by"),
    (["--on", "slurm", "--env", "XLA_FLAGS=--xla_tpu_x=1"], 78, "flags for TPUs go into LIBTPU_INIT_ARGS"),
    (["--on", "slurm", "--name", "No_Name"], 78, "job name 'No_Name': write it as a-z, 0-9 and -"),
    (["--on", "slurm", "--max-restarts", "-1"], 78, "max restarts is -1; it must be 0 or more"),
    (["--on", "slurm", "--grace", "0"], 78, "grace of 0 s; it must be positive"),
    (["--on", "slurm", "--set", "lr.peek=1"], 2, "did you mean"),
    (["--on", "slurm", "--set", "mesh.data=3"], 78, "does not make up the 1 devices of cpu"),
]


@pytest.mark.parametrize("words, status, line", REFUSALS, ids=lambda value: " ".join(value) if value is list else None)
def test_what_cannot_run_is_refused_in_one_line(words, status, line, capsys):
    assert main([*TINY, "--dry-run", *words]) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said


def test_too_much_for_an_array(capsys):
    assert main(["launch", "prepare", "--out", "d", "--items", "1001", "--on", "slurm", "--dry-run"]) == 78
    assert "1001 tasks: a SLURM array holds 1000 by default" in capsys.readouterr().err
    assert main(["launch", "prepare", "--out", "d", "--items", "0", "--on", "slurm", "--dry-run"]) == 78
    assert "--items 0: must be 1 or more" in capsys.readouterr().err


def test_a_limit_of_cost_is_held(capsys, monkeypatch):
    import types

    asked = []

    def estimate(run, target):
        asked.append((run.name, target))
        return {"cost_usd": {"total": 120.0}}

    money = types.ModuleType("tinyllama_jax.preflight.money")
    money.estimate = estimate
    monkeypatch.setitem(sys.modules, "tinyllama_jax.preflight.money", money)
    words = (
        "launch",
        "experiments.tinyllama:v1_0",
        "--on",
        "slurm",
        "--nodes",
        "2",
        "--workdir",
        "r",
        "--dry-run",
        "--json",
    )
    assert answer(capsys, *words, "--max-cost", "120")["cost_usd"] == 120
    assert main([*words, "--max-cost", "119"]) == 78
    assert "about $120 on a100-40g:2x8, more than --max-cost 119; nothing launched" in capsys.readouterr().err
    assert asked == [("tinyllama-v1.0", "a100-40g:2x8")] * 2


def test_launching_never_imports_jax():
    code = "import sys\nfrom tinyllama_jax.cli import main\nfor case in sys.argv[1:]:\n    assert main(case.split()) == 0\n"
    code += "assert not {'jax', 'numpy'} & set(sys.modules)\n"
    cases = ["launch experiments.tinyllama:v1_0 --on slurm --workdir r --nodes 2 --dry-run", "launch flags"]
    done = subprocess.run([sys.executable, "-c", code, *cases], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
