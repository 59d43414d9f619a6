"""Sampling: prefill all prompts at once, then one token per row and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import transformer


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits outside the top_k largest (0 = off) or outside the nucleus of mass top_p (1 = off) become -inf.

    The nucleus (Holtzman et al., arXiv 1904.09751) is the smallest set of most likely tokens whose probability
    reaches top_p; the most likely token always stays.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # mass of all likelier tokens
        last_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < last_B1, -jnp.inf, logits_BV)
    return logits_BV


def pick(logits_BV: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token per row, int32 [B].  Temperature 0 is greedy.  A row's draw does not depend on the other rows."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(row_keys, logits_BV).astype(jnp.int32)


@lru_cache(maxsize=16)
def functions(model: Model, execution: Execution, slots: int, temperature: float, top_k: int, top_p: float):
    """Compiled prefill and step for one model, cache length and way of sampling."""

    def prefill(params: Any, tokens_BT: jax.Array, length_B: jax.Array, key: jax.Array):
        cache = transformer.init_cache(model, tokens_BT.shape[0], slots)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        logits_BTV, cache = transformer.decode(params, tokens_BT, model, execution, cache, positions_BT)
        # Each row's next token follows its own last prompt token; what padding wrote behind it is overwritten
        # before any query can see it.
        last_BV = jax.vmap(lambda row_TV, length: row_TV[length - 1])(logits_BTV, length_B)
        return pick(last_BV, jax.random.fold_in(key, 0), temperature, top_k, top_p), cache

    def step(params: Any, token_B: jax.Array, position_B: jax.Array, cache: dict, key: jax.Array, count: jax.Array):
        logits_BTV, cache = transformer.decode(params, token_B[:, None], model, execution, cache, position_B[:, None])
        return pick(logits_BTV[:, 0], jax.random.fold_in(key, count), temperature, top_k, top_p), cache

    return jax.jit(prefill), jax.jit(step, donate_argnums=3)


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
    seed: int = 0,
    eos_id: int | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """Continuations of `prompts` (token ids, possibly of different lengths), each up to `max_new_tokens` long.

    A row ends with `eos_id`, which is its last token then; None never ends early.  `on_tokens` is called after each
    step with one token per row, None for rows that have ended.  Runs under the mesh in context.
    Raises ConfigError for an empty prompt, ids outside the vocabulary, or more tokens than the model's context.
    """
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise ConfigError("a prompt is empty; generation needs at least one token, such as BOS")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    top_id = max(max(p) for p in prompts)
    if top_id >= model.vocab_size or min(min(p) for p in prompts) < 0:
        raise ConfigError(f"token id {top_id} is outside the model's vocabulary of {model.vocab_size}")
    total = max(lengths) + max_new_tokens
    if total > model.context_tokens:
        raise ConfigError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.context_tokens}"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError("sampling takes temperature >= 0, top_k >= 0 and top_p in (0, 1]")

    tokens_BT = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    length_B = np.array(lengths, np.int32)
    prefill, step = functions(model, execution, total, float(temperature), int(top_k), float(top_p))
    key = jax.random.key(seed)
    token_B, cache = prefill(params, jnp.asarray(tokens_BT), jnp.asarray(length_B), key)

    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for count in range(max_new_tokens):
        emitted: list[int | None] = []
        for row, token in enumerate(np.asarray(token_B).tolist()):
            emitted.append(None if ended[row] else token)
            if not ended[row]:
                answers[row].append(token)
            ended[row] = ended[row] or token == eos_id
        if on_tokens is not None:
            on_tokens(emitted)
        if all(ended) or count == max_new_tokens - 1:
            break
        token_B, cache = step(params, token_B, jnp.asarray(length_B + count), cache, key, jnp.int32(count + 1))
    return answers
