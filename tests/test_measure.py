"""The verb `measure`: loss in longer windows, speed of generation, and the file that keeps both."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from quick_experiment import quick

from tinyllama_jax import configio
from tinyllama_jax.cli import main
from tinyllama_jax.config import Evaluation, Execution, Mesh, Model, Rope, replace
from tinyllama_jax.data.store import TokenStore, Windows
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.evaluate import beyond
from tinyllama_jax.evaluate.loss import Validator
from tinyllama_jax.generate import speed
from tinyllama_jax.generate.score import score
from tinyllama_jax.lab import measures
from tinyllama_jax.model import transformer
from tinyllama_jax.presets import preset
from tinyllama_jax.sharding import make_mesh

MODEL = quick().model
TRAINED = quick().data.sequence_tokens  # 32


@pytest.fixture(scope="module")
def mesh():
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def params(mesh):
    """Weights that tell positions apart."""
    return jax.jit(lambda key: jax.tree.map(lambda p: p * 3, transformer.init(MODEL, key)))(jax.random.key(1))


def asking(store, **evaluation):
    run = quick()
    return replace(
        run, data=replace(run.data, store=str(store)), evaluation=replace(run.evaluation, sequences=8, **evaluation)
    )


# -- loss in longer windows --------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [False, True])
def test_at_the_training_length_it_is_the_validation_loss_of_the_same_windows(params, mesh, small_store, masking):
    run = asking(small_store, beyond_tokens=(TRAINED,), beyond_ropes=("as-trained",))
    run = replace(run, data=replace(run.data, document_masking=masking))
    store = TokenStore.open(small_store)
    windows = beyond.text(run, store)
    validator = Validator(
        windows,
        store.tokenizer().token_bytes(),
        MODEL,
        Execution(),
        mesh,
        batch_sequences=8,
        document_masking=masking,
    )
    expected = validator(params)
    found = beyond.measure(params, run, MODEL, mesh, windows)["as-trained"][str(TRAINED)]
    for domain, at in found["domains"].items():
        assert at["loss"] == pytest.approx(expected[domain]["loss"], rel=1e-5)
        assert at["loss_se"] == pytest.approx(expected[domain]["loss_se"], rel=1e-4)
    assert found["loss"] == pytest.approx(np.mean([at["loss"] for at in expected.values()]), rel=1e-5)


def test_the_same_tokens_are_predicted_at_every_length(small_store):
    store, run = TokenStore.open(small_store), asking(small_store, beyond_tokens=(64, 128))
    for windows in beyond.text(run, store).values():
        assert windows.tokens_NT.shape == (8 * TRAINED // 128, 129)
        for length in (32, 64, 128):
            pieces = beyond.cut(windows, length)
            assert pieces.tokens_NT.shape[1] == length + 1 and (pieces.used_N == length + 1).all()
            np.testing.assert_array_equal(pieces.tokens_NT[:, 1:].reshape(-1, 128), windows.tokens_NT[:, 1:])
            np.testing.assert_array_equal(
                pieces.tokens_NT[:, 0].reshape(-1), windows.tokens_NT[:, :-1:length].reshape(-1)
            )


def test_padding_stays_padding_when_a_window_is_cut():
    tokens = np.arange(9)[None]
    pieces = beyond.cut(Windows(tokens, np.zeros_like(tokens), np.array([6], np.int32)), 4)
    assert pieces.used_N.tolist() == [5, 2]  # 4, 5 are the second's only tokens


def test_a_store_of_shorter_windows_gives_text_in_a_row(small_store):
    """Joined windows are those of the text itself: no token between two stored windows is lost or told twice."""
    split = TokenStore.open(small_store).split("validation", "prose")
    assert split.window_tokens == 33
    stored = split.read(np.arange(8), 33).tokens_NT.reshape(-1)
    joined = split.read(np.arange(2), 129).tokens_NT.reshape(-1)
    np.testing.assert_array_equal(joined, stored[: 2 * 129])


def test_the_mean_over_positions_is_the_loss(params, mesh, small_store):
    run = asking(small_store, beyond_tokens=(64,), beyond_ropes=("as-trained", "yarn"))
    found = beyond.measure(params, run, MODEL, mesh, beyond.text(run, TokenStore.open(small_store)))
    assert list(found["as-trained"]) == ["32", "64"] and list(found["yarn"]) == ["64"]
    for lengths in found.values():
        for at in lengths.values():
            assert len(at["by_position"]) == beyond.BINS
            assert np.mean(at["by_position"]) == pytest.approx(at["loss"], rel=1e-6)
            assert 0 < at["loss_se"] < at["loss"]


def test_positions_are_told_apart(params, mesh, small_store):
    """Each bin is the mean of the tokens at its positions, as `score` gives them."""
    run = asking(small_store, beyond_tokens=(64,), beyond_ropes=("as-trained",))
    windows = beyond.text(run, TokenStore.open(small_store))
    found = beyond.measure(params, run, MODEL, mesh, windows)["as-trained"]["64"]["domains"]["code"]
    long = replace(MODEL, context_tokens=64)
    nll = score(params, long, Execution(), mesh, windows["code"].tokens_NT)
    np.testing.assert_allclose(found["by_position"], nll.reshape(len(nll), 16, 4).mean((0, 2)), rtol=1e-5)
    per_window = nll.mean(1)
    assert found["loss_se"] == pytest.approx(per_window.std(ddof=1) / math.sqrt(len(per_window)), rel=1e-4)


@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn"])
def test_a_factor_of_one_changes_nothing_and_another_does(params, mesh, small_store, rope):
    assert beyond.stretched(MODEL, rope, TRAINED, 64).rope == Rope(
        kind=rope, factor=2.0, original_context_tokens=TRAINED
    )
    rows = np.random.default_rng(0).integers(0, 512, (8, 33))
    plain = score(params, MODEL, Execution(), mesh, rows)
    same = score(params, beyond.stretched(MODEL, rope, TRAINED, TRAINED), Execution(), mesh, rows)
    np.testing.assert_allclose(same, plain, atol=1e-3)
    other = score(params, beyond.stretched(MODEL, rope, TRAINED, 4 * TRAINED), Execution(), mesh, rows)
    assert np.abs(other - plain).max() > 0.1


def test_what_makes_no_sense_is_left_out_by_name():
    everything = ["as-trained", "linear", "ntk", "yarn"]
    assert beyond.suitable(MODEL, ()) == (everything, "")
    assert beyond.suitable(MODEL, ("yarn",)) == (["yarn"], "")
    for kind, why in (("none", "NoPE"), ("partial", "without"), ("linear", "with linear already")):
        ropes, said = beyond.suitable(replace(MODEL, rope=Rope(kind=kind, fraction=0.5)), ())
        assert ropes == ["as-trained"] and said.startswith("linear, ntk, yarn left out: ") and why in said


def test_documents_hidden_from_each_other_are_scored_alone(params, mesh):
    rows = np.random.default_rng(0).integers(0, 512, (8, 21))
    documents = np.repeat([[0] * 8 + [1] * 13], 8, axis=0)
    masked = score(params, MODEL, Execution(), mesh, rows, documents_BT=documents)
    alone = score(params, MODEL, Execution(), mesh, rows[:, 8:])
    np.testing.assert_allclose(masked[:, 8:], alone, atol=1e-3)
    assert np.abs(masked - score(params, MODEL, Execution(), mesh, rows))[:, 8:].max() > 0.1


# -- generation --------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(speed, "PREFILLS", 1)
    monkeypatch.setattr(speed, "STEPS", 1)


def test_the_cache_takes_what_the_formula_says(params, mesh, quickly):
    assert speed.cache_bytes_per_token(preset("tinyllama-1.1b")) == 22_528
    assert speed.cache_bytes_per_token(replace(preset("tinyllama-1.1b"), kv_heads=32)) == 180_224
    pairs = ("1x8", "3x8", "3x16")
    found = speed.measure(params, MODEL, pairs)
    assert [f"{rows[1:]}x{context[1:]}" for rows, contexts in found.items() for context in contexts] == list(pairs)
    for rows, contexts in found.items():
        for context, at in contexts.items():
            tokens = int(rows[1:]) * int(context[1:])
            assert at["cache_bytes"] == tokens * speed.cache_bytes_per_token(MODEL)
            assert at["tokens_per_s"] > 0 and at["prefill_tokens_per_s"] > 0


def test_speeds_are_tokens_over_the_median_second(params, mesh, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks) * 0.5)  # each call takes half a second
    found = speed.measure(params, MODEL, ("3x16",))["b3"]["c16"]
    assert (found["tokens_per_s"], found["prefill_tokens_per_s"]) == (3 / 0.5, 3 * 16 / 0.5)


# -- the file ----------------------------------------------------------------------------------------------


def test_measurements_of_one_checkpoint_add_up_and_those_of_another_replace_them():
    first = {
        "beyond": {"linear": {"64": {"loss": 1.0}}, "ntk": {"64": {"loss": 2.0}}},
        "provenance": {"beyond": {"step": 5}},
    }
    assert measures.merged({}, first) == first
    more = {"beyond": {"linear": {"128": {"loss": 3.0}}}, "provenance": {"beyond": {"step": 5}}}
    assert measures.merged(first, more)["beyond"] == {
        "linear": {"64": {"loss": 1.0}, "128": {"loss": 3.0}},
        "ntk": {"64": {"loss": 2.0}},
    }
    other = {"decode": {"b1": {"c8": {}}}, "cache_bytes_per_token": 8, "provenance": {"decode": {"step": 6}}}
    both = measures.merged(first, other)
    assert both["beyond"] == first["beyond"] and both["decode"] == other["decode"]
    assert both["provenance"] == {"beyond": {"step": 5}, "decode": {"step": 6}} and both["cache_bytes_per_token"] == 8
    later = measures.merged(both, more | {"provenance": {"beyond": {"step": 6}}})
    assert later["beyond"] == more["beyond"] and later["decode"] == other["decode"]


@pytest.fixture
def own(finished, tmp_path):
    """A copy of a finished run that may be written into."""
    return shutil.copytree(finished, tmp_path / "own")


def said(capsys, *argv, status=0):
    capsys.readouterr()
    assert main(["measure", *map(str, argv)]) == status
    return capsys.readouterr()


def test_the_verb_measures_says_and_keeps(own, capsys, quickly):
    out = said(capsys, own, "--beyond", "64", "--rope", "as-trained,linear").out
    assert "linear" in out and "ntk" not in out and "decode" not in out
    kept = json.loads((own / "measures.json").read_text())
    assert kept["provenance"]["beyond"]["step"] == 16 and kept["provenance"]["beyond"]["versions"]["jax"]
    out = said(capsys, own, "--decode", "1x8", "--json").out
    [value] = json.loads(out)["runs"]
    written = json.loads((own / "measures.json").read_text())
    assert {key: value[key] for key in written} == written and value["name"] == "quick"
    assert written["beyond"] == kept["beyond"]
    assert written["decode"]["b1"]["c8"]["cache_bytes"] == 8 * written["cache_bytes_per_token"]
    assert not [path for path in own.iterdir() if ".tmp" in path.name]


def test_a_run_says_itself_what_is_to_be_measured(own, capsys):
    said(capsys, own, status=78)
    info = json.loads((own / "run.json").read_text())
    info["config"]["evaluation"] |= {"beyond_tokens": [64], "beyond_ropes": ["ntk"]}
    (own / "run.json").write_text(json.dumps(info))
    [value] = json.loads(said(capsys, own, "--json").out)["runs"]
    assert list(value["beyond"]) == ["ntk"] and list(value["beyond"]["ntk"]) == ["64"] and "decode" not in value


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 78, "asks for no measurement; give --beyond or --decode"),
        (("--beyond", "16"), 78, "none be shorter"),
        (("--beyond", "64,96"), 78, "must divide the longest"),
        (("--beyond", "long"), 2, "lengths in tokens, such as 256,512"),
        (("--beyond", "64", "--rope", "alibi"), 78, "'alibi' is none of as-trained, linear, ntk, yarn"),
        (("--rope", "ntk"), 2, "--rope says how --beyond is measured"),
        (("--decode", "8"), 78, "each must be rows x tokens, such as 8x512"),
        (("--beyond", "64", "--sequences", "-1"), 2, "cannot be negative"),
        (("--beyond", "1048576"), 78, "no domain has 1048577 tokens of validation text in a row"),
    ],
)
def test_what_cannot_be_measured_is_one_line(finished, capsys, words, status, line):
    error = said(capsys, finished, *words, status=status).err.strip()
    assert line in error and "\n" not in error and error.startswith("tinyllama measure: ")
    assert not (finished / "measures.json").exists()


def test_a_wrong_run_is_one_line_before_any_is_measured(finished, tmp_path, capsys):
    for wrong, line in ((tmp_path / "none", "no such run directory"), (tmp_path, "it has no run.json")):
        error = said(capsys, finished, wrong, "--decode", "1x8", status=78).err.strip()
        assert line in error and "\n" not in error
    assert not (finished / "measures.json").exists()


def test_a_run_without_a_checkpoint_or_an_end(own, capsys, quickly):
    lines = (own / "metrics.jsonl").read_text().splitlines(keepends=True)
    (own / "metrics.jsonl").write_text("".join(lines[:-3]))
    assert "the run is not finished; its newest checkpoint is measured" in said(capsys, own, "--decode", "1x8").err
    (own / "measures.json").write_text("[1")
    assert "remove it and measure again" in said(capsys, own, "--decode", "1x8", status=78).err
    (own / "measures.json").unlink()
    shutil.rmtree(own / "checkpoints")
    assert "no complete checkpoint here" in said(capsys, own, "--decode", "1x8", status=78).err


def test_a_packed_store_has_no_longer_text(small_store):
    run, store = asking(small_store, beyond_tokens=(64,)), TokenStore.open(small_store)
    store.manifest["packing"] = "best_fit"
    with pytest.raises(ConfigError, match="no longer text in a row is left of them"):
        beyond.text(run, store)


def test_what_is_measured_is_no_part_of_a_runs_identity():
    run = quick()
    more = replace(run, evaluation=replace(run.evaluation, beyond_tokens=(64,), decode=("1x8",)))
    assert configio.fingerprint(run) == configio.fingerprint(more)
    assert {f.name for f in dataclasses.fields(Evaluation)} >= {"beyond_tokens", "beyond_ropes", "decode"}
    assert isinstance(MODEL, Model)
