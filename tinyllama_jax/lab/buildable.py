"""From a number of parameters to a model that can be built, and the run that trains it by a rule.  No jax here."""

from __future__ import annotations

import math

import numpy as np

from tinyllama_jax import flops
from tinyllama_jax.config import Data, Execution, LearningRate, Mesh, Model, Run, Stage, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import rules, shapes
from tinyllama_jax.lab.fit.allocate import Price
from tinyllama_jax.preflight import money
from tinyllama_jax.preflight.targets import Target
from tinyllama_jax.presets import PRESETS, llama

PRESET_WITHIN = 0.10  # of the wanted size
SHAPE_WITHIN = 0.10
HEADS = (128, 64, 32, 16)  # head sizes; 128 from LARGE parameters on, the small ones where 64 is too wide
LARGE = 5e9
STATE_BYTES = 16  # of a parameter in training: weight, two moments and gradient in float32
STATE_SHARE = 0.8  # of the memory that these may take
MICRO_TOKENS = 16_384  # of a device in one micro-batch, as TinyLlama's 8 x 2048
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128)  # in heads, of the models that are priced


def near(parameters: float, *, count: str, vocab_size: int, sequence_tokens: int) -> tuple[str, Model]:
    """(preset's name or "", model) nearest to so many parameters: a preset within 10 %, else a shape of the family.

    Raises ConfigError when no Llama of that vocabulary is within 10 %.
    """
    same = {
        name: abs(math.log(flops.parameter_counts(model)[count] / parameters))
        for name, model in PRESETS.items()
        if model.vocab_size == vocab_size and model.context_tokens >= sequence_tokens
    }
    name = min(same, key=same.get, default="")
    if name and same[name] <= math.log1p(PRESET_WITHIN):
        return name, PRESETS[name]
    for head_dim in HEADS if parameters >= LARGE else HEADS[1:]:
        try:
            return "", shapes.near(
                parameters,
                vocab_size=vocab_size,
                context_tokens=sequence_tokens,
                head_dim=head_dim,
                count=count,
                tolerance=SHAPE_WITHIN,
            )
        except ConfigError:
            continue
    raise ConfigError(
        f"no Llama with a vocabulary of {vocab_size:,} has about {parameters:.3g} parameters ({count}); give "
        "--vocab-size the size that you mean to train with"
    )


def run(model: Model, tokens: float, *, sequence_tokens: int, rule: str, target: Target | None = None) -> Run:
    """The run of about so many tokens, in whole batches, with learning rate, batch and warm-up by the rule.

    On a target the batch is a multiple of its devices; the weights are sharded within a machine, and over all devices
    where they do not fit one.
    """
    devices = target.count if target else 1
    begun = Run(
        name="allocated",
        model=model,
        data=Data(store="data/allocated", sequence_tokens=sequence_tokens),
        curriculum=(
            Stage(name="pretrain", tokens=max(round(tokens), 1), batch_tokens=sequence_tokens, mixture={"text": 1.0}),
        ),
        lr=LearningRate(kind="cosine", peak=4e-4, end=4e-5),
        execution=Execution(remat="save_dots_and_attention"),
        mesh=_mesh(model, target),
    )
    found = rules.derive(begun, rule, batch_multiple=devices)
    rows = max(1, MICRO_TOKENS // sequence_tokens)
    if target and found.curriculum[0].batch_tokens > 2 * rows * devices * sequence_tokens:
        found = rules.derive(begun, rule, batch_multiple=rows * devices)
        micro = replace(found.execution, micro_batch_sequences=rows * devices)
        found = replace(found, execution=micro)
    batch = found.curriculum[0].batch_tokens
    whole = max(1, round(tokens / batch)) * batch
    return replace(
        found,
        curriculum=(replace(found.curriculum[0], tokens=whole),),
        lr=replace(found.lr, warmup_tokens=min(found.lr.warmup_tokens, whole)),
    )


def _mesh(model: Model, target: Target | None) -> Mesh:
    if target is None or target.platform != "gpu" or target.shape[0] == 1:
        return Mesh()
    machines, each = target.shape
    needed = STATE_BYTES * flops.parameter_counts(model)["total"]
    return Mesh(replica=machines, data=each) if needed <= STATE_SHARE * each * target.capacity_bytes else Mesh()


def fits(model: Model, target: Target) -> bool:
    """Whether the training state alone leaves room on the target, sharded over all of it."""
    needed = STATE_BYTES * flops.parameter_counts(model)["total"]
    return needed <= STATE_SHARE * target.count * target.capacity_bytes


def dollars(
    target: Target, *, usd_per_hour: float | None, rule: str, count: str, vocab_size: int, sequence_tokens: int
):
    """The Price of training on a target in US dollars: money.estimate for Llamas of many sizes, log-log in between.

    Sizes whose training state does not fit the target, or that no Llama of this vocabulary has, cannot be bought.
    Raises UsageError for a target or a price that means nothing, ConfigError when no size fits.
    """
    log_n, log_cost = [], []
    for heads in WIDTHS:
        kv_heads = max(k for k in (1, 2, 4, 8, 16, 32) if heads % k == 0 and k <= max(1, heads // 4))
        d_model = 64 * heads
        shape = (heads, d_model, heads, kv_heads, max(64, round(8 * d_model / 3 / 64) * 64))
        model = llama(*shape, vocab_size=vocab_size, context_tokens=sequence_tokens)
        if not fits(model, target):
            break
        n = flops.parameter_counts(model)[count]
        priced = run(model, 20 * n, sequence_tokens=sequence_tokens, rule=rule, target=target)
        log_n.append(math.log(n))
        log_cost.append(math.log(_per_token(priced, target, usd_per_hour)))
    if not log_n:
        raise ConfigError(f"{target.name} does not hold the training state of any model of the family")

    def per_token(N) -> np.ndarray:
        inside = (np.log(N) >= log_n[0] - 1e-9) & (np.log(N) <= log_n[-1] + 1e-9)
        return np.where(inside, np.exp(np.interp(np.log(N), log_n, log_cost)), np.inf)

    return Price(
        tokens=lambda N, budget: budget / per_token(N),
        cost=lambda N, D: float(per_token(N) * D),
        unit="usd",
    )


def _per_token(priced: Run, target: Target, usd_per_hour: float | None) -> float:
    value = money.estimate(priced, target, price=usd_per_hour)
    return value["cost_usd"]["total"] / value["tokens"]


def bought(model: Model, usd: float, target: Target, usd_per_hour: float | None, **how) -> Run:
    """The run of this model that costs so many dollars, to half a batch."""
    tokens = 20.0 * flops.parameter_counts(model)["total"]
    for _ in range(4):  # the price of a token depends a little on the batch, and that on the tokens
        found = run(model, tokens, target=target, **how)
        tokens = usd / _per_token(found, target, usd_per_hour)
    return run(model, tokens, target=target, **how)
