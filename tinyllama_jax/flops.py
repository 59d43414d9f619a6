"""Parameter counts and floating-point operations, in closed form.  No jax here.

Which parameters N counts, and whether attention is counted over the full map, moves scaling-law exponents and MFU
more than most results do; so every convention has a name, and the terms are there one by one.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from tinyllama_jax.config import Adapter, Model, Run
from tinyllama_jax.errors import ConfigError

Convention = Literal["palm", "causal", "6n_total", "6n_non_embedding"]
CONVENTIONS: tuple[str, ...] = ("palm", "causal", "6n_total", "6n_non_embedding")

# Dense bf16 FLOP/s of one device, from the vendors' data sheets; keys are parts of JAX's `device_kind` in lower case,
# the more specific first.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("h200 nvl", 835e12),
    ("h200", 989e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("tpu v6e", 918e12),
    ("tpu v6 lite", 918e12),
    ("tpu v5p", 459e12),
    ("tpu v5e", 197e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4 lite", 138e12),
    ("tpu v4", 275e12),
)


def parameter_counts(cfg: Model) -> dict[str, int]:
    """Exact numbers of parameters.

    total            every weight; the N of Hoffmann et al. (arXiv 2203.15556)
    embedding        input table, and output table unless tied
    non_embedding    total - embedding; the N of Kaplan et al. (arXiv 2001.08361), with the norm scales
    matmul           weights that are in a matrix product: blocks and head, not norms, not the input lookup;
                     the N of Porian et al. (arXiv 2406.19146)
    """
    d, width, kv_width = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    block = 2 * d * width + 2 * d * kv_width + 3 * d * cfg.d_ff
    table = cfg.vocab_size * d
    embedding = table if cfg.tied_embeddings else 2 * table
    non_embedding = cfg.layers * (block + 2 * d) + d
    return {
        "total": non_embedding + embedding,
        "embedding": embedding,
        "non_embedding": non_embedding,
        "matmul": cfg.layers * block + table,
    }


def forward_terms(cfg: Model, sequence_tokens: int, *, causal: bool) -> dict[str, int]:
    """Forward FLOPs per token by term, over all layers, at 2 per multiply-add: proj, mlp, attention, head.

    attention is q k^T and weights v.  A token meets s = `sequence_tokens` keys on the full map, which MFU by
    convention counts (PaLM, arXiv 2204.02311, appendix B), and s / 2 under the causal mask: half the map, which
    leaves out half the diagonal ((s + 1) / 2 with it).  Norms, softmax, RoPE and the embedding lookup are not counted.
    """
    d, width, kv_width = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    return {
        "proj": cfg.layers * 4 * d * (width + kv_width),
        "mlp": cfg.layers * 6 * d * cfg.d_ff,
        "attention": cfg.layers * (2 if causal else 4) * sequence_tokens * width,
        "head": 2 * d * cfg.vocab_size,
    }


def adapter_parameters(cfg: Model, adapter: Adapter) -> int:
    """Trained weights of an adapter: rank * (inputs + outputs) of each matrix that is adapted, or a prefix's keys and
    values."""
    d, width, kv_width, f = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.d_ff
    if adapter.method == "prefix":
        return 2 * cfg.layers * adapter.prefix_tokens * kv_width
    of_layer = {
        "attention.query": d + width,
        "attention.key": d + kv_width,
        "attention.value": d + kv_width,
        "attention.out": width + d,
        "mlp.gate": d + f,
        "mlp.up": d + f,
        "mlp.down": f + d,
    }
    sizes = {name: cfg.layers * size for name, size in of_layer.items()} | {"head": d + cfg.vocab_size}
    adapted = [name for name in sizes if any(fnmatchcase(name, pattern) for pattern in adapter.targets)]
    return adapter.rank * sum(sizes[name] for name in adapted)


def trained_parameters(run: Run) -> int:
    """The weights that have gradients and optimizer state."""
    return adapter_parameters(run.model, run.adapter) if run.adapter else parameter_counts(run.model)["total"]


def of_run(run: Run, convention: str = "palm") -> int:
    """`flops_per_token` of a run.  Beside frozen matrices the backward pass leaves out their gradients, a third of what
    is done with them; what adapters add is not counted."""
    length = run.data.sequence_tokens
    whole = flops_per_token(run.model, length, convention)
    if run.adapter is None:
        return whole
    if convention.startswith("6n"):
        return whole * 2 // 3
    terms = forward_terms(run.model, length, causal=convention == "causal")
    return whole - terms["proj"] - terms["mlp"] - terms["head"]


def flops_per_token(cfg: Model, sequence_tokens: int, convention: str = "palm") -> int:
    """Training FLOPs per token: forward and a backward of twice that; rematerialisation is not counted.

    palm                full attention map            causal              half of it
    6n_total            6 * total parameters          6n_non_embedding    6 * non-embedding parameters

    Raises ConfigError for another convention.
    """
    if convention in ("palm", "causal"):
        return 3 * sum(forward_terms(cfg, sequence_tokens, causal=convention == "causal").values())
    if convention in ("6n_total", "6n_non_embedding"):
        return 6 * parameter_counts(cfg)[convention.removeprefix("6n_")]
    raise ConfigError(f"FLOPs convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by JAX's name for it (`jax.devices()[0].device_kind`); None when unknown."""
    kind = device_kind.lower()
    return next((flops for part, flops in PEAK_FLOPS if part in kind), None)
