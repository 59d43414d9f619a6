"""The studies: what they promise, and their pod lists in tests/golden/studies.

After a change that is meant: `pytest tests/test_studies.py --update-golden`."""

import json
from pathlib import Path

import pytest

from experiments import curves, gqa, repetition, rope, scaling, three_stage
from tinyllama_jax import configio, flops
from tinyllama_jax.config import Run, replace
from tinyllama_jax.data.order import Order
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import plan, shapes, sweep
from tinyllama_jax.schedules import Plan, learning_rate

GOLDEN = Path(__file__).parent / "golden" / "studies"
POD = {
    "isoflop_pod": scaling.isoflop_pod,
    "ladder_pod": scaling.ladder_pod,
    "repetition_pod": repetition.repetition_pod,
    "gqa_pod": gqa.gqa_pod,
    "rope_pod": rope.rope_pod,
    "three_stage_pod": three_stage.three_stage_pod,
    "v1_0_pod": curves.v1_0_pod,
}
# FLOPs of a whole list, as its docstring says, and runs.
CPU = {
    "isoflop_cpu": (scaling.isoflop_cpu, 4e13, 40),
    "ladder_cpu": (scaling.ladder_cpu, 2e13, 16),
    "repetition_cpu": (repetition.repetition_cpu, 1.5e13, 20),
    "gqa_cpu": (gqa.gqa_cpu, 8e12, 9),
    "gqa_cpu_matched": (gqa.gqa_cpu_matched, 8e12, 9),
    "rope_cpu": (rope.rope_cpu, 1e13, 12),
    "three_stage_cpu": (three_stage.three_stage_cpu, 7e12, 12),
    "v1_0_cpu": (curves.v1_0_cpu, 6e12, 6),
}
ALL = {**POD, **{name: function for name, (function, _, _) in CPU.items()}}
SUMMARY = ("name", "parameters", "tokens", "own_tokens", "batch_tokens", "lr", "steps", "flops")


@pytest.mark.parametrize("name", POD)
def test_the_pod_list_is_the_golden_one(name, request):
    rows = [{key: row[key] for key in SUMMARY} for row in plan.rows(POD[name]())]
    path = GOLDEN / f"{name}.json"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    assert json.loads(path.read_text()) == rows


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.iterdir()} == set(POD)


@pytest.mark.parametrize("name", ALL)
def test_a_list_has_no_run_twice_and_can_be_written_down(name):
    runs = ALL[name]()
    assert sweep.checked(runs) == runs
    for run in runs:
        assert configio.from_dict(Run, json.loads(json.dumps(configio.to_dict(run)))) == run
        of_run = Plan(run.curriculum, run.data.sequence_tokens)
        learning_rate(run.lr, of_run)
        if run.fork:
            [parent] = [other for other in runs if run.fork.run == f"@{other.name}"]
            assert parent.seed == run.seed and of_run.step_at(run.fork.tokens)


@pytest.mark.parametrize("name", CPU)
def test_a_list_for_the_cpu_costs_no_more_than_it_says(name):
    function, most, count = CPU[name]
    rows = plan.rows(function())
    assert len(rows) == count
    assert most / 2 < sum(row["flops"] for row in rows) < most


def by_name(runs):
    return {run.name: run for run in runs}


def the_same_but(a: Run, b: Run, *fields: str) -> bool:
    """Whether two runs differ in their names and these fields alone."""
    different = configio.differences(configio.to_dict(a), configio.to_dict(b))
    return all(any(line.startswith(field) for field in ("name", *fields)) for line in different)


@pytest.mark.parametrize("function", [gqa.gqa_cpu, gqa.gqa_cpu_matched, gqa.gqa_pod])
def test_gqa_changes_heads_and_in_one_arm_d_ff_only(function):
    runs = by_name(function())
    for name, run in runs.items():
        size, _, rest = name.partition("-matched" if "-matched" in name else "-fixed")
        arm = "matched" if "-matched" in name else "fixed"
        seed, model = run.seed, run.model
        mha = runs.get(f"{size}-fixed-kv{model.heads}-seed{seed}") or runs[f"{size}-{arm}-kv{model.heads}-seed{seed}"]
        assert rest.startswith(f"-kv{model.kv_heads}-seed{seed}") and model.heads % model.kv_heads == 0
        rate = ("lr.peak", "lr.end") if "-lr" in name else ()
        assert the_same_but(mha, run, "model.kv_heads", *rate, *(["model.d_ff"] if arm == "matched" else []))
        n, wanted = (flops.parameter_counts(m)["total"] for m in (model, mha.model))
        if arm == "matched":
            assert abs(n / wanted - 1) < 0.005
        else:
            saved = 2 * model.layers * model.d_model * model.head_dim * (model.heads - model.kv_heads)
            assert wanted - n == saved
        assert run.evaluation.decode


