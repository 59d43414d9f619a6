"""What a model is: frozen dataclasses, standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyllama_jax.errors import ConfigError


def require(condition: object, message: str) -> None:
    """Raises ConfigError with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding, half-split pairing (dimension i with i + rotated/2)."""

    # default | none (NoPE) | partial (a share of the head) | linear (position interpolation)
    # | ntk (theta raised once, static) | yarn (arXiv 2309.00071) | llama3 (Llama 3.1's wavelength bands)
    kind: Literal["default", "none", "partial", "linear", "ntk", "yarn", "llama3"] = "default"
    theta: float = 10_000.0
    fraction: float = 1.0  # partial: share of head_dim that is rotated
    factor: float = 1.0  # linear, ntk, yarn, llama3: context extension, new / original
    original_context_tokens: int = 2048  # yarn, llama3: the context that the frequencies were trained at
    beta_fast: float = 32.0  # yarn: rotations over the original context above which a dimension is kept
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated
    attention_factor: float = 0.0  # yarn: scale of cos and sin; 0 = 0.1 ln(factor) + 1
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def __post_init__(self):
        require(self.theta > 0, f"rope.theta is {self.theta}; it must be positive")
        require(self.factor >= 1, f"rope.factor is {self.factor}; it must be at least 1")
        require(0 < self.fraction <= 1, f"rope.fraction is {self.fraction}; it must lie in (0, 1]")
        require(
            self.kind != "llama3" or self.high_freq_factor > self.low_freq_factor,
            "rope.high_freq_factor must exceed rope.low_freq_factor",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A member of the Llama family: pre-norm, RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    vocab_size: int
    d_model: int
    layers: int
    heads: int  # query heads
    kv_heads: int  # key/value heads: `heads` = MHA, 1 = MQA, a divisor between = GQA
    head_dim: int  # free of d_model / heads
    d_ff: int
    context_tokens: int = 2048
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    rope: Rope = field(default_factory=Rope)
    # tinyllama: the documented recipe.  tinyllama_start: the code when the v1.0 run began.
    # torch_default: what that run most likely got (INFERRED).  Formulas: model/init.py.
    init: Literal["tinyllama", "tinyllama_start", "torch_default"] = "tinyllama"
    dropout: float = 0.0  # on embeddings and both residual branches; 0 in TinyLlama
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # weights and optimizer state stay float32

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context_tokens"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}",
        )
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must lie in [0, 1)")
        if self.rope.kind != "none":
            rotated = self.rotated_dims
            require(
                rotated >= 2 and rotated % 2 == 0,
                f"RoPE would rotate {rotated} of model.head_dim={self.head_dim}; the number must be even and >= 2",
            )

    @property
    def rotated_dims(self) -> int:
        share = self.rope.fraction if self.rope.kind == "partial" else 1.0
        return 0 if self.rope.kind == "none" else int(round(self.head_dim * share))
