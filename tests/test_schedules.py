import pytest

from tinyllama_jax.config import LearningRate, Stage
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan, learning_rate, mixture_at

BATCH = 2_097_152  # TinyLlama: 1024 sequences of 2048 tokens
STEPS = 1_430_512


def stage(name="main", tokens=1000, batch_tokens=100, mixture=None, **more):
    return Stage(name=name, tokens=tokens, batch_tokens=batch_tokens, mixture=mixture or {"a": 1.0}, **more)


def plan(*stages, sequence_tokens=10):
    return Plan(stages or (stage(),), sequence_tokens)


def tinyllama():
    return Plan((stage(tokens=STEPS * BATCH, batch_tokens=BATCH),), 2048)


def rates(cfg, p, *tokens):
    f = learning_rate(cfg, p)
    return [f(t) for t in tokens]


def test_stages_round_up_and_the_next_starts_at_the_real_border():
    p = plan(stage("one", 950, 100), stage("two", 400, 250), stage("three", 1, 100))
    assert [(s.start_step, s.end_step, s.start_tokens, s.end_tokens) for s in p.stages] == [
        (0, 10, 0, 1000),
        (10, 12, 1000, 1500),
        (12, 13, 1500, 1600),
    ]
    assert (p.total_steps, p.total_tokens, p.total_windows) == (13, 1600, 160)
    assert [s.batch_sequences for s in p.stages] == [10, 25, 10]
    assert [s.start_windows for s in p.stages] == [0, 100, 150]


def test_step_token_and_window_clocks_agree_at_every_step():
    p = plan(stage("one", 950, 100), stage("two", 400, 250))
    tokens = windows = 0
    for step in range(p.total_steps):
        assert p.tokens_at(step) == tokens and p.windows_at(step) == windows and p.step_at(tokens) == step
        assert p.at_step(step) is p.at_tokens(tokens) is p.at_tokens(tokens + 1)
        tokens += p.at_step(step).batch_tokens
        windows += p.at_step(step).batch_sequences
    assert p.tokens_at(p.total_steps) == p.total_tokens == tokens
    assert p.step_at(tokens) == p.total_steps and p.windows_at(p.total_steps) == windows


@pytest.mark.parametrize("tokens", [1, 1050, -100, 1501])
def test_only_batch_borders_have_a_step(tokens):
    with pytest.raises(ConfigError):
        plan(stage("one", 950, 100), stage("two", 400, 250)).step_at(tokens)


def test_a_missed_border_names_its_neighbours():
    with pytest.raises(ConfigError, match="1000 and 1250"):
        plan(stage("one", 950, 100), stage("two", 400, 250)).step_at(1100)


@pytest.mark.parametrize("step", [-1, 10])
def test_steps_outside_the_run(step):
    with pytest.raises(IndexError):
        plan().at_step(step)


def test_clock_past_the_end():
    assert plan().tokens_at(10) == 1000
    with pytest.raises(IndexError):
        plan().tokens_at(11)


def test_plan_contradictions():
    with pytest.raises(ConfigError, match="no stage"):
        Plan((), 10)
    with pytest.raises(ConfigError, match="multiple"):
        plan(stage(batch_tokens=105))
    with pytest.raises(ConfigError, match="ramp_tokens"):
        plan(stage(ramp_from={"a": 1.0}))
    with pytest.raises(ConfigError, match="one scale"):
        plan(stage("one"), stage("two", mixture={"a": 75.0, "b": 25.0}, ramp_tokens=500))


def test_cosine_matches_tinyllama_milestones():
    f = learning_rate(LearningRate(peak=4e-4, end=4e-5, warmup_tokens=2000 * BATCH), tinyllama())
    for step, published in [
        (50_000, 3.990e-4),
        (240_000, 3.759e-4),
        (480_000, 3.094e-4),
        (715_000, 2.205e-4),
        (955_000, 1.298e-4),
        (1_195_000, 6.36e-5),
    ]:
        assert f(step * BATCH) == pytest.approx(published, rel=5e-4)
    assert f(STEPS * BATCH) == 4e-5 and f(2000 * BATCH) == pytest.approx(4e-4, rel=1e-12)
    assert f(BATCH) == pytest.approx(2e-7) and f(0) == 0


def test_flat_start_reproduces_the_published_error():
    """TinyLlama's rate stayed at its peak to 503B tokens, where the cosine then stood at 3.76e-4."""
    border = 240_000 * BATCH
    cfg = LearningRate(peak=4e-4, end=4e-5, warmup_tokens=2000 * BATCH, flat_until_tokens=border)
    f = learning_rate(cfg, tinyllama())
    assert f(1000 * BATCH) == pytest.approx(2e-4)
    assert f(100_000 * BATCH) == f(border) == 4e-4
    assert f(border + BATCH) == pytest.approx(3.759e-4, rel=5e-4)
    assert f(480_000 * BATCH) == pytest.approx(3.094e-4, rel=5e-4)


