"""The loader's benchmark counts what it says it counts: nothing here is about how fast anything is."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_cases import documents, make_store

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import data

# A run of the benchmark that keeps every claim.
FOUND = {
    "tokens_per_processor_s": {"median": 60e6},
    "share_of_step": data.share_of_step(1 << 20, 75_000, 60e6, 2.0),
    "start": {"processor_s": {"median": 2.5, "min": 1.0}},
    "seek": {"batch_0_s": {"median": 0.03, "min": 0.020}, "batch_9_s": {"median": 0.05, "min": 0.021}},
}


def test_the_share_of_a_step():
    found = data.share_of_step(batch_tokens=2_000_000, tokens_per_s=100_000, loader_tokens_per_s=50e6, put_batch_ms=10)
    assert found == {
        "tokens_per_s": 100_000,
        "step_ms": 20_000,
        "loader_ms": 40,
        "put_batch_ms": 10,
        "loader": 0.002,
        "loader_and_put": 0.0025,
    }


def test_what_keeps_every_claim_keeps_them():
    assert data.failures(FOUND) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("tokens_per_processor_s", "median"), 49e6, "49.0 million tokens a second, claimed 50"),
        (("share_of_step", "loader_and_put"), 0.011, "1.10 % of a step at 75000 tokens a second, claimed 1 %"),
        (("start", "processor_s", "min"), 2.1, "first batch took 2.10 s from the start on, claimed 2.0 s"),
        (("seek", "batch_9_s", "min"), 0.0221, "a later batch took 0.0221 s, the first 0.0200 s, claimed 1.1 times"),
    ],
)
def test_a_claim_that_fails_is_named(path, value, message):
    worse = copy.deepcopy(FOUND)
    *outer, last = path
    inner = worse
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (failed,) = data.failures(worse)
    assert message in failed


@pytest.mark.parametrize("failed", [[], ["too slow"]])
def test_the_exit_status_is_that_of_the_claims(failed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "measure", lambda *_, **__: dict(FOUND))
    monkeypatch.setattr(data, "failures", lambda found: failed)
    assert data.main(["--tokens", "1e5", "--out", str(tmp_path / "lines")]) == bool(failed)
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == failed and (tmp_path / "lines").read_text() == out
    assert err == "".join(f"data: {text}\n" for text in failed)


def test_a_real_store_is_mixed_by_its_tokens(tmp_path):
    opened = make_store(tmp_path / "store", {"a": documents(90, 1), "b": documents(30, 2), "none": documents(1, 3)[:0]})
    tokens = data.sources(opened)
    assert tokens == {name: opened.split("train", name).tokens for name in ("a", "b")}  # `none` fills no window
    read = data.pipeline(tmp_path / "store", batch_tokens=1600)
    assert read.batch(0)["tokens"].shape == (100, 16)  # windows of 17 tokens
    counts = read.order.counts(1000)
    assert counts["a"] / counts["b"] == pytest.approx(tokens["a"] / tokens["b"], rel=1e-3)
    assert {"a", "b"} == set(counts) and np.unique(read.batch(0)["documents"]).size > 1


@pytest.mark.parametrize("command", [["--store", "nowhere"], ["--store", "."]])
def test_a_wrong_store_is_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.main(command) == 78
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("data: ") and "is no token store" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["--tokens", "10"], ["--runs", "0"], ["--tokens", "1e9", "--store", "x"]])
def test_a_wrong_command_is_status_2(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        data.main(command)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_is_measured_and_a_training_too_fast_for_it_fails():
    sizes = ("--tokens", "1e6", "--batch-tokens", "65536", "--runs", "1", "--seconds", "0.1", "--rounds", "2")
    command = [sys.executable, ROOT / "benchmarks/data.py", *sizes, "--tokens-per-s", "1e7"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    line = json.loads(done.stdout)
    assert line["batch_tokens"] == 65536 and sum(line["sources"].values()) == pytest.approx(1e6, rel=0.01)
    share, rate = line["share_of_step"], line["tokens_per_processor_s"]["median"]
    assert share["loader"] == pytest.approx(1e7 / rate, rel=1e-3) and share["put_batch_ms"] > 0
    assert share["loader_and_put"] == pytest.approx(
        share["loader"] + share["put_batch_ms"] / share["step_ms"], rel=1e-3
    )
    assert any("of a step at 10000000 tokens a second" in text for text in line["failed"])
    assert list(line["seek"]) == [f"batch_{step}_s" for step in data.SEEK_STEPS]
    assert line["uncached"]["tokens_per_s"]["n"] == line["tokens_per_s"]["n"] == data.PARTS
    assert 0 < line["start"]["first_batch_s"]["min"] < line["start"]["process_s"]["min"]
