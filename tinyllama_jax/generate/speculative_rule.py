"""The arithmetic of speculative decoding: which drafted tokens stay, what follows them, and when it pays.

Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2.  A token x drawn from q
stays with probability min(1, p(x) / q(x)).  The first that does not is replaced by one from norm(max(p - q, 0)), and
nothing behind it is used.  What comes out is distributed as p, whatever q is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Verdict(NamedTuple):
    """Of one round.  accepted_B: drafted tokens that stay, in front; next_B: the token behind them, so that each row
    has accepted + 1 new tokens.  Over the tokens that were judged (those accepted, and the one rejected if there is
    one): judged_B their number, overlap_B the sum of sum_x min(p(x), q(x)), the probability with which each is
    accepted whatever was drawn, and variance_B the sum of that times one minus that."""

    accepted_B: jax.Array
    next_B: jax.Array
    judged_B: jax.Array
    overlap_B: jax.Array
    variance_B: jax.Array


def accepts(u: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """Whether a token of probability p and q stays; u uniform in [0, 1).  u < min(1, p / q), without the division."""
    return u * q < p


def draw(p_BV: jax.Array, gumbel_BV: jax.Array) -> jax.Array:
    """One token per row, int32 [B], of probabilities that need not sum to one, by noise used here alone
    (jax.random.gumbel); of p that is one token alone, that token, also with noise of 0."""
    return jnp.argmax(jnp.log(p_BV) + gumbel_BV, axis=-1).astype(jnp.int32)


def judge(
    p_BTV: jax.Array,
    q_BKV: jax.Array,
    drafted_BK: jax.Array,
    usable_B: jax.Array,
    u_BK: jax.Array,
    gumbel_BV: jax.Array,
) -> Verdict:
    """The verdict on K drafted tokens per row, of which row b may use the first usable_B[b].

    p_BTV: the target's distributions, T = K + 1; p[:, i] given the row and its first i drafted tokens.
    q_BKV: the distributions from which drafted_BK was drawn.  u_BK, gumbel_BV: uniform and Gumbel noise.
    """
    K = drafted_BK.shape[1]
    of_drafted = lambda x_BKV: jnp.take_along_axis(x_BKV, drafted_BK[..., None], axis=-1)[..., 0]  # noqa: E731
    index_K = jnp.arange(K)[None]
    usable_BK = index_K < usable_B[:, None]
    stay_BK = accepts(u_BK, of_drafted(p_BTV[:, :K]), of_drafted(q_BKV)) & usable_BK
    accepted_B = jnp.sum(jnp.cumprod(stay_BK.astype(jnp.int32), axis=1), axis=1)

    p_BV = jnp.take_along_axis(p_BTV, accepted_B[:, None, None], axis=1)[:, 0]
    q_BV = jnp.take_along_axis(q_BKV, jnp.minimum(accepted_B, K - 1)[:, None, None], axis=1)[:, 0]
    # Nothing was rejected: the next token is one more of the target's own.
    q_BV = jnp.where((accepted_B < usable_B)[:, None], q_BV, 0.0)
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # p = q leaves no rest and rejects nothing, but for rounding.
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)

    judged_BK = (index_K <= accepted_B[:, None]) & usable_BK
    overlap_BK = jnp.clip(jnp.sum(jnp.minimum(p_BTV[:, :K], q_BKV), axis=-1), 0.0, 1.0)
    total = lambda x_BK: jnp.sum(jnp.where(judged_BK, x_BK, 0.0), axis=1)  # noqa: E731
    return Verdict(
        accepted_B,
        draw(rest_BV, gumbel_BV),
        jnp.sum(judged_BK, axis=1),
        total(overlap_BK),
        total(overlap_BK * (1.0 - overlap_BK)),
    )


def expected_tokens(acceptance: float, draft_tokens: int) -> float:
    """New tokens per round and row, (1 - a^(K+1)) / (1 - a): arXiv 2211.17192, equation 1, for K drafted tokens that
    are each accepted with probability a, independently."""
    return float(sum(acceptance**i for i in range(draft_tokens + 1)))


def expected_speed_up(acceptance: float, draft_tokens: int, cost: float, verify: float = 1.0) -> float:
    """Over plain decoding: arXiv 2211.17192, theorem 3.8.  cost: a step of the draft over a step of the target.

    verify: the target's call with K + 1 tokens over its step with one.  The paper takes it for 1, which holds while a
    call's time is that of reading the weights.
    """
    return expected_tokens(acceptance, draft_tokens) / (draft_tokens * cost + verify)


def interval(variance: float, chance: float = 1e-4) -> float:
    """How far a sum of draws in [0, 1] is from the sum of their expectations, but for `chance`.

    variance: the sum of their variances, each given what was drawn before.  Freedman's inequality for martingales
    with differences of at most 1, Annals of Probability 3 (1975), theorem 1.6:
    P(|sum| >= t) <= 2 exp(-t^2 / (2 (variance + t / 3))).
    """
    nats = math.log(2 / chance)
    return nats / 3 + math.sqrt(nats**2 / 9 + 2 * variance * nats)
