"""The benchmarks count what they say they count, and run: nothing here is about how fast anything is."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention
import attention_contenders as contenders
import attention_parity
import lines
import train_step
from attention_contenders import Contender, Shape

from tinyllama_jax.config import Execution, replace
from tinyllama_jax.errors import ConfigError, UsageError

TINY = Shape(rows=2, tokens=128, heads=2, kv_heads=1, head_dim=16, dtype="float32")


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """A benchmark as a user starts it, on one CPU device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


# -- lines -------------------------------------------------------------------------------------------------


def test_a_spread_and_a_file_name():
    assert lines.spread([3.00004, 1, 2, 10]) == {"median": 2.5, "min": 1.0, "max": 10.0, "n": 4}
    assert lines.slug("NVIDIA A100-SXM4-40GB") == "nvidia-a100-sxm4-40gb" and lines.slug("TPU v5 lite") == "tpu-v5-lite"


# -- train_step --------------------------------------------------------------------------------------------


def test_what_changed_and_by_how_much():
    base = quick()
    other = replace(base, name="other", execution=Execution(remat="full"))
    assert train_step.changed(base, other) == {"execution.remat": "full"}

    def line(speed, size=100, compile_s=2.0):
        return {"tokens_per_s": {"median": speed}, "compiled_bytes": size, "compile_s": compile_s}

    measured = [[line(100.0), line(50.0)], [line(200.0, 50), line(150.0, 50)], [{"skipped": "no"}, {"skipped": "no"}]]
    same, faster, absent = train_step.ratios(measured)
    assert same["speed"] == 1 and absent == {}
    # Over the medians of all rounds, and round by round: the machine was half as fast in the second.
    assert (faster["speed"], faster["speed_min"], faster["speed_max"]) == (pytest.approx(175 / 75, abs=1e-3), 2.0, 3.0)
    assert faster["compiled_bytes"] == 0.5
    assert "not measured" in train_step.table(["same", "faster", "absent"], [same, faster, absent])


def test_an_experiment_is_a_run_or_a_list_of_runs():
    runs = train_step.runs_of("experiments.effectiveness:gpu", ["seed=7"])
    assert len(runs) > 5 and {r.seed for r in runs} == {7}
    assert len(train_step.runs_of("experiments.smoke:tiny", [])) == 1
    for wrong in ("experiments.smoke", "experiments.smoke:none", "experiments.nowhere:x"):
        with pytest.raises(UsageError, match="module:function"):
            train_step.runs_of(wrong, [])
    with pytest.raises(ConfigError, match="neither a Run nor a list"):
        train_step.runs_of("builtins:dict", [])


@pytest.mark.slow
def test_the_real_step_is_measured_and_what_cannot_run_is_said(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from quick_experiment import quick\n"
        "from tinyllama_jax.config import Execution, replace\n"
        "def both():\n"
        "    base = quick()\n"
        "    return [base, replace(base, name='on-hopper', execution=Execution(attention='hopper'))]\n"
    )
    command = (ROOT / "benchmarks/train_step.py", "mine:both", "--steps", "3", "--out", tmp_path / "out.jsonl")
    result = run(*command, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert result.returncode == 0, result.stderr[-3000:]
    base, hopper, ratios = (json.loads(line) for line in result.stdout.splitlines())
    assert (tmp_path / "out.jsonl").read_text() == result.stdout
    assert base["tokens_per_s"]["n"] == 3 and base["tokens_per_s"]["min"] <= base["tokens_per_s"]["median"]
    assert base["batch_sequences"] * base["sequence_tokens"] == 128 and base["attention"] == "blocks"
    assert 5 < base["last_loss"] < 8 and base["compile_s"] > base["first_step_s"] > 0
    # Weights and moments are the floor of what the compiler says is needed.
    assert base["compiled_bytes"] > 12 * base["parameters"]
    assert "mfu_palm" not in base  # the peak of a CPU is not known
    assert base["versions"]["jax"] and base["date"] and base["device"] == "cpu"
    assert hopper["changed"] == {"execution.attention": "hopper"} and "GPU" in hopper["skipped"]
    assert ratios["ratios"]["on-hopper"] == {} and ratios["ratios"]["quick"]["speed"] == 1


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [1, 2, 5])
def test_visible_scores_and_blocks_are_those_of_the_mask(per_row):
    shape = Shape(rows=3, tokens=640, heads=4, kv_heads=2)
    ids = contenders.document_ids(shape, per_row)
    position = np.arange(shape.tokens)
    mask = np.broadcast_to(position[:, None] >= position, (3, 640, 640))
    if per_row > 1:
        assert all(len(np.unique(row)) == per_row and (np.diff(row) >= 0).all() for row in ids)
        mask = mask & (ids[:, :, None] == ids[:, None, :])
        assert contenders.visible_scores(shape, ids) == mask.sum()
    else:  # FlashAttention's count leaves half of the diagonal out
        assert contenders.visible_scores(shape, ids) == mask.sum() - 3 * 640 / 2
    blocks = lambda m: m.reshape(-1, 5, 128, 5, 128).any(axis=(2, 4)).sum()  # noqa: E731
    whole = blocks(np.tril(np.ones((3, 640, 640), bool)))
    assert contenders.ideal_ratio(shape, ids) == pytest.approx(blocks(mask) / whole)


