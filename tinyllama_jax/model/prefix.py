"""Made-up keys and values before every row, the only trained weights of prefix tuning (arXiv 2101.00190).

They are params["layers"]["prefix"], {"key", "value"} [L, P, G, K], beside a layer's ordinary weights.  They lie in a
cache as they are: no position turns them.  Tokens stand at positions P, P + 1, ..., as PEFT has it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model.layers import Attend

BLOCK = 128  # kernels work on blocks of so many tokens


def tokens(params: dict[str, Any]) -> int:
    """How many stand before every row; 0 without."""
    layers = params["layers"]
    one = layers[0] if isinstance(layers, tuple) else layers
    return one["prefix"]["key"].shape[-3] if "prefix" in one else 0


def split(layer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, jax.Array] | None]:
    """A layer's ordinary weights, and its prefix or None."""
    return {name: part for name, part in layer.items() if name != "prefix"}, layer.get("prefix")


def refuse(params: dict[str, Any], what: str, instead: str) -> None:
    """Raises ConfigError for parameters with a prefix: `what` cannot be done with them."""
    if tokens(params):
        raise ConfigError(f"a model with a trained prefix (adapter.method=prefix) {what}; {instead}")


def before(prefix: dict[str, jax.Array], like_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The prefix's keys and values for every row, [B, P, G, K], in the dtype and the layout of `like_BTGK`."""
    spec = jax.typeof(like_BTGK).sharding.spec

    def rows(x_PGK: jax.Array) -> jax.Array:
        x_PGK = reshard(x_PGK.astype(like_BTGK.dtype), P(None, spec[2], None))
        return jnp.broadcast_to(x_PGK, (like_BTGK.shape[0], *x_PGK.shape), out_sharding=P(spec[0], None, spec[2], None))

    return rows(prefix["key"]), rows(prefix["value"])


def attending(attend: Attend, prefix: dict[str, jax.Array]) -> Attend:
    """`attend`, causal and of whole rows, with the prefix before them.

    Keys and queries must be as many for the kernels: so queries of zeros stand before the real ones, and rows behind
    them up to a whole block; what these get is cut off, and no real token sees what is behind it.
    """

    def run(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
        if sharding.parts(sharding.token_axis(q_BTHK)) > 1:
            raise ConfigError("adapter.method=prefix needs whole rows; set mesh.context=1")
        length = q_BTHK.shape[1]
        k_BPGK, v_BPGK = before(prefix, k_BTGK)
        count = k_BPGK.shape[1]
        behind = -count % BLOCK if length % BLOCK == 0 else 0

        def extended(first: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.concatenate([first, x, jnp.zeros_like(x[:, :behind])], axis=1)

        shape = (q_BTHK.shape[0], count, *q_BTHK.shape[2:])
        zeros = jnp.zeros(shape, q_BTHK.dtype, out_sharding=jax.typeof(q_BTHK).sharding.spec)
        q_B = extended(zeros, q_BTHK)
        return attend(q_B, extended(k_BPGK, k_BTGK), extended(v_BPGK, v_BTGK))[:, count : count + length]

    return run
