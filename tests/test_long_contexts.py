"""The options of `eval` for long contexts, the recipes that lengthen one, and the figures that show what came of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from matplotlib.image import imread

from experiments import extend, smoke
from tinyllama_jax import verbs_context
from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.evaluate import beyond
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.lab import context_plots
from tinyllama_jax.lab.draw import png
from tinyllama_jax.lab.report import write_report
from tinyllama_jax.presets import preset
from tinyllama_jax.schedules import Plan

# -- the verb ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(finished, tmp_path):
    """A finished run of one's own, trained in windows of 32 tokens."""
    return shutil.copytree(finished, tmp_path / "run")


def said(capsys, *argv, status=0):
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == status
    return capsys.readouterr()


def test_passkeys_of_a_run_are_kept_added_to_and_drawn(own, tmp_path, capsys):
    words = [own, "--passkey", "260", "--keys", "3", "--choices", "2", "--depths", "0,1", "--json"]
    value = json.loads(said(capsys, *words, "--rope", "as-trained", "--plots", tmp_path / "p").out)
    assert value["trained_tokens"] == 32 and value["provenance"]["passkey"]["chance"] == 0.5
    cell = value["passkey"]["as-trained"]["260"]
    assert list(cell["depths"]) == ["0", "1"] and len(cell["depths"]["0"]["said"]) == 3
    assert cell["margin"] == pytest.approx(np.mean([at["margin"] for at in cell["depths"].values()]))
    assert imread(tmp_path / "p" / "passkey.png").shape[1] == 1600
    [file] = (own / "evaluations").glob("*-passkey.json")
    assert json.loads(file.read_text())["passkey"] == value["passkey"]
    more = json.loads(said(capsys, *words, "--rope", "ntk").out)
    assert more["passkey"] == value["passkey"] | {"ntk": more["passkey"]["ntk"]}, "same conditions: added"
    assert more["passkey"]["ntk"]["260"]["margin"] != cell["margin"]
    shown = said(capsys, *words[:-1], "--rope", "ntk", "--seed", "5").out
    assert "one is the likeliest of 2 by chance in 50.0 %" in shown and "ntk              260" in shown
    assert list(json.loads(file.read_text())["passkey"]) == ["ntk"], "other keys: replaced"


def test_loss_by_position_is_what_measure_says_of_a_run(own, tmp_path, capsys):
    words = [own, "--positions", "32,64", "--rope", "as-trained,yarn", "--sequences", "2"]
    value = json.loads(said(capsys, *words, "--plots", tmp_path, "--json").out)
    assert main(["measure", str(own), "--beyond", "64", "--rope", "as-trained,yarn", "--sequences", "2"]) == 0
    assert value["positions"] == json.loads((own / "measures.json").read_text())["beyond"]
    assert list(value["positions"]["yarn"]) == ["64"] and list(value["positions"]["as-trained"]) == ["32", "64"]
    assert imread(tmp_path / "positions.png").shape[1] == 1600
    page = write_report(own).read_text()
    assert "Long windows, by position" in page and (own / "plots" / "positions.png").exists()
    words = [own, "--positions", "32", "--rope", "as-trained", "--sequences", "2", "--every-tokens", "2000"]
    along = json.loads(said(capsys, *words, "--json").out)["evaluations"]
    assert len(along) > 1 and [e["new"] for e in along].count(False) == 1, "the newest has one"
    assert "as-trained 32: " in said(capsys, *words).out


def test_loss_by_position_of_a_checkpoint_from_elsewhere(tmp_path, capsys):
    checkpoint = tiny_checkpoint.make(tmp_path, context_tokens=64)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    words = [checkpoint, "--positions", "128", "--corpus", f"foxes={tmp_path}/text", "--rope", "linear"]
    value = json.loads(said(capsys, *words, "--json").out)
    assert value["trained_tokens"] == 64, "its context" and list(value["positions"]["linear"]) == ["128"]
    assert list(value["positions"]["linear"]["128"]["domains"]) == ["foxes"]
    assert "name some with --corpus" in said(capsys, checkpoint, "--positions", "64", status=78).err
    assert "128: 48 does not divide it" in said(capsys, checkpoint, "--positions", "48,128", status=78).err


