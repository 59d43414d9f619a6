import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick_experiment import quick_command

from tinyllama_jax.cli import build_parser, main

ROOT = Path(__file__).parent.parent
VERBS = build_parser()._subparsers._group_actions[0].choices


def answer(capsys, *argv):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"example:\n  tinyllama {verb}" in shown
    for action in VERBS[verb]._actions:
        assert action.help or action.metavar, f"{verb} {action.dest} is not explained"


def test_the_list_of_options_is_meant():
    """Options are promises: adding or losing one must be a decision."""
    options = {
        verb: sorted(o for a in p._actions for o in a.option_strings if o[:2] == "--") for verb, p in VERBS.items()
    }
    common = ["--help", "--json"]
    settings = ["--experiment-path", "--set"]
    recipe = [*common, "--document-marks", "--filter", "--item-bytes", "--out", "--packing", "--tokenizer"]
    recipe += ["--validation-share", "--vocab-size", "--window-tokens"]
    launched = [*common, "--account", "--dry-run", "--env", "--folder", "--grace", "--image", "--max-restarts"]
    launched += ["--mount", "--name", "--on", "--partition", "--project", "--queue", "--setup", "--spot", "--time"]
    launched += ["--zone"]
    fitted = [*common, "--csv", "--draws", "--out", "--runs", "--seed", "--where"]
    drawn = ["--min-p", "--repetition-penalty", "--seed", "--temperature", "--top-k", "--top-p"]
    columns = ["--c-column", "--d-column", "--loss-column", "--n-column"]
    assert options == {
        "demo": sorted([*common, *settings, "--experiment", "--workdir"]),
        "prepare": sorted([*recipe, "--workers"]),
        "prepare plan": sorted(recipe),
        "prepare run": sorted([*common, "--items", "--out", "--workers"]),
        "prepare finalize": sorted([*common, "--out"]),
        "prepare view": sorted([*common, "--out", "--seed", "--tokens"]),
        "prepare tokenizer": sorted([*common, "--add", "--base", "--out", "--pieces", "--train"]),
        "train": sorted(
            [*settings, "--allow-config-change", "--coordinator", "--help", "--process", "--processes", "--workdir"]
        ),
        "finetune": sorted(
            [*settings, "--allow-config-change", "--base", "--coordinator", "--data", "--help", "--process"]
            + ["--processes", "--validation", "--workdir"]
        ),
        "finetune merge": sorted([*common, "--out"]),
        "preflight": sorted(
            [*common, *settings, "--as-written", "--assume", "--base", "--calibrate", "--estimate-only", "--max-cost"]
            + ["--memory", "--price", "--target"]
        ),
        "launch": sorted(
            [*launched, *settings, "--max-cost", "--nodes", "--processes-per-node", "--profile", "--target"]
            + ["--runs", "--workdir"]
        ),
        "launch prepare": sorted([*launched, "--items", "--out", "--target", "--workers"]),
        "launch flags": sorted([*common, "--profile"]),
        "launch supervise": sorted(["--checkpoints", "--help", "--max-restarts", "--on", "--workdir"]),
        "fit": common,
        "fit chinchilla": sorted([*fitted, *columns, "--compute", "--delta", "--given", "--group-column", "--tied"]),
        "fit isoflop": sorted([*fitted, *columns, "--compute", "--method", "--noise", "--window"]),
        "fit repetition": sorted(
            [*fitted, *columns, "--base", "--delta", "--given", "--group-column", "--law", "--start"]
            + ["--unique-column"]
        ),
        "fit overtraining": sorted([*fitted, *columns, "--delta", "--group-column"]),
        "fit downstream": sorted([*fitted, "--error-column", "--loss-column"]),
        "allocate": sorted(
            [*common, "--count", "--flops", "--inference", "--law", "--price", "--rule", "--sequence-tokens"]
            + ["--target", "--unique", "--usd", "--vocab-size"]
        ),
        "sweep": sorted(
            [*common, *settings, "--dry-run", "--gpus-per-run", "--max-cost", "--max-restarts", "--price", "--runs"]
            + ["--slots", "--table", "--target", "--workdir"]
        ),
        "runs": sorted([*common, "--columns", "--out", "--sort", "--where"]),
        "measure": sorted([*common, "--beyond", "--decode", "--dtype", "--rope", "--sequences"]),
        "report": sorted(
            [*common, "--compare", "--out", "--reference", "--reference-batch-tokens", "--reference-columns"]
        ),
        "eval": sorted(
            [*common, "--allow-code-execution", "--baselines", "--batch-rows", "--corpus", "--dtype", "--every-tokens"]
            + ["--include-path", "--limit", "--out", "--samples", "--seed", "--sequence-tokens", "--sequences"]
            + ["--shots", "--start", "--tasks", "--watch"]
            + ["--choices", "--depths", "--keys", "--passkey", "--plots", "--positions", "--rope"]
        ),
        "score": sorted([*common, "--dtype", "--tokens"]),
        "generate": sorted(
            [*common, *drawn, "--dtype", "--draft", "--draft-tokens", "--ignore-eos", "--max-new-tokens", "--prompt"]
            + ["--prompt-file", "--rows", "--self-check", "--slide", "--stop", "--tokens", "--weights"]
        ),
        "chat": sorted([*common, *drawn, "--dtype", "--max-new-tokens", "--system", "--template", "--weights"]),
        "serve": sorted(
            [
                *common,
                "--api-key-env",
                "--context-tokens",
                "--dtype",
                "--grace",
                "--host",
                "--max-body",
                "--model-name",
                "--port",
            ]
            + ["--queue", "--rows", "--template", "--weights"]
        ),
        "import": sorted([*common, "--base", "--context-tokens", "--out"]),
        "export": sorted(
            [*common, "--base-model", "--dtype", "--language", "--layout", "--license", "--out", "--shard-size"]
        ),
        "inspect": sorted([*common, *settings, "--samples", "--seed", "--sequence-tokens", "--verify"]),
    }


