"""What `tinyllama allocate` answers: the best N and D for a budget, the run nearest to it, and what TinyLlama's costs.

    value = allocation.answer(Question(law=laws.load("epoch"), flops=1e21))
    value["N"], value["D"], value["loss"]

Keys of the answer (one JSON object with --json):

    law             {"name", "source", "kind", "constants", "count", "draws", "data"}; count: what its N counts
    budget          {"flops": C} or {"usd": X, "target", "price", "calibration"}; "inference_tokens", "unique_tokens"
    N, D, loss, tokens_per_parameter, epochs     the best choice, at a continuous size; epochs: null without --unique
    ci95            of N, D, tokens_per_parameter under the resampled laws, and of the loss at this N and D; {} without
    batch_tokens, lr, warmup_tokens, steps       those of `run`
    run             the nearest model that can be built, for the same budget; null where there is none:
                    preset, model, parameters, non_embedding, matmul, tokens, tokens_per_parameter, epochs, steps,
                    batch_tokens, lr, warmup_tokens, beta2, rule, loss, loss_ci95, deadweight_share (of the budget, by
                    not having exactly N), flops (causal attention), flops_palm, flops_6nd, and on a target usd, days
    tinyllama       what 1.1B parameters cost instead; each N, D, flops or usd, loss, loss_ci95, best_for_the_same,
                    flops_for_the_same_loss (or usd), deadweight_share: the share that the best choice would have saved
      same_budget   the budget asked spent on 1.1B parameters; null where it pays for no token of them
      three_trillion    3T tokens, in FLOPs
    extrapolation   {"times", "limit", "within"}: compute over that of the largest run in the fit, null where unknown;
                    beyond the limit `within` is the best choice at the limit
    warnings
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_jax import flops
from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.lab import buildable, rules
from tinyllama_jax.lab.fit import allocate
from tinyllama_jax.lab.fit.allocate import Price
from tinyllama_jax.lab.fit.chinchilla import EXTRAPOLATION
from tinyllama_jax.lab.laws import Named
from tinyllama_jax.preflight import money, prices, targets
from tinyllama_jax.presets import TINYLLAMA
from tinyllama_jax.schedules import Plan

THREE_TRILLION = 3e12
DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Question:
    """One of flops and usd; usd needs a target."""

    law: Named
    flops: float | None = None
    usd: float | None = None
    target: str = ""
    usd_per_hour: float | None = None  # of a device; None = the dated list price
    unique_tokens: float | None = None
    inference_tokens: float = 0.0
    rule: str = "olmo"
    vocab_size: int = 32_000
    sequence_tokens: int = 2048
    count: str = ""  # what the law's N counts; empty = as its fit says, else all parameters

    @property
    def budget(self) -> float:
        return self.flops if self.usd is None else self.usd

    @property
    def counted(self) -> str:
        return self.count or self.law.count


def answer(ask: Question) -> dict:
    """The whole answer.  Raises ConfigError when the budget has no best choice, UsageError for an unknown target."""
    if ask.unique_tokens is not None and not ask.law.law.repeats:
        raise ConfigError(
            f"--unique: the law {ask.law.name} has no R_D and R_N, so it cannot value repetition; "
            "`--law c4` or a fit of `fit repetition` can"
        )
    target = targets.parse(ask.target) if ask.target else None
    price = _price(ask, target)
    law, unique = ask.law.law, ask.unique_tokens
    chosen = allocate.best(law, price, ask.budget, unique)
    warnings = _of_the_law(ask)
    if ask.usd is not None and price.tokens(chosen["N"] * 1.02, 1.0) == 0:
        warnings.append(f"{target.name} does not hold larger models, of which the best choice is one")
    row = _row(ask, target, price, chosen["N"], warnings)
    beyond = _extrapolation(ask, chosen, warnings)
    return {
        "law": {
            "name": ask.law.name,
            "source": ask.law.source,
            "kind": law.kind,
            "constants": dict(law.constants),
            "count": ask.counted,
            "draws": len(ask.law.draws),
            "data": dict(ask.law.data),
        },
        "budget": _budget(ask, target),
        **chosen,
        "epochs": _epochs(chosen["D"], unique),
        "ci95": allocate.spread(ask.law.draws, price, ask.budget, chosen, unique),
        **{name: row[name] if row else None for name in ("batch_tokens", "lr", "warmup_tokens", "steps")},
        "run": row,
        "tinyllama": _tinyllama(ask, price, warnings),
        "extrapolation": beyond,
        "warnings": warnings,
    }


def _price(ask: Question, target: targets.Target | None) -> Price:
    if ask.usd is None:
        return allocate.flops_price(ask.inference_tokens)
    return buildable.dollars(
        target, usd_per_hour=ask.usd_per_hour, count=ask.counted, **_how(ask), vocab_size=ask.vocab_size
    )


def _how(ask: Question) -> dict:
    return {"rule": ask.rule, "sequence_tokens": ask.sequence_tokens}


def _budget(ask: Question, target: targets.Target | None) -> dict:
    also = {"inference_tokens": ask.inference_tokens, "unique_tokens": ask.unique_tokens}
    if ask.usd is None:
        return {"flops": ask.flops, **also}
    listed = {"what": "as given", "usd": ask.usd_per_hour}
    price = prices.of(target.name)._asdict() if ask.usd_per_hour is None else listed
    calibration = money.calibrate(None, target)._asdict()
    return {"usd": ask.usd, "target": target.name, "price": price, "calibration": calibration, **also}


def _epochs(tokens: float, unique: float | None) -> float | None:
    return None if unique is None else tokens / min(unique, tokens)


def _of_the_law(ask: Question) -> list[str]:
    law, said = ask.law, [f"of the fit: {text}" for text in ask.law.warnings]
    if not law.draws:
        how = "write the fit with --out" if law.data.get("points") else "published constants"
        said.append(f"no intervals: the law {law.name} comes without resamples ({how})")
    elif law.law.kind in ("effective", "penalty") and len({one.constants["B"] for one in law.draws}) == 1:
        said.append("the intervals are those of the constants of repetition; the surface below them is held")
    return said


def _row(ask: Question, target, price: Price, wanted: float, warnings: list[str]) -> dict | None:
    """The run of the nearest model for the same budget."""
    try:
        preset, model = buildable.near(
            wanted, count=ask.counted, vocab_size=ask.vocab_size, sequence_tokens=ask.sequence_tokens
        )
    except ConfigError as error:
        warnings.append(str(error))
        return None
    n = flops.parameter_counts(model)[ask.counted]
    if ask.usd is not None:
        run = buildable.bought(model, ask.usd, target, ask.usd_per_hour, **_how(ask))
    else:
        run = buildable.run(model, float(price.tokens(n, ask.budget)), target=target, **_how(ask))
    plan = Plan(run.curriculum, ask.sequence_tokens)
    tokens, batch = plan.total_tokens, run.curriculum[0].batch_tokens
    asked = rules.RULES[ask.rule](model, tokens)
    if asked.lr > rules.LR_CAP:
        warnings.append(
            f"learning rate: {ask.rule} asks for {asked.lr:.3g} at this size, which is capped at {rules.LR_CAP:g}; "
            "sweep half and twice of it"
        )
    if asked.batch_tokens > 1.5 * batch:
        warnings.append(
            f"batch: {ask.rule} asks for {asked.batch_tokens:,} tokens, of which the run would have fewer than "
            f"{rules.SHORTEST_RUN} steps; it is {batch:,}"
        )
    if plan.total_steps < rules.SHORTEST_RUN // 2:
        warnings.append(f"{plan.total_steps} steps of one sequence a device: a budget for smaller --sequence-tokens")
    row = {
        "preset": preset or None,
        "model": _shape(model),
        **{name: flops.parameter_counts(model)[key] for name, key in _COUNTED.items()},
        "tokens": tokens,
        "tokens_per_parameter": tokens / n,
        "epochs": _epochs(tokens, ask.unique_tokens),
        "steps": plan.total_steps,
        "batch_tokens": batch,
        "lr": run.lr.peak,
        "warmup_tokens": run.lr.warmup_tokens,
        "beta2": run.optimizer.beta2,
        "rule": f"{ask.rule}: {asked.source}",
        **_cost(ask, price, n, tokens),
        "flops": tokens * flops.flops_per_token(model, ask.sequence_tokens, "causal"),
        "flops_palm": tokens * flops.flops_per_token(model, ask.sequence_tokens, "palm"),
        "flops_6nd": 6 * n * tokens,
    }
    if target is not None:
        value = money.estimate(run, target, price=ask.usd_per_hour)
        row |= {"usd": value["cost_usd"]["total"], "days": value["days"], "target": target.name}
        if not buildable.fits(model, target):
            warnings.append(f"{target.name} does not hold the training state of this run")
    return row


_COUNTED = {"parameters": "total", "non_embedding": "non_embedding", "matmul": "matmul"}


def _shape(model: Model) -> dict[str, int]:
    names = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab_size", "context_tokens")
    return {name: getattr(model, name) for name in names}


def _cost(ask: Question, price: Price, N: float, D: float) -> dict:
    """Loss and what the best choice would have saved."""
    found = allocate.deadweight(ask.law.law, price, N, D, ask.unique_tokens)
    return {
        "loss": found["loss"],
        "loss_ci95": _loss_interval(ask, N, D),
        "deadweight_share": found["deadweight_share"],
    }


def _loss_interval(ask: Question, N: float, D: float) -> list[float] | None:
    return allocate.loss_interval(ask.law.draws, N, D, ask.unique_tokens) if len(ask.law.draws) > 1 else None


def _tinyllama(ask: Question, price: Price, warnings: list[str]) -> dict:
    n = flops.parameter_counts(TINYLLAMA)[ask.counted]
    law, unique = ask.law.law, ask.unique_tokens

    def of(price: Price, tokens: float) -> dict:
        return allocate.deadweight(law, price, n, tokens, unique) | {"loss_ci95": _loss_interval(ask, n, tokens)}

    tokens = float(price.tokens(n, ask.budget))
    whole = of(allocate.flops_price(ask.inference_tokens), THREE_TRILLION)
    most = ask.law.most_compute
    if most and 6 * n * THREE_TRILLION > EXTRAPOLATION * most:
        warnings.append(
            f"TinyLlama's 3T tokens are {6 * n * THREE_TRILLION / most:.3g} times the compute of the largest run in "
            "the fit: what is said of them is an extrapolation"
        )
    return {"same_budget": of(price, tokens) if tokens >= 1 else None, "three_trillion": whole}


def _extrapolation(ask: Question, chosen: dict, warnings: list[str]) -> dict:
    most = ask.law.most_compute
    if not most:
        warnings.append(
            f"the law {ask.law.name} does not say what compute its runs had: how far this reaches is unknown"
        )
        return {"times": None, "limit": EXTRAPOLATION, "within": None}
    times, within = 6 * chosen["N"] * chosen["D"] / most, None
    if times > EXTRAPOLATION:
        limit = EXTRAPOLATION * most
        try:
            within = {"flops": limit} | allocate.best(ask.law.law, allocate.flops_price(), limit, ask.unique_tokens)
        except ConfigError:
            within = None
        warnings.append(
            f"this is {times:.3g} times the compute of the largest run in the fit ({most:.3g} FLOPs); beyond "
            f"{EXTRAPOLATION} times, take the interval and not the number"
        )
    return {"times": times, "limit": EXTRAPOLATION, "within": within}


def check(ask: Question) -> None:
    """Raises UsageError for a question that contradicts itself."""
    if (ask.flops is None) == (ask.usd is None):
        raise UsageError("give one budget: --flops C, or --usd X with --target MACHINE")
    if ask.usd is not None and not ask.target:
        raise UsageError("--usd needs --target MACHINE, on which the dollars are spent")
    if ask.usd is not None and ask.inference_tokens:
        raise UsageError("--inference is counted in FLOPs (2 N a token): give --flops, not --usd")
    if ask.usd_per_hour is not None and not ask.target:
        raise UsageError("--price is that of a device of --target MACHINE, which is not given")
    named = {"--flops": ask.flops, "--usd": ask.usd, "--price": ask.usd_per_hour, "--unique": ask.unique_tokens}
    for option, value in named.items():
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{option} {value:g}: must be a number above 0")
    if not 0 <= ask.inference_tokens < float("inf"):
        raise UsageError(f"--inference {ask.inference_tokens:g}: must be a number of tokens")
    for option, value in (("--vocab-size", ask.vocab_size), ("--sequence-tokens", ask.sequence_tokens)):
        if value < 2:
            raise UsageError(f"{option} {value}: at least 2")
