"""What is read from a compiled step's text is what is there, and the real step's text says what it should.

The texts by hand are of a model with 2 layers of one matrix [64, 32], 100 words of width 64, rows of 24 tokens.
"""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compiled
import hlo

from tinyllama_jax.config import replace
from tinyllama_jax.preflight import targets

TEXT = """\
HloModule jit_train_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_cast (p.0: f32[2,64,32]) -> bf16[2,64,32] {
  %p.0 = f32[2,64,32]{2,1,0} parameter(0)
  ROOT %convert.1 = bf16[2,64,32]{2,1,0} convert(%p.0)
}

%fused_late_cast (p.1: f32[2,64,32], p.2: s32[]) -> bf16[64,32] {
  %p.1 = f32[2,64,32]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %slice.1 = f32[1,64,32]{2,1,0} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,64,32}
  %bitcast.1 = f32[64,32]{1,0} bitcast(%slice.1)
  ROOT %convert.2 = bf16[64,32]{1,0} convert(%bitcast.1)
}

%fused_copy (p.3: f32[2,64,32]) -> f32[2,32,64] {
  %p.3 = f32[2,64,32]{2,1,0} parameter(0)
  ROOT %transpose.1 = f32[2,32,64]{2,1,0} transpose(%p.3), dimensions={0,2,1}
}

%body (arg: (s32[], bf16[2,64,32], f32[2,64,32], f32[100,64])) -> (s32[], bf16[2,64,32], f32[2,64,32], f32[100,64]) {
  %arg = (s32[], bf16[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, /*index=3*/f32[100,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %cast.2 = bf16[2,64,32]{2,1,0} get-tuple-element(%arg), index=1
  %master = f32[2,64,32]{2,1,0} get-tuple-element(%arg), index=2
  %table = f32[100,64]{1,0} get-tuple-element(%arg), index=3
  %ids = s32[96,1]{1,0} iota(), iota_dimension=0
  %x = f32[96,64]{1,0} gather(%table, %ids), slice_sizes={1,64}
  %logits = f32[48,100]{1,0} dot(%x, %table)
  %product = f32[64,32]{1,0} dot(%x, %x)
  %gradient = bf16[64,32]{1,0} convert(%product)
  %rows = f32[100,64]{1,0} scatter(%table, %ids, %x), unique_indices=true, to_apply=%add
BODY
  ROOT %next = (s32[], bf16[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, f32[100,64]{1,0}) tuple(%i, %cast.2, %master, %rows)
}

%condition (arg.1: (s32[], bf16[2,64,32], f32[2,64,32], f32[100,64])) -> pred[] {
  %arg.1 = (s32[], bf16[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, f32[100,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %three = s32[] constant(3)
  ROOT %more = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (w: f32[2,64,32], e: f32[100,64]) -> (f32[2,64,32], f32[100,64]) {
  %w = f32[2,64,32]{2,1,0} parameter(0)
  %e = f32[100,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %cast = bf16[2,64,32]{2,1,0} fusion(%w), kind=kLoop, calls=%fused_cast
  %start = (s32[], bf16[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, f32[100,64]{1,0}) tuple(%zero, %cast, %w, %e)
  %loop = (s32[], bf16[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, f32[100,64]{1,0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %table.1 = f32[100,64]{1,0} get-tuple-element(%loop), index=3
ENTRY_
  ROOT %result = (f32[2,64,32]{2,1,0}, f32[100,64]{1,0}) tuple(%w, %table.1)
}
"""
STATE_BYTES = 4 * (2 * 64 * 32 + 100 * 64)


def text(*, body: str = "", entry: str = "", **replaced: str) -> str:
    """The program with more instructions in its loop and its entry."""
    made = TEXT.replace("BODY\n", body and f"  {body}\n").replace("ENTRY_\n", entry and f"  {entry}\n")
    for old, new in replaced.items():
        made = made.replace(old, new)
    return made


def judge(program: str, deterministic: str | None = None) -> dict:
    run = compiled.run_of(targets.parse("h200"), 4, "none", "loop", tokens=24)
    run = replace(run, model=replace(run.model, vocab_size=100, d_model=64))
    run = replace(run, execution=replace(run.execution, loss_chunk_tokens=48))
    return compiled.judge(
        program,
        text() if deterministic is None else deterministic,
        run,
        state_bytes=STATE_BYTES,
        layer_sizes=[2048, 4096],
    )


def test_a_program_of_which_all_holds():
    judged = judge(text())
    assert judged["holds"] == dict.fromkeys(compiled.CHECKS, True) and not any(judged["lines"].values())
    assert judged["found"] == {
        "logits_tokens": [48],
        "state_bytes": STATE_BYTES,
        "donated_bytes": STATE_BYTES,
        "copies_in_loops": 0,
        "layer_casts": {"entry": 1, "loops": 0},
        "embedding_and_head_casts": {"entry": 0, "loops": 0},
        "unordered_scatters": 0,
        "kernels": {"as_is": 1 + 3 * 6, "deterministic": 1 + 3 * 6},
    }