def test_the_rate_is_halved_and_doubled_on_the_pod():
    runs = by_name(gqa.gqa_pod())
    for k in (8, 1):
        run = runs[f"gqa-t55-fixed-kv{k}-seed0"]
        for times in (0.5, 2.0):
            other = runs[f"{run.name}-lr{times:g}"]
            assert (other.lr.peak, other.lr.end) == (times * run.lr.peak, times * run.lr.end)


@pytest.mark.parametrize("function", [rope.rope_cpu, rope.rope_pod])
def test_rope_changes_the_positions_only(function):
    runs = function()
    for run in runs:
        first = next(other for other in runs if other.seed == run.seed)
        assert the_same_but(first, run, "model.rope")
        assert run.evaluation.beyond_tokens[-1] >= 4 * run.data.sequence_tokens
    kinds = {configio.fingerprint(replace(run, seed=0)) for run in runs}
    assert len(kinds) * len(rope.SEEDS) == len(runs)


@pytest.mark.parametrize("function", [three_stage.three_stage_cpu, three_stage.three_stage_pod])
def test_three_stages_and_one_see_as_many_windows_of_each_source(function):
    runs = by_name(function())
    for name in [name for name in runs if "-staged-seed" in name]:
        arms = [runs[name.replace("-staged-", f"-{arm}-")] for arm in ("staged", "staged-lr", "staged-none", "mixed")]
        plans = [Plan(run.curriculum, run.data.sequence_tokens) for run in arms]
        windows = dict.fromkeys(arms[0].curriculum[1].mixture, 10**6)
        counts = [Order(p, windows, run.seed).counts(p.total_steps) for run, p in zip(arms, plans, strict=True)]
        assert counts[0] == counts[1] == counts[2] == counts[3]
        assert all(count > 0 for count in counts[0].values())
        assert len({p.total_tokens for p in plans}) == 1
        staged, by_rate, none, mixed = arms
        assert [s.batch_tokens for s in plans[0].stages] == [b * mixed.curriculum[0].batch_tokens for b in (1, 1, 4)]
        assert the_same_but(staged, none, "curriculum.2.batch_tokens", "fork")
        assert the_same_but(none, by_rate, "lr")
        assert the_same_but(staged, mixed, "curriculum")
        begin, end = none.fork.tokens, plans[0].total_tokens
        assert begin == plans[0].stages[2].start_tokens
        rates = [learning_rate(run.lr, p) for run, p in zip(arms, plans, strict=True)]
        assert rates[1](begin) == rates[0](begin) and rates[1](end) == 0 < rates[0](end)
        assert rates[1]((begin + end) // 2) < rates[0]((begin + end) // 2)


def test_the_stages_have_v1_1s_shares():
    [staged, *_] = three_stage.three_stage_pod()
    tokens = [s.tokens for s in staged.curriculum]
    assert [n / sum(tokens) for n in tokens] == [0.75, 0.175, 0.075]


@pytest.mark.parametrize("function", [curves.v1_0_cpu, curves.v1_0_pod])
def test_the_curve_as_run_is_flat_for_the_same_share(function):
    runs = by_name(function())
    for name, run in runs.items():
        if "as-run" not in name:
            continue
        documented = runs[name.replace("-as-run", "")]
        assert the_same_but(documented, run, "lr.flat_until_tokens", "data.", "model.init")
        of_run = Plan(run.curriculum, run.data.sequence_tokens)
        assert run.lr.flat_until_tokens / of_run.total_tokens == pytest.approx(240_000 / 1_430_512, rel=2e-3)
        assert (documented.data.document_marks, run.data.document_marks) == ("eos", "bos")
        assert documented.data.store != run.data.store
        for cause in ("flat", "bos", "init"):
            if alone := runs.get(name.replace("as-run", cause)):
                assert not the_same_but(documented, alone) and not the_same_but(alone, run)


def test_a_matched_shape_that_cannot_be_is_refused():
    model = gqa.gqa_cpu()[0].model
    assert shapes.matched(model, model) == model
    with pytest.raises(ConfigError, match=r"no d_ff gives the shape [\d,]+ parameters; the nearest is off by"):
        shapes.matched(model, replace(model, d_ff=1, layers=1))
