"""A run directory as the trainer would have written it, made up: three stages, a ramped mixture, a cosine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

PARAMETERS = {"total": 4_732_160, "non_embedding": 4_207_872, "embedding": 524_288}


def lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(
    directory: Path,
    *,
    name: str = "three-stages",
    steps: int = 900,
    taken: int | None = None,
    validation_every: int = 60,
    sequence_tokens: int = 256,
    shift: float = 0.0,
    domains: tuple[str, ...] = ("prose", "code"),
    bad_loss: tuple[int, ...] = (),
    prompt: str = "def main(",
    text: str = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    return 0",
    extras: bool = True,
) -> Path:
    """Write `taken` of `steps` planned steps; `extras` are baselines, samples and events."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    borders = [0, max(1, steps // 2), max(2, 4 * steps // 5), steps]
    batches = [16 * sequence_tokens, 32 * sequence_tokens, 32 * sequence_tokens]
    mixtures = [[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]]
    weights = [np.resize(m, len(domains)) / np.resize(m, len(domains)).sum() for m in mixtures]
    stages, tokens = [], 0
    for stage, begin, end, batch in zip(("base", "more-code", "cooldown"), borders, borders[1:], batches, strict=False):
        stages.append(dict(name=stage, start_step=begin, end_step=end, start_tokens=tokens, batch_tokens=batch))
        tokens += (end - begin) * batch
        stages[-1]["end_tokens"] = tokens
    total, ramp = tokens, (stages[1]["end_tokens"] - stages[1]["start_tokens"]) // 2
    curriculum = [
        dict(name=s["name"], tokens=s["end_tokens"] - s["start_tokens"], batch_tokens=s["batch_tokens"],
             mixture=dict(zip(domains, w.tolist(), strict=True)), ramp_tokens=ramp if i == 1 else 0)
        for i, (s, w) in enumerate(zip(stages, weights, strict=True))
    ]  # fmt: skip
    info = {
        "name": name,
        "fingerprint": "3f9c2a7e51d0",
        "config": {"name": name, "curriculum": curriculum, "optimizer": {"clip_norm": 1.0}},
        "plan": {"stages": stages, "total_steps": steps, "total_tokens": total},
        "model": {"parameters": PARAMETERS, "train_flops_per_token": {"palm": 31_000_000, "causal": 28_500_000}},
        "versions": {"python": "3.12.3", "jax": "0.12.0", "flax": "0.12.12"},
        "devices": {"kind": "NVIDIA H100 80GB HBM3", "count": 8, "mesh": {"replica": 1, "data": 8}},
    }
    (directory / "run.json").write_text(json.dumps(info), encoding="utf-8")

    metrics, validation, epochs, seen, clock = [], [], np.zeros(len(domains)), 0, 1.75e9
    for step in range(1, (steps if taken is None else taken) + 1):
        index = next(i for i, s in enumerate(stages) if step <= s["end_step"])
        stage = stages[index]
        blend = min(1.0, (seen - stage["start_tokens"]) / ramp) if index == 1 else 1.0
        wanted = weights[max(index - 1, 0)] * (1 - blend) + weights[index] * blend
        rows = rng.multinomial(stage["batch_tokens"] // sequence_tokens, wanted) * sequence_tokens
        seen += stage["batch_tokens"]
        epochs += rows / (total * np.resize([0.45, 0.18], len(domains)))
        share = rows / rows.sum()
        floor = 2.35 + shift + 5.2 * np.exp(-step / (0.03 * steps)) + 1.1 * np.exp(-step / (0.3 * steps))
        loss = float(floor - 0.5 * share[-1] + rng.normal(0, 0.09) + (2.5 if step in (271, 640) else 0.0))
        rate = 1e-3 * min(1.0, step / (0.05 * steps)) * (0.55 + 0.45 * np.cos(np.pi * seen / total))
        duration = float((14.0 if step == 1 else 0.21) * stage["batch_tokens"] / batches[0] * rng.gamma(200, 1 / 200))
        clock += duration
        speed = 0.21 * stage["batch_tokens"] / batches[0] / duration
        metrics.append({
            "step": step, "tokens": seen, "loss": float("nan") if step in bad_loss else loss, "lr": float(rate),
            "grad_norm": float(rng.gamma(20, 1 / 20) * (0.35 + 3 * np.exp(-step / (0.02 * steps)))
                               + (6 if step in (271, 640) else 0)),
            "param_norm": 60 + 22 * float(np.sqrt(step / steps)), "skipped": int(step in (271, 640)),
            "stage": stage["name"], "epoch": dict(zip(domains, epochs.tolist(), strict=True)),
            "mixture": dict(zip(domains, share.tolist(), strict=True)),
            "timing": {"step_s": duration, "data_wait_s": float(rng.gamma(2, 0.0008)),
                       "tokens_per_s": stage["batch_tokens"] / duration, "mfu_palm": 0.41 * speed,
                       "mfu_causal": 0.37 * speed, "time": clock}
                      | ({"compiled": True} if step in (1, borders[1] + 1) else {}),
        })  # fmt: skip
        if validation_every and (step % validation_every == 0 or step == steps):
            values = {d: float(floor + 0.25 - 0.35 * i) for i, d in enumerate(domains)}
            measured = {
                d: {"loss": v, "bits_per_byte": v / np.log(2) / 3.1, "tokens": 16384} for d, v in values.items()
            }
            validation.append({"step": step, "tokens": seen, "domains": measured, "timing": {"seconds": 1.2}})
    lines(directory / "metrics.jsonl", metrics)
    if validation:
        lines(directory / "validation.jsonl", validation)
    if extras and validation:
        lines(directory / "samples.jsonl", [
            {"step": s, "tokens": s * batches[0], "prompt": p, "text": t}
            for s in (borders[1], steps) for p, t in ((prompt, text), ("The world is", " not a list of strings."))
        ])  # fmt: skip
        lines(directory / "events.jsonl", [
            {"kind": "start", "step": 0, "how": "started from fresh weights", "time": "2025-06-15T15:06:40.000+00:00"},
            {"kind": "checkpoint_set_aside", "step": 480, "time": "2025-06-15T15:08:11+00:00", "path": "480.corrupt"},
            {"kind": "resume", "step": 450, "time": "2025-06-15T15:08:12.251+00:00", "devices": 8},
        ])  # fmt: skip
        scores = {
            d: {order: {"loss": level - 0.4 * i, "bits_per_byte": (level - 0.4 * i) / np.log(2) / 3.1}
                for order, level in (("unigram", 5.9), ("bigram", 4.1))}
            | {"model": {k: validation[-1]["domains"][d][k] for k in ("loss", "bits_per_byte")}}
            for i, d in enumerate(domains)
        }  # fmt: skip
        (directory / "baselines.json").write_text(json.dumps({"fitted_on_tokens": total, "domains": scores}))
    return directory
