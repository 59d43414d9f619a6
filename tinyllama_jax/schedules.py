"""Curriculum, learning rate and mixture as pure functions of the tokens seen.  No jax, no state.

A *batch border* is a number of tokens at which one batch ends and the next begins.  Stages round up to whole
batches, so every stage starts on a border and the next stage starts at the tokens really consumed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from tinyllama_jax.config import LearningRate, Stage
from tinyllama_jax.errors import ConfigError

# Ramp weights are raw numbers, so a stage in per cent after one in fractions would finish its ramp in the first
# few batches.  Totals further apart than this are taken for such a slip.
_SCALE_SLIP = 10.0


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its place in the run: steps and tokens in [start, end)."""

    name: str
    index: int
    start_step: int
    end_step: int
    start_tokens: int
    end_tokens: int
    start_windows: int  # sequences consumed before the stage
    batch_tokens: int
    batch_sequences: int
    ramp_from: dict[str, float]  # raw weights at the stage's first token; equal to stage.mixture without a ramp
    stage: Stage


class Plan:
    """Steps, tokens and stages of a curriculum.

    Step t (0-based) is the batch that makes line t+1 of the metrics.  Raises ConfigError when the curriculum is
    empty, a batch is not a whole number of sequences, or a ramp joins mixtures on different scales.
    """

    def __init__(self, curriculum: tuple[Stage, ...], sequence_tokens: int):
        if not curriculum:
            raise ConfigError("curriculum has no stage; give it at least one")
        self.sequence_tokens = sequence_tokens
        self.stages: list[PlannedStage] = []
        step = tokens = windows = 0
        for index, stage in enumerate(curriculum):
            if stage.batch_tokens % sequence_tokens:
                raise ConfigError(
                    f"stage {stage.name!r}: batch_tokens={stage.batch_tokens} is not a multiple of "
                    f"data.sequence_tokens={sequence_tokens}; round it to whole sequences"
                )
            steps = -(-stage.tokens // stage.batch_tokens)
            planned = PlannedStage(
                name=stage.name,
                index=index,
                start_step=step,
                end_step=step + steps,
                start_tokens=tokens,
                end_tokens=tokens + steps * stage.batch_tokens,
                start_windows=windows,
                batch_tokens=stage.batch_tokens,
                batch_sequences=stage.batch_tokens // sequence_tokens,
                ramp_from=_ramp_from(stage, curriculum[index - 1] if index else None),
                stage=stage,
            )
            self.stages.append(planned)
            step, tokens = planned.end_step, planned.end_tokens
            windows += steps * planned.batch_sequences
        self.total_steps, self.total_tokens, self.total_windows = step, tokens, windows
        self._step_starts = [s.start_step for s in self.stages]
        self._token_starts = [s.start_tokens for s in self.stages]

    def at_step(self, step: int) -> PlannedStage:
        """The stage of batch `step`, 0 <= step < total_steps; IndexError outside."""
        if step == self.total_steps:
            raise IndexError(f"the run ends before step {step}")
        return self._stage_before(step)

    def at_tokens(self, tokens: int) -> PlannedStage:
        """The stage that consumes the token after `tokens`; the last stage from the end of the run on."""
        return self.stages[max(0, bisect.bisect_right(self._token_starts, tokens) - 1)]

    def _stage_before(self, step: int) -> PlannedStage:
        if not 0 <= step <= self.total_steps:
            raise IndexError(f"step {step} lies outside the run's {self.total_steps} steps")
        return self.stages[bisect.bisect_right(self._step_starts, step) - 1]

    def tokens_at(self, step: int) -> int:
        """Tokens seen before batch `step`; tokens_at(total_steps) == total_tokens."""
        stage = self._stage_before(step)
        return stage.start_tokens + (step - stage.start_step) * stage.batch_tokens

    def windows_at(self, step: int) -> int:
        """Sequences seen before batch `step`."""
        stage = self._stage_before(step)
        return stage.start_windows + (step - stage.start_step) * stage.batch_sequences

    def step_at(self, tokens: int) -> int:
        """The step whose batch starts at exactly `tokens` (total_steps at the end).

        Raises ConfigError naming the nearest batch borders if none lies there.
        """
        if not 0 <= tokens <= self.total_tokens:
            raise ConfigError(f"{tokens} tokens lie outside the run's {self.total_tokens}; choose a point inside it")
        stage = self.at_tokens(tokens)
        steps, rest = divmod(tokens - stage.start_tokens, stage.batch_tokens)
        if rest:
            below = tokens - rest
            raise ConfigError(
                f"no batch border at {tokens} tokens in stage {stage.name!r}; "
                f"the nearest are {below} and {below + stage.batch_tokens}"
            )
        return stage.start_step + steps


def _ramp_from(stage: Stage, previous: Stage | None) -> dict[str, float]:
    if not stage.ramp_tokens:
        if stage.ramp_from:
            raise ConfigError(f"stage {stage.name!r}: ramp_from without ramp_tokens has no effect; set both or neither")
        return dict(stage.mixture)
    if stage.ramp_from:
        return dict(stage.ramp_from)
    if previous is None:
        return dict(stage.mixture)
    before, after = sum(previous.mixture.values()), sum(stage.mixture.values())
    if not 1 / _SCALE_SLIP <= before / after <= _SCALE_SLIP:
        raise ConfigError(
            f"stage {stage.name!r}: its ramp moves raw weights from stage {previous.name!r}, whose mixture adds up to "
            f"{before:g}, to a mixture that adds up to {after:g}; put both on one scale or give ramp_from"
        )
    return dict(previous.mixture)


def mixture_at(plan: Plan, tokens: float) -> dict[str, float]:
    """Normalised share of each source for the token after `tokens`.

    Inside a ramp the *raw* weights move linearly and the shares are normalised afterwards, as TinyLlama v1.1 did:
    SlimPajama stays at 75 while Starcoder rises from 0 to 15 and Proof-Pile from 0 to 10.
    """
    planned = plan.at_tokens(tokens)
    old, new, ramp = planned.ramp_from, planned.stage.mixture, planned.stage.ramp_tokens
    share = min(1.0, (tokens - planned.start_tokens) / ramp) if ramp else 1.0
    names = sorted(set(old) | set(new))
    # At share 1 the old weight must vanish exactly: a source that left must not keep a rounding error of one.
    weights = {name: (1.0 - share) * old.get(name, 0.0) + share * new.get(name, 0.0) for name in names}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def learning_rate(cfg: LearningRate, plan: Plan) -> Callable[[int], float]:
    """Returns f(tokens seen after the batch) -> learning rate.

    With r = (tokens - warmup) / (horizon - warmup), from 0 to 1:
    cosine     end + (peak - end) (1 + cos(pi r)) / 2           (TinyLlama; SGDR, arXiv 1608.03983)
    linear     peak + (end - peak) r
    wsd        peak, then over the last decay_tokens, x from 0 to 1, end + (peak - end) (1 - x) or (1 - sqrt x)
               (arXiv 2404.06395, 2405.18392)
    constant   peak
    piecewise  straight lines between `points`, constant outside them
    Warm-up is linear from 0 at no tokens to the peak at warmup_tokens.  At and beyond the horizon the rate is `end`.
    With flat_until_tokens the peak is held up to that point and the curve is joined where it is by then.
    Raises ConfigError for settings that contradict each other or that the chosen kind would not use.
    """
    horizon = cfg.horizon_tokens or plan.total_tokens
    _check(cfg, horizon)
    warmup, peak, end = cfg.warmup_tokens, cfg.peak, cfg.end

    def curve(tokens: int) -> float:
        if cfg.kind == "constant":
            return peak
        if tokens >= horizon:
            return end
        if cfg.kind == "wsd":
            x = (tokens - (horizon - cfg.decay_tokens)) / cfg.decay_tokens
            if x <= 0:
                return peak
            return end + (peak - end) * (1.0 - (x if cfg.decay_shape == "linear" else math.sqrt(x)))
        r = (tokens - warmup) / (horizon - warmup)
        if cfg.kind == "linear":
            return peak + (end - peak) * r
        return end + 0.5 * (1.0 + math.cos(math.pi * r)) * (peak - end)

    def rate(tokens: int) -> float:
        if cfg.kind == "piecewise":
            return _interpolate(cfg.points, tokens)
        if tokens < warmup:
            return peak * tokens / warmup
        if tokens <= cfg.flat_until_tokens:
            return peak
        return curve(tokens)

    return rate


def _interpolate(points: tuple[tuple[int, float], ...], tokens: int) -> float:
    right = bisect.bisect_right([t for t, _ in points], tokens)
    if right == 0:
        return points[0][1]
    if right == len(points):
        return points[-1][1]
    (t0, y0), (t1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (tokens - t0) / (t1 - t0)


def _check(cfg: LearningRate, horizon: int) -> None:
    unused = {
        "warmup_tokens": cfg.kind == "piecewise",
        "horizon_tokens": cfg.kind in ("constant", "piecewise"),
        "flat_until_tokens": cfg.kind in ("constant", "piecewise"),
        "decay_tokens": cfg.kind != "wsd",
        "points": cfg.kind != "piecewise",
    }
    for name, has_no_effect in unused.items():
        if has_no_effect and getattr(cfg, name):
            raise ConfigError(f"lr.{name} has no effect with lr.kind={cfg.kind}; remove it or choose another kind")
    if cfg.kind == "piecewise":
        if any(rate < 0 for _, rate in cfg.points):
            raise ConfigError("lr.points has a negative rate; rates must be at least 0")
        return
    whose = "lr.horizon_tokens" if cfg.horizon_tokens else "the curriculum's length"
    if cfg.warmup_tokens >= horizon:
        raise ConfigError(f"lr.warmup_tokens={cfg.warmup_tokens} must be shorter than {whose}, {horizon} tokens")
    if cfg.kind == "wsd" and cfg.warmup_tokens + cfg.decay_tokens > horizon:
        raise ConfigError(
            f"lr.warmup_tokens={cfg.warmup_tokens} and lr.decay_tokens={cfg.decay_tokens} together exceed "
            f"{whose}, {horizon} tokens; shorten one of them"
        )
    flat = cfg.flat_until_tokens
    if flat and not cfg.warmup_tokens < flat <= horizon:
        raise ConfigError(
            f"lr.flat_until_tokens={flat} must lie after lr.warmup_tokens={cfg.warmup_tokens} "
            f"and not beyond {whose}, {horizon} tokens"
        )
