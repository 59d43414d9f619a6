"""What `launch` renders: committed examples, schemas, sweeps, and what it refuses."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from launch_cases import CASES, TINY, answer, render
from launch_schemas import JOBSET, KUEUE, SKY

from tinyllama_jax.cli import main
from tinyllama_jax.launch import gke
from tinyllama_jax.preflight import money

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
COMMITTED = {case.committed: name for name, case in CASES.items() if case.committed}


def written(name: str) -> str:
    """What launch/NAME holds by rights."""
    if name == "kueue.yaml":
        return gke.kueue("research", "a100-40g", 16)
    case, [text] = CASES[COMMITTED[name]], render(COMMITTED[name])
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    shebang = f"{first}\n" if first else ""
    return f"{shebang}# tinyllama launch {case.argv} --on {case.on}\n{rest}"


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


SWEEP = (
    "from experiments.smoke import tiny\nfrom tinyllama_jax.config import replace\n"
    "def sweep():\n    return [replace(tiny(), seed=n) for n in range(3)]\n"
)


@pytest.mark.parametrize("on", ["slurm", "gke", "tpu", "sky"])
def test_a_sweep_is_an_array_or_a_job_for_each_run(on, tmp_path, capsys, monkeypatch):
    (tmp_path / f"sweep_on_{on}.py").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    more = {
        "gke": ["--image", "i", "--mount", "r:/r"],
        "tpu": ["--image", "i", "--mount", "r:/r", "--project", "p", "--zone", "z"],
    }
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
        assert "train 'sweep_on_slurm:sweep['\"$SLURM_ARRAY_TASK_ID\"']'" in job["text"].replace("\\\n    ", "")
        assert 'runs/s/"$SLURM_ARRAY_TASK_ID"' in job["text"]
    else:
        assert [job["name"] for job in jobs] == [f"sweep-{n}" for n in range(3)]
        for number, job in enumerate(jobs):
            assert f"sweep_on_{on}:sweep[{number}]" in job["text"] and f"runs/s/{number}" in job["text"]
    [one] = answer(capsys, *words[:1], f"sweep_on_{on}:sweep[2]", *words[2:], *more.get(on, []))["jobs"]
    assert "array" not in one["text"] and f"sweep_on_{on}:sweep[2]" in one["text"]


@pytest.mark.parametrize("on", ["slurm", "gke", "tpu", "sky"])
def test_items_are_prepared_everywhere(on, capsys):
    more = {
        "gke": ["--image", "i", "--mount", "r:/r"],
        "tpu": ["--image", "i", "--mount", "r:/r", "--project", "p", "--zone", "z"],
    }.get(on, [])
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
    (["--on", "gke", "--image", "i"], 78, "checkpoints in run would be lost with the machines; write them to a bucket"),
    (["--on", "tpu", "--project", "p", "--zone", "z"], 2, "--on tpu --target cpu: not a TPU; write --target v5e:4x4"),
    (["--on", "sky", "--time", "2h"], 2, "--time: managed jobs of SkyPilot have no limit of their own; leave it out"),
    (["--on", "slurm", "--time", "2 hours"], 2, "--time 2 hours: write it as 90m, 24h or 7d"),
    (["--on", "slurm", "--time", "2m"], 78, "a time limit of 120 s leaves nothing beside 120 s of grace"),
    (["--on", "slurm", "--nodes", "0"], 2, "--nodes 0: must be 1 or more"),
    (["--on", "slurm", "--nodes", "3"], 78, "tiny: stage 'basic': a micro-batch of 8 sequences cannot be spread over"),
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
    (["--on", "slurm", "--set", "mesh.data=3"], 78, "does not make up the 1 device(s) of cpu"),
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


COSTLY = ("launch", "experiments.tinyllama:v1_0", "--on", "slurm", "--nodes", "2", "--workdir", "r")


def refused(capsys, *words) -> str:
    """What the refusal says, in its one line; nothing was written to stdout."""
    assert main(list(words)) == 78
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err


def test_a_limit_of_cost_is_held(capsys, tmp_path):
    from experiments.tinyllama import v1_0

    total = money.estimate(v1_0(), "a100-40g:2x8")["cost_usd"]["total"]
    line = refused(capsys, *COSTLY, "--max-cost", "1000", "--folder", str(tmp_path / "launched"))
    assert f"experiments.tinyllama:v1_0 on a100-40g:2x8 is estimated at ${total:,.0f}" in line
    assert "more than --max-cost 1,000" in line and not (tmp_path / "launched").exists()
    value = answer(capsys, *COSTLY, "--dry-run", "--json", "--max-cost", f"{total + 1:.2f}")
    assert value["cost_usd"] == pytest.approx(total)
    refused(capsys, *COSTLY, "--dry-run", "--json", "--max-cost", f"{total - 1:.2f}")


def test_a_sweep_costs_as_much_as_its_runs_together(capsys, tmp_path, monkeypatch):
    body = "from experiments.tinyllama import tinyllama_120m\ndef two():\n    return [tinyllama_120m()] * 2\n"
    (tmp_path / "costly_sweep.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    words = ("launch", "costly_sweep:two", "--on", "slurm", "--target", "a100-40g", "--workdir", "r", "--dry-run")
    value = answer(capsys, *words, "--json")
    one, other = (estimate["cost_usd"]["total"] for estimate in value["estimates"])
    assert value["cost_usd"] == 2 * one == 2 * other > 0
    line = refused(capsys, *words, "--max-cost", f"{1.5 * one:.2f}")
    assert "the 2 runs of costly_sweep:two on a100-40g:1x8 are estimated at $" in line


def test_a_dry_run_says_what_it_would_take(capsys):
    assert main([*COSTLY, "--dry-run"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    found = re.fullmatch(r"# estimated on a100-40g:2x8: ([\d,]+) tokens/s, ([\d,.]+) days, \$([\d,]+)", first)
    speed, days, _ = (float(number.replace(",", "")) for number in found.groups())
    assert speed * days * 86_400 == pytest.approx(3e12, rel=0.06)  # but for the share of time that is lost
    assert main([*TINY, "--on", "slurm", "--dry-run"]) == 0
    assert "estimated" not in capsys.readouterr().out
    assert main([*TINY, "--on", "slurm", "--dry-run", "--max-cost", "5"]) == 2
    assert "--max-cost 5: there is no price for cpu; leave it out" in capsys.readouterr().err


def test_launching_never_imports_jax():
    code = "import sys\nfrom tinyllama_jax.cli import main\n"
    code += "for case in sys.argv[1:]:\n    assert main(case.split()) == 0\n"
    code += "assert not {'jax', 'numpy'} & set(sys.modules)\n"
    cases = ["launch experiments.tinyllama:v1_0 --on slurm --workdir r --nodes 2 --dry-run", "launch flags"]
    done = subprocess.run([sys.executable, "-c", code, *cases], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_image_is_built_from_what_there_is():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for words in extras.values() for word in words for extra in re.findall(r"^jax\[(.+)\]", word)}
    assert set(re.findall(r"ACCELERATOR=(\S+)", "\n".join(lines))) == named
    [base] = [line for line in lines if line.startswith("FROM")]
    assert re.fullmatch(r"FROM python:3\.1[12]\.\d+-slim-\w+", base), "pinned to the patch"
    users = [line for line in lines if line.startswith("USER")]
    last_run = max(number for number, line in enumerate(lines) if line.startswith("RUN"))
    assert users == ["USER researcher"] and lines.index(users[0]) > last_run
    install = next(n for n, line in enumerate(lines) if "-r requirements.txt" in line)
    assert install < next(n for n, line in enumerate(lines) if "tinyllama_jax tinyllama_jax" in line)
    for line in lines:
        if line.startswith("COPY"):
            for source in [word for word in line.split()[1:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists()
