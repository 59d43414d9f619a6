"""Initial weights: what TinyLlama's documents, its first code and its first run each used.

Standard deviations for width d, L layers and a matrix with fan_in inputs (d = 2048, L = 22 in brackets):

                        embedding, head, matrices          attention out              MLP down
    tinyllama           N(0, 2/(5d))     [0.01398]         1/(sqrt(d) L)  [0.00100]   1/(sqrt(d) L)       [0.00100]
    tinyllama_start     N(0, 2/(5 fan_in))                 as the others              1/(sqrt(fan_in) L)  [0.00061]
    torch_default       U(+-1/sqrt(fan_in)); embedding N(0, 1)      as the others in both columns

`tinyllama` is lit_gpt/model.py of github.com/jzhang38/TinyLlama since commit 89c75f4; `tinyllama_start` is the same
file at 09baa9e, when the v1.0 run began.  `torch_default` is INFERRED: that run built its model on the meta device,
where the custom function did nothing and PyTorch's own defaults remained.  Norm scales start at one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tinyllama_jax.config import Model

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> float32 weights


def normal(stddev: float) -> Initializer:
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def initializers(cfg: Model) -> dict[str, Initializer]:
    """Initializer of each weight by name: embedding, query, key, value, out, gate, up, down, head."""
    d, out_inputs, down_inputs = cfg.d_model, cfg.heads * cfg.head_dim, cfg.d_ff
    fan_in = dict.fromkeys(("embedding", "query", "key", "value", "gate", "up", "head"), d)
    fan_in |= {"out": out_inputs, "down": down_inputs}
    if cfg.init == "torch_default":
        return {name: uniform(1 / math.sqrt(n)) for name, n in fan_in.items()} | {"embedding": normal(1.0)}
    if cfg.init == "tinyllama_start":
        table = {name: normal(math.sqrt(2 / (5 * n))) for name, n in fan_in.items()}
        return table | {"down": normal(1 / (math.sqrt(down_inputs) * cfg.layers))}
    residual = normal(1 / (math.sqrt(d) * cfg.layers))
    return {name: normal(math.sqrt(2 / (5 * d))) for name in fan_in} | {"out": residual, "down": residual}
