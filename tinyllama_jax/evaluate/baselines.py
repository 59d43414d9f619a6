"""What counting would have reached: n-gram models fitted on the very tokens that a run was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tinyllama_jax.config import ConfigError, Run
from tinyllama_jax.data.order import Order
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.evaluate import ngram
from tinyllama_jax.evaluate.loss import Windows
from tinyllama_jax.schedules import Plan

MOST_TOKENS = 500_000_000  # counted in memory on one core; beyond this a bigram model says little anyway


def seen_windows(run: Run, store: TokenStore, step: int) -> Iterator[np.ndarray]:
    """The training windows of steps 0..step-1 in their order, int32 [rows, sequence_tokens + 1] a batch."""
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    window = run.data.sequence_tokens + 1
    sources = list(dict.fromkeys(s for stage in run.curriculum for s in stage.mixture))
    splits = {source: store.split("train", source) for source in sources}
    order = Order(plan, {s: split.windows(window) for s, split in splits.items()}, run.seed, run.data.epochs)
    for index in range(step):
        which, ids = order.rows(index)
        for number, source in enumerate(order.sources):
            mine = ids[which == number]
            if len(mine):
                yield splits[source].read(mine, window)[0]


def measure(run: Run, store: TokenStore, step: int, windows: Windows, token_bytes_V: np.ndarray) -> dict:
    """Unigram and interpolated bigram losses on `windows`, fitted on what the run had seen after `step` steps.

    {"fitted_on_tokens": n, "domains": {domain: {"unigram": {loss, bits_per_byte}, "bigram": {...}}}}
    Raises ConfigError when that is too much text to count in memory.
    """
    tokens = Plan(run.curriculum, run.data.sequence_tokens).tokens_at(step)
    if tokens > MOST_TOKENS:
        raise ConfigError(f"the run saw {tokens} tokens; n-gram baselines are counted for at most {MOST_TOKENS}")
    model = ngram.fit(seen_windows(run, store, step), run.model.vocab_size)
    domains = {}
    for domain, (tokens_NW, _) in windows.items():
        targets = tokens_NW[:, 1:].size
        bits = math.log(2) * max(int(token_bytes_V[tokens_NW[:, 1:]].sum()), 1)
        domains[domain] = {
            kind: {"loss": float(nll) / targets, "bits_per_byte": float(nll) / bits}
            for kind, nll in (
                ("unigram", np.sum(model.unigram_nll(tokens_NW), dtype=np.float64)),
                ("bigram", np.sum(model.bigram_nll(tokens_NW), dtype=np.float64)),
            )
        }
    return {"fitted_on_tokens": tokens, "domains": domains}