def test_the_anchors_operations():
    anchor = Shape(rows=8, tokens=2048, heads=32, kv_heads=4)
    assert contenders.operations(anchor, None, "forward") == pytest.approx(137.4e9, rel=1e-3)
    assert contenders.operations(anchor, None, "forward_backward") == pytest.approx(3.5 * 137.4e9, rel=1e-3)


@pytest.mark.parametrize("name", ["reference", "interpret:triton"])
def test_a_cell_is_measured(name):
    args = SimpleNamespace(sets=2, samples=3, sample_seconds=0.001)
    line = attention.cell(name, TINY, 2, "forward_backward", args)
    assert line["ms"]["n"] == 3 and line["documents_as"] == "ranges"
    ids = contenders.document_ids(TINY, 2)
    work = contenders.operations(TINY, ids, "forward_backward")
    assert line["tflops"] == pytest.approx(work / line["ms"]["median"] / 1e9, abs=1e-4)


@pytest.mark.parametrize("name", ["cudnn", "hopper", "cudnn-mask", "tokamax-mosaic", "jax-flash", "nobody"])
def test_what_cannot_run_here_says_why(name):
    line = attention.cell(name, TINY, 2, "forward", SimpleNamespace(sets=1, samples=1, sample_seconds=0.001))
    assert line.keys() == {"skipped"} and len(line["skipped"]) > 20


def test_calls_of_one_program_wait_for_each_other():
    """Otherwise kernels could overlap, and each would look faster than it is."""
    sets = [tuple(jnp.full((2, 2), float(i)) for i in range(4))] * 3
    text = attention.program(lambda q, k, v: q @ k + v, "forward").lower(sets, ()).as_text()
    assert text.count("optimization_barrier") == 2


@pytest.mark.slow
def test_attention_as_a_command(tmp_path):
    small = ("--tokens", "128", "--lengths", "64", "--heads", "2/1", "--head-dim", "16", "--dtype", "float32")
    little = ("--documents", "1,2", "--directions", "forward", "--samples", "2", "--sample-seconds", "0.001")
    command = ("benchmarks/attention.py", *small, *little, "--out", tmp_path, "--implementations", "xla,hopper")
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    written = [json.loads(line) for line in (tmp_path / "attention-speed-cpu.jsonl").read_text().splitlines()]
    assert [(w["implementation"], w["documents"], "ms" in w) for w in written] == [
        ("xla", 1, True),
        ("xla", 2, True),
        ("hopper", 1, False),
        ("hopper", 2, False),
    ]
    assert written[1]["speedup_over_causal"] > 0 and written[0]["tokens"] == 64
    assert "xla" in result.stdout.splitlines()[-3]


# -- parity ------------------------------------------------------------------------------------------------


