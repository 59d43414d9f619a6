"""Downstream tasks from the command line, with the harness' package and without PyTorch."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import local_tasks
import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.evaluate.suites import SUITES

pytestmark = pytest.mark.harness

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return local_tasks.write(tmp_path_factory.mktemp("tasks") / "tasks", documents=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of 40 steps of 1000 tokens, with checkpoints at three of them; nothing of it was trained."""
    from tinyllama_jax.configio import to_dict
    from tinyllama_jax.train.checkpoint import save_params

    folder = tmp_path_factory.mktemp("run")
    model, params = local_tasks.checkpoint(folder / "imported")
    (folder / "run.json").write_text(json.dumps({"name": "made", "plan": {"total_steps": 40, "total_tokens": 40_000}}))
    for step in (10, 20, 40):
        meta = {"step": step, "tokens": 1000 * step, "model": to_dict(model), "document_marks": "eos"}
        changed = jax.tree.map(lambda p, step=step: p * (1 + step / 100), params)
        save_params(folder / f"checkpoints/{step:08d}", changed, meta, [folder / "tokenizer.model"])
    return folder


def answer(capsys, *words) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words, status=78) -> str:
    assert main(["eval", *map(str, words)]) == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("tinyllama eval: ")
    return said


def test_a_checkpoint_is_evaluated_and_the_result_kept_beside_its_run(run, tasks, tmp_path, capsys):
    names = "local_choices,local_letters,local_texts,local_answers"
    out, samples = tmp_path / "out/answer.json", tmp_path / "samples.jsonl"
    value = answer(
        capsys,
        run,
        "--tasks",
        names,
        "--include-path",
        tasks,
        "--limit",
        5,
        "--out",
        out,
        "--samples",
        samples,
        "--batch-rows",
        8,
    )
    assert value["step"] == 40 and value["tokens"] == 40_000 and value["harness"].startswith("0.4.")
    assert list(value["results"]) == names.split(",") and value["mean"] is None
    choices = value["results"]["local_choices"]
    assert (choices["metric"], choices["shots"], choices["samples"]) == ("acc_norm", 1, 5)
    assert choices["value"] == value["all"]["local_choices"]["acc_norm,none"] and choices["stderr"] > 0
    assert value["results"]["local_texts"]["metric"] == "bits_per_byte"
    assert json.loads(out.read_text()) == value
    kept = run / "evaluations/00000040-local_choices+local_letters+local_texts+local_answers.first-5.json"
    assert json.loads(kept.read_text())["results"] == value["results"]
    kept.unlink()
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [r["task"] for r in records].count("local_answers") == 5 and len(records) == 20
    words = ["--tasks", "local_choices", "--include-path", tasks, "--limit", 5, "--batch-rows", 16, "--seed", 1234]
    again = answer(capsys, f"{run}@40", *words)
    assert again["results"]["local_choices"] == pytest.approx(choices), "the same examples, whatever the batches"
    (run / "evaluations/00000040-local_choices.first-5.json").unlink()


