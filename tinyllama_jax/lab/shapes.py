"""Model shapes near a wanted size, all of one family, for sweeps over N."""

from __future__ import annotations

import math

from tinyllama_jax import flops
from tinyllama_jax.config import Model, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.presets import llama


def near(
    parameters: float,
    *,
    vocab_size: int,
    context_tokens: int,
    head_dim: int = 64,
    queries_per_kv: int = 4,
    width_per_layer: float = 64.0,
    count: str = "non_embedding",
    tolerance: float = 0.15,
    **more,
) -> Model:
    """The Llama of the family whose `count` (flops.parameter_counts) is nearest to `parameters`.

    The width is a multiple of head_dim, d_ff near 8/3 of it, kv heads the divisor of the heads nearest to one for
    `queries_per_kv`.  Among shapes of almost the right size the one nearest to these two proportions is taken, so that
    they stay the same along a ladder.  Raises ConfigError when none is within `tolerance`.
    """
    best: tuple[float, Model] | None = None
    unit = 64 if head_dim >= 64 else 16
    for heads in range(1, 129):
        d_model = heads * head_dim
        divisors = (k for k in range(1, heads + 1) if heads % k == 0)
        kv_heads = min(divisors, key=lambda k: abs(math.log(heads / k / queries_per_kv)))
        d_ff = max(unit, round(8 * d_model / 3 / unit) * unit)
        shape = (d_model, heads, kv_heads, d_ff)
        one, two = (
            flops.parameter_counts(llama(layers, *shape, vocab_size=vocab_size, context_tokens=context_tokens))[count]
            for layers in (1, 2)
        )
        if one > 4 * parameters:
            break
        wanted = 1 + (parameters - one) / (two - one)  # every count is linear in the layers
        fewest, most = max(1, round(d_model / width_per_layer / 2)), round(2 * d_model / width_per_layer) + 1
        for layers in {min(max(near, fewest), most) for near in (math.floor(wanted), math.ceil(wanted))}:
            off = abs(math.log((one + (layers - 1) * (two - one)) / parameters))
            apart = abs(math.log(d_model / layers / width_per_layer)) + abs(math.log(heads / kv_heads / queries_per_kv))
            score = max(0.0, off - 0.02) + 0.1 * apart
            if off <= math.log1p(tolerance) and (best is None or score < best[0]):
                model = llama(layers, *shape, vocab_size=vocab_size, context_tokens=context_tokens)
                best = (score, model)
    if best is None:
        raise ConfigError(
            f"no shape of {parameters:.3g} parameters ({count}) within {100 * tolerance:.0f} %: heads of {head_dim} "
            "are too wide for it; give a smaller head_dim"
        )
    return replace(best[1], **more) if more else best[1]


def matched(model: Model, like: Model, *, tolerance: float = 0.005) -> Model:
    """`model` with the d_ff that gives it as many parameters as `like`, all counted.

    d_ff is a multiple of the largest power of two up to 64 for which the rest is certainly below half of `tolerance`,
    if there is one; else of 1.  Raises ConfigError when the counts still differ by `tolerance` or more.
    """
    wanted = flops.parameter_counts(like)["total"]
    column = 3 * model.layers * model.d_model  # weights that one more of d_ff takes
    exact = model.d_ff + (wanted - flops.parameter_counts(model)["total"]) / column
    unit = next((u for u in (64, 32, 16, 8, 4, 2) if u / 2 * column < tolerance / 2 * wanted), 1)
    found = replace(model, d_ff=max(unit, round(exact / unit) * unit))
    off = flops.parameter_counts(found)["total"] / wanted - 1
    if abs(off) >= tolerance:
        raise ConfigError(f"no d_ff gives the shape {wanted:,} parameters; the nearest is off by {100 * off:.2f} %")
    return found
