"""What our kernels share: differentiation, sharding and padding around `forward` and `backward` of one module.

The backward pass is a kernel of its own and needs only the result and the log-sum-exp of each row, under the names of
names.py, so that a remat policy can keep them and the forward kernel runs once.  `shard_map` stands inside the
differentiation rules: nothing differentiates through it, and rows and heads are independent, so that no collective is
needed.  Tokens are not: where the mesh's `context` splits them, stripes.py calls the kernel once for each part of the
keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding
from tinyllama_jax.attention import stripes
from tinyllama_jax.attention.choice import kernel
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.names import LSE, OUTPUT
from tinyllama_jax.errors import ConfigError


class Options(NamedTuple):
    """What is known while tracing."""

    name: str  # of the kernel's module
    kind: str  # of the device, for the table of block sizes
    soft_cap: float | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_kernel(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ranges: Ranges | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Causal attention [B, T, H, K] in q's dtype, and its log-sum-exp float32 [B, H, T], by one of our kernels.

    Tokens may be striped over `context` (sharding.striped); ranges are of the whole row, in the order of its tokens.
    Raises ConfigError when head dimensions are sharded, or the heads of q and k differently.
    """
    return _forward(q_BTHK, k_BTGK, v_BTGK, ranges, options)


def _forward(q_BTHK, k_BTGK, v_BTGK, ranges, options):
    module = kernel(options.name)
    specs = _specs(q_BTHK, k_BTGK, ranges)

    def whole_row(q_BTHK, k_BTGK, v_BTGK, ranges):
        T = q_BTHK.shape[1]
        q_BTHK, k_BTGK, v_BTGK = (_pad(x, 1, module.GRANULE) for x in (q_BTHK, k_BTGK, v_BTGK))
        o_BTHK, lse_BHT = module.forward(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            _pad_ranges(ranges, module.GRANULE),
            kind=options.kind,
            soft_cap=options.soft_cap,
            interpret=options.interpret,
        )
        return o_BTHK[:, :T], lse_BHT[:, :, :T]

    def local(*arrays):
        return stripes.forward(whole_row, *arrays, specs.context) if specs.context else whole_row(*arrays)

    run = jax.shard_map(
        local, in_specs=(specs.q, specs.q, specs.q, specs.ranges), out_specs=(specs.q, specs.lse), check_vma=False
    )
    laid_out = reshard((k_BTGK, v_BTGK), (specs.q, specs.q))
    return run(q_BTHK, *laid_out, None if ranges is None else reshard(ranges, specs.ranges))


def _forward_rule(q_BTHK, k_BTGK, v_BTGK, ranges, options):
    o_BTHK, lse_BHT = _forward(q_BTHK, k_BTGK, v_BTGK, ranges, options)
    # Both names are on what the backward pass reads, and on what the caller goes on with.
    o_BTHK, lse_BHT = checkpoint_name(o_BTHK, OUTPUT), checkpoint_name(lse_BHT, LSE)
    return (o_BTHK, lse_BHT), (q_BTHK, k_BTGK, v_BTGK, ranges, o_BTHK, lse_BHT)


def _backward_rule(options, residuals, cotangents):
    q_BTHK, k_BTGK, v_BTGK, ranges, o_BTHK, lse_BHT = residuals
    do_BTHK, dlse_BHT = cotangents
    module = kernel(options.name)
    specs = _specs(q_BTHK, k_BTGK, ranges)

    def whole_row(q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges):
        T = q_BTHK.shape[1]
        by_token = (_pad(x, 1, module.GRANULE) for x in (q_BTHK, k_BTGK, v_BTGK, do_BTHK))
        by_row = (_pad(x, 2, module.GRANULE) for x in (lse_BHT, delta_BHT))
        gradients = module.backward(
            *by_token,
            *by_row,
            _pad_ranges(ranges, module.GRANULE),
            kind=options.kind,
            soft_cap=options.soft_cap,
            interpret=options.interpret,
        )
        return tuple(x[:, :T] for x in gradients)

    def local(q_BTHK, k_BTGK, v_BTGK, ranges, o_BTHK, lse_BHT, do_BTHK, dlse_BHT):
        # sum_s P dP, by which the softmax's gradient is centred, equals o . do (arXiv 2205.14135, appendix B.4).
        # Products and sum in float32, and no matrix product: those would be rounded to TF32 on a GPU.
        # The gradient of the log-sum-exp itself is P, so its cotangent joins here.
        delta_BTH = jnp.sum(o_BTHK.astype(jnp.float32) * do_BTHK.astype(jnp.float32), axis=-1)
        delta_BHT = jnp.transpose(delta_BTH, (0, 2, 1)) - dlse_BHT
        arrays = (q_BTHK, k_BTGK, v_BTGK, do_BTHK, lse_BHT, delta_BHT, ranges)
        return stripes.backward(whole_row, *arrays, specs.context) if specs.context else whole_row(*arrays)

    run = jax.shard_map(
        local,
        in_specs=(specs.q, specs.q, specs.q, specs.ranges, specs.q, specs.lse, specs.q, specs.lse),
        out_specs=(specs.q, specs.q, specs.q),
        check_vma=False,
    )
    k_and_v = reshard((k_BTGK, v_BTGK), (specs.q, specs.q))
    ranges = None if ranges is None else reshard(ranges, specs.ranges)
    dq, dk, dv = run(q_BTHK, *k_and_v, ranges, o_BTHK, lse_BHT, do_BTHK, dlse_BHT)
    as_given = (jax.typeof(k_BTGK).sharding.spec, jax.typeof(v_BTGK).sharding.spec)
    return dq, *reshard((dk, dv), as_given), None


by_kernel.defvjp(_forward_rule, _backward_rule)


class _Specs(NamedTuple):
    q: P
    lse: P
    ranges: Ranges | None
    context: stripes.Context | None


def _specs(q_BTHK: jax.Array, k_BTGK: jax.Array, ranges: Ranges | None) -> _Specs:
    """How the arrays lie over the mesh: rows, tokens and heads as q's, everything else whole."""
    rows, tokens, heads, head_dim = jax.typeof(q_BTHK).sharding.spec
    if head_dim is not None:
        raise ConfigError(f"attention: q lies as {(rows, tokens, heads, head_dim)}; head dimensions must be whole")
    if jax.typeof(k_BTGK).sharding.spec[2] != heads:
        raise ConfigError(f"attention: query heads lie over mesh axes {heads}, key heads do not")
    by_row = P(rows, None)
    count = sharding.parts(tokens)
    return _Specs(
        q=P(rows, tokens, heads, None),
        lse=P(rows, heads, tokens),
        ranges=ranges and Ranges(by_row, by_row),
        context=stripes.Context(tokens, count) if count > 1 else None,
    )


def _pad(x: jax.Array, axis: int, granule: int) -> jax.Array:
    """`x` with zeros up to the next multiple of `granule`: later tokens, which no real one sees."""
    missing = -x.shape[axis] % granule
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _pad_ranges(ranges: Ranges | None, granule: int) -> Ranges | None:
    """The tokens of the padding are a document of their own."""
    if ranges is None:
        return None
    T = ranges.first_BT.shape[1]
    padded = [(0, 0), (0, -T % granule)]
    return Ranges(
        jnp.pad(ranges.first_BT, padded, constant_values=T),
        jnp.pad(ranges.end_BT, padded, constant_values=T + -T % granule),
    )
