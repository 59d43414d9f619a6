"""Time and money without compiling: the arithmetic, and what it foretells of published runs."""

import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import tinyllama
from tinyllama_jax import flops, mesh_rules
from tinyllama_jax.cli import main
from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.preflight import anchors, assumptions, money, prices, roofline, targets, traffic
from tinyllama_jax.schedules import Plan

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "roofline.json").read_text())
V1_0 = tinyllama.v1_0()
TARGET = "a100-40g:2x8"
HUGE = 1e30


def parts_of(run, target=TARGET, **changed):
    target = targets.parse(target)
    given = replace(assumptions.of(target), **changed)
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    return roofline.of_plan(run, plan.stages, target.count, given)[0]["parts"]


# -- what it foretells -------------------------------------------------------------------------------------------


def test_the_published_run_is_foretold_by_one_number_of_another_system():
    """24 thousand tokens/s on each of 16 A100-40G and 90 days, by MPT-1B's speed on 8 of them."""
    value = money.estimate(V1_0, TARGET)
    assert value["calibration"]["anchor"] == "mpt-1b-a100-40g" and "llm-foundry" in value["calibration"]["source"]
    assert value["tokens_per_s_per_device"] == pytest.approx(24_000, rel=0.15)
    assert value["days"] == pytest.approx(90, rel=0.15)
    assert value["device_hours"] == pytest.approx(34_560, rel=0.15)  # 3,456 for each of ten times 300B tokens


def test_no_anchor_is_tinyllamas_own():
    for anchor in anchors.ANCHORS.values():
        assert "tinyllama" not in (anchor.name + anchor.source).lower()
        assert flops.parameter_counts(anchor.model)["total"] != flops.parameter_counts(V1_0.model)["total"]


@pytest.mark.parametrize("name", anchors.ANCHORS)
def test_every_other_anchor_is_reported_as_it_is(name):
    """The committed table says what each number would have foretold, the poor ones too."""
    (row,) = [row for row in COMMITTED["anchors"] if row["anchor"] == name]
    anchor = anchors.ANCHORS[name]
    value = money.estimate(V1_0, TARGET, calibration=name)
    assert row["efficiency"] == pytest.approx(anchor.efficiency, rel=1e-9)
    assert row["leave_one_out_error"] == pytest.approx(anchors.leave_one_out(name), rel=1e-9)
    error = value["tokens_per_s_per_device"] / 24_000 - 1
    assert row["tinyllama"]["tokens_per_s_per_device_error"] == pytest.approx(error, rel=1e-9)
    # Of the same card and at least a billion parameters, any would have done.
    if anchors.family(anchor.target) == "a100" and flops.parameter_counts(anchor.model)["total"] > 1e9:
        assert abs(error) < 0.15 and abs(row["leave_one_out_error"]) < 0.15


def test_the_committed_table_is_of_these_anchors():
    assert [row["anchor"] for row in COMMITTED["anchors"]] == list(anchors.ANCHORS)
    line, value = COMMITTED["tinyllama"], money.estimate(V1_0, TARGET)
    assert line["tokens_per_s_per_device"] == pytest.approx(value["tokens_per_s_per_device"], rel=1e-9)
    assert abs(line["tokens_per_s_per_device_error"]) < 0.15 and abs(line["days_error"]) < 0.15


@pytest.mark.parametrize("changed", ["overlap=0", "overlap=1", "network_bandwidth=6.25e9", "hbm_efficiency=0.75"])
def test_what_was_guessed_does_not_decide_the_answer(changed):
    value = money.estimate(V1_0, TARGET, assume=[changed])
    assert value["tokens_per_s_per_device"] == pytest.approx(24_000, rel=0.15)


# -- the model ---------------------------------------------------------------------------------------------------


