"""Recipes become runs: epochs and shares in tokens, the model the base's."""

import math

import pytest

from experiments import chat, finetune
from tinyllama_jax import configio, flops
from tinyllama_jax.cli import main
from tinyllama_jax.config import Adapter, Examples, Optimizer, Preference, Rope, replace
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.finetune.recipe import FineTune, Text
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.preflight.recipes import resolved
from tinyllama_jax.presets import preset
from tinyllama_jax.schedules import Plan, learning_rate

BASE = preset("tinyllama-1.1b")
RECIPES = [*(getattr(finetune, n) for n in ("full", "lora", "qlora", "prefix"))]
RECIPES += [*(getattr(chat, n) for n in ("chat_v0_1", "chat_v1_0_sft", "chat_v1_0_dpo"))]


def text(**changes) -> FineTune:
    return FineTune(name="t", base="runs/base", text=Text(**changes), sequence_tokens=128, batch_sequences=4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.__name__)
def test_every_recipe_becomes_a_run_and_survives_json(recipe):
    made = recipe()
    assert configio.from_dict(FineTune, configio.to_dict(made)) == made
    run = run_of(replace(made, base="runs/base"), BASE, "examples", {"data": 2_000 * made.sequence_tokens}, 32_000)
    assert run.model.layers == 22 and run.start.checkpoint == "runs/base"
    steps = Plan(run.curriculum, run.data.sequence_tokens).total_steps
    assert steps == math.ceil(made.epochs * 2_000 / made.batch_sequences)
    learning_rate(run.lr, Plan(run.curriculum, run.data.sequence_tokens))  # no contradiction


def test_chat_v1_0_has_the_numbers_of_the_handbook():
    sft, dpo = chat.chat_v1_0_sft(), chat.chat_v1_0_dpo()
    assert (sft.lr_peak, sft.batch_sequences, sft.sequence_tokens, sft.epochs, sft.lr_kind) == (
        2e-5,
        512,
        2048,
        1,
        "cosine",
    )
    assert (sft.examples.loss_on, sft.examples.packing, sft.examples.empty_system) == ("all", "concatenated", True)
    assert (dpo.lr_peak, dpo.batch_sequences, dpo.epochs, dpo.lr_kind, dpo.warmup_share) == (5e-7, 64, 3, "linear", 0.1)
    assert dpo.preference == Preference(beta=0.1) and dpo.optimizer.kind == "rmsprop" and dpo.optimizer.beta2 == 0.99
    assert dpo.examples.longest_prompt_tokens == 512 and dpo.sequence_tokens == 2 * 1024


def test_warm_up_is_a_share_or_a_number_of_steps():
    tokens = {"a": 128 * 400}
    shared = run_of(replace(text(store="s"), warmup_share=0.1), BASE, "s", tokens)
    counted = run_of(replace(text(store="s"), warmup_steps=10), BASE, "s", tokens)
    assert shared.lr.warmup_tokens == counted.lr.warmup_tokens == 10 * 4 * 128
    with pytest.raises(ConfigError, match="warming up takes 100 steps and the whole run 100"):
        run_of(replace(text(store="s"), warmup_steps=100), BASE, "s", tokens)


def test_replayed_text_has_its_share_and_lengthens_an_epoch():
    recipe = text(store="s", replay_store="old", replay_share=0.2)
    run = run_of(recipe, BASE, "s", {"a": 128 * 300, "b": 128 * 100}, replayed={"x": 300, "y": 100})
    assert run.curriculum[0].mixture == pytest.approx({"a": 0.6, "b": 0.2, "replay/x": 0.15, "replay/y": 0.05})
    assert Plan(run.curriculum, 128).total_steps == 125, "400 windows of the new text are four fifths of 500"
    assert run.data.replay_store == "old"


def test_a_longer_context_comes_with_its_rope():
    with pytest.raises(ConfigError, match="sequence_tokens=4096 exceeds the base's context of 2048"):
        run_of(replace(text(store="s"), sequence_tokens=4096), BASE, "s", {"a": 10**7})
    recipe = replace(text(store="s"), sequence_tokens=4096, context_tokens=4096, rope=Rope(kind="yarn", factor=2.0))
    run = run_of(recipe, BASE, "s", {"a": 10**7})
    assert run.model.context_tokens == 4096 and run.model.rope.kind == "yarn"


