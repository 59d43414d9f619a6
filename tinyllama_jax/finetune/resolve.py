"""From a recipe to a run: epochs become tokens, shares become tokens, and the model is the base's.

What it says depends on the base's metadata and on the prepared data only, so the same command makes the same run.
No jax here.
"""

from __future__ import annotations

import math

from tinyllama_jax.config import REPLAY, Data, LearningRate, Model, Run, Stage, Start, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.finetune.recipe import FineTune

STAGE = "finetune"


def model(recipe: FineTune, base: Model, vocab_size: int = 0) -> Model:
    """The base's model with what the recipe changes.  vocab_size: of the data's tokenizer, which may have more words.

    Raises ConfigError for windows that are longer than the context.
    """
    context = recipe.context_tokens or base.context_tokens
    if recipe.sequence_tokens > context:
        raise ConfigError(
            f"sequence_tokens={recipe.sequence_tokens} exceeds the base's context of {context}; set it lower, or "
            "lengthen the context with --set context_tokens=N and a --set rope.kind that suits it"
        )
    return replace(
        base,
        context_tokens=context,
        rope=recipe.rope or base.rope,
        vocab_size=max(base.vocab_size, vocab_size),
        dropout=recipe.dropout,
        compute_dtype=recipe.compute_dtype,
    )


def run_of(
    recipe: FineTune,
    base: Model,
    store_path: str,
    tokens: dict[str, int],
    vocab_size: int = 0,
    replayed: dict[str, int] | None = None,
) -> Run:
    """The run.

    store_path: the example store, or the token store.  tokens: by source, what its windows predict (windows x
    sequence_tokens); replayed: the same of the replay store.  vocab_size: of the store's tokenizer.
    """
    length = recipe.sequence_tokens
    batch = recipe.batch_sequences * length
    steps = max(1, math.ceil(_planned(recipe, tokens) / batch))
    warmup = recipe.warmup_steps or round(recipe.warmup_share * steps)
    if warmup >= steps:
        raise ConfigError(
            f"warming up takes {warmup} steps and the whole run {steps}; set --set warmup_steps lower, more epochs, or "
            "a smaller batch_sequences"
        )
    text, constant = recipe.text, recipe.lr_kind == "constant"
    every = max(1, round(steps / recipe.evaluations))
    return Run(
        name=recipe.name,
        model=model(recipe, base, vocab_size),
        data=Data(
            store=store_path,
            sequence_tokens=length,
            document_masking=recipe.document_masking,
            examples=recipe.examples,
            replay_store=text.replay_store if text else "",
        ),
        curriculum=(
            Stage(name=STAGE, tokens=steps * batch, batch_tokens=batch, mixture=mixture(recipe, tokens, replayed)),
        ),
        lr=LearningRate(
            kind=recipe.lr_kind,
            peak=recipe.lr_peak,
            end=0.0 if constant else recipe.lr_end,
            warmup_tokens=warmup * batch,
        ),
        optimizer=recipe.optimizer,
        seed=recipe.seed,
        start=Start(checkpoint=recipe.base, new_words=recipe.new_words),
        adapter=recipe.adapter,
        preference=recipe.preference,
        execution=recipe.execution,
        mesh=recipe.mesh,
        checkpoint=recipe.checkpoint,
        health=recipe.health,
        evaluation=replace(
            recipe.evaluation, every_tokens=every * batch, patience=recipe.patience, questions=recipe.questions
        ),
        tracking=recipe.tracking,
    )


def _planned(recipe: FineTune, tokens: dict[str, int]) -> float:
    """Tokens of training."""
    if recipe.text and recipe.text.tokens:
        return recipe.text.tokens
    share = 1 - (recipe.text.replay_share if recipe.text else 0.0)
    return recipe.epochs * sum(tokens.values()) / share


def mixture(recipe: FineTune, tokens: dict[str, int], replayed: dict[str, int] | None) -> dict[str, float]:
    """Weights of the sources: by size, or as the recipe says; those replayed have their share together, by size."""
    text = recipe.text
    given = text.mixture if text and text.mixture else tokens
    total = sum(given.values())
    share = text.replay_share if text else 0.0
    own = {name: (1 - share) * weight / total for name, weight in given.items()}
    old = replayed or {}
    return own | {REPLAY + name: share * n / sum(old.values()) for name, n in old.items()}