def test_with_endless_memory_and_links_only_flops_are_left():
    endless = {"hbm_bandwidth": HUGE, "link_bandwidth": HUGE, "network_bandwidth": HUGE, "gaps": 0.0}
    parts = parts_of(V1_0, matmul_efficiency=1.0, attention_efficiency=1.0, **endless)
    terms = flops.forward_terms(V1_0.model, 2048, causal=True)
    tokens, peak = 1024 * 2048 / 16, 312e12
    assert parts["matmul"] == pytest.approx(3 * (terms["proj"] + terms["mlp"] + terms["head"]) * tokens / peak)
    assert parts["attention"] == pytest.approx(3.5 * terms["attention"] * tokens / peak)
    assert sum(parts.values()) == pytest.approx(parts["matmul"] + parts["attention"])
    full = replace(V1_0, execution=replace(V1_0.execution, remat="full"))
    again = parts_of(full, matmul_efficiency=1.0, attention_efficiency=1.0, **endless)
    assert again["matmul"] - parts["matmul"] == pytest.approx((terms["proj"] + terms["mlp"]) * tokens / peak)
    assert again["attention"] == pytest.approx(4.5 / 3.5 * parts["attention"])


def test_elementwise_work_is_two_hundred_kilobytes_per_token_and_layer():
    keep_all = replace(V1_0, execution=replace(V1_0.execution, remat="none"))
    parts = parts_of(keep_all, hbm_bandwidth=1.0, hbm_efficiency=1.0)
    tokens = 1024 * 2048 / 16
    assert parts["elementwise"] / tokens / 22 == 2 * (20 * 2048 + 4 * (2048 + 256) + 9 * 5632) == 201_728
    assert parts_of(V1_0, hbm_bandwidth=1.0)["elementwise"] > 1.3 * parts["elementwise"]


def test_communication_by_hand():
    """v1_0 gathers and scatters within a machine of 8 and adds up over two machines, eight pairs at the same time."""
    parts = parts_of(V1_0, overlap=0.0, link_efficiency=1.0, link_bandwidth=100e9, network_bandwidth=10e9)
    layers, table = 22 * (9_437_184 + 34_603_008), 65_536_000
    inside = 8 * (2 * 2 * layers + 2 * table + 2 * layers + 2 * 4 * table) + 4 * table
    across = 8 * 2 * (2 * layers + 2 * 4 * table) / 8
    norms = 8 * 2 * 4 * (45 * 2048 + 2)
    by_hand = inside * 7 / 8 / 100e9 + across / 2 / 10e9 + norms * 15 / 16 / 80e9
    assert parts["communication"] == pytest.approx(by_hand)
    assert parts_of(V1_0)["communication"] == pytest.approx(parts_of(V1_0, overlap=0.0)["communication"] / 2)
    alone = replace(V1_0, mesh=Mesh(), execution=replace(V1_0.execution, micro_batch_sequences=8))
    assert parts_of(alone, "a100-80g")["communication"] == 0


@pytest.mark.parametrize(
    "axes, here",
    [(("data",), 8), (("replica",), 1), (("replica", "data"), 8), (("tensor",), 4), (("data", "tensor"), 8)],
)
def test_a_machine_holds_neighbours_of_the_last_axes(axes, here):
    sizes = {"replica": 4, "data": 8, "context": 1, "tensor": 1}
    if "tensor" in axes:
        sizes = {"replica": 4, "data": 2, "context": 1, "tensor": 4}
    assert roofline._members_here(axes, sizes, 8) == here


def test_tensor_and_context_axes_share_the_work_and_pay_for_it():
    wide = replace(V1_0, mesh=Mesh(replica=2, data=2, tensor=4), execution=Execution(micro_batch_sequences=128))
    plain = replace(V1_0, mesh=Mesh(replica=2, data=8), execution=Execution(micro_batch_sequences=128))
    assert parts_of(wide, gaps=0.0)["matmul"] == pytest.approx(parts_of(plain, gaps=0.0)["matmul"], rel=0.05)
    assert parts_of(wide)["communication"] > parts_of(plain)["communication"]
    long = replace(plain, mesh=Mesh(replica=2, data=2, context=4))
    sizes = mesh_rules.sizes(long.mesh, 16)
    kinds = {(c.kind, c.axes) for c in traffic.per_step(long, sizes, 32, 8)}
    assert ("all-gather", ("context",)) in kinds and ("reduce-scatter", ("context",)) in kinds
    assert parts_of(long)["attention"] == pytest.approx(parts_of(plain)["attention"])


