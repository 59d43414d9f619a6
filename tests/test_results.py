"""experiments/results: what is committed there is what the code would do, and the point from which a sweep goes on."""

import json
from pathlib import Path

import pytest

from tinyllama_jax import configio
from tinyllama_jax.cli import main
from tinyllama_jax.lab import table

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
STUDIES = {
    "isoflop": "experiments.scaling:isoflop_cpu",
    "isoflop_rates": "experiments.scaling:isoflop_cpu_rates",
    "repetition": "experiments.repetition:repetition_cpu",
    "gqa": "experiments.gqa:gqa_cpu",
    "rope": "experiments.rope:rope_cpu",
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_sweep_goes_on_from_its_committed_table(name, capsys, tmp_path):
    """Every run of the study is in it, finished, and under the configuration that the experiment has today."""
    path = RESULTS / name / "runs.jsonl"
    words = ["sweep", STUDIES[name], "--workdir", str(tmp_path / "s"), "--table", str(path), "--dry-run", "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in value["runs"]] == ["done"] * len(value["runs"])
    assert value["totals"]["runs"] == 0


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_table_says_what_it_was_made_with(name):
    rows = table.read(RESULTS / name / "runs.jsonl")
    assert len({row["store"] for row in rows}) in (1, len({row.get("config.data.unique_tokens") for row in rows}))
    assert len({row["tokenizer"] for row in rows}) == 1
    for row in rows:
        assert row["status"] == "finished" and row["loss"] > 0 and row["loss_se"] > 0
        assert row["git"] and row["version"] and row["jax"] and row["fingerprint"]
        assert not str(row["directory"]).startswith("/")


def test_the_fit_of_the_committed_profiles_is_the_committed_one(capsys):
    folder = RESULTS / "isoflop"
    assert main(["fit", "isoflop", "--runs", str(folder / "runs.jsonl"), "--json"]) == 0
    value, kept = (json.loads(text) for text in (capsys.readouterr().out, (folder / "fit.json").read_text()))
    assert value["exponents"] == pytest.approx(kept["exponents"], rel=1e-6)
    assert [at["N"] for at in value["optima"]] == pytest.approx([at["N"] for at in kept["optima"]], rel=1e-6)


def test_measures_are_in_the_tables():
    for row in table.read(RESULTS / "gqa" / "runs.jsonl"):
        model = {key: row[f"config.model.{key}"] for key in ("layers", "kv_heads", "head_dim")}
        assert row["measure.cache_bytes_per_token"] == 2 * 4 * model["layers"] * model["kv_heads"] * model["head_dim"]
        assert row["measure.decode.b8.c512.tokens_per_s"] > 0
    for row in table.read(RESULTS / "rope" / "runs.jsonl"):
        assert row["measure.beyond.as-trained.512.loss"] > 0


def test_every_experiment_of_the_table_exists():
    for experiment in STUDIES.values():
        assert all(configio.fingerprint(run) for run in configio.load_runs(experiment))


def test_the_law_of_repetition_is_the_committed_one(capsys):
    kept = json.loads((RESULTS / "repetition" / "fit.json").read_text())
    words = [x for name in ("repetition", "isoflop") for x in ("--runs", str(RESULTS / name / "runs.jsonl"))]
    assert main(["fit", "repetition", *words, "--where", "weight_decay=0.1", "--draws", "20", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["constants"] == pytest.approx(kept["constants"], rel=1e-3)
    assert value["derived"]["base_from"] == "all 39 runs of one epoch", "the long runs alone are far off at few tokens"
    r2 = {name: law["r2"] for name, law in value["quality"]["compared"].items()}
    assert r2["penalty"] > 0.95 > 0.8 > r2["effective"], "these runs overfit"