def test_groups_shots_and_what_a_text_begins_with(run, tasks, capsys):
    assert main(["eval", str(run / "imported"), "--tasks", "local", "--include-path", str(tasks), "--shots", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run}/imported: step 7, 7,000 tokens; harness 0.4.")
    assert lines[2].split()[:4] == ["local", "acc", "2", "12"] and len(lines) == 3
    bos = answer(capsys, run / "imported", "--tasks", "local_last_word", "--include-path", tasks)
    trained = answer(
        capsys, f"{run}@10", "--tasks", "local_last_word", "--include-path", tasks, "--start", "as-trained"
    )
    assert bos["start"] == "bos" and trained["start"] == "as-trained"
    half = answer(
        capsys, run / "imported", "--tasks", "local_last_word", "--include-path", tasks, "--dtype", "bfloat16"
    )
    logs = [math.log(each["all"]["local_last_word"]["perplexity,none"]) for each in (bos, half)]
    assert half["dtype"] == "bfloat16" and logs[0] != logs[1] and logs[0] == pytest.approx(logs[1], rel=0.02)
    (run / "evaluations/00000010-local_last_word.json").unlink()


def test_the_mark_of_the_training_documents_and_sampled_answers(run):
    from lm_eval.api.instance import Instance

    from tinyllama_jax.config import Mesh
    from tinyllama_jax.evaluate.harness_model import Model
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh

    text = Tokenizer.load(run / "tokenizer.model")
    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        loaded = load(f"{run}@10", mesh)
        for start, first in (("bos", text.bos_id), ("as-trained", text.eos_id)):
            model = Model(loaded, mesh, start=start)
            assert model.tok_encode("the cat") == [first, *text.encode("the cat")]
            assert model.tok_encode("the cat", add_special_tokens=False) == text.encode("the cat")
            assert model._encode_pair("the ", "cat")[0] == [first, *text.encode("the")]
            assert model.prefix_token_id == first
        sampled = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
        asked = [Instance("generate_until", {}, ("the cat", sampled), i) for i in range(4)]
        one, two = (Model(loaded, mesh, seed=seed, batch_rows=4).generate_until(asked) for seed in (1, 2))
        assert len(set(one)) > 1 and one != two, "the same prompt is answered in several ways"
        assert one == Model(loaded, mesh, seed=1, batch_rows=4).generate_until(asked)
        assert all(text and "\n" not in text for text in one)


def test_what_cannot_be_evaluated_is_said_in_one_line(run, tasks, tmp_path, capsys):
    said = refusal(capsys, run, "--tasks", "hellaswagg", status=2)
    assert "no task or suite 'hellaswagg' (did you mean 'hellaswag" in said
    here = ["--include-path", str(tasks)]
    assert "local_letters is asked for twice" in refusal(capsys, run, "--tasks", "local,local_letters", *here, status=2)
    assert "no such folder" in refusal(capsys, run, "--tasks", "x", "--include-path", tmp_path / "none")
    mine = tmp_path / "mine"
    mine.mkdir()

    def body(name: str) -> str:
        return (tasks / "choices.yaml").read_text().replace("local_choices", name)

    (mine / "far.yaml").write_text(body("far").replace("dataset_path: json", "dataset_path: some/where"))
    (mine / "gone.yaml").write_text(body("gone").replace("test.json", "absent.json"))
    (mine / "long.yaml").write_text((tasks / "answers.yaml").read_text().replace("12", "64").replace("local_", "long_"))
    (mine / "beams.yaml").write_text(
        (tasks / "answers.yaml").read_text().replace("12", "12, num_beams: 4").replace("local_", "beams_")
    )
    (mine / "code.yaml").write_text(body("code") + "unsafe_code: true\n")
    for task, words in (
        ("far", ["task far: its data some/where", "cannot be had", "dataset_path: json", "--include-path"]),
        ("gone", ["task gone: its data json", "absent.json", "cannot be had"]),
        ("long_answers", ["64 new tokens, and the model's context is 64", "max_gen_toks"]),
        ("beams_answers", ["num_beams", "not known here"]),
        ("code", ["task code executes code that the model writes", "--allow-code-execution"]),
    ):
        said = refusal(capsys, run, "--tasks", task, "--include-path", mine)
        assert all(word in said for word in words), said
    assert "humaneval executes code" in refusal(capsys, run, "--tasks", "problem-solving", *here)
    assert not list((run / "evaluations").glob("*")), "nothing is kept of what failed"


# One document each as the data sets have them, where the harness' files look for them.
PAPER = {
    "hellaswag": {"ctx_a": "A fox", "ctx_b": "it", "activity_label": "Run", "endings": ["naps", "jumps"], "label": "1"},
    "openbookqa": {
        "question_stem": "Foxes",
        "choices": {"text": ["run", "fly"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "winogrande": {"sentence": "The _ naps.", "option1": "fox", "option2": "roof", "answer": "1"},
    "arc": {"question": "Who naps?", "choices": {"text": ["cats", "rain"], "label": ["1", "2"]}, "answerKey": "1"},
    "super_glue/boolq": {"passage": "Cats nap.", "question": "do cats nap", "label": 1},
    "piqa": {"goal": "Nap", "sol1": "sleep", "sol2": "jump over the roof", "label": 0},
}


def test_the_papers_suite_over_local_copies(run, tmp_path, capsys):
    """As a machine without a hub does it: the harness' own files with another place for the data."""
    import lm_eval.tasks

    for folder, document in PAPER.items():
        copy = shutil.copytree(Path(lm_eval.tasks.__file__).parent / folder, tmp_path / folder)
        data = copy / "data.json"
        data.write_text((json.dumps(document) + "\n") * 2)
        files = json.dumps({"data_files": {split: str(data) for split in ("train", "validation", "test")}})
        for file in copy.glob("*.yaml"):
            lines = [line for line in file.read_text().splitlines() if not line.startswith("dataset_name")]
            place = f"dataset_path: json\ndataset_kwargs: {files}"
            file.write_text("\n".join(place if line.startswith("dataset_path") else line for line in lines) + "\n")
    assert main(["eval", str(run / "imported"), "--tasks", "tinyllama", "--include-path", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    metrics = {line[0]: line[1:4] for line in lines[2:9]}
    assert metrics == {task.name: [task.metric, "0", "2"] for task in SUITES["tinyllama"]}
    values = [float(line[4]) for line in lines[2:9]]
    assert set(values) <= {0.0, 100.0} and float(lines[9][1]) == pytest.approx(sum(values) / 7, abs=0.006)
    assert lines[12][:3] == ["this", "checkpoint", "7k"] and lines[13][:3] == ["TinyLlama", "50k", "105B"]
    assert lines[12][-1] == lines[9][1]


def test_marks_of_a_run_are_filled_and_nothing_is_done_twice(run, tasks, capsys):
    words = [run, "--tasks", "local_choices", "--include-path", tasks, "--every-tokens", 10_000]
    first = answer(capsys, *words)
    assert [(e["step"], e["new"]) for e in first["evaluations"]] == [(10, True), (20, True), (40, True)]
    files = {step: run / f"evaluations/{step:08d}-local_choices.json" for step in (10, 20, 40)}
    written = {step: file.stat().st_mtime_ns for step, file in files.items()}
    files[20].write_text(files[20].read_text()[:-30])  # as if another program had cut it
    again = answer(capsys, *words, "--watch")  # the run has ended, so that there is nothing to wait for
    assert [(e["step"], e["new"]) for e in again["evaluations"]] == [(10, False), (20, True), (40, False)]
    assert [files[s].stat().st_mtime_ns == written[s] for s in (10, 20, 40)] == [True, False, True]
    assert again["evaluations"][1]["results"] == first["evaluations"][1]["results"], "the same few examples again"


def test_a_watch_ends_with_75_when_it_is_stopped(run, tasks, tmp_path):
    """With nothing due and the run not ended; what was written stays."""
    going = tmp_path / "going"
    (going / "checkpoints").mkdir(parents=True)
    (going / "run.json").write_text((run / "run.json").read_text())
    words = ["eval", going, "--tasks", "local_choices", "--include-path", tasks, "--every-tokens", 10_000, "--watch"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", _WATCH, *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert "waiting\n" in iter(process.stderr.readline, ""), "behind what libraries say"
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "the same command goes on" in said.splitlines()[-1]


# Says when it waits for the run, in the place where it sleeps.
_WATCH = """
import sys, time
from tinyllama_jax.cli import main
sleep, said = time.sleep, []
def waiting(seconds):
    if seconds == 20 and not said:
        said.append(print("waiting", file=sys.stderr, flush=True))
    sleep(seconds)
time.sleep = waiting
sys.exit(main(sys.argv[1:]))
"""


def test_every_task_of_the_suites_is_one_of_the_harness():
    from lm_eval.tasks._yaml_loader import load_yaml

    from tinyllama_jax.evaluate.harness_tasks import manager_of_all

    manager = manager_of_all(())
    for suite in SUITES.values():
        for task in suite:
            assert task.name in manager.task_index, task.name
            found = load_yaml(manager.task_index[task.name].yaml_path, resolve_func=False, recursive=True)
            metrics = [m["metric"] for m in found.get("metric_list") or found["aggregate_metric_list"]]
            assert task.metric in [*metrics, "pass@1"], "a function counts that one"
            assert bool(found.get("unsafe_code")) == task.runs_code
