"""The benchmark of checkpoints says what it measured, of a model of a hundred thousand parameters."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import checkpoint

from tinyllama_jax import flops, presets

TINY = presets.llama(2, 64, 2, 1, 128, vocab_size=512, context_tokens=64)


FIXED = ["--preset", "tiny", "--rounds", "1"]


@pytest.fixture
def tiny(monkeypatch):
    """A model of that name, measured in this process."""
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setattr(checkpoint, "isolated", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(checkpoint, "ALONE_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint, "STEP_SECONDS", 0.002)


@pytest.fixture
def written(tmp_path, capsys):
    """written(*arguments): exit status, the lines, and what was said."""

    def run(*arguments) -> tuple[int, list[dict], str]:
        (tmp_path / "disk").mkdir()
        out = tmp_path / "out.jsonl"
        status = checkpoint.main([*FIXED, "--workdir", str(tmp_path / "disk"), "--out", str(out), *arguments])
        assert not any((tmp_path / "disk").iterdir()), "nothing is left behind"
        said = capsys.readouterr()
        assert out.read_text() == said.out
        return status, [json.loads(line) for line in said.out.splitlines()], said.err

    return run


@pytest.mark.slow
def test_the_lines_are_complete_and_consistent(tiny, written, monkeypatch):
    restoring, others = checkpoint.restoring, []

    def beside_another(name, folder, seed):
        others.append(restoring(name, folder, seed + 1)["bit_equal"])
        return restoring(name, folder, seed)

    monkeypatch.setattr(checkpoint, "restoring", beside_another)
    status, (raw, line), _ = written("--max-stall", "600", "--max-restore", "600")
    assert status == 0 and line["failed"] == [] and line["claims"] == {"max_stall_s": 600, "max_restore_s": 600}
    assert (raw["benchmark"], line["benchmark"]) == ("checkpoint_raw", "checkpoint")
    parameters = flops.parameter_counts(TINY)["total"]
    for one in (raw, line):
        assert one["parameters"] == parameters and one["bytes"] == pytest.approx(12 * parameters, rel=0.01)
        assert one["command"] and one["date"] and one["versions"]["orbax-checkpoint"]
    assert raw["write_gb_per_s"]["median"] > 0 and raw["warm_read_gb_per_s"]["median"] > 0
    assert line["device"]["platform"] == "cpu"
    assert line["bit_equal"] is True and others == [False], "equal to what was saved, and not to what was not"
    for save in (line["first"], {key: value["median"] for key, value in line["periodic"].items()}):
        assert 0 < save["stall_s"] <= save["complete_s"] and save["stall_s"] <= save["cost_s"] <= save["complete_s"]
        assert save["slow_down"] > 0 and save["longest_step_s"] > 0
    gigabytes = line["bytes"] / 1e9
    for what, seconds in (("periodic", "complete_s"), ("stage_end", "s"), ("resume", "s"), ("warm", "s")):
        assert line[what][seconds]["n"] == 1
        assert line[what]["gb_per_s"]["median"] == pytest.approx(gigabytes / line[what][seconds]["median"], rel=1e-2)
    assert min(line["peak_resident_bytes"].values()) > line["bytes"]


@pytest.mark.parametrize(
    ("arguments", "equal", "named"),
    [
        (("--max-stall", "0"), True, ["a save held the loop for 0.300 s, claimed 0"]),
        (("--max-stall", "0.2"), True, ["a save held the loop for 0.300 s, claimed 0.2"]),  # the first one counts
        (("--max-restore", "4"), True, ["a restore took 5.00 s, claimed 4"]),
        ((), False, ["the restored state differs from the one that was saved"]),
        (("--max-stall", "0.3", "--max-restore", "5"), True, []),
    ],
)
def test_a_claim_that_is_not_held_is_status_1_and_named(tiny, written, monkeypatch, arguments, equal, named):
    line = {"first": {"stall_s": 0.3}, "periodic": {"stall_s": {"max": 0.1}}, "resume": {"s": {"max": 5.0}}}
    monkeypatch.setattr(checkpoint, "measure", lambda *_: ({}, {"bit_equal": equal, **line}))
    status, (_, found), said = written(*arguments)
    assert (status, found["failed"]) == (int(bool(named)), named)
    assert said.splitlines() == [f"checkpoint: {text}" for text in named]


def test_bits_are_compared_not_numbers():
    """-0.0 equals 0.0 in numbers, and NaN nothing."""
    state = {"a": jnp.asarray([0.0, np.nan, 1.0]), "n": jnp.int32(7)}
    assert checkpoint.same_bits(state, dict(state))
    assert not checkpoint.same_bits(state, {**state, "a": jnp.asarray([-0.0, np.nan, 1.0])})
    assert not checkpoint.same_bits(state, {**state, "n": jnp.int32(8)})


def test_what_a_save_costs():
    """Half of the steps in nine seconds, after one in which there were none."""
    found = checkpoint.of_save(1.0, 10.0, [0.1, 0.1], [0.1, 0.2, 0.3])
    assert found["slow_down"] == pytest.approx(2) and found["longest_step_s"] == 0.3
    assert found["cost_s"] == pytest.approx(1 + 9 / 2)
    assert checkpoint.of_save(1.0, 10.0, [0.2], [0.1])["cost_s"] == 1, "steps that were faster give nothing back"


def command(*arguments) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, ROOT / "benchmarks/checkpoint.py", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=env)


def test_a_disk_without_room_is_one_line_and_status_78(mount):
    disk = mount("size=1m")
    done = command("--preset", "t15", "--workdir", disk)
    assert (done.returncode, done.stdout) == (78, "") and done.stderr.count("\n") == 1
    assert "0.0 GB are free and 0.4 GB are needed" in done.stderr
    assert not any(disk.iterdir())


def test_a_disk_that_fills_meanwhile_is_one_line_and_status_78(tiny, mount, monkeypatch, capsys):
    """As when another program writes: the room was there when it was looked for."""
    disk = mount("size=1m")
    monkeypatch.setattr(checkpoint, "COPIES", 0.1)
    assert checkpoint.main([*FIXED, "--workdir", str(disk)]) == 78
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "no space left on the device" in said.err
    assert not any(disk.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--preset", "t234"), 78, "the nearest is 't243'"),
        (("--rounds", "0"), 2, "--rounds must be positive"),
        (("--workdir", "/nowhere/at/all"), 2, "no such folder"),
        (("--out", "/nowhere/at/all.jsonl"), 2, "no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(capsys, arguments, status, message):
    try:
        found = checkpoint.main(list(arguments))
    except SystemExit as error:
        found = error.code
    assert found == status and message in capsys.readouterr().err
