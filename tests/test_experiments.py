"""Every named experiment, resolved and compared with the copy in tests/golden, so that a diff shows what a change to
the code changes in the runs.  After a change that is meant: `pytest tests/test_experiments.py --update-golden`."""

import json
from pathlib import Path

import pytest

from experiments import context, smoke, tinyllama
from tinyllama_jax import configio, mesh_rules
from tinyllama_jax.config import Run, replace
from tinyllama_jax.schedules import Plan, learning_rate, mixture_at

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = {
    f"{module.__name__}:{name}": getattr(module, name)
    for module, names in (
        (smoke, ("demo", "tiny")),
        (context, ("long_8k", "long_16k", "long_32k")),
        (tinyllama, ("v1_0", "v1_0_as_run", "v1_1", "v1_1_math_code", "v1_1_chinese", "tinyllama_120m")),
    )
    for name in names
}


def test_every_public_function_of_the_modules_is_listed():
    for module in (smoke, context, tinyllama):
        public = {
            f"{module.__name__}:{name}"
            for name, value in vars(module).items()
            if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
        }
        assert public == {name for name in EXPERIMENTS if name.startswith(module.__name__ + ":")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_resolved_configuration_is_the_golden_one(name, request):
    run = EXPERIMENTS[name]()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    resolved = {
        "fingerprint": configio.fingerprint(run),
        "total_steps": plan.total_steps,
        "stages": {s.name: [s.start_tokens, s.end_tokens, s.end_step - s.start_step] for s in plan.stages},
        "config": configio.to_dict(run),
    }
    path = GOLDEN / f"{name.replace(':', '.')}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(resolved, indent=1) + "\n")
    assert json.loads(path.read_text()) == json.loads(json.dumps(resolved))
    assert configio.from_dict(Run, json.loads(path.read_text())["config"]) == run


def test_v1_0_has_the_published_numbers():
    run = tinyllama.v1_0()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    assert plan.total_steps == 1_430_512
    assert plan.total_tokens == 3_000_001_101_824
    rate = learning_rate(run.lr, plan)
    for step, published in [(50_000, 3.990e-4), (240_000, 3.759e-4), (480_000, 3.094e-4), (955_000, 1.298e-4)]:
        assert rate(step * 2_097_152) == pytest.approx(published, rel=2e-4)
    assert rate(plan.total_tokens) == pytest.approx(4e-5)
    assert rate(plan.tokens_at(1)) == pytest.approx(4e-4 / 2000)  # the first step is not at 0


def test_v1_0_as_run_is_flat_until_503b_tokens_and_then_joins_the_cosine():
    run = tinyllama.v1_0_as_run()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    rate, documented = learning_rate(run.lr, plan), learning_rate(tinyllama.v1_0().lr, plan)
    assert rate(plan.tokens_at(3000)) == rate(plan.tokens_at(239_999)) == 4e-4
    assert rate(plan.tokens_at(240_001)) == documented(plan.tokens_at(240_001)) < 3.77e-4
    assert run.data.document_marks == "bos" and run.model.init == "torch_default"


def test_v1_1_siblings_share_the_first_stage_and_ramp_their_domains_in():
    base, math_code = tinyllama.v1_1(), tinyllama.v1_1_math_code()
    assert base.curriculum[0] == math_code.curriculum[0]
    plan = Plan(math_code.curriculum, math_code.data.sequence_tokens)
    assert math_code.fork.tokens == plan.stages[0].end_tokens == 1_500_001_599_488
    assert [s.batch_tokens for s in plan.stages] == [1_835_008, 1_835_008, 7_340_032]
    start = plan.stages[1].start_tokens
    assert mixture_at(plan, start) == {"slimpajama": 1.0, "starcoder": 0.0, "proofpile": 0.0}
    halfway = mixture_at(plan, start + 3_000_000_000)  # SlimPajama's weight stays 75 while the others have half theirs
    assert halfway["slimpajama"] == pytest.approx(75 / 87.5) and halfway["starcoder"] == pytest.approx(7.5 / 87.5)
    assert mixture_at(plan, start + 6_000_000_000) == pytest.approx(
        {"slimpajama": 0.75, "starcoder": 0.15, "proofpile": 0.10}
    )
    chinese = Plan(tinyllama.v1_1_chinese().curriculum, 2048)
    assert mixture_at(chinese, plan.total_tokens) == pytest.approx({"slimpajama": 0.5, "skypile": 0.5})


@pytest.mark.parametrize("tokens", [8192, 16_384, 32_768])
def test_long_contexts_differ_in_length_and_theta_only(tokens):
    run, base = getattr(context, f"long_{tokens // 1024}k")(), tinyllama.v1_0()
    assert run.data.sequence_tokens == run.model.context_tokens == tokens
    assert run.model.rope.theta > 10_000 and run.data.document_masking
    plain = replace(run.model, rope=base.model.rope, context_tokens=base.model.context_tokens)
    assert plain == base.model
    [stage] = Plan(run.curriculum, tokens).stages
    assert stage.batch_tokens == base.curriculum[0].batch_tokens  # the same optimizer steps, so that curves compare
    assert run.mesh.context == tokens // 4096  # 4096 tokens of each row on a device
    sizes = mesh_rules.sizes(run.mesh, 16)
    mesh_rules.check(run, [stage], sizes)
    rows = mesh_rules.rows_per_place(run, stage, sizes)
    assert rows * tokens // run.mesh.context == 16_384  # of a device at a time, as v1_0's 8 sequences of 2048


def test_the_small_run_for_tests_crosses_what_it_should():
    run = smoke.tiny()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    assert plan.total_steps >= 60 and len(plan.stages) == 3
    assert plan.stages[2].batch_tokens > plan.stages[1].batch_tokens
    assert run.checkpoint.temporary_steps >= 5