@pytest.mark.parametrize(
    "words, status, line",
    [
        (["--passkey", "64,no"], 2, "--passkey 64,no: lengths in tokens"),
        (["--positions", "0"], 2, "--positions 0: lengths in tokens"),
        (["--passkey", "64", "--positions", "64"], 2, "--passkey and --positions are evaluations of their own"),
        (["--passkey", "64", "--tasks", "piqa"], 2, "--tasks and --passkey are evaluations of their own"),
        (["--passkey", "64", "--corpus", "x"], 2, "--corpus goes not with --passkey"),
        (["--passkey", "64", "--rope", "alibi"], 2, "--rope alibi: choose of as-trained, linear, ntk, yarn"),
        (["--passkey", "64", "--choices", "11"], 2, "--choices 11: must be at least 2 and at most --keys 10"),
        (["--passkey", "64", "--depths", "0,2"], 2, "--depths 0,2: shares of the filler"),
        (["--positions", "64", "--keys", "3"], 2, "--keys goes with --passkey"),
        (["--rope", "yarn"], 2, "--rope goes with --passkey or --positions"),
        (["--passkey", "64", "--every-tokens", "9", "--plots", "x"], 2, "--plots is of one checkpoint"),
        (["--positions", "16", "--rope", "yarn"], 2, "--rope yarn: up to the 32 tokens of training there is only"),
        (["--passkey", "64"], 78, "a window of 64 tokens cannot hold the prompt"),
    ],
)
def test_what_makes_no_sense_is_one_line(finished, capsys, words, status, line):
    lines = said(capsys, finished, *words, status=status).err.strip().splitlines()
    assert line in lines[-1]


def test_the_treatments_of_the_verb_are_those_that_are_measured():
    assert verbs_context.ROPES == beyond.ROPES


@pytest.mark.parametrize(
    "name, kind, factor, steps, sequences, tokens",
    [
        ("linear_8k", "linear", 4, 1000, 64, 8192),
        ("linear_16k", "linear", 8, 1000, 128, 16_384),
        ("ntk_8k", "ntk", 8, 400, 64, 8192),
        ("ntk_16k", "ntk", 16, 400, 64, 16_384),
        ("yarn_8k", "yarn", 4, 400, 64, 8192),
        ("yarn_16k", "yarn", 8, 400, 64, 16_384),
        ("cpu_as_trained", "default", 1, 100, 8, 1024),
        ("cpu_linear", "linear", 4, 100, 8, 1024),
        ("cpu_ntk", "ntk", 8, 100, 8, 1024),
        ("cpu_yarn", "yarn", 4, 100, 8, 1024),
    ],
)
def test_the_recipes_say_what_the_papers_do(name, kind, factor, steps, sequences, tokens):
    recipe, small = getattr(extend, name)(), name.startswith("cpu")
    base = smoke.demo().model if small else preset("tinyllama-1.1b")
    run = run_of(replace(recipe, base="base"), base, "store", {"text": 10**9})
    [stage] = Plan(run.curriculum, run.data.sequence_tokens).stages
    assert (run.data.sequence_tokens, run.model.context_tokens) == (tokens, tokens)
    assert (stage.end_step, stage.batch_tokens) == (steps, sequences * tokens)
    assert (run.model.rope.kind, run.model.rope.factor) == (kind, factor)
    if kind != "default":
        assert run.model.rope.original_context_tokens == base.context_tokens
    assert run.lr.kind == "constant" and (run.optimizer.beta2, run.optimizer.weight_decay) == (0.95, 0)
    if not small:
        assert run.lr.peak == 2e-5 and run.lr.warmup_tokens == 20 * stage.batch_tokens


# -- figures -----------------------------------------------------------------------------------------------


def cell(value: float, depths=("0", "0.5", "1")) -> dict:
    at = {"exact": value, "accuracy": value, "margin": 9 * value - 1}
    return at | {"depths": {depth: at for depth in depths}}


@pytest.mark.parametrize("names", [1, 7])
def test_figures_show_something_and_nothing_is_cut_off(names, tmp_path):
    ropes = ["as-trained", "linear", "ntk", "yarn", *(f"{rope}, fine-tuned" for rope in ("linear", "ntk", "yarn"))]
    lengths = (256, 512, 1024)
    trained = 256 if names > 1 else 1024
    curve = np.linspace(3, 4, 16)
    value = {
        "trained_tokens": trained,
        "passkey": {r: {str(n): cell(0.1 * i) for i, n in enumerate(lengths)} for r in ropes[:names]},
        "positions": {r: {str(n): {"by_position": [*curve[:-1], None]} for n in lengths} for r in ropes[:names]},
        "provenance": {"passkey": {"choices": 10}},
    }
    for name, figure in context_plots.figures(value).items():
        path = Path(tmp_path / f"{name}.png")
        path.write_bytes(png(figure))
        image = imread(path)
        ink = (image[..., :3] < 0.7).any(axis=2)
        assert image.shape[1] == 1600 and 400 < image.shape[0] < 3000 and 0.003 < ink.mean() < 0.6
        edge = np.ones_like(ink)
        edge[3:-3, 3:-3] = False
        assert not ink[edge].any(), "something is cut off at the border of the picture"


def test_up_to_the_trained_length_every_treatment_shows_what_was_measured_as_trained():
    found = {"as-trained": {"256": cell(0.9), "512": cell(0.1)}, "yarn": {"512": cell(0.4)}}
    figure = context_plots.figures(
        {"trained_tokens": 256, "passkey": found, "provenance": {"passkey": {"choices": 10}}}
    )["passkey"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["as-trained", "yarn"] * 3
    yarn = [text.get_text() for text in figure.axes[1].texts]
    assert yarn == ["90", "40"] * 3
