"""Hyper-parameters from the number of parameters N and of tokens D, by named rules with their source.

    run = rules.derive(run, "olmo")                      # learning rate, batch, warm-up, beta2
    run = rules.derive(run, "steplaw", lr_times=0.5)     # and a look to the side

A law of loss describes tuned runs; one learning rate or one batch for all sizes fakes a steep exponent (arXiv
2406.19146).  Below some 50M parameters every rule is an extrapolation, so the rate is capped, and a sweep should try
half and twice of it at both ends of the ladder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinyllama_jax import flops
from tinyllama_jax.config import LearningRate, Model, Run, replace
from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError

LR_CAP = 1e-2
SHORTEST_RUN = 100  # steps, at least: where a rule's batch would leave fewer, the batch is made smaller
LONGEST_WARMUP = 0.1  # of the run


@dataclass(frozen=True)
class Derived:
    lr: float
    batch_tokens: int
    warmup_tokens: int
    beta2: float | None  # None = the run's own
    source: str


def olmo(model: Model, tokens: int, *, wsd: bool = False) -> Derived:
    """OLMo's ladders (arXiv 2412.04403, OLMo-core's model_ladder), after Porian et al. (arXiv 2406.19146).

    N without embeddings: rate 0.0047 (N/108M)^(-1/3), half of it for WSD; batch 160 x 2048 (N/108M)^(2/3) tokens;
    N tokens of warm-up; beta2 0.95 from 524,288 tokens a batch on, else 0.99.
    """
    counts = flops.parameter_counts(model)
    n = counts["non_embedding"]
    batch = 160 * 2048 * (n / 108e6) ** (2 / 3)
    return Derived(
        lr=0.0047 * (n / 108e6) ** (-1 / 3) * (0.5 if wsd else 1),
        batch_tokens=round(batch),
        warmup_tokens=counts["total"],
        beta2=0.95 if batch >= 524_288 else 0.99,
        source="OLMo ladders, arXiv 2412.04403",
    )


def steplaw(model: Model, tokens: int, *, wsd: bool = False) -> Derived:
    """Step Law (arXiv 2503.04715): rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571 tokens; N without embeddings."""
    n = flops.parameter_counts(model)["non_embedding"]
    return Derived(1.79 * n**-0.713 * tokens**0.307, round(0.58 * tokens**0.571), n, None, "Step Law, arXiv 2503.04715")


def deepseek(model: Model, tokens: int, *, wsd: bool = False) -> Derived:
    """DeepSeek LLM (arXiv 2401.02954): rate 0.3118 C^-0.1250, batch 0.2920 C^0.3271 tokens, C = 6 N D.

    Their C counts the FLOPs of the layers with attention; N here is what is in a matrix product.
    """
    counts = flops.parameter_counts(model)
    c = 6 * counts["matmul"] * tokens
    return Derived(0.3118 * c**-0.125, round(0.2920 * c**0.3271), counts["total"], None, "DeepSeek, arXiv 2401.02954")


RULES: dict[str, Callable[..., Derived]] = {"olmo": olmo, "steplaw": steplaw, "deepseek": deepseek}


def derive(
    run: Run, rule: str = "olmo", *, lr_times: float = 1.0, batch_times: float = 1.0, batch_multiple: int = 1
) -> Run:
    """The run with the rule's learning rate, batch, warm-up and beta2; `*_times` look to the side of it.

    The batch is the same in every stage, a multiple of `batch_multiple` sequences (so that the devices can share it),
    and small enough for SHORTEST_RUN steps; the warm-up at most a tenth of the run; the learning rate at most LR_CAP
    before `lr_times`, its end in the proportion that the run has.  Raises ConfigError for an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"there is no rule {rule!r}{nearest(rule, RULES)}; there are {', '.join(RULES)}")
    length, tokens = run.data.sequence_tokens, sum(stage.tokens for stage in run.curriculum)
    found = RULES[rule](run.model, tokens, wsd=run.lr.kind == "wsd")
    batch = min(found.batch_tokens * batch_times, tokens / SHORTEST_RUN)
    unit = batch_multiple * length
    batch = max(1, round(batch / unit)) * unit
    peak = min(found.lr, LR_CAP) * lr_times
    lr = _with(run.lr, peak, min(found.warmup_tokens, round(LONGEST_WARMUP * tokens)))
    return replace(
        run,
        lr=lr,
        curriculum=tuple(replace(stage, batch_tokens=batch) for stage in run.curriculum),
        optimizer=replace(run.optimizer, beta2=found.beta2 or run.optimizer.beta2),
    )


def _with(lr: LearningRate, peak: float, warmup_tokens: int) -> LearningRate:
    return replace(lr, peak=peak, end=lr.end * peak / lr.peak, warmup_tokens=warmup_tokens)
