"""A model's answers to passkey prompts: each prompt is computed once, then what could follow it is read from its cache.

No array is as large as tokens times tokens (`beyond.execution`), and logits exist for the answers alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import DataError
from tinyllama_jax.evaluate.beyond import TOKENS_AT_A_TIME, execution
from tinyllama_jax.evaluate.passkey import Answer, Prompt
from tinyllama_jax.model import cached
from tinyllama_jax.sharding import place, token_sharding


@functools.lru_cache(maxsize=8)
def _program(model: Model, how: Execution):
    """(params, prompts [B, P], answers [K, B, N]) -> log-likelihoods [B, K], and N + 1 likeliest tokens [B, N + 1].

    The last of them is predicted from P + N tokens: it tells whether a number ends where it should.
    """

    def run(params: Any, prompts_BP: jax.Array, answers_KBN: jax.Array):
        B, P = prompts_BP.shape
        N = answers_KBN.shape[2]
        last_B = prompts_BP[:, 0] * 0 + P - 1
        logits_BV, cache = cached.prefill(params, prompts_BP, model, how, last_B)
        cache = jax.tree.map(lambda x_BGPK: jnp.pad(x_BGPK, ((0, 0), (0, 0), (0, N), (0, 0))), cache)

        def likelihood(answer_BN: jax.Array) -> jax.Array:
            nats_B = _of(logits_BV, answer_BN[:, 0])
            if N == 1:
                return nats_B
            given_BM = answer_BN[:, :-1]
            at_BM = given_BM * 0 + P + jnp.arange(N - 1)
            logits_BMV, _ = cached.decode(params, given_BM, model, cache, at_BM)
            return nats_B + _of(logits_BMV, answer_BN[:, 1:]).sum(1)

        def next_(carry, position: jax.Array):
            token_B, cache = carry
            logits_B1V, cache = cached.decode(params, token_B[:, None], model, cache, token_B[:, None] * 0 + position)
            following_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
            return (following_B, cache), following_B

        nats_KB = jax.lax.map(likelihood, answers_KBN)
        first_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        _, more_NB = jax.lax.scan(next_, (first_B, cache), P + jnp.arange(N))
        return nats_KB.T, jnp.concatenate([first_B[None], more_NB]).T

    return jax.jit(run)


def _of(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log softmax of [..., V] at ids [...], float32."""
    nats = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.where(jnp.arange(nats.shape[-1]) == ids[..., None], nats, 0.0), axis=-1)


def answers(
    params: Any,
    model: Model,
    mesh: Mesh,
    prompts: Sequence[Prompt],
    text: Callable[[Sequence[int]], str],
    on_done: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """To `prompts`, which are of one length, as their answers are.  Runs under the mesh in context.

    text: of the tokens that the model says.  on_done(n): n more prompts are answered.
    Raises DataError for ids outside of the vocabulary and for rows that are longer than the model's context.
    """
    tokens_NP = np.array([prompt.tokens for prompt in prompts], np.int32)
    answers_NKA = np.array([prompt.answers for prompt in prompts], np.int32)
    length = tokens_NP.shape[1] + answers_NKA.shape[2]
    if length > model.context_tokens:
        raise DataError(f"passkey: rows of {length} tokens exceed the model's context of {model.context_tokens}")
    largest = max(tokens_NP.max(), answers_NKA.max())
    if largest >= model.vocab_size:
        raise DataError(f"passkey: token id {largest} is outside the model's vocabulary of {model.vocab_size}")
    shards = mesh.shape["replica"] * mesh.shape["data"]
    rows = max(1, TOKENS_AT_A_TIME // length) * shards
    rows = -(-min(rows, len(prompts)) // shards) * shards
    program = _program(model, execution(model, tokens_NP.shape[1]))
    spec, spec_K = token_sharding(mesh).spec, token_sharding(mesh, leading=1).spec
    found = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        tokens_BP = _filled(tokens_NP[part], rows)
        answers_KBA = _filled(answers_NKA[part], rows).swapaxes(0, 1)
        placed = place(tokens_BP, mesh, spec), place(answers_KBA, mesh, spec_K)
        nats_BK, said_BN = (np.asarray(x) for x in program(params, *placed))
        count = len(tokens_NP[part])
        found += [Answer(nats_BK[i].astype(np.float64), text(said_BN[i].tolist())) for i in range(count)]
        on_done(count)
    return found


def _filled(x_N: np.ndarray, rows: int) -> np.ndarray:
    """Up to `rows` rows, the last one again where there are fewer."""
    return np.pad(x_N, ((0, rows - len(x_N)), *[(0, 0)] * (x_N.ndim - 1)), "edge")
