"""The series for a lent GPU, tried without one: pieces end in time and badly, and the record holds their lines."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import h200  # noqa: E402
import pieces  # noqa: E402
import real_runs  # noqa: E402
from pieces import Piece  # noqa: E402

SCRIPT = """
import json, sys, time
print(json.dumps({"benchmark": "train_step", "configuration": "a", "tokens_per_s": {"median": float(sys.argv[1]),
    "min": 1.0, "max": 3.0}, "mfu_palm": 0.5, "peak_bytes": 2**30, "compile_s": 4.0, "date": "x"}), flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_pieces_end_in_time_and_say_how(script, tmp_path, capsys):
    assert pieces.run("good", Piece("", [(script, "1", "0", "0"), (script, "2", "0", "0")]), tmp_path)
    assert [line["tokens_per_s"]["median"] for line in pieces.lines_of(tmp_path / "good")] == [1, 2]
    assert not pieces.run("bad", Piece("", [(script, "1", "0", "3"), (script, "2", "0", "0")]), tmp_path)
    assert len(pieces.lines_of(tmp_path / "bad")) == 1  # nothing is begun after a failure
    assert not pieces.run("slow", Piece("", [(script, "1", "600", "0")]), tmp_path, limit=3)
    said = capsys.readouterr().out
    assert "good: done" in said and "bad: 3;" in said and "slow: out of time after 3 s" in said
    assert pieces.lines_of(tmp_path / "nothing") == []


def test_the_record_and_the_table_hold_every_row(script, tmp_path):
    pieces.run("step", Piece("", [(script, "2", "0", "0")]), tmp_path)
    pieces.run("flags-none", Piece("", [(script, "2", "0", "0")]), tmp_path)
    pieces.run("flags-autotune-4", Piece("", [(script, "3", "0", "0")]), tmp_path)
    made = h200.record(tmp_path, {"kind": "NVIDIA H200"})
    assert list(made["pieces"]) == ["flags-autotune-4", "flags-none", "step"] and made["versions"]["jax"]
    assert "date" not in made["pieces"]["step"][0] and made["pieces"]["step"][0]["mfu_palm"] == 0.5
    made["pieces"]["versus"] = [
        {"bench": "train", "side": "peer", "configuration": "block", "tok_s": 5.0, "error": None, "mfu": 0.4},
        {"bench": "train", "side": "peer", "configuration": "model", "error": "out of memory"},
        {"bench": "versus_torch", "ratio": 1.05, "ratio_fastest_step": 1.04},
    ]
    shown = h200.table(made["pieces"])
    assert "step a" in shown and " 0.500 " in shown and " 1.0 " in shown and "out of memory" in shown
    assert "flags autotune-4: 1.500 of none" in shown and "ours over PyTorch: 1.05" in shown


def test_every_piece_names_a_program_and_options_that_exist():
    for name, piece in h200.series("python").items():
        for program, *options in piece.commands:
            source = (ROOT / "benchmarks" / program).read_text()
            for option in (o for o in options if o.startswith("--") and o.count("-") < 5):
                assert f'"{option}"' in source or program == "versus_torch.py", (name, option)


def test_without_a_gpu_it_is_one_line(tmp_path):
    for words, status, said in ((["step"], 78, "finds no GPU"), (["speeed"], 2, "choose from"), ([], 2, "no piece")):
        command = [sys.executable, ROOT / "benchmarks/h200.py", *words, "--out", tmp_path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and said in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_ceilings_are_of_real_arithmetic():
    found = h200.ceilings(side=128, copy_bytes=1 << 20, seconds=0.05)
    assert found["gemm_tflops"]["n"] >= 3 and found["gemm_tflops"]["min"] > 0 and found["copy_gb_per_s"]["min"] > 0


def test_steady_steps_are_those_that_nothing_disturbed(tmp_path):
    lines = [
        {"step": i, "timing": {"tokens_per_s": float(i), **({"compiled": True} if i == 5 else {})}}
        for i in range(1, 13)
    ]
    events = [{"kind": "start", "step": 0}, {"kind": "saved", "step": 6}, {"kind": "checkpoint_written", "step": 9}]
    for name, found in (("metrics", lines), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in found))
    assert real_runs.steady(tmp_path) == [3, 4, 6, 9, 10, 11, 12]


@pytest.mark.slow
def test_real_runs_on_a_cpu(small_store, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from quick_experiment import quick\n"
        "from tinyllama_jax.config import Checkpoint, Execution, Recipe, Stage, replace\n"
        "def long():\n"
        "    stage = Stage(name='basic', tokens=128 * 60, batch_tokens=128, mixture={'prose': 1.0})\n"
        "    data = replace(quick().data, store='x')\n"
        "    return replace(quick(), curriculum=(stage,), execution=Execution(deterministic=True), data=data,\n"
        "        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=10))\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{tmp_path}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    for what, options in (("exact", []), ("end-to-end", ["--steps", "3", "--max-restart", "0"])):
        (tmp_path / what).mkdir()
        # The store that the run makes itself lies where this one is.
        program = (
            "import sys, real_runs; from pathlib import Path\n"
            "real = real_runs.train\n"
            f"def train(experiment, workdir, settings, **how):\n"
            f"    (workdir.parent / 'store').exists() or (workdir.parent / 'store').symlink_to({str(small_store)!r})\n"
            "    return real(experiment, workdir, settings, **how)\n"
            "real_runs.train = train\n"
            "sys.exit(real_runs.main(sys.argv[1:]))\n"
        )
        command = [sys.executable, "-c", program, what, "mine:long", "--kill-after", "25", *options]
        command += ["--workdir", tmp_path / what, "--out", tmp_path / "line.jsonl"]
        done = subprocess.run(command, cwd=ROOT / "benchmarks", env=env, capture_output=True, text=True)
        line = json.loads((tmp_path / "line.jsonl").read_text())
        assert line["continued"].startswith("resumed at step"), done.stderr[-3000:]
        assert line["killed_after_step"] >= 25 and line["steps"] == 60
        if what == "exact":
            assert done.returncode == 0 and line["ok"] and line["equal_steps"] == 60 and line["largest_difference"] == 0
        else:
            assert (
                done.returncode == 1 and line["share"] > 0 and line["first_step_s"] > line["first_step_compile_s"] > 0
            )
            assert len(line["failed"]) == 1 and "a restart took" in line["failed"][0]
            assert line["loop_ms"] * (1 - line["share"]) >= 0  # both say which of the two was faster


def test_the_claims_are_options(capsys):
    with pytest.raises(SystemExit) as stop:
        real_runs.main(["exact"])
    assert stop.value.code == 2 and argparse and "MODULE:FUNCTION" in capsys.readouterr().err