def test_linear_with_warmup_and_its_own_horizon():
    cfg = LearningRate(kind="linear", peak=1.0, end=0.2, warmup_tokens=100, horizon_tokens=500)
    assert rates(cfg, plan(), 0, 50, 100, 300, 500, 501, 10**6) == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2, 0.2])


def test_horizon_defaults_to_the_real_end_of_the_plan():
    p = plan(stage(tokens=950))
    assert rates(LearningRate(kind="linear", peak=1.0, end=0.0), p, 500, 999, 1000) == pytest.approx([0.5, 0.001, 0])


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.55), ("one_minus_sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_wsd(shape, half):
    cfg = LearningRate(kind="wsd", peak=1.0, end=0.1, warmup_tokens=200, decay_tokens=400, decay_shape=shape)
    expected = [0.5, 1, 1, 1, half, 0.1, 0.1]
    assert rates(cfg, plan(), 100, 200, 400, 600, 800, 1000, 2000) == pytest.approx(expected)


def test_constant_and_piecewise():
    assert rates(LearningRate(kind="constant", peak=0.5, warmup_tokens=100), plan(), 50, 100, 9999) == [0.25, 0.5, 0.5]
    cfg = LearningRate(kind="piecewise", points=((100, 1.0), (200, 0.5), (400, 0.5), (500, 0.0)))
    assert rates(cfg, plan(), 0, 100, 150, 200, 300, 450, 500, 600) == [1, 1, 0.75, 0.5, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(warmup_tokens=1000), "curriculum's length"),
        (dict(warmup_tokens=300, horizon_tokens=300), "lr.horizon_tokens"),
        (dict(kind="constant", warmup_tokens=2000), "lr.warmup_tokens"),
        (dict(kind="wsd", warmup_tokens=500, decay_tokens=501), "lr.decay_tokens"),
        (dict(flat_until_tokens=1001), "lr.flat_until_tokens"),
        (dict(warmup_tokens=100, flat_until_tokens=100), "lr.flat_until_tokens"),
        (dict(kind="cosine", decay_tokens=10), "lr.decay_tokens has no effect"),
        (dict(kind="cosine", points=((0, 1.0),)), "lr.points has no effect"),
        (dict(kind="constant", horizon_tokens=10), "lr.horizon_tokens has no effect"),
        (dict(kind="constant", flat_until_tokens=10), "lr.flat_until_tokens has no effect"),
        (dict(kind="piecewise", points=((0, 1.0),), warmup_tokens=10), "lr.warmup_tokens has no effect"),
        (dict(kind="piecewise", points=((0, -1.0),)), "negative"),
    ],
)
def test_learning_rate_contradictions(settings, names):
    with pytest.raises(ConfigError, match=names):
        learning_rate(LearningRate(**settings), plan())


def test_mixture_ramp_of_tinyllama_math_and_code():
    final = {"slim": 75.0, "star": 15.0, "proof": 10.0}
    p = plan(
        stage("basic", 1000, mixture={"slim": 75.0}),
        stage("continual", 1000, mixture=final, ramp_tokens=400),
        stage("cooldown", 1000, mixture=final),
    )
    assert mixture_at(p, 999) == {"slim": 1.0}
    assert mixture_at(p, 1000) == {"slim": 1.0, "star": 0.0, "proof": 0.0}
    half = mixture_at(p, 1200)  # weights 75 : 7.5 : 5
    assert half == pytest.approx({"slim": 75 / 87.5, "star": 7.5 / 87.5, "proof": 5 / 87.5})
    for tokens in (1400, 1999, 2000, 3000, 4000):
        assert mixture_at(p, tokens) == pytest.approx({"slim": 0.75, "star": 0.15, "proof": 0.1})


def test_ramp_from_and_a_source_that_leaves():
    p = plan(stage("x", mixture={"b": 2.0}, ramp_from={"a": 1.0}, ramp_tokens=100))
    assert mixture_at(p, 0) == {"a": 1.0, "b": 0.0}
    assert mixture_at(p, 50) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert mixture_at(p, 100) == {"a": 0.0, "b": 1.0}


def test_first_stage_ramps_from_its_own_mixture():
    p = plan(stage(mixture={"a": 1.0, "b": 3.0}, ramp_tokens=500))
    assert mixture_at(p, 123) == pytest.approx({"a": 0.25, "b": 0.75})