LATE = "%late = bf16[64,32]{1,0} fusion(%master, %i), kind=kLoop, calls=%fused_late_cast"


@pytest.mark.parametrize(
    ("check", "where", "line"),
    [
        ("scores", "body", "%bad = bf16[4,24,24]{2,1,0} dot(%x, %x)"),
        ("scores", "body", '%bad = (f32[], f32[48,2,24]{2,1,0}) custom-call(%x), custom_call_target="attend"'),
        ("logits", "body", "%bad = f32[96,100]{1,0} dot(%x, %table)"),
        ("logits", "body", "%bad = bf16[4,24,100]{2,1,0} dot(%x, %table)"),
        ("host", "body", '%bad = f32[] custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback"'),
        ("host", "entry", "%bad = ((f32[]), token[]) infeed(%after)"),
        ("host", "body", "%bad = token[] outfeed(%x, %after)"),
        ("host", "body", "%bad = (f32[], u32[], token[]) send(%x, %after), channel_id=1, is_host_transfer=true"),
        ("host", "body", "%bad = token[] recv-done(%after), channel_id=1, is_host_transfer=true"),
        ("host", "body", "%bad = f32[96,64]{1,0:S(5)} copy(%x)"),
        ("copies", "entry", "%bad = f32[2,64,32]{2,1,0} copy(%w)"),
        ("copies", "entry", "%bad = f32[64,100]{1,0} transpose(%e), dimensions={1,0}"),
        ("copies", "entry", "%bad = (f32[2,64,32]{2,1,0}, f32[2,64,32]{2,1,0}, u32[]) copy-start(%w)"),
        ("copies", "entry", "%bad = f32[2,32,64]{2,1,0} fusion(%w), kind=kInput, calls=%fused_copy"),
        ("casts", "body", "%bad = bf16[2,64,32]{2,1,0} convert(%master)"),
        ("casts", "body", LATE.replace("late =", "bad =")),
    ],
)
def test_each_check_can_fail_and_says_where(check, where, line):
    judged = judge(text(**{where: line}))
    assert [name for name, holds in judged["holds"].items() if not holds] == [check]
    (said,) = judged["lines"][check]
    assert "bad = " in said or said.startswith("fused_late_cast: convert.2"), said


def test_what_the_checks_let_pass():
    """A copy of activations, a transpose in a loop, a rounded product and the head's own cast are none of theirs."""
    assert all(judge(text(entry="%fine = f32[96,64]{1,0} copy(%table.1)"))["holds"].values())
    moved = judge(text(body="%fine = f32[2,32,64]{2,1,0} fusion(%master), kind=kInput, calls=%fused_copy"))
    assert all(moved["holds"].values()) and moved["found"]["copies_in_loops"] == 1
    head = judge(text(body="%fine = bf16[100,64]{1,0} convert(%table)"))
    assert all(head["holds"].values()) and head["found"]["embedding_and_head_casts"] == {"entry": 0, "loops": 1}


def test_state_that_is_not_donated_fails():
    judged = judge(text().replace(", {1}: (1, {}, may-alias)", ""))
    assert not judged["holds"]["donated"] and judged["found"]["donated_bytes"] == 4 * 4096
    assert judged["lines"]["donated"] == ["16,384 bytes of 41,984"]


def test_a_program_without_any_cast_is_not_one_that_casts_once():
    judged = judge(text().replace("bf16[2,64,32]{2,1,0} convert(%p.0)", "f32[2,64,32]{2,1,0} negate(%p.0)"))
    assert not judged["holds"]["casts"]


@pytest.mark.parametrize("combiner", ["add", "maximum"])
def test_a_scatter_that_sums_in_no_order_fails_where_it_must_not_be(combiner):
    loose = text().replace("unique_indices=true, ", "").replace("f32[] add(", f"f32[] {combiner}(")
    assert judge(loose)["found"]["unordered_scatters"] == 1 and judge(loose)["holds"]["deterministic"]
    judged = judge(loose, loose)
    assert not judged["holds"]["deterministic"] and "scatter(%table" in judged["lines"]["deterministic"][0]
    overwrites = loose.replace(f"ROOT %sum = f32[] {combiner}(%a, %b)", "ROOT %sum = f32[] bitcast(%b)")
    assert judge(overwrites, overwrites)["holds"]["deterministic"]


def test_kernels_are_counted_as_often_as_a_step_starts_them():
    found = hlo.kernels(hlo.Program(text(body=LATE)))
    assert found["by_kind"] == {
        "fusion:loop": 1 + 3,
        **dict.fromkeys(("iota", "gather", "scatter"), 3),
        "dot": 6,
        "convert": 3,
    }
    assert found["places"] == {
        "main": {"loops": 0, "times": 1, "kernels": 1},
        "body": {"loops": 1, "times": 3, "kernels": 7},
    }
    assert found["per_step"] == 22 and found["again"] == {"kernels": 0, "products": 0}


