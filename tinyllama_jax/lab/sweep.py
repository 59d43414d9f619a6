"""Lists of Runs from one Run: what an experiment function returns when it is a sweep.  No jax here.

    def study():
        runs = sweep.product(base(), {"model.kv_heads": [8, 4, 1], "seed": [0, 1, 2]})
        return sweep.checked(runs)

A run's name tells it apart from the others of its sweep, and each changed field adds to it.  Fields are addressed and
parsed as by --set.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tinyllama_jax import configio, flops
from tinyllama_jax.config import Fork, LearningRate, Model, Run, Stage, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import rules

Runs = Run | Sequence[Run]


def product(runs: Runs, axes: Mapping[str, Sequence[Any]]) -> list[Run]:
    """Every run with every combination of values; the last axis changes fastest."""
    values = [[(path, value) for value in choices] for path, choices in axes.items()]
    return [_set(run, changes) for run in _several(runs) for changes in itertools.product(*values)]


def zipped(runs: Runs, axes: Mapping[str, Sequence[Any]]) -> list[Run]:
    """Every run with the first values of all axes, with the second, ...  ConfigError when they are not as many."""
    lengths = {path: len(choices) for path, choices in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"zipped axes have different lengths: {lengths}")
    rows = zip(*([(path, value) for value in choices] for path, choices in axes.items()), strict=True)
    return [_set(run, changes) for run, changes in itertools.product(_several(runs), list(rows))]


def chain(*sweeps: Runs) -> list[Run]:
    """One after the other."""
    return [run for runs in sweeps for run in _several(runs)]


def each(runs: Runs, change: Callable[[Run], Runs]) -> list[Run]:
    """What `change` makes of every run: one or several."""
    return [made for run in _several(runs) for made in _several(change(run))]


def ladder(
    base: Run, models: Mapping[str, Model], tokens_per_parameter: Sequence[float], *, rule: str = "olmo", **beside
) -> list[Run]:
    """Each model trained on each multiple of its parameters (all of them), hyper-parameters by `rule`.

    The base's stages keep their shares.  beside: lr_times, batch_times and batch_multiple of
    rules.derive.
    """
    runs, many = [], len(tokens_per_parameter) > 1
    for (name, model), multiple in itertools.product(models.items(), tokens_per_parameter):
        tokens = multiple * flops.parameter_counts(model)["total"]
        run = replace(of_tokens(base, tokens), model=model, name=f"{base.name}-{name}" + f"-x{multiple:g}" * many)
        runs.append(rules.derive(run, rule, **beside))
    return runs


def isoflop(
    base: Run, budgets: Sequence[float], models: Callable[[float], Mapping[str, Model]], *, rule: str = "olmo", **beside
) -> list[Run]:
    """For each budget in FLOPs the models that `models(budget)` names, each on the tokens that it pays for.

    FLOPs are those of training at the run's sequence length, with causal attention.
    """
    runs = []
    for budget in budgets:
        for name, model in models(budget).items():
            tokens = budget / flops.flops_per_token(model, base.data.sequence_tokens, "causal")
            run = replace(of_tokens(base, tokens), model=model, name=f"{base.name}-c{budget:.3g}-{name}")
            runs.append(rules.derive(run, rule, **beside))
    return runs


def repeated(runs: Runs, unique_tokens: Sequence[int], epochs: Sequence[float]) -> list[Run]:
    """Every run on each budget of unique tokens for each number of epochs, 1 being all of the budget once; schedules
    stretch with the length, batch and learning rate stay."""
    return [
        replace(
            of_tokens(run, unique * passes),
            name=f"{run.name}-u{unique:.3g}-e{passes:g}",
            data=replace(run.data, unique_tokens=unique),
        )
        for run in _several(runs)
        for unique in unique_tokens
        for passes in epochs
    ]


def decays(run: Run, at_tokens: Sequence[int], *, share: float = 0.2) -> list[Run]:
    """One trunk at a constant rate, and for each of `at_tokens` a branch that decays to it over its last `share`.

    A branch forks from the trunk where its decay begins, so that the whole axis of D costs one long run and the
    decays (WSD: arXiv 2404.06395; 1-sqrt over 10 to 20 %: arXiv 2405.18392).  Each is what a run of that length
    with this schedule would be.  The run must have one stage.
    """
    if len(run.curriculum) != 1:
        raise ConfigError(f"{run.name}: a trunk has one stage, not {len(run.curriculum)}")
    stage, name = run.curriculum[0], f"{run.name}-trunk"
    batch = stage.batch_tokens
    ends = [max(2, round(tokens / batch)) * batch for tokens in sorted(at_tokens)]
    begins = [end - max(1, round(share * end / batch)) * batch for end in ends]
    peak, warmup = run.lr.peak, run.lr.warmup_tokens
    if begins[0] < warmup:
        raise ConfigError(f"{run.name}: the decay to {ends[0]:,} tokens begins before the warm-up of {warmup:,} ends")
    trunk = replace(
        run,
        name=name,
        curriculum=(replace(stage, tokens=begins[-1]),),
        lr=LearningRate(kind="constant", peak=peak, end=peak, warmup_tokens=warmup),
        checkpoint=replace(run.checkpoint, permanent_at_tokens=tuple(begins)),
    )
    branches = [
        replace(
            run,
            name=f"{run.name}-d{end:.3g}",
            curriculum=(replace(stage, tokens=end),),
            lr=LearningRate(kind="wsd", peak=peak, end=0.0, warmup_tokens=warmup, decay_tokens=end - begin),
            fork=Fork(run=f"@{name}", tokens=begin),
        )
        for begin, end in zip(begins, ends, strict=True)
    ]
    return [trunk, *branches]


def of_tokens(run: Run, tokens: float) -> Run:
    """The run at another length: stages keep their shares; schedules and the pace of validation stretch with it."""
    whole = sum(stage.tokens for stage in run.curriculum)
    stretch = tokens / whole

    def stretched(stage: Stage) -> Stage:
        length = max(1, round(stage.tokens * stretch))
        return replace(stage, tokens=length, ramp_tokens=min(length, round(stage.ramp_tokens * stretch)))

    lr = {
        name: round(getattr(run.lr, name) * stretch)
        for name in ("warmup_tokens", "horizon_tokens", "flat_until_tokens", "decay_tokens")
    }
    evaluation = replace(run.evaluation, every_tokens=round(run.evaluation.every_tokens * stretch))
    stages = tuple(map(stretched, run.curriculum))
    return replace(run, curriculum=stages, lr=replace(run.lr, **lr), evaluation=evaluation)


def checked(runs: Iterable[Run]) -> list[Run]:
    """The runs; ConfigError when two have one name, or are one and the same run under two names."""
    runs, names, prints = list(runs), {}, {}
    for index, run in enumerate(runs):
        if run.name in names:
            raise ConfigError(f"runs {names[run.name]} and {index} of the sweep are both called {run.name!r}")
        same = prints.get(configio.fingerprint(run))
        if same is not None:
            raise ConfigError(f"{same!r} and {run.name!r} of the sweep are the same run: nothing that counts differs")
        names[run.name], prints[configio.fingerprint(run)] = index, run.name
    return runs


def _several(runs: Runs) -> list[Run]:
    return [runs] if isinstance(runs, Run) else list(runs)


def _set(run: Run, changes: Sequence[tuple[str, Any]]) -> Run:
    words = [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in changes]
    name = "-".join([run.name, *(_label(path, value) for path, value in changes)])
    return replace(configio.override(run, words), name=name)


def _label(path: str, value: Any) -> str:
    """peak0.001 for lr.peak=0.001, mixture-prose0.5-code0.5 for a mixture."""
    field = path.rpartition(".")[2]
    if isinstance(value, Mapping):
        return "-".join([field, *(_label(str(name), part) for name, part in value.items())])
    if isinstance(value, (list, tuple)):
        return field + "x".join(_label("", part) for part in value)
    return f"{field}{value:g}" if isinstance(value, float) and math.isfinite(value) else f"{field}{value}"
