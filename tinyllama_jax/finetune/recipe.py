"""A fine-tuning experiment before its base and its data are known: in epochs and shares, not in tokens.

`finetune/resolve.py` makes a `Run` of it, which `train` then trains like any other.  Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyllama_jax.config import (
    Adapter,
    Checkpoint,
    Evaluation,
    Examples,
    Execution,
    Health,
    Mesh,
    Optimizer,
    Preference,
    Rope,
    Tracking,
)
from tinyllama_jax.config_model import require


@dataclass(frozen=True, kw_only=True)
class Text:
    """A token store to go on with, and what of the old text is mixed in against forgetting."""

    store: str = ""  # prepared with the base's tokenizer, or one that begins with all of its words
    mixture: dict[str, float] = field(default_factory=dict)  # source -> weight; empty = by size
    tokens: int = 0  # of training; 0 = `epochs` over the store
    replay_store: str = ""  # a store of text that the base was trained on
    replay_share: float = 0.0  # of all tokens

    def __post_init__(self):
        require(0 <= self.replay_share < 1, f"text.replay_share is {self.replay_share}; it must lie in [0, 1)")
        require(
            bool(self.replay_store) == bool(self.replay_share),
            "text.replay_store and text.replay_share need each other",
        )
        require(self.tokens >= 0, "text.tokens is negative")


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A recipe.  Exactly one of `examples` and `text` is there."""

    name: str
    base: str = ""  # the checkpoint to begin with: a run, RUN@STEP, RUN@best or a directory; usually given by --base
    examples: Examples | None = None
    store: str = ""  # where prepared examples are kept; empty = WORKDIR/examples
    text: Text | None = None
    adapter: Adapter | None = None  # None: all weights are trained
    preference: Preference | None = None
    sequence_tokens: int = 2048
    document_masking: bool = True  # packed examples hidden from each other
    epochs: float = 1.0
    batch_sequences: int = 16  # windows per optimizer step
    lr_kind: Literal["constant", "cosine", "linear"] = "cosine"
    lr_peak: float = 2e-5
    lr_end: float = 0.0
    warmup_share: float = 0.0  # of all steps
    warmup_steps: int = 0  # instead of a share
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(beta2=0.999, weight_decay=0.0))
    new_words: Literal["mean", "init"] = "mean"  # rows of words that the base lacks
    rope: Rope | None = None  # another than the base's, to read longer contexts
    context_tokens: int = 0  # of the model; 0 = the base's
    dropout: float = 0.0  # of the model
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    evaluations: int = 10  # over the whole run, evenly, and one before the first step
    patience: int = 0  # end after so many evaluations in a row without a better one; 0 = never
    questions: tuple[str, ...] = ()  # answered at each evaluation
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(sequences=512, keep_best=True))
    seed: int = 42
    execution: Execution = field(default_factory=Execution)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    health: Health = field(default_factory=Health)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self):
        require(
            (self.examples is None) != (self.text is None),
            "a fine-tuning recipe has either `examples` or `text` to learn from, and not both",
        )
        require(self.preference is None or self.examples is not None, "`preference` learns from pairs in `examples`")
        require(self.epochs > 0, f"epochs is {self.epochs}; it must be positive")
        for name in ("batch_sequences", "sequence_tokens", "evaluations"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        require(0 <= self.warmup_share < 1, f"warmup_share is {self.warmup_share}; it must lie in [0, 1)")
        require(not (self.warmup_share and self.warmup_steps), "warmup_share and warmup_steps exclude each other")
        require(self.patience >= 0 and self.warmup_steps >= 0, "patience and warmup_steps must be 0 or more")
