"""cuDNN's attention through jax.nn: causal only.  Documents would have to be a T x T bias, and are refused."""

from __future__ import annotations

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax.attention.names import OUTPUT


def cudnn(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    """Causal attention, [B, T, H, K]; bfloat16 or float16.

    What its backward pass keeps besides the result has no name; a remat policy knows it by the primitive,
    names.CUDNN_FORWARD.
    """
    rows, _, heads, _ = jax.typeof(q_BTHK).sharding.spec
    spec = P(rows, None, heads, None)
    run = jax.shard_map(
        functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    return checkpoint_name(run(q_BTHK, *reshard((k_BTGK, v_BTGK), (spec, spec))), OUTPUT)
