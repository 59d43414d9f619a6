"""The ramp of TinyLlama v1.1 Math&Code as its batches are really made up, beside the formula.

    python benchmarks/ramp.py        # half a minute, no data

Over the first 6 billion tokens of the second stage the weights of StarCoder and Proof-Pile grow linearly from 0 to 15
and 10 while SlimPajama's stays at 75.  So at a share u of the ramp SlimPajama is due 75 / (75 + 25 u) of the draws, and
up to there, of a ramp of N windows, the integral 3 N ln(1 + u / 3); StarCoder and Proof-Pile share the rest, 3 : 2.

Draws the rows of every batch of the ramp, compares what was drawn with what was due after every row, and writes
results/ramp_v1_1_math_code.json and .png.  Exit status 1 when a source is ever further from its due than one window.
"""

# ruff: noqa: E402  (experiments/ is found through the repository's folder)

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import numpy as np
from lines import RESULTS, ROOT, origin

sys.path.insert(0, str(ROOT))

from experiments.tinyllama import v1_1_math_code
from tinyllama_jax.config import Run
from tinyllama_jax.data.order import Order
from tinyllama_jax.schedules import Plan

SOURCES = ("slimpajama", "starcoder", "proofpile")
# Windows of each: of no importance for how many are drawn when, only for which.
WINDOWS = {"slimpajama": 290_000_000, "starcoder": 122_000_000, "proofpile": 27_000_000}
ALLOWED = 1.0  # windows


class Ramp(NamedTuple):
    """steps S, sources N in the order of SOURCES."""

    tokens_S: np.ndarray  # since the ramp began, at the end of each batch
    share_SN: np.ndarray  # of each batch
    formula_SN: np.ndarray  # in the middle of each batch
    low_SN: np.ndarray  # least and largest distance of what was drawn from what was due after any row of the batch
    high_SN: np.ndarray


def due(windows: np.ndarray, ramp_windows: float) -> np.ndarray:
    """What each source is due after so many windows [R] of the stage: float64 [R, N]."""
    u = np.minimum(windows / ramp_windows, 1)
    slim = 3 * ramp_windows * np.log1p(u / 3) + 0.75 * np.maximum(windows - ramp_windows, 0)
    return np.stack([slim, 0.6 * (windows - slim), 0.4 * (windows - slim)], axis=1)


def measure(run: Run, every: int = 1) -> Ramp:
    """The rows of each batch of the ramp, or of every so many-th, as the order draws them."""
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    order = Order(plan, WINDOWS, run.seed, run.data.epochs)
    stage = plan.stages[1]
    rows = stage.batch_sequences
    ramp_windows = stage.stage.ramp_tokens / run.data.sequence_tokens
    steps = np.arange(0, -(-stage.stage.ramp_tokens // stage.batch_tokens), every)
    begun, found = order.counts(stage.start_step), []
    for step in steps.tolist():
        source, _ = order.rows(stage.start_step + step)
        drawn = np.stack([np.cumsum(source == order.sources.index(name)) for name in SOURCES], axis=1)
        before = order.counts(stage.start_step + step)
        count = np.array([before[name] - begun[name] for name in SOURCES])
        beyond = count + drawn - due(step * rows + np.arange(1, rows + 1), ramp_windows)
        found.append((drawn[-1] / rows, beyond.min(axis=0), beyond.max(axis=0)))
    share, low, high = (np.stack(column) for column in zip(*found, strict=True))
    u = np.minimum((steps + 0.5) * rows / ramp_windows, 1)[:, None]
    formula = np.array([75, 15, 10]) * np.concatenate([np.ones_like(u), u, u], axis=1) / (75 + 25 * u)
    return Ramp((steps + 1) * stage.batch_tokens, share, formula, low, high)


def record(ramp: Ramp) -> dict:
    farthest = np.maximum(-ramp.low_SN.min(axis=0), ramp.high_SN.max(axis=0))
    return {
        "benchmark": "ramp",
        "claim": f"after every row each source has had what the ramp's integral says, within {ALLOWED:g} window",
        **origin(),
        "tokens": int(ramp.tokens_S[-1]),
        "batches": len(ramp.tokens_S),
        "farthest_from_due_windows": dict(zip(SOURCES, farthest.round(4).tolist(), strict=True)),
        "first_batch_shares": dict(zip(SOURCES, ramp.share_SN[0].round(4).tolist(), strict=True)),
        "last_batch_shares": dict(zip(SOURCES, ramp.share_SN[-1].round(4).tolist(), strict=True)),
    }


def plot(ramp: Ramp, path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from tinyllama_jax.lab.draw import GREY, INK, PALETTE, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        shares, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        billions = ramp.tokens_S / 1e9
        for index, name in enumerate(SOURCES):
            shares.plot(billions, ramp.share_SN[:, index], color=PALETTE[index], linewidth=3, alpha=0.5)
            shares.plot(billions, ramp.formula_SN[:, index], color=INK, linewidth=0.8)
            shares.text(billions[-1] * 1.01, ramp.formula_SN[-1, index], name, color=PALETTE[index], va="center")
            for farthest in (ramp.low_SN, ramp.high_SN):
                distance.plot(billions, farthest[:, index], color=PALETTE[index], linewidth=0.8)
        for limit in (-1, 1):
            distance.axhline(limit, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        shares.set_ylabel("share of each batch")
        shares.set_title("colours: drawn; thin lines: formula", loc="left", color=GREY)
        distance.set_ylabel("windows drawn – due")
        distance.set_xlabel("billion tokens since the ramp began")
        figure.savefig(path, dpi=100)


def main() -> int:
    ramp = measure(v1_1_math_code())
    value = record(ramp)
    print(json.dumps(value, indent=1))
    if max(value["farthest_from_due_windows"].values()) > ALLOWED:
        print("ramp: a source strayed further than a window from its due", file=sys.stderr)
        return 1
    (RESULTS / "ramp_v1_1_math_code.json").write_text(json.dumps(value, indent=1) + "\n")
    plot(ramp, RESULTS / "ramp_v1_1_math_code.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
