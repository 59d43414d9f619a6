"""Windows of pairs through a model: in batches over the mesh, for references (reference.py) and for validation."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, reshard
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Execution, Model, Preference
from tinyllama_jax.data.pipeline import valid_targets
from tinyllama_jax.data.splits import Windows
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.distributed.together import compiled_together
from tinyllama_jax.evaluate.loss import HeldOut
from tinyllama_jax.finetune.preference import answer_logps, answer_tokens, losses
from tinyllama_jax.sharding import BATCH, place, striped, token_sharding


def batches(windows: Windows, batch_sequences: int, mesh: Mesh) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """(pairs, batch) over the windows in order: tokens, targets, valid, documents [B, T], and reference [B, 2] where
    the windows have it.  B is batch_sequences rounded up to whole rows on every device; rows behind `pairs` are
    padding.
    """
    shards = mesh.shape["replica"] * mesh.shape["data"]
    rows = -(-batch_sequences // shards) * shards
    spec, context = token_sharding(mesh).spec, mesh.shape["context"]
    for start in range(0, len(windows.tokens_NT), rows):
        part = windows.rows(slice(start, start + rows))
        pairs = len(part.tokens_NT)
        by_token = {
            "tokens": part.tokens_NT[:, :-1],
            "targets": part.tokens_NT[:, 1:],
            "valid": valid_targets(part, document_masking=True),
            "documents": part.documents_NT[:, :-1],
        }
        padding = ((0, rows - pairs), (0, 0))
        batch = {name: place(striped(np.pad(x, padding), context), mesh, spec) for name, x in by_token.items()}
        if part.reference_N2 is not None:
            batch["reference"] = place(np.pad(part.reference_N2, padding), mesh, P(BATCH, None))
        yield pairs, batch


@functools.lru_cache(maxsize=4)
def _logps(model: Model, execution: Execution):
    def logps(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return reshard(answer_logps(params, batch, model, execution), P(None, None))  # every process has all rows

    return jax.jit(logps)


@functools.lru_cache(maxsize=4)
def _of_pairs(model: Model, execution: Execution, preference: Preference):
    def of_pairs(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        policy_B2 = answer_logps(params, batch, model, execution)
        policy_B2, reference_B2, tokens_B2 = (
            reshard(x, P(None, None)) for x in (policy_B2, batch["reference"], answer_tokens(batch))
        )
        loss_B, metrics = losses(policy_B2, reference_B2, tokens_B2, preference)
        return {"loss": loss_B, **metrics, "tokens": tokens_B2.sum(axis=1)}

    return jax.jit(of_pairs)


class AnswerLogps:
    """Log-probabilities of both answers of each pair; compiled once, padded to whole batches."""

    def __init__(
        self,
        model: Model,
        execution: Execution,
        mesh: Mesh,
        *,
        batch_sequences: int,
        peers: Peers = ALONE,
        barrier_seconds: float = 900.0,
    ):
        self.mesh, self.batch_sequences = mesh, batch_sequences
        self.logps = compiled_together(_logps(model, execution), peers, "answers", barrier_seconds)

    def __call__(self, params: Any, windows: Windows) -> np.ndarray:
        """float32 [N, 2], in nats."""
        found = [
            np.asarray(self.logps(params, batch))[:pairs]
            for pairs, batch in batches(windows, self.batch_sequences, self.mesh)
        ]
        return np.concatenate(found)


class PairValidator:
    """Measures parameters on pairs that have references, as `evaluate.loss.Validator` does on text."""

    def __init__(
        self,
        windows: HeldOut,
        model: Model,
        execution: Execution,
        mesh: Mesh,
        preference: Preference,
        *,
        batch_sequences: int,
        peers: Peers = ALONE,
        barrier_seconds: float = 900.0,
    ):
        self.windows, self.mesh, self.batch_sequences = windows, mesh, batch_sequences
        program = _of_pairs(model, execution, preference)
        self.of_pairs = compiled_together(program, peers, "validation of pairs", barrier_seconds)

    def __call__(self, params: Any, windows: HeldOut | None = None) -> dict[str, dict[str, float]]:
        """{domain: {loss, loss_se, the means of preference.METRICS, pairs, tokens}}, of these windows or its own.

        loss_se is the standard error of the mean over pairs, NaN for one pair; tokens are those of both answers.
        """
        windows = self.windows if windows is None else windows
        return {domain: self._measure(params, found) for domain, found in windows.items()}

    def _measure(self, params: Any, windows: Windows) -> dict[str, float]:
        parts = [
            {name: np.asarray(x_B, np.float64)[:pairs] for name, x_B in self.of_pairs(params, batch).items()}
            for pairs, batch in batches(windows, self.batch_sequences, self.mesh)
        ]
        by_pair = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        loss_N, tokens_N = by_pair.pop("loss"), by_pair.pop("tokens")
        pairs = len(loss_N)
        return {
            "loss": float(loss_N.mean()),
            "loss_se": float(loss_N.std(ddof=1)) / math.sqrt(pairs) if pairs > 1 else math.nan,
            **{name: float(x_N.mean()) for name, x_N in by_pair.items()},
            "pairs": pairs,
            "tokens": int(tokens_N.sum()),
        }