def test_inspecting_tinyllama_prints_the_published_counts(capsys):
    value = answer(capsys, "inspect", "tinyllama-1.1b", "--json")
    assert value["parameters"]["total"] == 1_100_048_384
    assert value["parameters"]["non_embedding"] == 968_976_384
    assert value["parameters"]["matmul"] == 1_034_420_224
    assert value["train_flops_per_token"]["palm"] == 7_313_817_600
    assert value["train_flops_per_token"]["causal"] == 6_760_169_472
    assert answer(capsys, "inspect", "tinyllama-120m", "--json")["parameters"]["total"] == 121_129_728


def test_inspect_takes_runs_checkpoints_and_experiments(finished, capsys):
    run = answer(capsys, "inspect", finished, "--json")
    newest = Path(run["checkpoint"])
    assert run["step"] == int(newest.name) and run["config"]["name"] == "quick"
    assert answer(capsys, "inspect", newest, "--json")["parameters"] == run["parameters"]
    assert answer(capsys, "inspect", f"{finished}@4", "--json")["step"] == 4
    experiment = answer(capsys, "inspect", "experiments.smoke:tiny", "--set", "model.d_ff=200", "--json")
    assert experiment["config"]["model"]["d_ff"] == 200 and experiment["shapes"]["layers.mlp.gate"] == [2, 64, 200]
    total = sum(int(np.prod(shape)) for shape in experiment["shapes"].values())
    assert total == experiment["parameters"]["total"]


def test_export_and_import_keep_every_bit(finished, tmp_path, capsys):
    answer(capsys, "export", "hf", finished, "--out", tmp_path / "hf", "--json")
    answer(capsys, "import", "hf", tmp_path / "hf", "--out", tmp_path / "ckpt", "--json")
    answer(capsys, "export", "hf", tmp_path / "ckpt", "--out", tmp_path / "again", "--json")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("hf", "again"))
    assert first == second
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 512, (3, 30)).astype(np.int32))
    scores = [
        answer(capsys, "score", c, "--tokens", tmp_path / "rows.npy", "--json") for c in (finished, tmp_path / "ckpt")
    ]
    assert scores[0] == scores[1]
    assert np.array(scores[0]["nll"]).shape == (3, 29)
    assert scores[0]["mean_nll"] == pytest.approx(np.mean(scores[0]["nll"]), rel=1e-6)


