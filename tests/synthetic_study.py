"""Runs tables as sweeps would have made them, made up: isoFLOP profiles, repetition, GQA, RoPE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tinyllama_jax.lab.fit import chinchilla, repeated
from tinyllama_jax.lab.fit.points import Points

TRUE = {"A": 60.0, "B": 90.0, "E": 0.9, "alpha": 0.34, "beta": 0.33}
OF_EVERY_RUN = {
    "status": "finished", "seed": 0, "store": "5a1e", "tokenizer": "70c5", "git": "a29e616", "version": "0.6.0",
    "jax": "0.12.0", "device_kind": "cpu", "devices": 1, "sequence_tokens": 128, "weight_decay": 0.1,
    "config.optimizer.weight_decay": 0.1, "config.model.rope.kind": "default", "config.model.rope.theta": 10_000.0,
    "config.seed": 0,
}  # fmt: skip


def row(name: str, n: float, d: float, loss: float, **more) -> dict:
    """A finished run of n parameters and d tokens; `more` replaces and adds columns."""
    n, d = int(n), int(d)
    width = max(1, round((n / 12) ** (1 / 3)))
    found = {
        **OF_EVERY_RUN, "name": name, "directory": name, "fingerprint": name, "parameters": n, "tokens": d,
        "planned_tokens": d, "own_tokens": d, "unique_tokens": max(d, 50_000_000), "epochs": 1.0, "flops": 6.0 * n * d,
        "loss": loss, "loss_se": 0.004, "best_loss": loss, "train_loss": loss - 0.03, "steps": d // 1024,
        "tokens_per_s": 4e10 / n, "seconds": n * d / 4e10, "lr": 1e-2, "config.name": name,
        "config.model.d_model": width,
        "config.model.layers": max(1, width // 24), "config.curriculum.0.name": "main", "config.curriculum.0.tokens": d,
        "config.curriculum.0.batch_tokens": 1024, "config.curriculum.0.mixture.prose": 0.5,
        "config.curriculum.0.mixture.code": 0.5, "config.data.sequence_tokens": 128, "config.model.kv_heads": 4,
        "config.lr.peak": 1e-2,
    }  # fmt: skip
    return found | more | {"config.seed": more.get("seed", 0)}


def isoflop(budgets=(1e12, 2e12, 4e12, 8e12), sizes: int = 5, noise: float = 0.002, spread: float = 3.0) -> list[dict]:
    rng, rows = np.random.default_rng(1), []
    for budget in budgets:
        best = chinchilla.optimum(TRUE, budget)["N"]
        for n in best * spread ** np.linspace(-1, 1, sizes):
            n = int(n)
            loss = float(chinchilla.loss(TRUE, n, budget / 6 / n) * np.exp(noise * rng.normal()))
            rows.append(row(f"isoflop-c{budget:.0e}-n{n:.2g}", n, budget / 6 / n, loss))
    return rows


def repetition(unique=(3e5, 1e6, 3e6), passes=(1, 2, 4, 8, 16), decays=(0.1, 1.0), sizes=(1e5, 2e5, 4e5)) -> list[dict]:
    """All passes at the middle size, the first and the third of them at the others."""
    rng, rows = np.random.default_rng(2), []
    for decay in decays:
        for n in sizes:
            for u in unique:
                for e in passes if n == sizes[len(sizes) // 2] else passes[:3:2]:
                    at = Points.of([n], [u * e], [1.0], U=[u])
                    star = np.log([[6.0 if decay < 0.5 else 18.0, 5.0]])
                    worse = 0.0 if decay > 0.5 else 0.004 * max(0, e - 4) ** 1.3 * (3e5 / u) ** 0.5
                    loss = np.exp(repeated.Effective(TRUE).at(at)(star)[0][0, 0]) * np.exp(0.003 * rng.normal()) + worse
                    gap = 0.02 * (e - 1) * (1e6 / u) ** 0.5 * (1 if decay < 0.5 else 0.5)
                    rows.append(row(
                        f"repeat-n{n:.0e}-u{u:.0e}-e{e}-wd{decay}", n, u * e, float(loss), unique_tokens=int(u),
                        epochs=float(e), weight_decay=decay, best_loss=float(loss - worse * 0.7),
                        **{"gap.prose": gap, "seen_loss.prose": float(loss - gap), "config.data.unique_tokens": int(u),
                           "config.optimizer.weight_decay": decay},
                    ))  # fmt: skip
    return rows


def gqa(seeds: int = 3) -> list[dict]:
    rng, rows = np.random.default_rng(3), []
    for layers, width in ((6, 96), (8, 192)):
        for seed in range(seeds):
            shared = 0.02 * rng.normal()
            for kv in (8, 4, 1):
                n = 12 * layers * width**2 * (0.9 + 0.012 * kv)
                loss = 3.4 - 0.25 * np.log10(n / 1e6) + 0.008 * (3 - np.log2(kv)) + shared + 0.003 * rng.normal()
                measured = {
                    f"measure.decode.b{b}.c{c}.tokens_per_s": b * 4e3 / (1 + kv * b * c / 3e4) / layers
                    for b, c in ((1, 128), (8, 128), (8, 1024))
                }
                rows.append(row(
                    f"gqa-l{layers}-kv{kv}-seed{seed}", n, 4e6, float(loss), seed=seed,
                    **{"config.model.layers": layers, "config.model.d_model": width, "config.model.kv_heads": kv,
                       "measure.cache_bytes_per_token": 2 * layers * kv * 16 * 2, **measured},
                ))  # fmt: skip
    return rows


def rope(seeds: int = 3) -> list[dict]:
    rng, rows = np.random.default_rng(4), []
    for kind, theta in (("default", 1e4), ("default", 1e5), ("partial", 1e4), ("none", 1e4)):
        for seed in range(seeds):
            base = 2.9 + {"none": 0.05, "partial": 0.01}.get(kind, 0.0) + 0.004 * rng.normal()
            measured = {}
            for method in ("none", "linear", "ntk", "yarn"):
                for length in (128, 256, 512, 1024):
                    over = max(0.0, np.log2(length / 128))
                    worse = {"none": 0.9, "linear": 0.35, "ntk": 0.2, "yarn": 0.12}[method] * over
                    measured[f"measure.beyond.{method}.{length}.loss"] = base + worse + 0.01 * rng.normal()
                at = np.linspace(0, 1024, 64)
                rise = {"none": 1.5, "linear": 0.5, "ntk": 0.3, "yarn": 0.15}[method] * np.log2(np.maximum(at / 128, 1))
                curve = base + 0.8 * np.exp(-at / 40) + rise + 0.02 * rng.normal(size=64)
                measured[f"measure.beyond.{method}.1024.by_position"] = curve.tolist()
            rows.append(row(
                f"rope-{kind}-{theta:.0e}-seed{seed}", 5e5, 4e6, float(base), seed=seed,
                **{"config.model.rope.kind": kind, "config.model.rope.theta": theta, **measured},
            ))  # fmt: skip
    return rows


def write_table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def write_directories(folder: Path, rows: list[dict], points: int = 12, steps: int = 60) -> None:
    """The run directories behind the rows, with as much as a curve needs."""
    for i, each in enumerate(rows):
        directory, total = folder / each["directory"], each["tokens"]
        directory.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        info = {"name": each["name"], "plan": {"total_steps": steps, "total_tokens": total}}
        (directory / "run.json").write_text(json.dumps(info))

        def loss(t, each=each, total=total):
            return each["loss"] + 2.0 * ((max(t, 1e-3 * total) / total) ** -0.25 - 1)

        marks = [(s, int(total * s / steps)) for s in range(1, steps + 1)]
        metrics = [{"step": s, "tokens": t, "loss": float(loss(t) + 0.05 * rng.normal())} for s, t in marks]
        validation = [
            {"step": s, "tokens": t, "domains": {d: {"loss": float(loss(t)) + x} for d, x in (("a", -0.1), ("b", 0.1))}}
            for s, t in [(0, 0), *marks[steps // points - 1 :: steps // points]]
        ]
        for name, records in (("metrics", metrics), ("validation", validation)):
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
