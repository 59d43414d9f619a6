"""Run directories as the trainer would have written them: real configurations, few steps, chosen losses."""

import json
from pathlib import Path

from quick_experiment import quick
from synthetic_run import lines

from tinyllama_jax import configio
from tinyllama_jax.config import replace
from tinyllama_jax.schedules import Plan


def made(directory: Path, run=None, *, losses=(5.0, 4.0, 3.0), taken=None, info=None, se=0.01, **fields) -> Path:
    """A run directory with a step for each batch until `taken`, and validations spread evenly over all steps."""
    run = replace(run or quick(), **fields)
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    begin = plan.step_at(run.fork.tokens) if run.fork else 0
    stages = [{k: getattr(s, k) for k in ("name", "start_step", "end_step", "start_tokens", "end_tokens")}
              | {"batch_tokens": s.batch_tokens} for s in plan.stages]  # fmt: skip
    described = {
        "name": run.name,
        "fingerprint": configio.fingerprint(run),
        "config": configio.to_dict(run),
        "plan": {"stages": stages, "total_steps": plan.total_steps, "total_tokens": plan.total_tokens},
        **(info or {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(described))
    taken = plan.total_steps if taken is None else taken
    lines(directory / "metrics.jsonl", [
        {"step": s, "tokens": plan.tokens_at(s), "loss": 6.0 - s / 100, "batch_tokens": 128,
         "timing": {"time": 1e9 + s, "step_s": 1.0, "tokens_per_s": 100.0 + s}}
        for s in range(begin + 1, taken + 1)
    ])  # fmt: skip
    at = [round(plan.total_steps * (i + 1) / len(losses)) for i in range(len(losses))]
    lines(directory / "validation.jsonl", [
        {"step": s, "tokens": plan.tokens_at(s),
         "domains": {d: {"loss": loss + shift, "loss_se": se, "bits_per_byte": loss / 2, "tokens": 99}
                     for d, shift in (("prose", 0.5), ("code", -0.5))}}
        for s, loss in zip(at, losses, strict=True) if s <= taken
    ])  # fmt: skip
    return directory


def names(found: list[dict]) -> list[str]:
    return [row["name"] for row in found]
