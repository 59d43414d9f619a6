"""Weights of layers and of the head that training leaves as they are, alone or with a trained low-rank part.

They stand where an array would, in the trees of transformer.py, and `layers.linear`, `transformer.project` and loss.py
multiply with them (`layers.terms`).  A frozen weight has no gradient; it is cast, dequantised and gathered anew for
each pass, so that nothing but what it is stored as lives from the forward to the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from tinyllama_jax.model.quantized import Quantized


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclass(frozen=True)
class Frozen:
    """A weight without a gradient, in any dtype."""

    weight: jax.Array | Quantized


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "key"], meta_fields=["scale", "rate"])
@dataclass(frozen=True)
class LowRank:
    """x base + scale (dropout(x) a) b (LoRA, arXiv 2106.09685); the base is frozen.

    base: [*inputs, *outputs], a: float32 [*inputs, r], b: float32 [r, *outputs], used in the dtype of x; all of them
    with the same leading axis where layers are stacked.
    key: of the dropout, with probability `rate`, of what `a` is multiplied with; without one nothing is dropped.
    """

    base: jax.Array | Quantized
    a: jax.Array
    b: jax.Array
    key: jax.Array | None
    scale: float
    rate: float
