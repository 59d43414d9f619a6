"""Learning rate, batch and warm-up from N and D: by hand for published ladders, and their caps."""

import pytest

from tinyllama_jax import flops
from tinyllama_jax.config import Data, LearningRate, Run, Stage, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import rules
from tinyllama_jax.presets import preset


def run_of(name: str, tokens: int, **lr) -> Run:
    return Run(
        name=name,
        model=preset(name),
        data=Data(store="data/x", sequence_tokens=2048),
        curriculum=(Stage(name="main", tokens=tokens, batch_tokens=2048, mixture={"x": 1.0}),),
        lr=LearningRate(**lr),
    )


# The table of the ladder: N non-embedding and total in millions, learning rate, batch in thousands of tokens.
@pytest.mark.parametrize(
    "name, non_embedding, total, lr, batch",
    [
        ("t37", 12.6, 37.2, 9.6e-3, 78),
        ("t55", 21.8, 54.5, 8.0e-3, 113),
        ("t79", 42.5, 79.3, 6.4e-3, 176),
        ("t101", 60.2, 101, 5.7e-3, 222),
        ("t150", 101, 150, 4.8e-3, 313),
        ("t243", 177, 243, 4.0e-3, 456),
        ("t331", 266, 331, 3.5e-3, 597),
        ("t489", 407, 489, 3.0e-3, 794),
        ("t1100", 969, 1100, 2.3e-3, 1416),
    ],
)
def test_the_ladder_by_olmos_rule(name, non_embedding, total, lr, batch):
    counts = flops.parameter_counts(preset(name))
    assert counts["non_embedding"] / 1e6 == pytest.approx(non_embedding, rel=5e-3)
    assert counts["total"] / 1e6 == pytest.approx(total, rel=5e-3)
    tokens = 20 * counts["total"]
    found = rules.derive(run_of(name, tokens), "olmo")
    assert found.lr.peak == pytest.approx(lr, rel=0.02)
    assert found.curriculum[0].batch_tokens / 1e3 == pytest.approx(batch, rel=0.02)
    assert found.curriculum[0].batch_tokens % 2048 == 0
    assert found.lr.warmup_tokens == counts["total"] and found.lr.end == pytest.approx(0.1 * found.lr.peak)
    assert found.optimizer.beta2 == (0.95 if batch > 524 else 0.99)


def test_olmos_rule_by_hand():
    """t150: N = 100,688,640 without embeddings, so 0.0047 (N/108e6)^(-1/3) and 160 x 2048 (N/108e6)^(2/3)."""
    n = flops.parameter_counts(preset("t150"))["non_embedding"]
    assert n == 16 * (2 * 768 * 768 + 2 * 768 * 256 + 3 * 768 * 2048 + 2 * 768) + 768
    found = rules.olmo(preset("t150"), 3_000_000_000)
    assert found.lr == pytest.approx(0.0047 * (n / 108e6) ** (-1 / 3), rel=1e-12)
    assert found.batch_tokens == round(160 * 2048 * (n / 108e6) ** (2 / 3))
    assert rules.olmo(preset("t150"), 1, wsd=True).lr == found.lr / 2


def test_the_other_rules_by_hand():
    n = flops.parameter_counts(preset("t331"))
    step = rules.steplaw(preset("t331"), 6_600_000_000)
    assert step.lr == pytest.approx(1.79 * n["non_embedding"] ** -0.713 * 6.6e9**0.307)
    assert step.batch_tokens == round(0.58 * 6.6e9**0.571) and step.beta2 is None
    deep = rules.deepseek(preset("t331"), 6_600_000_000)
    c = 6 * n["matmul"] * 6.6e9
    assert deep.lr == pytest.approx(0.3118 * c**-0.125) and deep.batch_tokens == round(0.2920 * c**0.3271)
    # 1e20 FLOPs is 9.9e-4 and 1.0M tokens by the second paper's formulas
    assert 0.3118 * 1e20**-0.125 == pytest.approx(9.86e-4, rel=1e-3)


@pytest.mark.parametrize("name", ["t15", "t22"])
def test_the_rate_of_small_models_is_capped(name):
    tokens = 20 * flops.parameter_counts(preset(name))["total"]
    assert rules.olmo(preset(name), tokens).lr > rules.LR_CAP
    assert rules.derive(run_of(name, tokens), "olmo").lr.peak == rules.LR_CAP
    doubled = rules.derive(run_of(name, tokens), "olmo", lr_times=2.0)
    assert doubled.lr.peak == 2 * rules.LR_CAP, "a look to the side starts from the cap"


def test_short_runs_have_small_batches_and_short_warm_ups():
    short = rules.derive(run_of("t331", 10_000_000), "olmo")
    assert short.curriculum[0].batch_tokens == round(10_000_000 / rules.SHORTEST_RUN / 2048) * 2048
    assert short.lr.warmup_tokens == 1_000_000
    tiny = rules.derive(run_of("t331", 2048), "olmo")
    assert tiny.curriculum[0].batch_tokens == 2048, "one sequence at least"


def test_devices_can_share_the_batch_and_wsd_is_known():
    found = rules.derive(run_of("t150", 3_000_000_000), "olmo", batch_multiple=64)
    assert found.curriculum[0].batch_tokens % (64 * 2048) == 0
    wsd = run_of("t150", 3_000_000_000, kind="wsd", decay_tokens=10**8)
    assert rules.derive(wsd, "olmo").lr.peak == pytest.approx(rules.olmo(wsd.model, 1).lr / 2)
    half = rules.derive(run_of("t150", 3_000_000_000), "olmo", batch_times=0.5).curriculum[0].batch_tokens
    assert half == pytest.approx(rules.olmo(preset("t150"), 1).batch_tokens / 2, rel=0.01)
    with pytest.raises(ConfigError, match="no rule 'olmoe'.*did you mean 'olmo'"):
        rules.derive(run_of("t150", 10**9), "olmoe")


def test_every_stage_has_the_batch():
    run = run_of("t150", 10**9)
    two = replace(run, curriculum=(run.curriculum[0], replace(run.curriculum[0], name="more")))
    batches = {stage.batch_tokens for stage in rules.derive(two).curriculum}
    assert len(batches) == 1
