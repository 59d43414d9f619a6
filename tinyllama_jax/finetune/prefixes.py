"""The trained weights of prefix tuning, adapter.method=prefix: what they begin as and where they lie.

What they do is in model/prefix.py; finetune/adapters.py calls this where it is the method.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tinyllama_jax.config import Adapter, Model

STD = 0.02  # keys near zero draw no attention of their own, and values near zero add little

AXES = ("layers", "prefix", "kv_heads", "head_dim")


def axes() -> dict[str, Any]:
    """Logical axes of every trained weight."""
    return _tree({"key": AXES, "value": AXES})


def init(model: Model, adapter: Adapter, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 keys and values [L, P, G, K], normal with standard deviation STD."""
    shape = (model.layers, adapter.prefix_tokens, model.kv_heads, model.head_dim)
    draw = lambda number: STD * jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)  # noqa: E731
    return _tree({"key": draw(0), "value": draw(1)})


def beside(params: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the prefix in them, as model/prefix.py reads it."""
    return params | {"layers": params["layers"] | trained["layers"]}


def _tree(prefix: dict[str, Any]) -> dict[str, Any]:
    return {"layers": {"prefix": prefix}}
