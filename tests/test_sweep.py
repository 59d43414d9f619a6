"""Lists of runs: the combinators, the plan and its price."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import repetition, scaling
from tinyllama_jax import configio, flops
from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.lab import plan, rules, sweep
from tinyllama_jax.schedules import Plan, learning_rate

ROOT = Path(__file__).parent.parent
BASE = scaling.cpu_base("base")


def lines(capsys, *argv) -> tuple[int, str, str]:
    status = main([str(word) for word in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_product_has_every_combination_and_the_last_axis_changes_fastest():
    runs = sweep.product(BASE, {"lr.peak": [0.001, 0.002], "seed": [0, 1, 2]})
    assert [(run.lr.peak, run.seed) for run in runs] == [(p, s) for p in (0.001, 0.002) for s in (0, 1, 2)]
    assert [run.name for run in runs][:4] == [
        "base-peak0.001-seed0",
        "base-peak0.001-seed1",
        "base-peak0.001-seed2",
        "base-peak0.002-seed0",
    ]


def test_zipped_axes_go_together():
    runs = sweep.zipped(BASE, {"model.heads": [4, 2], "model.kv_heads": [2, 1]})
    assert [(run.model.heads, run.model.kv_heads) for run in runs] == [(4, 2), (2, 1)]
    with pytest.raises(ConfigError, match="zipped axes have different lengths: {'seed': 2, 'lr.peak': 1}"):
        sweep.zipped(BASE, {"seed": [1, 2], "lr.peak": [1e-3]})


def test_what_an_axis_may_be_is_what_set_takes():
    with pytest.raises(UsageError, match="did you mean 'peak'"):
        sweep.product(BASE, {"lr.peek": [1]})
    [run] = sweep.product(BASE, {"curriculum.main.mixture": [{"prose": 1.0}]})
    assert run.curriculum[0].mixture == {"prose": 1.0} and run.name == "base-mixture-prose1"


def test_chain_and_each():
    two = sweep.each(BASE, lambda run: sweep.product(run, {"seed": [1, 2]}))
    assert [run.seed for run in sweep.chain(BASE, two)] == [BASE.seed, 1, 2]


def test_the_same_run_twice_is_refused():
    with pytest.raises(ConfigError, match="runs 0 and 1 of the sweep are both called 'base'"):
        sweep.checked([BASE, BASE])
    with pytest.raises(ConfigError, match="'base' and 'other' of the sweep are the same run"):
        sweep.checked([BASE, replace(BASE, name="other")])


def test_an_isoflop_sweep_spends_its_budgets_to_a_percent():
    for run, row in zip(scaling.isoflop_cpu(), plan.rows(scaling.isoflop_cpu()), strict=True):
        budget = float(run.name.split("-")[1][1:])  # c2.5e+11
        assert row["flops"] == pytest.approx(budget, rel=0.01)
        by_hand = 6 * row["matmul"] + 6 * run.model.layers * run.model.heads * run.model.head_dim * 128
        assert row["flops"] == pytest.approx(by_hand * row["tokens"], rel=1e-12)


def test_a_ladder_trains_each_model_on_each_multiple_of_its_parameters():
    models = {name: scaling.small(n) for name, n in (("a", 16), ("b", 48))}
    runs = sweep.ladder(BASE, models, (5, 20))
    assert [run.name for run in runs] == ["base-a-x5", "base-a-x20", "base-b-x5", "base-b-x20"]
    for run, multiple in zip(runs, (5, 20, 5, 20), strict=True):
        n = flops.parameter_counts(run.model)["total"]
        assert run.curriculum[0].tokens == pytest.approx(multiple * n, rel=0.02)
        assert run.lr.peak == rules.olmo(run.model, 1).lr or run.lr.peak == rules.LR_CAP


def test_a_branch_is_what_a_run_of_that_length_would_be():
    """Its learning rate is the trunk's up to the fork, and ends at 0; all batches are those of the trunk."""
    [trunk, *branches] = [run for run in scaling.ladder_cpu() if "w24" in run.name]
    at_trunk = learning_rate(trunk.lr, Plan(trunk.curriculum, 128))
    assert [round(b.curriculum[0].tokens / flops.parameter_counts(b.model)["total"]) for b in branches] == [4, 12, 36]
    for branch in branches:
        planned = Plan(branch.curriculum, 128)
        rate = learning_rate(branch.lr, planned)
        for tokens in range(896, branch.fork.tokens + 1, 8960):
            assert float(rate(tokens)) == pytest.approx(float(at_trunk(tokens)))
        assert float(rate(planned.total_tokens)) == 0 < float(rate(planned.total_tokens - 896))
        assert branch.fork.run == f"@{trunk.name}"
        assert branch.fork.tokens in trunk.checkpoint.permanent_at_tokens
        assert (planned.total_tokens - branch.fork.tokens) / planned.total_tokens == pytest.approx(0.2, abs=0.01)


def test_a_trunk_has_one_stage_and_no_decay_begins_in_the_warmup():
    two = replace(BASE, curriculum=(BASE.curriculum[0], replace(BASE.curriculum[0], name="more")))
    with pytest.raises(ConfigError, match="base: a trunk has one stage, not 2"):
        sweep.decays(two, [2**19])
    warm = replace(BASE, lr=replace(BASE.lr, warmup_tokens=2**19))
    with pytest.raises(ConfigError, match="begins before the warm-up of 524,288 ends"):
        sweep.decays(warm, [2**17, 2**20])


def test_repeated_budgets_are_seen_the_planned_number_of_times():
    for run, row in zip(repetition.repetition_cpu(), plan.rows(repetition.repetition_cpu()), strict=True):
        planned = float(run.name.split("-e")[1].split("-")[0])
        assert row["epochs"] == pytest.approx(planned, rel=0.02)
        assert row["unique_tokens"] == run.data.unique_tokens


