"""Attention in plain JAX, a block of queries at a time: what `auto` takes on CPUs, and right on any device.

The keys after a block's last query are left out, which saves almost half of the arithmetic, and a block's scores are
forgotten before the next one's: no array is T x T, and nothing of that size is kept for the backward pass, which makes
the scores again from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2, with whole rows of keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from tinyllama_jax.attention.documents import Ranges

GRANULE = 1  # `forward` and `backward` take any number of tokens
BLOCK, BLOCKS = 64, 16  # queries in a block at least, and blocks at most: each is a piece of program of its own


def refuses(**_) -> None:
    """Nothing: any head, dtype and soft cap."""


def forward(q_BTHK, k_BTGK, v_BTGK, ranges, *, kind=None, soft_cap=None, interpret=False):
    """As a kernel (see fused.py): (o [B, T, H, K] in q's dtype, log-sum-exp float32 [B, H, T])."""
    del kind, interpret  # it is the same everywhere
    B, T, H, K = q_BTHK.shape
    q_BGRTK, k_BGSK, v_BGSK = _by_group(q_BTHK, k_BTGK.shape[2]), _heads_first(k_BTGK), _heads_first(v_BTGK)
    os, lses = [], []
    for at, upto in _blocks(T):
        scores, mask, _ = _scores(q_BGRTK[:, :, :, at], k_BGSK[:, :, :upto], at, ranges, soft_cap)
        # A finite floor: every query sees itself, so that the masked weights are exactly zero after the exponential.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - highest)
        total = jnp.sum(p, axis=-1, keepdims=True)
        os.append(_times(p.astype(v_BGSK.dtype), v_BGSK[:, :, :upto]) / total)
        lses.append(highest + jnp.log(total))
    o_BGRTK, lse_BGRT = jnp.concatenate(os, axis=3), jnp.concatenate(lses, axis=3)[..., 0]
    return _tokens_first(o_BGRTK).astype(q_BTHK.dtype), lse_BGRT.reshape(B, H, T)


def backward(q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges, *, kind=None, soft_cap=None, interpret=False):
    """(dq, dk, dv), from the log-sum-exp and delta = sum(o do) of each row, which may be of more keys than these."""
    del kind, interpret
    G, K = k_BTGK.shape[2:]
    q_BGRTK, do_BGRTK = _by_group(q_BTHK, G), _by_group(do_BTHK, G)
    k_BGSK, v_BGSK = _heads_first(k_BTGK), _heads_first(v_BTGK)
    of_row = lambda x_BHT: x_BHT.reshape(*q_BGRTK.shape[:4], 1)  # noqa: E731
    lse_BGRT1, delta_BGRT1 = of_row(lse_BHT), of_row(delta_BHT)
    dk_BGSK, dv_BGSK, dqs = jnp.zeros(k_BGSK.shape, jnp.float32), jnp.zeros(v_BGSK.shape, jnp.float32), []
    for at, upto in _blocks(q_BTHK.shape[1]):
        q, do, k, v = q_BGRTK[:, :, :, at], do_BGRTK[:, :, :, at], k_BGSK[:, :, :upto], v_BGSK[:, :, :upto]
        scores, mask, slope = _scores(q, k, at, ranges, soft_cap)
        p = jnp.where(mask, jnp.exp(scores - lse_BGRT1[:, :, :, at]), 0.0)
        ds = p * (_against(do, v) - delta_BGRT1[:, :, :, at]) * (slope / math.sqrt(K))
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dqs.append(_times(ds, k))
        dk_BGSK = dk_BGSK.at[:, :, :upto].add(_over_queries(ds, q))
        dv_BGSK = dv_BGSK.at[:, :, :upto].add(_over_queries(p, do))
    dq_BTHK = _tokens_first(jnp.concatenate(dqs, axis=3)).astype(q_BTHK.dtype)
    return dq_BTHK, *(jnp.swapaxes(x, 1, 2).astype(k_BTGK.dtype) for x in (dk_BGSK, dv_BGSK))


def _blocks(tokens: int) -> Iterator[tuple[slice, int]]:
    """The queries of each block, and one past its last."""
    size = max(BLOCK, -(-tokens // BLOCKS))
    for begin in range(0, tokens, size):
        yield slice(begin, min(begin + size, tokens)), min(begin + size, tokens)


def _scores(q_BGRbK, k_BGSK, at: slice, ranges: Ranges | None, soft_cap: float | None):
    """A block's scores [B, G, R, b, S] in float32, the mask over them, and the soft cap's slope at each."""
    scores, slope = _against(q_BGRbK, k_BGSK) / math.sqrt(q_BGRbK.shape[-1]), 1.0
    if soft_cap is not None:
        capped = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * capped, 1 - capped**2
    key_S = jnp.arange(at.stop)
    mask = key_S <= jnp.arange(at.start, at.stop)[:, None]
    if ranges is not None:
        mask = mask & (key_S >= ranges.first_BT[:, None, None, at, None])
    return scores, mask, slope


# The query heads of a group and the queries of a block are one axis in every product, so that it is one matrix product
# per row and key head: XLA's CPU backend has no good way with two.


def _product(a, b, contract: tuple[int, int]) -> jax.Array:
    axes = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _merged(x_BGRbX) -> jax.Array:
    B, G, R, b, X = x_BGRbX.shape
    return x_BGRbX.reshape(B, G, R * b, X)


def _against(x_BGRbK, y_BGSK) -> jax.Array:
    """x y^T: [B, G, R, b, S]."""
    return _product(_merged(x_BGRbK), y_BGSK, (3, 3)).reshape(*x_BGRbK.shape[:4], y_BGSK.shape[2])


def _times(p_BGRbS, y_BGSK) -> jax.Array:
    """p y: [B, G, R, b, K]."""
    return _product(_merged(p_BGRbS), y_BGSK, (3, 2)).reshape(*p_BGRbS.shape[:4], y_BGSK.shape[3])


def _over_queries(p_BGRbS, x_BGRbK) -> jax.Array:
    """p^T x, summed over the queries and the heads of a group: [B, G, S, K]."""
    return _product(_merged(p_BGRbS), _merged(x_BGRbK), (2, 2))


def _by_group(x_BTHK, groups: int) -> jax.Array:
    """[B, G, R, T, K]: query head h is head h % R of group h // R."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.reshape(B, T, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _tokens_first(x_BGRTK) -> jax.Array:
    B, G, R, T, K = x_BGRTK.shape
    return x_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _heads_first(x_BTGK) -> jax.Array:
    return jnp.swapaxes(x_BTGK, 1, 2)