def test_attention_that_writes_its_scores_is_slow():
    slow = replace(V1_0, execution=replace(V1_0.execution, attention="reference"))
    assert parts_of(slow)["attention"] > 10 * parts_of(V1_0)["attention"]


def test_what_cannot_be_spread_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="cannot be spread over 256 devices"):
        money.estimate(replace(V1_0, mesh=Mesh(data=256)), "v5e:16x16")
    with pytest.raises(ConfigError, match="does not make up the 16 device"):
        money.estimate(replace(V1_0, mesh=Mesh(replica=3, data=8)), TARGET)


# -- time and money ----------------------------------------------------------------------------------------------


def test_days_hours_and_cost_follow_from_the_speed():
    value = money.estimate(V1_0, TARGET, price=2.0, assume=["goodput=0.9"])
    assert value["tokens"] == 3_000_001_101_824
    assert value["days"] == pytest.approx(value["tokens"] / value["tokens_per_s"] / 86_400 / 0.9)
    assert value["device_hours"] == pytest.approx(value["days"] * 24 * 16)
    cost = value["cost_usd"]
    assert cost["per_device_hour"] == 2.0 and cost["total"] == pytest.approx(2 * value["device_hours"])
    assert sum(value["parts"].values()) == pytest.approx(value["step_seconds"])
    assert value["tokens_per_s"] == pytest.approx(1024 * 2048 / value["step_seconds"])
    palm = value["tokens_per_s_per_device"] * 7_313_817_600 / 312e12
    assert value["mfu"]["palm"] == pytest.approx(palm) and value["mfu"]["causal"] < palm
    assert value["assumptions"]["goodput"] == 0.9 and value["assumptions"]["efficiency"] < 1


def test_stages_with_other_batches_and_a_fork_are_added_up():
    whole = money.estimate(tinyllama.v1_1(), "a100-40g:16x4")
    fork = money.estimate(tinyllama.v1_1_math_code(), "a100-40g:16x4")
    assert [stage["steps"] for stage in fork["stages"]] == [0, 190_735, 20_436]
    assert whole["tokens"] - fork["tokens"] == tinyllama.v1_1_math_code().fork.tokens
    seconds = sum(stage["steps"] * stage["step_seconds"] for stage in whole["stages"])
    assert whole["days"] == pytest.approx(seconds / 86_400)
    basic, _, cooldown = whole["stages"]
    assert cooldown["tokens_per_s"] > basic["tokens_per_s"], "the optimizer is paid for less often"


@pytest.mark.parametrize("name", [*targets.GPUS, *targets.TPUS])
def test_every_target_has_a_price_a_source_and_an_anchor(name):
    for price in prices.PRICES[name]:
        assert price.usd > 0 and price.source and price.what and price.read.startswith("20")
        assert price.spot_usd is None or price.spot_usd < price.usd
    assert anchors.NEAREST[name] in anchors.ANCHORS
    shape = "" if name in targets.GPUS else ":1x1" if targets.TPUS[name].dimensions == 2 else ":1x1x1"
    one = replace(V1_0, mesh=Mesh(), execution=replace(V1_0.execution, micro_batch_sequences=4))
    value = money.estimate(one, name + shape)
    assert 0.2 < value["mfu"]["causal"] < value["mfu"]["palm"] < 0.8


def test_it_is_there_at_once_and_without_jax():
    program = (
        "import sys, time; start = time.monotonic()\n"
        "from experiments.tinyllama import v1_0\n"
        "from tinyllama_jax.preflight import money\n"
        f"value = money.estimate(v1_0(), {TARGET!r})\n"
        "assert value['days'] > 0 and 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(time.monotonic() - start)"
    )
    best = math.inf
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        best = min(best, float(done.stdout))
    assert best < 1


# -- calibration by a run ----------------------------------------------------------------------------------------


@pytest.fixture
def measured(finished, tmp_path):
    """The finished run's own metrics, as if eight A100s had written them."""
    copy = tmp_path / "measured"
    shutil.copytree(finished, copy)
    info = json.loads((copy / "run.json").read_text())
    info["devices"]["kind"] = "NVIDIA A100-SXM4-40GB"
    (copy / "run.json").write_text(json.dumps(info))
    return copy