@settings(deadline=None)
@given(st.floats(0.01, 300), st.integers(0, 2**21), st.integers(0, 2**20))
def test_a_run_of_another_length_keeps_its_shares(stretch, warmup, ramp):
    stages = (
        replace(BASE.curriculum[0], ramp_tokens=ramp),
        replace(BASE.curriculum[0], name="b", tokens=3 * 2**20),
    )
    run = replace(BASE, curriculum=stages, lr=replace(BASE.lr, warmup_tokens=warmup))
    made = sweep.of_tokens(run, stretch * 2**22)
    assert sum(stage.tokens for stage in made.curriculum) == pytest.approx(stretch * 2**22, abs=2)
    assert made.curriculum[1].tokens == pytest.approx(3 * made.curriculum[0].tokens, abs=5)
    assert made.lr.warmup_tokens == pytest.approx(warmup * stretch, abs=1)
    assert made.curriculum[0].ramp_tokens == pytest.approx(ramp * stretch, abs=1)


# -- the plan ----------------------------------------------------------------------------------------------


def test_a_plan_of_200_runs_takes_less_than_two_seconds():
    """On a quiet machine a quarter of that; JAX is not imported."""
    code = (
        "import sys, time\nbegin = time.monotonic()\n"
        "from experiments import scaling\nfrom tinyllama_jax.lab import plan, sweep\n"
        "runs = sweep.checked(sweep.product(scaling.isoflop_pod(), {'seed': [0, 1, 2, 3, 4]}))\n"
        "rows = plan.rows(runs, ['h100:8'])\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules, 'too much is imported'\n"
        "print(len(rows), time.monotonic() - begin)\n"
    )
    tries = []
    for _ in range(3):  # other tests share the cores
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        count, seconds = done.stdout.split()
        tries.append(float(seconds))
        if tries[-1] < 2:
            break
    assert int(count) == 210 and min(tries) < 2, tries


def test_the_plan_is_shown_and_nothing_begins(capsys, tmp_path):
    where = tmp_path / "sweep"
    words = ("sweep", "experiments.scaling:ladder_pod", "--workdir", where, "--dry-run", "--target", "h100:8")
    status, out, err = lines(capsys, *words)
    assert status == 0 and not where.exists() and not err
    assert "42 runs to go: 210," in out and "on h100:8, one after the other:" in out
    value = json.loads(lines(capsys, *words, "--json")[1])
    assert len(value["runs"]) == 42 and value["totals"]["runs"] == 42
    row = value["runs"][0]
    assert row["name"] == "ladder-t15-trunk" and row["state"] == "new"
    assert math.isclose(sum(r["on"]["h100:8"]["usd"] for r in value["runs"]), value["totals"]["on"]["h100:8"]["usd"])
    assert row["disk_bytes"] == (1 + 6 + 2) * 12 * row["parameters"]
    one = json.loads(lines(capsys, *words, "--json", "--runs", "3,5-6")[1])
    assert [r["name"] for r in one["runs"]] == [value["runs"][n]["name"] for n in (3, 5, 6)]


REFUSALS = [
    (["experiments.smoke:tiny"], 78, "experiments.smoke:tiny is one run: `tinyllama train` trains it"),
    (["experiments.scaling:isoflop"], 2, "did you mean"),
    (["experiments.scaling:isoflop_cpu", "--set", "lr.peek=1"], 2, "did you mean 'peak'"),
    (["experiments.scaling:isoflop_cpu", "--set", "name=x"], 78, "are both called 'x'"),
    (["experiments.scaling:isoflop_cpu", "--max-cost", "5"], 2, "--max-cost 5: on which machine?"),
    (["experiments.scaling:isoflop_cpu", "--target", "h1000"], 2, "--target h1000"),
    (["experiments.scaling:isoflop_cpu", "--runs", "40"], 2, "is 40 runs, from 0 on"),
    (["experiments.scaling:isoflop_cpu", "--runs", "3-1"], 2, "--runs 3-1: write it as 0,4-6"),
    (["experiments.scaling:isoflop_cpu", "--table", "no.jsonl"], 78, "no.jsonl"),
    (["experiments.scaling:isoflop_pod", "--target", "h100:8", "--max-cost", "9"], 78, "are estimated at $"),
    (["experiments.scaling:isoflop_pod"], 78, "GB are free; make room"),
    (["experiments.scaling:isoflop_cpu", "--slots", "999"], 2, "cores; ask for fewer"),
    (["experiments.scaling:isoflop_cpu", "--gpus-per-run", "2"], 2, "there is no GPU here"),
]


@pytest.mark.parametrize(("words", "status", "line"), REFUSALS, ids=lambda x: x if isinstance(x, str) else None)
def test_what_cannot_be_is_said_in_one_line_and_begins_nothing(words, status, line, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if "free" in line:
        import shutil

        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    got, out, err = lines(capsys, "sweep", *words, "--workdir", tmp_path / "s")
    assert got == status and line in err.splitlines()[-1] and not out
    assert not (tmp_path / "s" / "0").exists()


@pytest.mark.parametrize("name", ["isoflop", "ladder"])
def test_studies_have_a_small_and_a_large_grid(name):
    small, large = (getattr(scaling, f"{name}_{where}")() for where in ("cpu", "pod"))
    assert max(r["flops"] for r in plan.rows(small)) < 1.5e13 < 1e16 < min(r["flops"] for r in plan.rows(large)) * 20
    assert len({configio.fingerprint(run) for run in [*small, *large]}) == len(small) + len(large)