def test_generating_tokens_and_text(finished, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.array([[2, 40, 41], [2, 50, 51]], np.int32))
    greedy = ["--max-new-tokens", "6", "--temperature", "0", "--json"]
    value = answer(capsys, "generate", finished, "--tokens", tmp_path / "rows.npy", *greedy)
    assert [len(row) for row in value["tokens"]] == [6, 6] or 2 in sum(value["tokens"], [])
    assert value["prompt_tokens"] == [[2, 40, 41], [2, 50, 51]] and len(value["text"]) == 2
    both = answer(capsys, "generate", finished, "--prompt", "The value", "--prompt", "If", *greedy)
    one = answer(capsys, "generate", finished, "--prompt", "The value", *greedy)
    assert both["tokens"][0] == one["tokens"][0] and both["text"][0] == one["text"][0]
    assert (
        main(["generate", str(finished), "--prompt", "The value", "--max-new-tokens", "6", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr().out == f"The value{one['text'][0]}\n", "the stream shows what --json says"


def test_evaluating_on_held_out_text_a_corpus_and_beside_n_grams(finished, small_store, tmp_path, capsys):
    own = answer(capsys, "eval", finished, "--json")
    last = json.loads((finished / "validation.jsonl").read_text().splitlines()[-1])["domains"]
    few = answer(capsys, "eval", finished, "--sequences", "4", "--json")
    for domain in ("prose", "code"):
        assert few["domains"][domain]["loss"] == pytest.approx(last[domain]["loss"], rel=1e-6)
        assert own["domains"][domain]["tokens"] > few["domains"][domain]["tokens"]
    (tmp_path / "notes.txt").write_text("Some notes that the model has never seen, about nothing much.\n" * 40)
    notes = answer(capsys, "eval", finished, "--corpus", f"notes={tmp_path / 'notes.txt'}", "--json")["domains"][
        "notes"
    ]
    assert notes["tokens"] % 32 == 0 and 0.9 < notes["bytes"] / (62 * 40) <= 1
    assert notes["bits_per_byte"] == pytest.approx(notes["loss"] * notes["tokens"] / notes["bytes"] / np.log(2))
    same = answer(capsys, "eval", finished, "--corpus", small_store, "--json")
    assert same["domains"] == own["domains"]
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    counted = answer(capsys, "eval", copy, "--baselines", "--json")["baselines"]
    assert counted["fitted_on_tokens"] == json.loads((finished / "run.json").read_text())["plan"]["total_tokens"]
    for kinds in counted["domains"].values():
        assert kinds["bigram"]["loss"] < kinds["unigram"]["loss"]
    assert json.loads((copy / "baselines.json").read_text())["domains"] == counted["domains"]


def test_a_report_of_a_run(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    page = Path(answer(capsys, "report", copy, "--compare", finished, "--json")["report"])
    assert page == copy / "report.html" and "http://" not in page.read_text().replace("http://www.w3.org", "")


def test_a_run_directory_may_be_relative(small_store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(quick_command(small_store, "runs/relative")) == 0
    assert answer(capsys, "inspect", "runs/relative", "--json")["step"] == 16
    assert "runs/relative" in answer(capsys, "report", "runs/relative", "--json")["report"]
    assert main(["generate", "runs/relative@8", "--prompt", "The", "--max-new-tokens", "2"]) == 0
    assert main(["export", "hf", "runs/relative", "--out", "hf"]) == 0
    assert main(["import", "hf", "hf", "--out", "ckpt"]) == 0
    assert main(["inspect", "ckpt"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("program", ["console script", "python -m"])
def test_both_ways_in_find_experiments(program, tmp_path):
    start = [sys.executable, "-m", "tinyllama_jax"]
    if program == "console script":
        start = [str(Path(sys.executable).parent / "tinyllama")]
    (tmp_path / "mine.py").write_text("from quick_experiment import quick\ndef my_own():\n    return quick()\n")

    def found(name, cwd, *more):
        done = subprocess.run([*start, "inspect", name, "--json", *more], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["config"]["name"]

    assert found("experiments.smoke:tiny", ROOT) == "tiny"
    assert found("mine:my_own", tmp_path, "--experiment-path", str(ROOT / "tests")) == "quick"


def test_the_reader_of_our_output_may_leave(finished):
    command = f"{sys.executable} -m tinyllama_jax inspect tinyllama-1.1b | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "tinyllama-1.1b\n"
