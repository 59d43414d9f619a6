"""The PyTorch peer computes what we compute, in every variant that is timed, and the comparison says what it measured.

Nothing here is about how fast anything is.  What needs PyTorch imports it inside of tests, so that the rest of this
file runs without.
"""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import train_step
import versus_torch

from tinyllama_jax import flops
from tinyllama_jax.config import Data, Execution, LearningRate, Mesh, Run, Stage, replace
from tinyllama_jax.presets import llama

TINY = replace(llama(2, 128, 4, 2, 352, vocab_size=512, context_tokens=64), compute_dtype="float32")
ROWS = 4
LOOP = Run(
    name="loop",
    model=TINY,
    data=Data(store="none: random tokens", sequence_tokens=64),
    curriculum=(Stage(name="main", tokens=ROWS * 64, batch_tokens=ROWS * 64, mixture={"random": 1.0}),),
    lr=LearningRate(kind="constant"),
    execution=Execution(attention="reference", loss_chunk_tokens=100),
    mesh=Mesh(replica=1, data=1),
)


def experiment():
    """For the program's --experiment."""
    return [LOOP, replace(LOOP, name="two-micro-batches", execution=Execution(micro_batch_sequences=2))]


@pytest.fixture(scope="module")
def peer():
    import torch
    import torch_peer

    torch.set_num_threads(1)  # other test processes run beside it
    return torch_peer


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """{dtype: (what our first steps say, the folder with the weights and windows they began with)}."""
    batch = train_step.batch_of(LOOP, ROWS)
    windows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = replace(LOOP, model=replace(TINY, compute_dtype=dtype))
        folder = tmp_path_factory.mktemp("proof") / dtype
        found[dtype] = versus_torch.first_steps(run, folder, windows), folder
    return found


def peer_row(peer, folder, *words, rows=ROWS):
    args = peer.arguments(["--device", "cpu", "--preset", "tiny", "--compile", "none", "--load", str(folder), *words])
    return peer.measure(peer.SHAPES["tiny"], rows, False, args)


