"""How the next token is drawn from logits; every row in its own way, in one program.

Order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p, then one draw.  The draw of a row
depends on its seed, its stream and how many tokens it has drawn, not on what other rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row is continued.  Raises ConfigError for values without a meaning."""

    temperature: float = 0.7  # 0 = greedy: the likeliest token, whatever the filters say
    top_k: int = 0  # only the k likeliest tokens; 0 = off
    top_p: float = 1.0  # only the nucleus (Holtzman et al., arXiv 1904.09751) of this mass; 1 = off
    min_p: float = 0.0  # only tokens at least so likely, relative to the likeliest (arXiv 2407.01082); 0 = off
    # logits of tokens that the row holds already, prompt included, are divided by this where they are positive and
    # multiplied where they are not (CTRL, Keskar et al., arXiv 1909.05858); 1 = off
    repetition_penalty: float = 1.0
    seed: int = 0
    stream: int = 0  # rows with one seed and different streams draw independently

    def __post_init__(self):
        checks = {
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < float("inf"),
            "seed": 0 <= self.seed < 2**32,
            "stream": 0 <= self.stream < 2**32,
        }
        wanted = (
            "temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0, 0 <= seed < 2^32"
        )
        for name, good in checks.items():
            if not good:
                raise ConfigError(f"sampling: {name} is {getattr(self, name)}; it takes {wanted}")


class Rows(NamedTuple):
    """`Sampling` of every row: arrays [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    stream: jax.Array


class Uses(NamedTuple):
    """What any of the rows asks for.  Static: programs without a filter do not sort the vocabulary."""

    draws: bool = True
    sorts: bool = True
    min_p: bool = True
    penalty: bool = True


def rows(of: Sequence[Sampling]) -> tuple[Rows, Uses]:
    """The arrays of NumPy for so many rows, and what they use."""
    types = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    types |= {"repetition_penalty": np.float32, "seed": np.uint32, "stream": np.uint32}
    arrays = Rows(**{name: np.array([getattr(s, name) for s in of], kind) for name, kind in types.items()})
    drawn = [s for s in of if s.temperature > 0]
    uses = Uses(
        draws=bool(drawn),
        sorts=any(s.top_k or s.top_p < 1 for s in drawn),
        min_p=any(s.min_p > 0 for s in drawn),
        penalty=any(s.repetition_penalty != 1 for s in of),
    )
    return arrays, uses


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits after the repetition penalty; seen_BV: bool, the tokens that each row holds."""
    by_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / by_B1, logits_BV * by_B1), logits_BV)


def filtered(logits_BV: jax.Array, how: Rows, uses: Uses) -> jax.Array:
    """Logits over the temperature, -inf for what the filters exclude; for rows with temperature 0 without a meaning.

    Their softmax is the distribution that a token is drawn from.  The likeliest token always stays.
    """
    temperature_B = jnp.where(how.temperature > 0, how.temperature, 1)
    logits_BV = logits_BV / temperature_B[:, None]
    if uses.sorts:
        logits_BV = jnp.where(logits_BV < _lowest(logits_BV, how)[:, None], -jnp.inf, logits_BV)
    if uses.min_p:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(how.min_p)[:, None]
        logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
    return logits_BV


def _lowest(logits_BV: jax.Array, how: Rows) -> jax.Array:
    """The smallest logit of each row that top-k and then top-p let through."""
    vocab = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    k_B = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, vocab), vocab)
    # Ties with the k-th stay, as they do in transformers.
    kth_B1 = jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=-1)
    sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # mass of all likelier tokens
    inside_BV = (before_BV < how.top_p[:, None]) & (sorted_BV > -jnp.inf)
    inside_BV |= (how.top_p >= 1)[:, None] & (sorted_BV > -jnp.inf)  # whatever the sum was rounded to
    return jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1)


def keys(how: Rows, count_B: jax.Array) -> jax.Array:
    """The key of each row's draw number count_B."""
    fold = jax.random.fold_in
    return jax.vmap(lambda seed, stream, n: fold(fold(jax.random.key(seed), stream), n))(how.seed, how.stream, count_B)


def pick(logits_BV: jax.Array, how: Rows, uses: Uses, count_B: jax.Array) -> jax.Array:
    """One token per row, int32 [B]: its draw number count_B, or the likeliest where the temperature is 0."""
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if not uses.draws:
        return best_B
    drawn_B = jax.vmap(jax.random.categorical)(keys(how, count_B), filtered(logits_BV, how, uses))
    return jnp.where(how.temperature > 0, drawn_B.astype(jnp.int32), best_B)
