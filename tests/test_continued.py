"""The experiments that go on with pretraining, and what is committed of their results."""

import json
from pathlib import Path

import pytest

from experiments import continued
from tinyllama_jax import configio
from tinyllama_jax.config import replace
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.presets import preset
from tinyllama_jax.schedules import Plan, learning_rate

RESULTS = json.loads((Path(__file__).parent.parent / "experiments/results/continued.json").read_text())


@pytest.mark.parametrize("make, share, words", [(continued.domain, 0.05, 32_000), (continued.language, 0.25, 40_000)])
def test_tinyllama_is_warmed_up_again_and_old_text_has_its_share(make, share, words):
    old = {"slimpajama": 7 * 10**9, "starcoder": 3 * 10**9}
    recipe = replace(make(), base="runs/v1_0")
    run = run_of(recipe, preset("tinyllama-1.1b"), "data/new", {"new": 10**9}, words, old)
    plan = Plan(run.curriculum, 2048)
    mixture = run.curriculum[0].mixture
    assert mixture["replay/slimpajama"] + mixture["replay/starcoder"] == pytest.approx(share)
    assert mixture["new"] * plan.total_tokens == pytest.approx(10**9, rel=0.001), "one pass over the new text"
    rate = learning_rate(run.lr, plan)
    assert rate(plan.total_tokens // 100) == pytest.approx(4e-4, rel=0.01)
    assert rate(plan.total_tokens) == pytest.approx(4e-5) and run.model.vocab_size == words


def test_the_results_are_those_of_the_runs_as_they_are():
    base, found = continued.base_cpu(), RESULTS["runs"]
    assert configio.fingerprint(base) == found["prose"]["fingerprint"]
    for name, make in (("code", continued.domain_cpu), ("code-alone", continued.domain_cpu_alone)):
        recipe = replace(make(), base="runs/prose/checkpoints/00001500")
        old = {"prose": 1} if recipe.text.replay_store else None
        run = run_of(recipe, base.model, recipe.text.store, {"code": 1}, 512, old)
        assert configio.fingerprint(run) == found[name]["fingerprint"]
        assert run.curriculum[0].mixture == found[name]["mixture"]


def test_what_the_results_say():
    """By more than twice the standard errors: replay keeps more of the old, and costs the new nothing."""
    loss = {
        name: {d: (m["loss"], m["loss_se"]) for d, m in r["held_out"].items()} for name, r in RESULTS["runs"].items()
    }

    def below(first, second, domain):
        (a, a_se), (b, b_se) = loss[first][domain], loss[second][domain]
        return b - a > 2 * (a_se**2 + b_se**2) ** 0.5

    assert below("code", "code-alone", "prose") and not below("code-alone", "code", "code")
    assert below("prose", "code", "prose") and below("code", "prose", "code")
    assert below("code-flat", "code", "prose"), "a low rate forgets less"