def test_what_xla_computes_again_to_save_memory():
    """An instruction that was moved, not repeated, is the only one of its name."""
    more = "%logits.remat2 = f32[48,100]{1,0} dot(%x, %table)\n  %x.remat.remat = f32[96,64]{1,0} gather(%table, %ids)"
    moved = {"%gradient": "%gradient.remat"}
    found = hlo.kernels(hlo.Program(text(body=more, **moved)))
    assert found["again"] == {"kernels": 3 * 2, "products": 3}


# -- the program ----------------------------------------------------------------------------------------------


def lines_of(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_exit_status_and_file_tell_what_does_not_hold(monkeypatch, capsys, tmp_path):
    bad = text(body="%bad = f32[8,1920,1920]{2,1,0} dot(%x, %x)")
    given = {"state_bytes": STATE_BYTES, "layer_sizes": [2048, 4096], "attention": {}}
    command = [
        "program",
        "--layers-as",
        "loop",
        "--out",
        str(tmp_path / "out.jsonl"),
        "--keep",
        str(tmp_path / "texts"),
    ]
    monkeypatch.setattr(compiled, "check_installed", lambda _: None)
    monkeypatch.setattr(compiled, "isolated", lambda *_: {"text": text(), **given})
    assert compiled.main(command) == 0
    monkeypatch.setattr(compiled, "isolated", lambda *_: {"text": bad, **given})
    assert compiled.main(command) == 1
    captured = capsys.readouterr()
    assert "no array holds a number for each pair of tokens of a row: body: bad" in captured.err
    assert (tmp_path / "out.jsonl").read_text() == captured.out and captured.out.count("\n") == 2
    assert (tmp_path / "texts" / "loop.txt").read_text() == bad


def test_larger_micro_batches_are_not_compiled_once_one_does_not_fit(monkeypatch, capsys):
    def pretend(function, run, target):
        return {"fits": run.execution.micro_batch_sequences <= (8 if run.execution.remat == "full" else 4)}

    monkeypatch.setattr(compiled, "check_installed", lambda _: None)
    monkeypatch.setattr(compiled, "isolated", pretend)
    command = ["memory", "--targets", "a100-40g", "--remat", "full,none", "--layers-as", "loop", "--rows", "16,4,8,32"]
    assert compiled.main(command) == 0
    lines = lines_of(capsys)
    assert [(line["remat"], line["rows"]) for line in lines] == [
        *(("full", 4), ("full", 8), ("full", 16)),
        *(("none", 4), ("none", 8)),
    ]
    speed = lines[0]["forecast"]
    assert 5_000 < speed["tokens_per_s_per_device"] < speed["in_a_batch_of_2m"] < 40_000
    assert "mpt-1b-a100-40g" in speed["calibrated"]["by"]

    assert compiled.main(["memory", "--targets", "v5e:4x4", "--remat", "none,full"]) == 0
    assert [(line["remat"], line["rows"], line["fits"]) for line in lines_of(capsys)] == [
        *(("none", 4, False), ("full", 4, False)),
    ]


def test_wrong_words_are_one_line(capsys):
    assert compiled.main(["memory", "--targets", "h300"]) == 2
    assert "h300: not a target" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        compiled.main(["memory", "--remat", "some"])
    assert exit.value.code == 2


def start(*words: str) -> list[dict]:
    command = [sys.executable, ROOT / "benchmarks/compiled.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.aot
@pytest.mark.parametrize("layers_as", compiled.LAYERS_AS)
def test_the_real_step_for_an_h200(layers_as):
    (line,) = start("program", "--layers", "2", "--layers-as", layers_as)
    assert line["holds"] == dict.fromkeys(compiled.CHECKS, True), line["lines"]
    found = line["found"]
    assert found["logits_tokens"] == [1920], "15,360 tokens in 8 chunks of at most 2,048"
    assert found["donated_bytes"] == found["state_bytes"] > 12 * 200_000_000
    assert found["layer_casts"] == {"entry": 7, "loops": 0}, "four of attention, three of the MLP"
    assert found["unordered_scatters"] == 1, "the embedding's gradient, which execution.deterministic sorts"
    assert found["kernels"]["deterministic"] > found["kernels"]["as_is"]


@pytest.mark.aot
def test_the_memory_of_the_real_step():
    loop, unrolled = start("memory", "--targets", "a100-40g", "--rows", "4", "--layers", "2", "--remat", "none")
    for line in (loop, unrolled):
        assert line["fits"] and line["attention"]["compiled"] == "triton" and line["compile_s"] > 0
        sizes = line["bytes"]
        assert sizes["state"] + sizes["temporaries"] <= sizes["total"] <= line["capacity_bytes"]
        # The sums of the gradients are float32, and 2 micro-batches are not kept at the same time.
        assert sizes["state"] / 3 < sizes["temporaries"] < sizes["state"] * 2
    assert unrolled["kernels"]["per_step"] < loop["kernels"]["per_step"]
    assert {place["loops"] for place in loop["kernels"]["places"].values()} == {0, 1, 2}
