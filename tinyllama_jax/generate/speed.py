"""How fast a model generates, and what its key/value cache takes.

Timed are the functions that the engine compiles, prefill and one step; the weights are kept in the compute dtype, which
is what a server would do.  What is predicted does not matter, so any context can be timed, a longer one
than that of training too.  Numbers of one machine, one batch and one context: compare them with each other only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.model import cached, quantized

PREFILLS, STEPS = 5, 20  # timed, after one that compiles and warms up


def cache_bytes_per_token(model: Model) -> int:
    """2 layers kv_heads head_dim bytes: keys and values of one token of one row, in the compute dtype."""
    return 2 * model.layers * model.kv_heads * model.head_dim * jnp.dtype(model.compute_dtype).itemsize


def pair(text: str) -> tuple[int, int]:
    """(rows, tokens) of `8x512`, checked by config.Evaluation."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def measure(params: Any, model: Model, pairs: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """{"b8": {"c512": {tokens_per_s, prefill_tokens_per_s, cache_bytes}}} for each pair of rows and context.

    tokens_per_s: rows over the median time of a step, from the call to the new token, whose query sees `context`
    tokens, its own among them.  prefill_tokens_per_s: rows x context over the median time of a prefill.  cache_bytes:
    of the arrays that make up the cache.  Runs under the mesh in context.
    """
    params = jax.jit(quantized.serving, static_argnums=1)(params, model)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rows, context in map(pair, pairs):
        found.setdefault(f"b{rows}", {})[f"c{context}"] = _measure(params, model, rows, context)
    return found


def _measure(params: Any, model: Model, rows: int, context: int) -> dict[str, float]:
    draw = np.random.default_rng(0)
    tokens_BT = jnp.asarray(draw.integers(0, model.vocab_size, (rows, context)), jnp.int32)
    at_B1 = jnp.full((rows, 1), context - 1, jnp.int32)
    prefill = jax.jit(lambda p, tokens_BT, last_B: _greedy(cached.prefill(p, tokens_BT, model, Execution(), last_B)))
    step = jax.jit(
        lambda p, token_B, cache: _greedy(cached.decode(p, token_B[:, None], model, cache, at_B1)), donate_argnums=2
    )
    state: dict[str, Any] = {}

    def fill() -> None:
        state.clear()  # no two caches at a time
        state["token"], state["cache"] = jax.block_until_ready(prefill(params, tokens_BT, at_B1[:, 0]))

    def one() -> None:
        # Always the last slot anew, so that every step sees as much.
        state["token"], state["cache"] = jax.block_until_ready(step(params, state["token"], state["cache"]))

    prefill_s = _median_seconds(fill, PREFILLS)
    step_s = _median_seconds(one, STEPS)
    return {
        "tokens_per_s": rows / step_s,
        "prefill_tokens_per_s": rows * context / prefill_s,
        "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state["cache"])),
    }


def _greedy(logits_and_cache: tuple[jax.Array, cached.Cache]) -> tuple[jax.Array, cached.Cache]:
    logits, cache = logits_and_cache
    return jnp.argmax(logits.reshape(logits.shape[0], -1), axis=-1).astype(jnp.int32), cache


def _median_seconds(call: Callable[[], None], times: int) -> float:
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