def test_the_exact_attention_is_exact():
    """By numpy in float64, head by head."""
    shape = Shape(rows=2, tokens=8, heads=4, kv_heads=2, head_dim=4, dtype="float32")
    q, k, v, do = (np.asarray(x, np.float64) for x in contenders.arrays(shape, 0))
    ids = contenders.document_ids(shape, 3)
    got = attention_parity.by_group(*contenders.arrays(shape, 0), jnp.asarray(ids), exactly=True)
    for b in range(2):
        for h in range(4):
            mask = np.tril(ids[b][:, None] == ids[b])
            p = np.where(mask, np.exp(q[b, :, h] @ k[b, :, h // 2].T / 2), 0)
            p /= p.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(got[0][b, :, h], p @ v[b, :, h // 2], atol=1e-5)
            dp = do[b, :, h] @ v[b, :, h // 2].T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / 2
            np.testing.assert_allclose(got[1][b, :, h], ds @ k[b, :, h // 2], atol=1e-5)


def parity(monkeypatch, tmp_path, name, change=None):
    """Exit status and the file of `--parity` in this process, with `change` applied to the kernel's result."""
    real = contenders.contender

    def changed(*arguments):
        entrant = real(*arguments)
        return Contender(lambda *a: change(entrant.run(*a)), *entrant[1:]) if change else entrant

    monkeypatch.setattr(contenders, "contender", changed)
    monkeypatch.setattr(attention_parity, "isolated", lambda f, *a: f(*a))
    path = tmp_path / "attention-cpu.json"
    status = attention_parity.report(
        [name], SimpleNamespace(shapes=[TINY._replace(dtype="bfloat16")], complete=False), path, lines.origin()
    )
    return status, json.loads(path.read_text())


def test_parity_of_plain_attention_is_one(monkeypatch, tmp_path):
    status, written = parity(monkeypatch, tmp_path, "xla")
    result = written["implementations"]["xla"]
    assert (status, written["ok"], len(result["cells"])) == (0, True, 2)
    assert 0.8 < result["worst_ratio"] < 1.2
    assert written["command"] and written["versions"]["jax"] and not written["all_default_shapes"]


@pytest.mark.parametrize("change", [lambda o: o * 1.02, lambda o: o * jnp.nan, lambda o: jnp.roll(o, 1, axis=2)])
def test_parity_fails_what_is_wrong(monkeypatch, tmp_path, change):
    status, written = parity(monkeypatch, tmp_path, "xla", change)
    assert status == 1 and not written["ok"] and not written["implementations"]["xla"]["ok"]


def test_parity_fails_when_nothing_was_compared(monkeypatch, tmp_path):
    status, written = parity(monkeypatch, tmp_path, "hopper")
    assert status == 1 and "GPU" in written["implementations"]["hopper"]["skipped"]


def test_a_kernel_whose_runs_differ_is_told(monkeypatch):
    calls = iter(range(100))

    class Unsteady:
        def lower(self, *_):
            return self

        compile = lower

        def __call__(self, q, k, v, do, more):
            return tuple(x + next(calls) for x in (q, q, k, v))

    real = attention_parity.jax.jit
    jit = lambda f, **how: Unsteady() if f.__name__ == "kernel" else real(f, **how)  # noqa: E731
    monkeypatch.setattr(attention_parity, "jax", SimpleNamespace(**{**vars(attention_parity.jax), "jit": jit}))
    assert not attention_parity.compare("xla", TINY, 1)["repeats_bit_for_bit"]


# -- fusions -----------------------------------------------------------------------------------------------


def test_kernels_are_counted_in_the_entry_only():
    import fusions

    text = """
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %e = f32[4]{0} exponential(%p)
}

ENTRY %main (a: f32[4], b: f32[4]) -> (f32[4], f32[4]) {
  %a = f32[4]{0} parameter(0)
  %c = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[4]{0} copy-done(%c)
  %loop.1 = f32[4]{0} fusion(%d), kind=kLoop, calls=%fused
  %loop.2 = (f32[4]{0}, f32[4]{0}) fusion(%loop.1), kind=kLoop, calls=%fused
  %g = f32[4]{0} get-tuple-element(%loop.2), index=0
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%g, %loop.1)
}
"""
    assert fusions.kernels(text) == {"copy-start": 1, "fusion": 2}


@pytest.mark.aot
def test_elementwise_operations_are_one_kernel_each():
    """What the README says of XLA's fusion, held to; on a TPU the norm reads its input twice and RoPE widens it."""
    command = ("benchmarks/fusions.py", "--operations", "rms_norm,swiglu,swiglu_backward,rope,rope_backward,adamw")
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for line in result.stdout.splitlines():
        one = json.loads(line)
        found[one["device"].split()[0], one["operation"]] = one
    assert len(found) == 12
    for operation in ("rms_norm", "swiglu", "swiglu_backward", "rope", "rope_backward"):
        gpu = found["NVIDIA", operation]
        assert gpu["by_kind"] == {"fusion": 1} and gpu["temp_bytes"] < 1000, gpu
    for operation in ("swiglu", "swiglu_backward"):
        assert found["TPU", operation]["by_kind"] == {"fusion": 1} and found["TPU", operation]["temp_bytes"] == 0
    assert found["TPU", "rms_norm"]["by_kind"]["fusion"] <= 3 and found["TPU", "rope"]["kernels"] <= 5
    # Nothing as large as a weight is copied: the new state is written where the old one was.
    update = found["NVIDIA", "adamw"]
    assert update["temp_bytes"] < 1e6 and update["kernels"] <= 60
