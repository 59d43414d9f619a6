"""A step's line in metrics.jsonl."""

from __future__ import annotations

import time

import jax

from tinyllama_jax import flops
from tinyllama_jax.config import Run
from tinyllama_jax.data.order import Order
from tinyllama_jax.finetune.preference import METRICS
from tinyllama_jax.schedules import Plan


class Record:
    """Turns a step's raw metrics into its line in metrics.jsonl.  Whatever the clock decides is under `timing`."""

    def __init__(self, run: Run, plan: Plan, order: Order):
        self.run, self.plan, self.order = run, plan, order
        self.flops = {c: flops.of_run(run, c) for c in ("palm", "causal")}
        device_peak = run.tracking.peak_flops_per_device or flops.peak_flops(jax.devices()[0].device_kind)
        self.peak = device_peak * jax.device_count() if device_peak else None

    def __call__(self, index: int, metrics: dict, rate, *, seconds: float, waited: float, compiled: bool) -> dict:
        stage, tokens = self.plan.at_step(index), self.plan.tokens_at(index + 1)
        before, after = self.order.counts(index), self.order.counts(index + 1)
        speed = stage.batch_tokens / seconds
        timing = {"time": time.time(), "step_s": seconds, "data_wait_s": waited, "tokens_per_s": speed}
        if compiled:
            timing["compiled"] = True  # this step's time includes compilation
        if self.peak:
            timing |= {f"mfu_{c}": speed * f / self.peak for c, f in self.flops.items()}
        return {
            "step": index + 1,
            "tokens": tokens,
            "loss": metrics["loss"],
            # with optimizer.z_loss, and of pairs
            **{name: metrics[name] for name in ("z_loss", *METRICS) if name in metrics},
            "lr": rate(tokens),
            "grad_norm": metrics["grad_norm"],
            "param_norm": metrics["param_norm"],
            "skipped": int(metrics["skipped"]),
            "valid_tokens": int(metrics["valid_tokens"]),
            "stage": stage.name,
            "batch_tokens": stage.batch_tokens,
            "mixture": {s: (after[s] - before[s]) / stage.batch_sequences for s in after},
            "epoch": self.order.epoch(index + 1),
            "flops": self.flops["palm"] * tokens,
            "timing": timing,
        }
