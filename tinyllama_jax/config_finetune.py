"""What fine-tuning adds to a run: where its weights begin, which of them move, and what they learn from.

Frozen dataclasses, standard library only; all of it is part of a run's identity, but for where things lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinyllama_jax.config_model import require

TARGETS = (
    *("attention." + name for name in ("query", "key", "value", "out")),
    *("mlp." + name for name in ("gate", "up", "down")),
    "head",
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Begin with the weights of a checkpoint, at step 0, with a fresh optimizer and a schedule of one's own.

    RoPE and the length of the context may be others than the checkpoint's, and the vocabulary larger.
    """

    checkpoint: str  # RUN, RUN@STEP, RUN@best or a checkpoint directory; relative to the current directory
    # Rows of words that the checkpoint's vocabulary lacks, in the embedding and the head: `mean` of those it has, as
    # TinyLlama's chat models began (sft/finetune.py), or `init` as a fresh model's.
    new_words: Literal["mean", "init"] = "mean"

    def __post_init__(self):
        require(bool(self.checkpoint), "start.checkpoint is empty; it names the checkpoint to begin with")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Few trained weights beside frozen ones: only they have gradients, optimizer state and checkpoints."""

    # lora: y = x W + scale (dropout(x) A) B (arXiv 2106.09685); with base_weights of 4 bits that is QLoRA (2305.14314).
    # prefix: keys and values of `prefix_tokens` made-up tokens before every row, in each layer (arXiv 2101.00190).
    method: Literal["lora", "prefix"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False  # scale = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), not alpha / rank
    dropout: float = 0.0  # of the input of A
    targets: tuple[str, ...] = ("attention.query", "attention.value")  # patterns over TARGETS, such as mlp.*
    prefix_tokens: int = 32
    # What the frozen matrices of the layers are kept in.  nf4: QLoRA's 16 quantiles of a normal distribution.
    base_weights: Literal["float32", "bfloat16", "int8", "int4", "nf4"] = "bfloat16"

    def __post_init__(self):
        require(self.rank > 0, f"adapter.rank is {self.rank}; it must be positive")
        require(self.alpha > 0, f"adapter.alpha is {self.alpha}; it must be positive")
        require(0 <= self.dropout < 1, f"adapter.dropout is {self.dropout}; it must lie in [0, 1)")
        require(self.prefix_tokens > 0, f"adapter.prefix_tokens is {self.prefix_tokens}; it must be positive")
        require(bool(self.targets), "adapter.targets is empty; it names the matrices that are adapted")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Learn from pairs of answers, one preferred (DPO, arXiv 2305.18290), measured against the weights at the start."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: (margin per token - 1 / (2 beta))^2, arXiv 2310.12036
    beta: float = 0.1  # how far from the reference; of the handbook's recipe for Zephyr
    label_smoothing: float = 0.0  # share of pairs taken for labelled the wrong way round (conservative DPO)

    def __post_init__(self):
        require(self.beta > 0, f"preference.beta is {self.beta}; it must be positive")
        require(
            0 <= self.label_smoothing < 0.5,
            f"preference.label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)",
        )
        require(
            self.loss == "sigmoid" or not self.label_smoothing,
            "preference.label_smoothing has no meaning with loss=ipo",
        )


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Dialogues, instructions or pairs of answers, and how they become windows (finetune/prepare.py)."""

    sources: tuple[str, ...]  # files or folders of jsonl, json, parquet: [NAME=]PATH[?form=alpaca]
    validation_sources: tuple[
        str, ...
    ] = ()  # held out; empty = a share of the sources, chosen by a hash of the content
    validation_share: float = 0.05
    # messages: OpenAI's; alpaca: instruction, input, output; sharegpt: conversations; text: plain text, all of it
    # learned; preference: prompt, chosen, rejected.  auto: what the first row is.
    form: Literal["auto", "messages", "alpaca", "sharegpt", "text", "preference"] = "auto"
    template: Literal["auto", "zephyr", "chatml", "v0_1", "alpaca", "none"] = "auto"  # auto: as the tokenizer says
    tokenizer: str = ""  # tokenizer file or folder; empty = the base checkpoint's
    new_tokens: tuple[str, ...] = ()  # control tokens that are added to the tokenizer, such as <|im_start|>
    loss_on: Literal["assistant", "all"] = "assistant"  # which tokens are learned
    system: str = ""  # system message of dialogues that have none
    empty_system: bool = False  # such dialogues get an empty system message, as the Zephyr recipe's
    # best_fit: whole examples, many to a window.  single: one to a window, the rest is padding.
    # concatenated: one after another, cut wherever a window ends.
    packing: Literal["best_fit", "single", "concatenated"] = "best_fit"
    longest_prompt_tokens: int = (
        0  # preference: longer prompts lose their beginning; 0 = half of an answer's room, which is half a window
    )
    too_long: Literal["cut", "drop"] = "cut"  # examples longer than a window: lose their end, or are left out
    malformed_share: float = 0.01  # rows that cannot be used, beyond which preparing ends; each is named

    def __post_init__(self):
        require(bool(self.sources), "examples.sources is empty; it names files of examples")
        for name in ("validation_share", "malformed_share"):
            require(0 <= getattr(self, name) < 1, f"examples.{name} must lie in [0, 1)")
        require(self.longest_prompt_tokens >= 0, "examples.longest_prompt_tokens is negative")
        require(not (self.system and self.empty_system), "examples.system and examples.empty_system exclude each other")
