"""Whether speculative answers are the target's, by computing with the target alone.

Greedy ones must be the tokens of plain decoding.  Sampled ones cannot be compared one by one; what is known of them is
held against what was measured, each difference being that of a martingale (rule.interval):

    accepted tokens        against the sum of sum_x min(p(x), q(x)), with which each should be accepted
    p of the new tokens    against the sum of sum_x p(x)^2, what it is on average when they are drawn from p; by whole
                           rows through the model without a cache, which no code of speculation has a part in
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.generate import sampling
from tinyllama_jax.generate import speculative_rule as rule
from tinyllama_jax.generate.engine import bucket
from tinyllama_jax.generate.sampling import Rows, Sampling, Uses
from tinyllama_jax.generate.speculative import HasWeights, Speculated
from tinyllama_jax.generate.speculative_round import distribution
from tinyllama_jax.model import quantized, transformer

CHANCE = 1e-4  # of a false alarm, each of the two


def first_difference(plain: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """(row, place) of the first token that is not the same, or None."""
    for row, (a, b) in enumerate(zip(plain, found, strict=True)):
        if list(a) != list(b):
            return row, next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None


def gap(target: HasWeights, ids: Sequence[int], one: int, other: int, penalty: float = 1.0) -> float:
    """By how much the target's logit of `one` lies above that of `other` behind these ids.  Where plain and speculative
    decoding part by rounding, this is as small as the compute dtype's steps at logits of that size."""
    how = Sampling(temperature=1, repetition_penalty=penalty)
    with np.errstate(divide="ignore"):
        p_V = np.log(_whole(target, ids, how)[len(ids) - 1])
    return float(p_V[one] - p_V[other])


def sampled(target: HasWeights, prompts: Sequence[Sequence[int]], found: Speculated, how: Sampling) -> dict[str, Any]:
    """{"accepted", "likelihood"}: each {measured, expected, within, holds}, sums over tokens; within: how far they may
    lie apart but for CHANCE."""
    parts = [
        _likelihood(target, prompt, answer, how)
        for prompt, answer in zip(prompts, found.answers, strict=True)
        if answer
    ]
    measured, expected, variance = np.sum(parts, axis=0).tolist()
    return {
        "accepted": _held(found.accepted, found.overlap, found.variance),
        "likelihood": _held(measured, expected, variance),
    }


def _held(measured: float, expected: float, variance: float) -> dict[str, Any]:
    within = rule.interval(variance, CHANCE)
    holds = abs(measured - expected) <= within
    return {"measured": measured, "expected": expected, "within": within, "holds": holds}


def _likelihood(target: HasWeights, prompt: Sequence[int], answer: Sequence[int], how: Sampling) -> tuple[float, ...]:
    """Sums over the answer's tokens: p of the token, its expectation, its variance.  A token that the filters exclude
    counts as minus infinity: it cannot have been drawn."""
    ids = [*prompt, *answer]
    p_TV = _whole(target, ids, how)
    p_TV = p_TV[len(prompt) - 1 : len(ids) - 1]
    p_T = p_TV[np.arange(len(answer)), list(answer)]
    mean_T = (p_TV**2).sum(-1)
    variance_T = (p_TV**3).sum(-1) - mean_T**2
    return float(np.where(p_T > 0, p_T, -np.inf).sum()), float(mean_T.sum()), float(variance_T.sum())


def _whole(target: HasWeights, ids: Sequence[int], how: Sampling) -> np.ndarray:
    """float64 [T, V]: what follows each of the ids is drawn from.  T is a power of two that holds them."""
    T = bucket(len(ids), target.model.context_tokens)
    tokens_1T = np.zeros((1, T), np.int32)
    tokens_1T[0, : len(ids)] = ids
    rows, uses = sampling.rows([how] * T)
    run = _distributions(target.model, uses)
    return np.asarray(run(target.params, jnp.asarray(tokens_1T), jax.tree.map(jnp.asarray, rows)), np.float64)


@lru_cache(maxsize=4)
def _distributions(cfg: Model, uses: Uses):
    """(params, tokens_1T, rows of sampling [T]) -> what follows each token of one row is drawn from, float32 [T, V]."""
    execution = Execution(scan_layers=False, remat="none")  # parameters for serving are layers apart

    def run(params: Any, tokens_1T: jax.Array, rows: Rows) -> jax.Array:
        params = quantized.whole(params, jnp.dtype(cfg.compute_dtype))
        logits_TV = transformer.logits(params, tokens_1T, cfg, execution)[0]
        if uses.penalty:
            held_TV = jnp.cumsum(jax.nn.one_hot(tokens_1T[0], cfg.vocab_size, dtype=jnp.int32), axis=0) > 0
            logits_TV = sampling.penalized(logits_TV, held_TV, rows.repetition_penalty)
        return distribution(logits_TV, rows, uses)

    return jax.jit(run)
