"""Validation: loss in nats per token and bits per byte, per domain, on windows that never change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, reshard
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.data.pipeline import valid_targets
from tinyllama_jax.data.store import TokenStore, Windows
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.distributed.together import compiled_together
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.loss import token_nll
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import place, striped, token_sharding

HeldOut = dict[str, Windows]  # by domain


def held_out(store: TokenStore, window_tokens: int, count: int, domains: Sequence[str] | None = None) -> HeldOut:
    """Up to `count` windows (0 = all) per domain, evenly spread over its held-out text, the same at every call.

    Domains whose held-out text fills no window are left out; raises ConfigError when that leaves none.
    """
    windows = {}
    for domain in domains or store.domains:
        split = store.split("validation", domain)
        available = split.windows(window_tokens)
        if available:
            n = available if count == 0 else min(count, available)
            windows[domain] = split.read(np.arange(n) * available // n, window_tokens)
    if not windows:
        raise ConfigError(
            f"{store.path}: no domain has {window_tokens} tokens of validation text in a row; shorten "
            "data.sequence_tokens or prepare a store with more text"
        )
    return windows


class Validator:
    """Measures parameters on given windows; compiled once, padded to whole batches."""

    def __init__(
        self,
        windows: HeldOut,
        token_bytes_V: np.ndarray,
        model: Model,
        execution: Execution,
        mesh: Mesh,
        *,
        batch_sequences: int,
        document_masking: bool,
        peers: Peers = ALONE,
        barrier_seconds: float = 900.0,
    ):
        shards = mesh.shape["replica"] * mesh.shape["data"]
        self.rows = -(-batch_sequences // shards) * shards  # whole rows on every device; the rest is padding
        self.windows, self.token_bytes_V = windows, token_bytes_V
        self.mesh, self.document_masking = mesh, document_masking

        def batch_loss(params: Any, batch: dict[str, jax.Array]):
            x_BTD = transformer.hidden(params, batch["tokens"], model, execution, documents_BT=batch.get("documents"))
            nll_BT = token_nll(
                x_BTD,
                transformer.head_kernel(params, model),
                batch["targets"],
                chunk_tokens=execution.loss_chunk_tokens,
            )
            valid_BT = reshard(batch["valid"], jax.typeof(nll_BT).sharding.spec)
            return reshard(jnp.sum(jnp.where(valid_BT, nll_BT, 0.0), axis=1), P(None))  # every process has all rows

        self.batch_loss = compiled_together(jax.jit(batch_loss), peers, "validation", barrier_seconds)

    def __call__(self, params: Any, windows: HeldOut | None = None) -> dict[str, dict[str, float]]:
        """{domain: {loss (nats per token), loss_se, bits_per_byte, tokens, bytes}}, of these windows or its own.

        loss_se is the standard error over windows, whose tokens are not independent of each other; NaN for one window.
        """
        windows = self.windows if windows is None else windows
        return {domain: self._measure(params, found) for domain, found in windows.items()}

    def _measure(self, params: Any, windows: Windows) -> dict[str, float]:
        nll, tokens, size = [], [], 0  # by window
        spec, context = token_sharding(self.mesh).spec, self.mesh.shape["context"]
        for start in range(0, len(windows.tokens_NT), self.rows):
            rows = windows.rows(slice(start, start + self.rows))
            window_BW, documents_BW = rows.tokens_NT, rows.documents_NT
            valid_BT = valid_targets(rows, self.document_masking)
            size += int(self.token_bytes_V[window_BW[:, 1:]][valid_BT].sum())
            padding = ((0, self.rows - len(window_BW)), (0, 0))
            window_BW, documents_BW = np.pad(window_BW, padding), np.pad(documents_BW, padding)
            batch = {
                "tokens": window_BW[:, :-1],
                "targets": window_BW[:, 1:],
                "valid": np.pad(valid_BT, padding),
                **({"documents": documents_BW[:, :-1]} if self.document_masking else {}),
            }
            batch = {name: place(striped(x, context), self.mesh, spec) for name, x in batch.items()}
            batch_nll_B = np.asarray(self.batch_loss(params, batch), np.float64)
            nll.append(batch_nll_B[: len(valid_BT)])
            tokens.append(valid_BT.sum(1))
        return summary(np.concatenate(nll), np.concatenate(tokens), size)


def summary(nll_N: np.ndarray, tokens_N: np.ndarray, size: int) -> dict[str, float]:
    """Of sums over windows: a ratio's standard error, for the windows need not have equally many valid tokens."""
    nll, tokens, windows = float(nll_N.sum()), int(tokens_N.sum()), len(nll_N)
    loss = nll / max(tokens, 1)
    off = ((nll_N - loss * tokens_N) ** 2).sum()
    return {
        "loss": loss,
        "loss_se": math.sqrt(off * windows / (windows - 1)) / max(tokens, 1) if windows > 1 else math.nan,
        "bits_per_byte": nll / (math.log(2) * max(size, 1)),
        "tokens": tokens,
        "bytes": size,
    }