def test_a_measured_run_foretells_itself(measured):
    from tinyllama_jax import configio
    from tinyllama_jax.config import Run

    calibration = money.of_run(measured)
    info = json.loads((measured / "run.json").read_text())
    run = configio.from_dict(Run, info["config"])
    value = money.estimate(run, f"a100-40g:{info['devices']['count']}", calibration=str(measured))
    times, since_compiled = {}, 0
    for line in map(json.loads, (measured / "metrics.jsonl").read_text().splitlines()):
        since_compiled = 0 if line["timing"].get("compiled") else since_compiled + 1
        if since_compiled > money.WARM_UP:
            times.setdefault(line["stage"], []).append(line["timing"]["step_s"])
    foretold = {stage["name"]: stage["step_seconds"] for stage in value["stages"]}
    there = sum(len(t) * statistics.median(t) for t in times.values())
    assert sum(len(t) * foretold[stage] for stage, t in times.items()) == pytest.approx(there)
    assert 0 < calibration.efficiency < 0.1, "a CPU is far below an A100's roof"
    assert value["calibration"]["anchor"] == str(measured)
    assert value["assumptions"]["efficiency"] == calibration.efficiency


def test_a_run_on_other_devices_or_too_short_calibrates_nothing(finished, measured, tmp_path):
    with pytest.raises(ConfigError, match="it ran on cpu; the model knows NVIDIA A100"):
        money.of_run(finished)
    lines = (measured / "metrics.jsonl").read_text().splitlines(keepends=True)
    (measured / "metrics.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(ConfigError, match="no step is left"):
        money.of_run(measured)
    with pytest.raises(UsageError, match="neither a run directory nor an anchor"):
        money.estimate(V1_0, TARGET, calibration=str(tmp_path / "nowhere"))


# -- the command line --------------------------------------------------------------------------------------------


def test_the_verb_answers_without_compiling(capsys):
    ask = ["preflight", "experiments.tinyllama:v1_0", "--target", TARGET, "--estimate-only"]
    started = time.monotonic()
    assert main([*ask, "--json", "--price", "1.5"]) == 0
    assert time.monotonic() - started < 5
    value = json.loads(capsys.readouterr().out)
    assert value["estimate"]["cost_usd"]["per_device_hour"] == 1.5 and "bytes_per_device" not in value
    assert main(ask) == 0
    shown = capsys.readouterr().out
    for word in (
        "tokens/s per device",
        "days for 3,000,001,101,824 tokens",
        "AWS p4d.24xlarge",
        "overlap=0.5",
        "mpt-1b",
    ):
        assert word in shown


@pytest.mark.parametrize("options", [("--estimate-only",), ()])
def test_beyond_max_cost_is_78_before_anything_is_compiled(options, capsys):
    ask = ["preflight", "experiments.tinyllama:v1_0", "--target", TARGET, "--json", *options]
    assert main([*ask, "--max-cost", "50000"]) == 78
    captured = capsys.readouterr()
    assert json.loads(captured.out)["estimate"]["cost_usd"]["total"] > 50_000
    (line,) = captured.err.splitlines()
    assert "is estimated at $" in line and "more than --max-cost 50,000" in line
    money.check(money.estimate(V1_0, TARGET), 1e9, "v1_0")
    with pytest.raises(ConfigError):
        money.check(money.estimate(V1_0, TARGET), 1e3, "v1_0")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--assume", "overlp=1"), "did you mean 'overlap'"),
        (("--assume", "overlap=most"), "'most' is not a number"),
        (("--assume", "overlap=1.5"), "is a share, at most 1"),
        (("--assume", "hbm_bandwidth=0"), "must be positive"),
        (("--price", "-1"), "must be positive"),
        (("--calibrate", "mpt-1b-a100-40"), "did you mean 'mpt-1b-a100-40g'"),
    ],
)
def test_wrong_options_are_one_line(options, words, capsys):
    assert main(["preflight", "experiments.tinyllama:v1_0", "--target", TARGET, "--estimate-only", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
