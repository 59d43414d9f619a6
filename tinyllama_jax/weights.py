"""What weights a model has: names, axes and shapes, from its configuration alone.  No jax here.

`model.transformer.init` makes them, and tests/test_startup.py holds the two together.  They are float32.
"""

from __future__ import annotations

from tinyllama_jax.config import Model

# Axes of every weight by its path: layers L, embed D, heads H, kv_heads G, head_dim K, mlp F, vocab V.
AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("layers", "attention_norm", "scale"): ("layers", "norm"),
    ("layers", "attention", "query"): ("layers", "embed", "heads", "head_dim"),
    ("layers", "attention", "key"): ("layers", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "value"): ("layers", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "out"): ("layers", "heads", "head_dim", "embed"),
    ("layers", "mlp_norm", "scale"): ("layers", "norm"),
    ("layers", "mlp", "gate"): ("layers", "embed", "mlp"),
    ("layers", "mlp", "up"): ("layers", "embed", "mlp"),
    ("layers", "mlp", "down"): ("layers", "mlp", "embed"),
    ("norm", "scale"): ("norm",),
    ("head", "kernel"): ("embed", "vocab"),
}


def shapes(cfg: Model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every weight, in the order of jax's trees: sorted by the names along the path."""
    sizes = {
        "layers": cfg.layers,
        "embed": cfg.d_model,
        "norm": cfg.d_model,
        "heads": cfg.heads,
        "kv_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "mlp": cfg.d_ff,
        "vocab": cfg.vocab_size,
    }
    paths = sorted(path for path in AXES if not (cfg.tied_embeddings and path[0] == "head"))
    return {path: tuple(sizes[axis] for axis in AXES[path]) for path in paths}