def test_more_words_than_the_base():
    assert run_of(text(store="s"), BASE, "s", {"a": 10**6}, 32_003).model.vocab_size == 32_003


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": None}, "either `examples` or `text`"),
        ({"examples": Examples(sources=("x",))}, "either `examples` or `text`"),
        ({"preference": Preference()}, "`preference` learns from pairs"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"warmup_share": 0.1, "warmup_steps": 3}, "exclude each other"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(text(store="s"), **change)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Adapter(rank=0), "adapter.rank is 0"),
        (lambda: Adapter(dropout=1.0), "adapter.dropout is 1.0"),
        (lambda: Adapter(targets=()), "adapter.targets is empty"),
        (lambda: Preference(beta=0.0), "preference.beta is 0.0"),
        (lambda: Preference(loss="ipo", label_smoothing=0.1), "no meaning with loss=ipo"),
        (lambda: Examples(sources=()), "examples.sources is empty"),
        (lambda: Text(replay_share=0.1), "need each other"),
    ],
)
def test_values_without_a_meaning_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_reach_into_recipes():
    recipe = configio.override(finetune.lora(), ["adapter.rank=4", "epochs=0.5", "examples.form=alpaca"])
    assert (recipe.adapter.rank, recipe.epochs, recipe.examples.form) == (4, 0.5, "alpaca")
    with pytest.raises(UsageError, match="did you mean 'adapter.rank'|did you mean 'rank'"):
        configio.override(finetune.lora(), ["adapter.rnk=4"])


def test_recipes_and_runs_are_told_apart(capsys):
    assert main(["train", "experiments.finetune:lora", "--workdir", "nowhere"]) == 78
    assert "`tinyllama finetune` trains it" in capsys.readouterr().err
    assert main(["finetune", "experiments.smoke:tiny", "--base", "x", "--workdir", "nowhere"]) == 78
    assert "`tinyllama train` trains it" in capsys.readouterr().err
    assert main(["finetune", "experiments.finetune:lora", "--workdir", "nowhere"]) == 2
    assert "--base names a run or a checkpoint" in capsys.readouterr().err
    assert main(["finetune", "experiments.finetune:lora", "--base", "nowhere", "--workdir", "nowhere"]) == 78
    assert "nowhere: no such directory" in capsys.readouterr().err


def test_what_is_trained_is_counted():
    lora, full = (resolved(f"experiments.finetune:{name}", (), (), "tinyllama-1.1b") for name in ("lora", "full"))
    d, kv, f, v = 2048, 256, 5632, 32_000
    a_layer = 4 * d + 2 * (d + kv) + 3 * (d + f)  # inputs + outputs: query and out, key and value, the MLP
    assert flops.trained_parameters(lora) == 32 * (22 * a_layer + d + v)
    assert flops.trained_parameters(full) == flops.parameter_counts(BASE)["total"]
    query = replace(lora, adapter=Adapter(rank=8, targets=("attention.q*",)))
    assert flops.trained_parameters(query) == 8 * 22 * 2 * d
    prefix = replace(lora, adapter=Adapter(method="prefix", prefix_tokens=30))
    assert flops.trained_parameters(prefix) == 2 * 22 * 30 * kv
    # Backward beside frozen matrices has one product for each of the two that training them has.
    assert 0.66 < flops.of_run(lora) / flops.of_run(full) < 0.70


def test_optimizer_kinds_are_part_of_the_identity_only_where_they_differ():
    run = resolved("experiments.finetune:full", (), (), "tinyllama-1.1b")
    plain = configio.identity(replace(run, optimizer=Optimizer()))
    assert "kind" not in plain["optimizer"], "as runs were named before there was another"
    assert configio.identity(replace(run, optimizer=Optimizer(kind="rmsprop")))["optimizer"]["kind"] == "rmsprop"
    assert {"start", "data"} <= plain.keys() and "adapter" not in plain
