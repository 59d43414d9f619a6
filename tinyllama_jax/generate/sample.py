"""Continuations of a list of prompts, through an engine that is made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import engine
from tinyllama_jax.generate.engine import Engine, Request
from tinyllama_jax.generate.sampling import Sampling

ROWS = 32  # prompts that are continued at a time; more wait for a free row


def generate(
    params: Any,
    model: Model,
    execution: Execution,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    slide: bool = False,
    rows: int = ROWS,
    on_tokens: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continuations of `prompts` (token ids, possibly of different lengths), each up to `max_new_tokens` long.

    A row ends with `eos_id`, which is its last token then; None never ends early.  `on_tokens(row, tokens)` is called
    with what a row got, as soon as it has it; when it answers True, the row ends there.  The draws of a row are decided
    by `seed` and its place.  slide: go on past the model's context, forgetting the oldest tokens.
    Runs under the mesh in context.
    Raises ConfigError for an empty prompt, ids outside the vocabulary, sampling without a meaning, or more tokens than
    the model's context.
    """
    prompts = [tuple(map(int, prompt)) for prompt in prompts]
    engine.check(prompts or [()], max_new_tokens, model)
    total = max(map(len, prompts)) + max_new_tokens
    if total > model.context_tokens and not slide:
        raise ConfigError(
            f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.context_tokens}; ask for fewer, or let it slide (--slide) and forget the oldest"
        )
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    how |= {"repetition_penalty": repetition_penalty, "seed": seed}
    context = engine.bucket(total, model.context_tokens)
    running = Engine(params, model, execution, rows=min(len(prompts), rows), context_tokens=context, slide=slide)
    stop_ids = () if eos_id is None else (eos_id,)
    row_of = {
        running.add(
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(**how, stream=row),
                stop_ids=stop_ids,
            )
        ): row
        for row, prompt in enumerate(prompts)
    }
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    while running.busy:
        for piece in running.step():
            row = row_of[piece.number]
            if ended[row] or not piece.tokens:
                continue
            answers[row] += piece.tokens
            if on_tokens is not None and on_tokens(row, piece.tokens):
                ended[row] = True
                running.cancel(piece.number)
    return answers
