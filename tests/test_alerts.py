import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_experiment import quick_command

from tinyllama_jax.cli import main
from tinyllama_jax.config import Health
from tinyllama_jax.train.alerts import Alerts

WINDOW = 10
HEALTH = Health(alert_window_steps=WINDOW)


def record(step, *, loss=3.0, seconds=1.0, batch_tokens=1000, stage="main", skipped=0, compiled=False):
    timing = {"step_s": seconds, "tokens_per_s": batch_tokens / seconds} | ({"compiled": True} if compiled else {})
    return dict(step=step, loss=loss, batch_tokens=batch_tokens, stage=stage, skipped=skipped, timing=timing)


def hear(changes, alerts=None, *, first=1):
    """[(step, kind)] that a run of these steps gives rise to."""
    alerts = alerts or Alerts(HEALTH)
    said = []
    for step, change in enumerate(changes, first):
        for alert in alerts.step(record(step, **change)):
            assert alert["step"] == step and "\n" not in alert["text"] and str(step) in alert["text"]
            assert "look at" in alert["text"]
            said.append((step, alert["alert"]))
    return said


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 50]))
def test_constant_noise_raises_nothing(seed, window):
    """Losses within half of divergence_nats of each other, times within 15 %."""
    chance = random.Random(seed)
    alerts = Alerts(Health(alert_window_steps=window))
    steps = [dict(loss=3 + chance.uniform(-0.25, 0.25), seconds=chance.uniform(0.85, 1.15)) for _ in range(400)]
    assert hear(steps, alerts) == []


def test_a_loss_that_rises_is_said_once_and_again_only_after_it_came_down():
    falling = [dict(loss=8 - 0.1 * i) for i in range(50)]
    up, down = [dict(loss=5.0)] * 30, [dict(loss=3.0)] * 30
    said = hear(falling + up + down + up)
    assert [kind for _, kind in said] == ["divergence"] * 2
    assert 50 < said[0][0] <= 60 and 110 < said[1][0] <= 120


def test_the_first_window_after_a_start_is_quiet():
    for step in range(1, WINDOW + 1):
        alerts = Alerts(HEALTH)
        rising = [dict(loss=float(i**2), seconds=20.0 if i == step else 1.0) for i in range(WINDOW)]
        assert hear(rising, alerts) == []


def test_another_stage_may_have_another_loss():
    assert hear([dict(loss=1.0)] * 40 + [dict(loss=4.0, stage="code")] * 40) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_losses_that_are_not_finite_take_no_part(bad):
    assert hear(([dict(loss=3.0)] * 3 + [dict(loss=bad)]) * 20) == []
    said = hear([dict(loss=3.0)] * 20 + [dict(loss=bad), dict(loss=6.0)] * 20)
    assert [kind for _, kind in said] == ["divergence"]


def test_a_step_that_stalls_is_named_and_does_not_make_the_run_slow():
    said = hear([{}] * 30 + [dict(seconds=500.0)] + [{}] * 30 + [dict(seconds=20.0)] * 2 + [{}] * 30)
    assert said == [(31, "stall"), (62, "stall")]


def test_compilation_is_no_stall():
    assert hear(([{}] * 25 + [dict(seconds=100.0, compiled=True)]) * 4) == []


def test_a_run_that_gets_slower_is_told_once():
    said = hear([{}] * 200 + [dict(seconds=1.6)] * 60)
    assert [kind for _, kind in said] == ["slow"] and 200 < said[0][0] <= 210
    said = hear([{}] * 200 + [dict(seconds=20.0)] * 60)
    assert [kind for _, kind in said] == ["stall", "slow"]


def test_another_batch_size_is_no_slowness():
    larger = dict(batch_tokens=4000, seconds=9.0, stage="large")  # a third of the throughput, nine times the time
    assert hear([{}] * 100 + [larger | dict(compiled=True)] + [larger] * 100) == []


def test_the_median_of_a_long_run_is_kept_in_little_memory():
    alerts = Alerts(HEALTH)
    assert hear([{}] * 5000, alerts) == []
    assert len(alerts._history) < 1024 and alerts._stride > 1
    assert [kind for _, kind in hear([dict(seconds=2.0)] * 20, alerts, first=5001)] == ["slow"]


def test_skipped_steps_in_a_row():
    skips = [dict(skipped=1)]
    alerts = Alerts(HEALTH, max_skips=20)
    said = hear((skips * 4 + [{}]) * 5 + skips * 8 + [{}] + skips * 5, alerts)
    assert said == [(30, "skips"), (39, "skips")]


def test_zero_turns_an_alert_off():
    off = Alerts(Health(alert_window_steps=WINDOW, divergence_nats=0, stall_factor=0, slow_share=0))
    rising = [dict(loss=0.1 * i, seconds=1.0 if i % 40 else 99.0) for i in range(200)]
    assert hear(rising, off) == []
    assert {kind for _, kind in hear(rising)} == {"divergence", "stall"}


def test_a_learning_rate_that_explodes_is_heard(small_store, tmp_path):
    settings = (
        "lr.peak=3.0",
        "lr.warmup_tokens=256",
        "optimizer.clip_norm=0",
        "checkpoint.temporary_steps=0",
        "curriculum.basic.tokens=7680",
    )
    assert main(quick_command(small_store, tmp_path / "run", *settings)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    alerts = Alerts(Health(alert_window_steps=5))
    kinds = [alert["alert"] for line in lines for alert in alerts.step(line)]
    assert "divergence" in kinds, [line["loss"] for line in lines]
