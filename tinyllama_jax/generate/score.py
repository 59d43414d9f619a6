"""Negative log-likelihood of given tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import DataError
from tinyllama_jax.loss import token_nll
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import in_order, striped, token_sharding


def score(
    params: Any,
    model: Model,
    execution: Execution,
    mesh: Mesh,
    tokens_BT: np.ndarray,
    *,
    rows: int = 8,
    documents_BT: np.ndarray | None = None,
) -> np.ndarray:
    """Nats of each predicted token, float32 [B, T-1], of integer tokens [B, T], `rows` rows at a time.

    documents_BT: numbers that rise along a row; a token sees only those of its own number.
    Raises DataError when the array has another shape or type, ids outside the vocabulary, or rows longer than the
    model's context.
    """
    if tokens_BT.ndim != 2 or not np.issubdtype(tokens_BT.dtype, np.integer):
        raise DataError(f"tokens must be integers [batch, time], not {tokens_BT.dtype} {list(tokens_BT.shape)}")
    batch, time = tokens_BT.shape
    if batch == 0 or time < 2:
        raise DataError(f"tokens of shape {[batch, time]} predict nothing; at least one row of two tokens is needed")
    if time - 1 > model.context_tokens:
        raise DataError(f"rows of {time} tokens predict more than the model's context of {model.context_tokens}")
    if tokens_BT.min() < 0 or tokens_BT.max() >= model.vocab_size:
        bad = tokens_BT.min() if tokens_BT.min() < 0 else tokens_BT.max()
        raise DataError(f"token id {bad} is outside the model's vocabulary of {model.vocab_size}")

    def batch_nll(
        params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, documents_BT: jax.Array | None = None
    ) -> jax.Array:
        x_BTD = transformer.hidden(params, tokens_BT, model, execution, documents_BT=documents_BT)
        return token_nll(
            x_BTD, transformer.head_kernel(params, model), targets_BT, chunk_tokens=execution.loss_chunk_tokens
        )

    shards = mesh.shape["replica"] * mesh.shape["data"]
    rows = -(-min(rows, batch) // shards) * shards
    context = mesh.shape["context"]
    sharding, compiled = token_sharding(mesh), jax.jit(batch_nll)
    parts = []
    for start in range(0, batch, rows):

        def padded(x_BT: np.ndarray, start: int = start) -> np.ndarray:
            part = x_BT[start : start + rows].astype(np.int32)
            # Padding behind a row is seen by none of its tokens.
            return np.pad(part, ((0, rows - len(part)), (0, -(time - 1) % context)), "edge")

        tokens = padded(tokens_BT)
        given = [tokens[:, :-1], tokens[:, 1:]]
        if documents_BT is not None:
            given.append(padded(documents_BT)[:, :-1])
        given = [jax.device_put(np.ascontiguousarray(striped(x, context)), sharding) for x in given]
        nll = np.asarray(compiled(params, *given))
        parts.append(in_order(nll, context)[: batch - start, : time - 1])
    return np.concatenate(parts)
