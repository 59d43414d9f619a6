"""Named model shapes: TinyLlama's own, the ladders around it, and neighbours to compare with.  No jax here."""

from __future__ import annotations

import difflib

from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.errors import ConfigError


def llama(
    layers: int,
    d_model: int,
    heads: int,
    kv_heads: int,
    d_ff: int,
    *,
    vocab_size: int = 32_000,
    context_tokens: int = 2048,
    tied_embeddings: bool = False,
    rope: Rope | None = None,
) -> Model:
    """A Llama whose heads share the width evenly."""
    return Model(
        vocab_size=vocab_size,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=d_model // heads,
        d_ff=d_ff,
        context_tokens=context_tokens,
        tied_embeddings=tied_embeddings,
        rope=rope or Rope(),
    )


TINYLLAMA = llama(22, 2048, 32, 4, 5632)

PRESETS: dict[str, Model] = {
    # github.com/jzhang38/TinyLlama, lit_gpt/config.py
    "tinyllama-1.1b": TINYLLAMA,
    "tinyllama-120m": llama(12, 768, 12, 1, 2048),
    "tinyllama-1.1b-code-8k": replace(TINYLLAMA, context_tokens=8192, rope=Rope(kind="linear", factor=4.0)),
    # the same file on its `refactor` branch: a ladder without grouped queries, named by non-embedding parameters
    "llama-19m": llama(6, 512, 8, 8, 1536),
    "llama-41m": llama(12, 512, 8, 8, 1536),
    "llama-85m": llama(12, 768, 12, 12, 2048),
    "llama-127m": llama(18, 768, 12, 12, 2048),
    "llama-231m": llama(18, 1024, 16, 16, 2816),
    "llama-308m": llama(24, 1024, 16, 16, 2816),
    "llama-488m": llama(24, 1280, 20, 20, 3584),
    "llama-679m": llama(24, 1536, 24, 24, 4096),
    "llama-1233m": llama(24, 2048, 16, 16, 5632),
    # litgpt's configuration of that name
    "micro-llama-300m": llama(12, 1024, 16, 4, 5632),
    # a TinyLlama-shaped ladder for scaling laws: heads of 64, d_ff near 8/3 d_model; named by all parameters
    "t15": llama(6, 192, 3, 1, 512),
    "t22": llama(8, 256, 4, 2, 704),
    "t37": llama(8, 384, 6, 2, 1024),
    "t55": llama(8, 512, 8, 2, 1344),
    "t79": llama(12, 576, 9, 3, 1536),
    "t101": llama(14, 640, 10, 2, 1728),
    "t150": llama(16, 768, 12, 4, 2048),
    "t243": llama(16, 1024, 16, 4, 2752),
    "t331": llama(24, 1024, 16, 4, 2752),
    "t489": llama(24, 1280, 20, 4, 3392),
    "t1100": TINYLLAMA,
    # Llama 2, arXiv 2307.09288
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, context_tokens=4096),
    # HuggingFaceTB/SmolLM2-135M, arXiv 2502.02737
    "smollm2-135m": llama(
        30,
        576,
        9,
        3,
        1536,
        vocab_size=49_152,
        context_tokens=8192,
        tied_embeddings=True,
        rope=Rope(theta=100_000.0),
    ),
}


def preset(name: str) -> Model:
    """The model of that name.  Raises ConfigError naming the nearest one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.0)[0]
    raise ConfigError(f"there is no model preset {name!r}; the nearest is {near!r} (all: {', '.join(PRESETS)})")
