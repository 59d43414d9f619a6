"""What a run is: frozen dataclasses, standard library only.

A field's unit is in its name (`batch_tokens`) or its comment.  Fields that decide which numbers a run
produces are its *identity* (`configio.identity`); everything under `execution`, `mesh`, `checkpoint`, `health`,
`evaluation` and `tracking` only decides where, how fast and how often, and may change on resume.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from tinyllama_jax.config_finetune import Adapter as Adapter
from tinyllama_jax.config_finetune import Examples as Examples
from tinyllama_jax.config_finetune import Preference as Preference
from tinyllama_jax.config_finetune import Start as Start
from tinyllama_jax.config_model import Model as Model
from tinyllama_jax.config_model import Rope as Rope
from tinyllama_jax.config_model import require

REPLAY = "replay/"  # before the names of the sources of data.replay_store


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a token store that is not there yet."""

    sources: tuple[str, ...] = ("python",)  # as on the command line of `prepare`
    tokenizer: str = ""  # tokenizer.model or tokenizer.json; empty = train a SentencePiece BPE on the sources
    vocab_size: int = 2048  # of the trained tokenizer
    # token that marks where a document begins or ends.  TinyLlama v1.0 was trained with `bos` only
    # (its author says so); its code since 2023-10 writes `eos` only.
    document_marks: Literal["eos", "bos", "both", "none"] = "eos"
    validation_share: float = 0.05  # share of documents held out, chosen by a hash of their text
    filters: tuple[str, ...] = ()  # which documents to leave out, as on the command line of `prepare`
    window_tokens: int = 2049  # windows are stored and checked whole; 2048 predicted tokens and one more
    # `none`: documents in a row, cut wherever a window ends, as TinyLlama did.  `best_fit`: each window is filled with
    # documents that fit, and none is cut that fits into one.
    packing: Literal["none", "best_fit"] = "none"
    item_bytes: int = 256 << 20  # input that is tokenised at a time, by one process

    def __post_init__(self):
        require(bool(self.sources), "data.recipe.sources is empty")
        require(self.window_tokens > 1, f"data.recipe.window_tokens is {self.window_tokens}; it must be at least 2")
        require(self.item_bytes > 0, f"data.recipe.item_bytes is {self.item_bytes}; it must be positive")
        require(
            0 < self.validation_share < 1,
            f"data.recipe.validation_share is {self.validation_share}; it must lie in (0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    store: str  # directory of the token store; relative to the current directory
    sequence_tokens: int = 2048  # predicted tokens per window; a window holds one token more
    epochs: Literal["reshuffle", "replay"] = "reshuffle"  # what a second pass over a source looks like
    document_masking: bool = False  # packed documents hidden from each other; TinyLlama trained with it off
    # which marks the store's documents must carry; `any` = whatever it has
    document_marks: Literal["any", "eos", "bos", "both", "none"] = "any"
    recipe: Recipe | None = None  # makes `store` when it is missing
    examples: Examples | None = None  # `store` holds examples instead, and is made of these when it is missing
    replay_store: str = ""  # a second token store, whose sources are called replay/NAME in mixtures
    cache: str = ""  # folder on a local disk that keeps what was read of a store in object storage
    # Neighbouring windows that stay neighbours when shuffled: 1 = every window for itself, right for local disks;
    # network storage reads 64 together several times faster.
    shuffle_block_windows: int = 1
    skip_ranges: tuple[tuple[int, int], ...] = ()  # batches [first, last) that are stepped over, each in one stage
    # Train on a view of the store with so many unique tokens, in proportion to its domains; 0 = on all of it.  Of two
    # budgets with one `unique_seed` the smaller lies inside the larger.
    unique_tokens: int = 0
    unique_seed: int = 0

    def __post_init__(self):
        require(bool(self.store), "data.store is empty; it names the token store's directory")
        require(
            self.examples is None or not (self.recipe or self.replay_store or self.unique_tokens),
            "data.examples excludes data.recipe, data.replay_store and data.unique_tokens",
        )
        require(self.unique_tokens >= 0, f"data.unique_tokens is {self.unique_tokens}; it must be 0 (all) or more")
        require(self.sequence_tokens > 0, f"data.sequence_tokens is {self.sequence_tokens}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum.  Borders round up to whole batches."""

    name: str
    tokens: int  # planned length
    batch_tokens: int
    mixture: dict[str, float]  # source -> weight, in tokens; normalised
    ramp_tokens: int = 0  # weights move linearly from `ramp_from` to `mixture` over the stage's first tokens
    ramp_from: dict[str, float] = field(default_factory=dict)  # empty = the previous stage's mixture

    def __post_init__(self):
        where = f"stage {self.name!r}"
        require(self.tokens > 0, f"{where}: tokens is {self.tokens}; it must be positive")
        require(self.batch_tokens > 0, f"{where}: batch_tokens is {self.batch_tokens}; it must be positive")
        require(0 <= self.ramp_tokens <= self.tokens, f"{where}: ramp_tokens must lie between 0 and tokens")
        for label, mixture in (("mixture", self.mixture), ("ramp_from", self.ramp_from)):
            require(all(w >= 0 for w in mixture.values()), f"{where}: {label} has a negative weight")
        require(sum(self.mixture.values()) > 0, f"{where}: mixture has no positive weight")
        require(not self.ramp_from or sum(self.ramp_from.values()) > 0, f"{where}: ramp_from has no positive weight")


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate as a function of the tokens seen after the batch."""

    kind: Literal["cosine", "wsd", "linear", "constant", "piecewise"] = "cosine"
    peak: float = 4e-4
    end: float = 4e-5  # reached at the horizon (cosine, wsd, linear)
    warmup_tokens: int = 0  # linear from 0; every kind but piecewise
    horizon_tokens: int = 0  # 0 = the end of the last stage
    flat_until_tokens: int = 0  # peak is held up to here, then the curve is joined where it is by then
    decay_tokens: int = 0  # wsd: length of the final decay
    decay_shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"  # wsd
    points: tuple[tuple[int, float], ...] = ()  # piecewise: (tokens, rate), linear between, constant outside

    def __post_init__(self):
        require(self.peak > 0, f"lr.peak is {self.peak}; it must be positive")
        require(0 <= self.end <= self.peak, f"lr.end={self.end} must lie between 0 and lr.peak={self.peak}")
        for name in ("warmup_tokens", "horizon_tokens", "flat_until_tokens", "decay_tokens"):
            require(getattr(self, name) >= 0, f"lr.{name} is negative")
        require(self.kind != "wsd" or self.decay_tokens > 0, "lr.kind=wsd needs lr.decay_tokens")
        tokens = [t for t, _ in self.points]
        require(self.kind != "piecewise" or bool(tokens), "lr.kind=piecewise needs lr.points")
        require(tokens == sorted(set(tokens)), "lr.points must have increasing tokens")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW or RMSprop in float32 with decoupled weight decay, and what is minimised besides the loss."""

    # rmsprop: the gradient over the root of a mean of its squares with beta2, PyTorch's RMSprop; beta1 has no part
    kind: Literal["adamw", "rmsprop"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "all"  # TinyLlama decayed every weight, norms and embeddings too
    clip_norm: float = 1.0  # global L2 norm; 0 = off
    z_loss: float = 0.0  # times log(Z)^2 per token, added to the loss that is differentiated; PaLM: 1e-4; 0 = off
    # A step whose loss or gradient norm exceeds mean + sigma * std of the last window is skipped; 0 = off.
    # Non-finite steps are always skipped.
    skip_sigma: float = 0.0
    skip_window_steps: int = 128
    max_skips: int = 20  # consecutive skipped steps after which the run stops

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1)")
        for name in ("eps", "skip_window_steps", "max_skips"):
            require(getattr(self, name) > 0, f"optimizer.{name} must be positive")
        for name in ("weight_decay", "clip_norm", "z_loss", "skip_sigma"):
            require(getattr(self, name) >= 0, f"optimizer.{name} is negative")

    @property
    def moments(self) -> int:
        """Arrays of the state that are as large as the weights."""
        return 2 if self.kind == "adamw" else 1


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Start from another run's checkpoint: its weights, optimizer state, step and place in the data."""

    run: str  # the parent's run directory, relative to the current one; @NAME = the run of that name in the same sweep
    tokens: int  # the parent's checkpoint at exactly this many tokens

    def __post_init__(self):
        require(self.tokens > 0, f"fork.tokens is {self.tokens}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the same numbers are computed; never part of a run's identity."""

    # attention/__init__.py says what each is; interpret: runs a kernel anywhere, slowly
    attention: Literal[
        "auto", "reference", "blocks", "xla", "cudnn", "splash", "triton", "hopper", "tpu",
        "interpret:triton", "interpret:hopper", "interpret:tpu",
    ] = "auto"  # fmt: skip
    remat: Literal["none", "full", "save_dots", "save_dots_and_attention"] = "none"
    scan_layers: bool = True  # False unrolls the layers: slower to compile, faster on GPUs and CPUs, same numbers
    micro_batch_sequences: int = 0  # sequences per accumulation step over all devices; 0 = the whole batch
    loss_chunk_tokens: int = 2048  # tokens whose logits exist at the same time, per device
    deterministic: bool = False  # GPUs: the same bits every time, as CPUs and TPUs do anyway; programs in RUN/programs

    def __post_init__(self):
        require(self.micro_batch_sequences >= 0, "execution.micro_batch_sequences is negative")
        require(self.loss_chunk_tokens > 0, "execution.loss_chunk_tokens must be positive")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; one of them may be -1, which takes what is left."""

    replica: int = 1  # whole copies of the weights (HSDP over nodes or slices)
    data: int = -1  # weights and optimizer state sharded (FSDP)
    context: int = 1  # tokens of a sequence split, for long contexts
    tensor: int = 1  # heads, MLP columns and vocabulary split (tensor parallelism), within a fast network

    def __post_init__(self):
        sizes = (self.replica, self.data, self.context, self.tensor)
        require(all(s == -1 or s > 0 for s in sizes), f"mesh sizes {sizes} must be positive, or -1 for the rest")
        require(sizes.count(-1) <= 1, "only one mesh axis may be -1")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Temporary checkpoints guard against crashes (the newest few are kept); permanent ones are results."""

    temporary_seconds: float = 300.0  # wall-clock seconds between temporary saves; 0 = off
    temporary_steps: int = 0  # steps between temporary saves; 0 = off
    keep_temporary: int = 2
    permanent_tokens: int = 0  # a permanent save each time another multiple is passed; 0 = off
    permanent_at_tokens: tuple[int, ...] = ()  # and when one of these is reached
    # The end of each stage and of the run is always saved, permanently, and read back.
    directory: str = ""  # where checkpoints go, such as gs://bucket/run; empty = RUN/checkpoints
    retry_seconds: float = 60.0  # after a periodic save that failed, until it is tried again
    max_failed_saves: int = 3  # in a row, after which the run ends
    barrier_seconds: float = 900.0  # for which the processes of a run wait for the last of them at a save or restore

    def __post_init__(self):
        for name in ("temporary_seconds", "temporary_steps", "permanent_tokens", "retry_seconds"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} is negative")
        for name in ("keep_temporary", "max_failed_saves", "barrier_seconds"):
            require(getattr(self, name) > 0, f"checkpoint.{name} must be positive")


@dataclass(frozen=True, kw_only=True)
class Health:
    """When a run warns, goes back, or gives up."""

    # A process that makes no progress for so long prints its stacks and ends with status 1; 0 = off.  Longer where a
    # step takes longer, and while it compiles.
    watchdog_seconds: float = 600.0
    peer_seconds: float = 60.0  # a process of the same run that was not heard of for so long is lost, and the run ends
    # After optimizer.max_skips skipped steps in a row the run goes back to its newest checkpoint and steps over the
    # batches since; this often at most, then it ends.
    max_rollbacks: int = 2
    alert_window_steps: int = 50  # over which loss and throughput are averaged for the alerts below
    divergence_nats: float = 0.5  # alert when the mean loss exceeds its lowest so far by this; 0 = off
    stall_factor: float = 10.0  # alert when a step takes this many times the median; 0 = off
    slow_share: float = 0.7  # alert when throughput falls below this share of the run's median; 0 = off

    def __post_init__(self):
        for name in ("watchdog_seconds", "max_rollbacks", "divergence_nats", "stall_factor", "slow_share"):
            require(getattr(self, name) >= 0, f"health.{name} is negative")
        for name in ("peer_seconds", "alert_window_steps"):
            require(getattr(self, name) > 0, f"health.{name} must be positive")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every_tokens: int = 0  # validation each time another multiple is passed, and at the end; 0 = stage ends only
    sequences: int = 64  # validation windows per domain; 0 = all
    # The first so many training windows of each source are measured beside them, from the end of the first batch on:
    # how much lower their loss is tells what was memorised.
    seen_sequences: int = 0
    batch_sequences: int = 8
    keep_best: bool = False  # the checkpoint with the lowest validation loss is kept, as RUN@best
    patience: int = 0  # the run ends after so many evaluations in a row without a better one; 0 = never
    prompts: tuple[str, ...] = ()  # continued at each stage's end, for the report
    questions: tuple[str, ...] = ()  # a chat model's: answered at each evaluation, in its template
    sample_tokens: int = 64
    sample_temperature: float = 0.7  # 0 = greedy
    sample_top_p: float = 0.9
    beyond_tokens: tuple[int, ...] = ()  # lengths of windows in which `measure` takes the finished run's loss too,
    beyond_ropes: tuple[Literal["as-trained", "linear", "ntk", "yarn"], ...] = ()  # with RoPE so; empty = all that suit
    decode: tuple[str, ...] = ()  # where `measure` times generation, such as 8x512: 8 rows behind 512 tokens each

    def __post_init__(self):
        for name in ("every_tokens", "sequences", "seen_sequences", "patience"):
            require(getattr(self, name) >= 0, f"evaluation.{name} is negative")
        for name in ("batch_sequences", "sample_tokens"):
            require(getattr(self, name) > 0, f"evaluation.{name} must be positive")
        require(self.sample_temperature >= 0, "evaluation.sample_temperature is negative")
        require(0 < self.sample_top_p <= 1, "evaluation.sample_top_p must lie in (0, 1]")
        sized = [re.fullmatch(r"[1-9]\d*x[1-9]\d*", pair) for pair in self.decode]
        require(all(sized), f"evaluation.decode={list(self.decode)}: each must be rows x tokens, such as 8x512")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """metrics.jsonl is always written; these adapters fail soft."""

    tensorboard: bool = False  # into RUN/tensorboard, over tokens
    wandb_project: str = ""  # Weights & Biases project; empty = off.  Needs the extra `wandb`
    trackio_project: str = ""  # trackio project; empty = off.  Needs the extra `trackio`
    profile_steps: int = 0  # steps that are traced into RUN/profile, to be read with xprof; 0 = none
    profile_after_steps: int = 10  # of this start, before the trace begins
    peak_flops_per_device: float = 0.0  # for MFU; 0 = from the device's name, unknown devices report none


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    model: Model
    data: Data
    curriculum: tuple[Stage, ...]
    lr: LearningRate = field(default_factory=LearningRate)
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: int = 3407  # TinyLlama's
    fork: Fork | None = None
    start: Start | None = None
    adapter: Adapter | None = None
    preference: Preference | None = None
    execution: Execution = field(default_factory=Execution)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    health: Health = field(default_factory=Health)
    evaluation: Evaluation = field(default_factory=Evaluation)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self):
        require(bool(self.curriculum), "curriculum has no stage")
        names = [s.name for s in self.curriculum]
        require(len(set(names)) == len(names), f"curriculum stages share a name: {names}")
        require(self.start is None or self.fork is None, "a run begins with `start` or with `fork`, not with both")
        for name in ("adapter", "preference"):
            require(
                getattr(self, name) is None or self.start, f"{name} needs start.checkpoint: the weights it begins at"
            )
        prefix = self.adapter is not None and self.adapter.method == "prefix"
        require(
            not (prefix and self.data.document_masking),
            "adapter.method=prefix stands before whole rows: set document_masking=false, with one example to a row "
            "(examples.packing=single)",
        )
        require(
            not prefix or self.mesh.context in (1, -1), "adapter.method=prefix needs whole rows: set mesh.context=1"
        )
        require(self.preference is None or self.data.examples, "preference learns from pairs in data.examples")
        require(
            self.preference is None or self.data.document_masking,
            "preference needs data.document_masking=true: both answers of a pair lie in one row",
        )
        length = self.data.sequence_tokens
        require(
            length <= self.model.context_tokens,
            f"data.sequence_tokens={length} exceeds model.context_tokens={self.model.context_tokens}",
        )
        longer = self.evaluation.beyond_tokens
        why = f"each, like data.sequence_tokens={length}, must divide the longest, and none be shorter than that"
        fits = all(n >= length and max(longer) % n == 0 for n in longer and (*longer, length))
        require(fits, f"evaluation.beyond_tokens={list(longer)}: {why}")
        for stage in self.curriculum:
            require(
                stage.batch_tokens % length == 0,
                f"stage {stage.name!r}: batch_tokens={stage.batch_tokens} is not a multiple of "
                f"data.sequence_tokens={length}",
            )
            micro = self.execution.micro_batch_sequences
            sequences = stage.batch_tokens // length
            require(
                micro == 0 or sequences <= micro or sequences % micro == 0,
                f"stage {stage.name!r}: {sequences} sequences per batch cannot be cut into micro-batches of "
                f"execution.micro_batch_sequences={micro}",
            )


replace = dataclasses.replace
