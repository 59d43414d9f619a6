"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the rescalings that stretch a trained context.

Half-split pairing: dimension i turns with dimension i + rotated/2, as in TinyLlama and Hugging Face's Llama.
Tables are float32 whatever the compute dtype: in bf16 the angle of position 2047 is off by whole radians.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Model

LARGEST_CONSTANT = 1 << 20  # values in a table of the program: 32k tokens of heads of 64 dimensions


def inverse_frequencies(cfg: Model) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float32 [rotated/2] in radians, and the factor on cos and sin.

    With e rotated dimensions, theta_i = theta^(-2i/e) and s = rope.factor:

        default, partial   theta_i
        linear             theta_i / s                                     (position interpolation, arXiv 2306.15595)
        ntk                theta raised to theta * s^(e/(e-2)), static      ("NTK-aware" scaling; YaRN eq. 16)
        yarn               theta_i for fast dimensions, theta_i / s for slow ones, a linear ramp over the dimension
                           index between; cos and sin times 0.1 ln s + 1   (arXiv 2309.00071, 3.2 and 3.4)
        llama3             the same with a ramp in original_context / wavelength between low_freq_factor and
                           high_freq_factor                                (Llama 3.1, arXiv 2407.21783)

    `none` gives an empty array.
    """
    rope, rotated = cfg.rope, cfg.rotated_dims
    theta, factor, context = rope.theta, rope.factor, rope.original_context_tokens
    if rope.kind == "ntk":
        # A single pair turns at frequency 1 whatever theta is; its exponent would divide by zero.
        theta *= factor ** (rotated / max(rotated - 2, 1))
    plain = theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / max(rotated, 1))
    scale = 1.0
    if rope.kind == "linear":
        plain = plain / factor
    elif rope.kind == "yarn":
        slow_share = _ramp(np.arange(rotated // 2), *_yarn_range(cfg))
        plain = plain / factor * slow_share + plain * (1 - slow_share)
        scale = rope.attention_factor or 0.1 * math.log(factor) + 1.0
    elif rope.kind == "llama3":
        rotations = context * plain / (2 * math.pi)
        fast_share = _ramp(rotations, rope.low_freq_factor, rope.high_freq_factor)
        plain = plain / factor * (1 - fast_share) + plain * fast_share
    return plain.astype(np.float32), scale


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def _yarn_range(cfg: Model) -> tuple[float, float]:
    """Pair indices between which YaRN's ramp runs, rounded outwards to whole pairs as Hugging Face does."""
    rope, rotated = cfg.rope, cfg.rotated_dims

    def pair_that_turns(times: float) -> float:  # over the original context
        return rotated * math.log(rope.original_context_tokens / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), rotated - 1)
    return low, high if high != low else high + 0.001


def tables(cfg: Model, positions: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., T, rotated/2], at integer positions [..., T].

    Of positions in numpy the tables are constants of the program, unless they are very large.  What the program
    computes, XLA fuses into each use, and a CPU then spends an eighth of a training step on the same cosines, once for
    every row, head and layer; it takes no notice of an optimization barrier.
    """
    frequencies, scale = inverse_frequencies(cfg)
    if isinstance(positions, np.ndarray) and positions.size * frequencies.size <= LARGEST_CONSTANT:
        # The angle is rounded to float32, as in the program; a cosine in float64 is the same on every host.
        angles = (positions.astype(np.float32)[..., None] * frequencies).astype(np.float64)
        cos, sin = (jnp.asarray(f(angles) * scale, jnp.float32) for f in (np.cos, np.sin))
        return cos, sin
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first 2 * cos.shape[-1] dimensions of each head; the rest pass.  cos, sin: [T or B,T, rotated/2]."""
    half = cos.shape[-1]
    if half == 0:
        return x_BTHK
    cos, sin = cos[..., None, :], sin[..., None, :]  # over heads
    turned, passed = x_BTHK[..., : 2 * half].astype(jnp.float32), x_BTHK[..., 2 * half :]
    first, second = turned[..., :half], turned[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTHK.dtype), passed], axis=-1)