# -- the peer ----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16-master"])
def test_three_steps_are_ours(peer, ours, precision, loss, accum):
    """Losses and gradient norms before the first update and after two: forward, backward, clipping and AdamW."""
    expected, folder = ours[versus_torch.DTYPE[precision]]
    assert expected["grad_norm_first"] > 1.5  # so that something is clipped
    words = ("--precision", precision, "--loss", loss, "--loss-chunks", "3", "--accum", str(accum))
    row = peer_row(peer, folder, *words, "--steps", "2", "--warmup", "0", rows=ROWS // accum)
    assert row["step_ms"]["n"] == 2 and row["params"] == flops.parameter_counts(TINY)["total"]
    verdict = versus_torch.differences(expected, row, precision)
    assert verdict["agree"] and len(verdict["relative"]) == 4, verdict
    # And not for want of anything to tell apart: the update moves the loss by far more than is allowed.
    assert expected["loss_first"] - expected["loss_last"] > 0.1


@pytest.mark.parity
def test_gradients_do_not_depend_on_the_chunks(peer):
    import torch

    torch.manual_seed(0)
    model, gradients = peer.TinyLlama(TINY, torch.float32), []
    windows = torch.randint(TINY.vocab_size, (3, 65))
    for words in ([], ["--loss", "chunked", "--loss-chunks", "5"]):
        loss_of = peer.make_loss(model, peer.arguments(["--device", "cpu", "--compile", "none", *words]))
        (0.5 * loss_of(windows[:, :-1], windows[:, 1:])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    full, chunked = gradients
    for name, gradient in full.items():
        assert (chunked[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parity
@pytest.mark.parametrize("repeat", [False, True])
def test_logits_are_those_of_transformers(peer, tmp_path, repeat):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.d_model,
        intermediate_size=TINY.d_ff,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        rms_norm_eps=TINY.norm_eps,
        initializer_range=0.08,
    )
    theirs = transformers.LlamaForCausalLM._from_config(shape, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    model = peer.TinyLlama(TINY, torch.float32, repeat)
    peer.load(model, tmp_path / "theirs")
    tokens = torch.randint(TINY.vocab_size, (2, 50))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, model.head(model(tokens))
    assert expected.std() > 0.3 and (found - expected).abs().max() <= 2e-5


@pytest.mark.parity
def test_operations_that_pytorch_counts_are_those_of_the_formula(peer, ours):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = peer.TinyLlama(TINY, torch.float32, repeat=True)
    loss_of = peer.make_loss(model, peer.arguments(["--device", "cpu", "--compile", "none"]))
    windows = torch.randint(TINY.vocab_size, (3, 65))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(windows[:, :-1], windows[:, 1:]).backward()
    assert counter.get_total_flops() == 3 * 64 * flops.flops_per_token(TINY, 64, "palm")
    row = peer_row(peer, ours["float32"][1], "--precision", "fp32", "--steps", "1", "--warmup", "0")
    for convention, count in row["flops_per_token"].items():
        assert count == flops.flops_per_token(TINY, 64, convention)
    assert row["tflops"] == pytest.approx(row["tok_s"] * row["flops_per_token"]["palm"] / 1e12)


@pytest.mark.parity
def test_the_clip_of_the_fused_kernel_is_that_of_the_plain_one(peer, ours):
    import torch

    args = peer.arguments(["--device", "cpu", "--preset", "tiny", "--precision", "fp32", "--compile", "none"])
    torch.manual_seed(0)
    fused = peer.TinyLlama(TINY, torch.float32)
    plain = peer.TinyLlama(TINY, torch.float32)
    plain.load_state_dict(fused.state_dict())
    windows = torch.randint(TINY.vocab_size, (1, 3, 65))
    step = peer.make_step(fused, windows, args)
    adam = torch.optim.AdamW(plain.parameters(), lr=peer.LR, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    loss_of = peer.make_loss(plain, args)
    for _ in range(2):
        _, norm = step()
        loss_of(windows[0, :, :-1], windows[0, :, 1:]).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5) and norm > 1.5
        adam.step()
        adam.zero_grad()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() <= 0.02 * peer.LR, name  # a step without the clip differs by several rates


@pytest.mark.parity
@pytest.mark.parametrize(
    "words", [["--micro-batches", "8,x"], ["--accum", "0"], ["--compile", "reduce-overhead", "--accum", "2"]]
)
def test_wrong_options_end_with_one_line(peer, words, capsys):
    with pytest.raises(SystemExit) as end:
        peer.arguments(["--device", "cpu", *words])
    assert end.value.code == 2 and words[0] in capsys.readouterr().err


# -- the comparison ----------------------------------------------------------------------------------------


def row(side, tok_s, round_=0, micro=8, cpu_s=1.0, **more):
    step = {"median": 1e3 * micro * 256 / tok_s, "min": 0.5e3 * micro * 256 / tok_s}
    return {
        "side": side,
        "configuration": f"{side}-{micro}",
        "round": round_,
        "micro_batch": micro,
        "accum": 1,
        "seq": 256,
        "error": None,
        "tok_s": tok_s,
        "step_ms": step,
        "cpu_s": cpu_s,
        **more,
    }


def test_ratios_by_hand():
    rows = [
        row("ours", 100.0),
        row("ours", 120.0, micro=16, cpu_s=1.0),
        row("peer", 150.0),
        row("peer", 100.0, micro=16),
        row("ours", 130.0, 1, micro=16, cpu_s=2.0),
        row("peer", 200.0, 1, cpu_s=0.5),
        row("peer", 50.0, 2),
        row("ours", 100.0, 2, micro=16),
        row("peer", 999.0, 2) | {"error": "starts with other numbers"},
    ]
    found = versus_torch.ratios(rows)
    assert found["ratio"] == found["ratio_fastest_step"] == 0.65
    assert found["ratio_by_round"] == {"median": 1.325, "min": 0.65, "max": 2.0, "n": 2}
    assert found["ratio_equal_micro_batch"] == {"8": 0.5, "16": 1.3}
    assert found["ratio_per_processor_second"] == 1.0  # 16 rows in a second, 8 in half a one
    assert (found["best_ours"], found["best_peer"], found["tok_s_peer"]) == ("ours-16", "peer-8", 200.0)
    assert versus_torch.ratios([r for r in rows if r["side"] == "ours"]) == {}
    without = versus_torch.ratios([r | {"cpu_s": None} for r in rows])
    assert without["ratio_per_processor_second"] is None and without["ratio"] == 0.65


def test_when_two_sides_agree():
    ours = dict(zip(versus_torch.PROVEN, (6.0, 2.0, 5.0, 1.5), strict=True))
    near = ours | {"loss_last": 5.0 * (1 + 0.9e-5), "grad_norm_first": 2.0 * (1 - 0.9e-4)}
    assert versus_torch.differences(ours, near, "fp32")["agree"]
    for wrong in ({"loss_first": 6.0 * (1 + 1.1e-5)}, {"grad_norm_last": 1.5 * (1 - 1.1e-4)}, {"loss_last": np.nan}):
        assert not versus_torch.differences(ours, ours | wrong, "fp32")["agree"]
        assert versus_torch.differences(ours, ours | wrong, "autocast")["agree"] == ("loss_last" not in wrong)
    assert not versus_torch.differences(ours, {"error": "no memory"}, "fp32")["agree"]


FAKE = """
import argparse, json
p = argparse.ArgumentParser()
for name in "device preset precision micro-batches accum steps warmup compile {more}".split():
    p.add_argument("--" + name, {default})
args = p.parse_args()
print("a line that is not an object")
print(json.dumps({{"bench": "train", "seq": 64, "params": {params}, "tok_s": 1e-3, "step_ms": 3e8, "step_ms_min": 2e8,
    "step_ms_max": 4e8, "loss_first": 6.4, "grad_norm_first": 2.6, "environment": __import__("os").environ.get("A")}}))
"""


def fake(tmp_path, more="", params=500352):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(more=more, params=params, default="metavar='X'"))
    return script


def compared(*words) -> SimpleNamespace:
    """The program on the tiny model in a process of its own, with its lines."""
    command = [sys.executable, str(ROOT / "benchmarks/versus_torch.py"), "--preset", "tiny", "--steps", "2", *words]
    command += ["--experiment", "test_versus_torch:experiment", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment(), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return SimpleNamespace(status=done.returncode, lines=lines, stderr=done.stderr)


def environment() -> dict:
    import os

    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_not_timed(tmp_path):
    done = compared("--peer", str(fake(tmp_path, "load")), "--set", "execution.micro_batch_sequences=0")
    assert done.status == 1 and "do not compute the same" in done.stderr
    (proof,) = done.lines
    assert proof["agree"] is False and proof["relative"]["loss_first"] > 1e-5
    assert 6 < proof["ours"]["loss_first"] < 7 and proof["ours"]["grad_norm_first"] > 1.5


@pytest.mark.slow
def test_a_peer_without_proof_is_timed_and_said_to_be_unproven(tmp_path):
    words = ["--peer", str(fake(tmp_path)), "--peer-options", "A=b --compile none", "--out", str(tmp_path / "lines")]
    done = compared(*words, "--minimum", "1e12")
    assert done.status == 1 and "1000000000000" in done.stderr, done.stderr[-2000:]
    *rows, last = done.lines
    assert [r["side"] for r in rows if r["bench"] == "train"] == ["ours", "peer", "ours", "peer", "ours", "peer"]
    assert all(r["agree"] is None for r in rows if r["bench"] == "proof")
    theirs = [r for r in rows if r.get("side") == "peer"]
    assert {r["environment"] for r in theirs} == {"b"} and {r["step_ms"]["min"] for r in theirs} == {2e8}
    assert last["proven"] is None and last["ratio"] > 1000 and last["ratio_per_processor_second"] is None
    assert last["ratio"] == pytest.approx(last["tok_s_ours"] / 1e-3, rel=1e-3)
    assert set(last["ratio_equal_micro_batch"]) == {"2", "4"} and last["command"] and last["versions"]["jax"]
    assert (tmp_path / "lines").read_text().splitlines() == [json.dumps(line) for line in done.lines]


def test_wrong_input_ends_with_one_line(tmp_path, capsys):
    experiment = ["--experiment", "test_versus_torch:experiment"]
    wrong = [
        (["--precision", "autocast"], 78, "model.compute_dtype"),
        (["--peer", str(tmp_path / "absent.py")], 78, "--help ended with"),
        (["--set", "model.layerz=1"], 2, "layers"),
    ]
    for words, status, text in wrong:
        assert versus_torch.main([*experiment, *words]) == status
        error = capsys.readouterr().err
        assert text in error and len(error.splitlines()) == 1, error
    with pytest.raises(SystemExit) as end:
        versus_torch.main(["--rounds", "0"])
    assert end.value.code == 2


@pytest.mark.parity
def test_the_whole_comparison(tmp_path):
    words = ("--peer-options=--compile none", "--peer-options=--compile none --loss chunked --attn math")
    done = compared(*words, "--minimum", "1e-6", "--out", str(tmp_path / "lines.jsonl"))
    assert done.status == 0, done.stderr[-3000:]
    proofs = [line for line in done.lines if line["bench"] == "proof"]
    rows = [line for line in done.lines if line["bench"] == "train"]
    last = done.lines[-1]
    assert all(proof["agree"] and max(proof["relative"].values()) < 1e-4 for proof in proofs) and proofs
    # Two of ours and, at each of their two sizes, two of the peer's; then one against one.
    assert [r["side"] for r in rows if r["round"] == 0] == ["ours", "peer", "ours", "peer", "peer", "peer"]
    assert [r["side"] for r in rows if r["round"] == 1] == ["ours", "peer"]
    assert all(r["error"] is None and r["tok_s"] > 0 and r["cpu_s"] > 0 for r in rows)
    assert {r["attn"] for r in rows if "math" in r["configuration"]} == {"math"}
    assert all(r["proof"]["agree"] for r in rows if r["side"] == "peer" and (r["micro_batch"], r["accum"]) == (4, 1))
    assert last["proven"] is True and last["ratio_by_round"]["n"] == 1
    best = {side: max(r["tok_s"] for r in rows if r["side"] == side) for side in ("ours", "peer")}
    assert last["ratio"] == pytest.approx(best["ours"] / best["peer"], abs=1e-4)
