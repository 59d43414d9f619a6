"""Log-likelihoods of continuations behind their contexts, in rows of a few lengths, spread over the mesh.

Rows are sorted by length and padded to a power of two, so that few programs are compiled.  Requests that differ in
their last token alone (the choices "A", "B", "C", "D" behind one question) share a row: what precedes it is computed
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import DataError
from tinyllama_jax.generate.engine import bucket
from tinyllama_jax.loss import token_nll_and_best
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import place, token_sharding

LAST_TOKENS = 8  # that one row is asked for

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of context and continuation


class Likelihood(NamedTuple):
    log_likelihood: float  # nats, summed over the continuation
    greedy: bool  # whether no other token is more likely at any place of it


@dataclass
class Row:
    """Inputs that requests share, the tokens that end them, and who asks."""

    inputs: tuple[int, ...]
    last: list[int] = field(default_factory=list)
    asks: list[tuple[int, int, int]] = field(default_factory=list)  # request, its continuation's length, place in last


def rows_of(pairs: Sequence[Pair], context_tokens: int) -> list[Row]:
    """The rows to be computed, the longest first.  What exceeds the context is cut off from the left.

    Raises DataError for an empty context or continuation, and for a continuation longer than the context.
    """
    rows, growing = [], {}
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise DataError(f"request {i}: a {'continuation' if context else 'context'} without tokens")
        if len(continuation) > context_tokens:
            raise DataError(
                f"request {i}: a continuation of {len(continuation)} tokens exceeds the model's context of "
                f"{context_tokens}"
            )
        whole = [*context, *continuation][-(context_tokens + 1) :]
        inputs, last = tuple(whole[:-1]), whole[-1]
        row = growing.get(inputs)
        if row is None or (last not in row.last and len(row.last) == LAST_TOKENS):
            row = growing[inputs] = Row(inputs)
            rows.append(row)
        if last not in row.last:
            row.last.append(last)
        row.asks.append((i, len(continuation), row.last.index(last)))
    return sorted(rows, key=lambda row: len(row.inputs), reverse=True)


@lru_cache(maxsize=8)
def _program(model: Model, execution: Execution):
    def scores(params: Any, tokens_BT: jax.Array, end_BT: jax.Array, targets_BT: jax.Array, last_BK: jax.Array):
        x_BTD = transformer.hidden(params, tokens_BT, model, execution)
        w_DV = transformer.head_kernel(params, model)
        x_B1D = jnp.sum(jnp.where(end_BT[..., None], x_BTD, 0), axis=1, keepdims=True)  # where the row's inputs end
        x_BKD = jnp.broadcast_to(x_B1D, (*last_BK.shape, x_BTD.shape[-1]))
        chunk = execution.loss_chunk_tokens
        inner = token_nll_and_best(x_BTD, w_DV, targets_BT, chunk_tokens=chunk)
        return inner, token_nll_and_best(x_BKD, w_DV, last_BK, chunk_tokens=chunk)

    return jax.jit(scores)


def log_likelihoods(
    params: Any,
    model: Model,
    execution: Execution,
    mesh: Mesh,
    pairs: Sequence[Pair],
    *,
    batch_rows: int = 32,
    on_rows: Callable[[int], object] = lambda requests: None,
) -> list[Likelihood]:
    """Of each continuation given its context, in the order of `pairs`.  Runs under the mesh in context.

    batch_rows: rows at a time, rounded up to whole rows on every device; the mesh must not split a row's tokens.
    on_rows(requests): is called behind each batch with how many requests it has answered.
    Raises DataError as `rows_of` does, and for ids outside the vocabulary, before anything is computed.
    """
    rows = rows_of(pairs, model.context_tokens)
    ids = {token for row in rows for token in (*row.inputs, *row.last)}
    if ids and not 0 <= min(ids) <= max(ids) < model.vocab_size:
        raise DataError(f"token id {max(ids)} is outside the model's vocabulary of {model.vocab_size}")
    shards = mesh.shape["replica"] * mesh.shape["data"]
    batch_rows = -(-batch_rows // shards) * shards
    program, spec = _program(model, execution), token_sharding(mesh).spec
    answers: list[Likelihood | None] = [None] * len(pairs)
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows]
        arrays = place(_arrays(part, batch_rows, bucket(len(part[0].inputs), model.context_tokens)), mesh, spec)
        inner, last = jax.tree.map(np.asarray, program(params, *arrays))
        for row, nll_T, best_T, nll_K, best_K in zip(part, *inner, *last, strict=False):
            end = len(row.inputs) - 1
            for i, tokens, k in row.asks:
                before = slice(end - tokens + 1, end)  # all of the continuation but its last token
                nll = float(nll_T[before].sum(dtype=np.float64)) + float(nll_K[k])
                answers[i] = Likelihood(-nll, bool(best_T[before].all() and best_K[k]))
        on_rows(sum(len(row.asks) for row in part))
    return answers


def _arrays(rows: Sequence[Row], count: int, length: int) -> tuple[np.ndarray, ...]:
    """(tokens_BT, end_BT, targets_BT, last_BK) of `rows`, and of empty ones up to `count`; padding is at the end."""
    tokens_BT, targets_BT = np.zeros((2, count, length), np.int32)
    end_BT, last_BK = np.zeros((count, length), bool), np.zeros((count, LAST_TOKENS), np.int32)
    for b, row in enumerate(rows):
        end = len(row.inputs) - 1
        tokens_BT[b, : end + 1] = row.inputs
        targets_BT[b, :end] = row.inputs[1:]
        end_BT[b, end] = True
        last_BK[b, : len(row.last)] = row.last
    return tokens_BT, end_BT, targets_BT, last_BK
