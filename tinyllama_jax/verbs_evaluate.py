"""What `eval` and `score` do."""

from __future__ import annotations

import argparse

from tinyllama_jax.config import Mesh
from tinyllama_jax.terminal import answer
from tinyllama_jax.train import saved
from tinyllama_jax.verbs_generate import load_rows


def evaluate(args: argparse.Namespace) -> None:
    saved.resolve(args.checkpoint)  # before jax is imported
    from tinyllama_jax.evaluate.measure import measure

    value = measure(
        args.checkpoint,
        corpus=args.corpus,
        sequences=args.sequences,
        sequence_tokens=args.sequence_tokens,
        baselines=args.baselines,
        dtype=args.dtype,
    )
    answer(args, value, table(value))


def table(value: dict) -> list[str]:
    lines = [f"{value['checkpoint']}: step {value['step']}, {value['tokens']:,} tokens"]
    lines.append(f"  {'domain':<14}{'nats/token':>12}{'bits/byte':>12}{'tokens':>12}")
    for domain, d in value["domains"].items():
        lines.append(f"  {domain:<14}{d['loss']:>12.4f}{d['bits_per_byte']:>12.4f}{d['tokens']:>12,}")
    if "baselines" in value:
        lines.append(f"n-grams fitted on the {value['baselines']['fitted_on_tokens']:,} tokens that the run saw:")
        lines.append(f"  {'domain':<14}{'model':>12}{'bigram':>12}{'unigram':>12}   nats/token")
        for domain, b in value["baselines"]["domains"].items():
            losses = [b[kind]["loss"] for kind in ("model", "bigram", "unigram")]
            verdict = "below both" if losses[0] < min(losses[1:]) else "NOT below both"
            lines.append(f"  {domain:<14}" + "".join(f"{x:>12.4f}" for x in losses) + f"   {verdict}")
    return lines


def score(args: argparse.Namespace) -> None:
    saved.resolve(args.checkpoint)  # before jax is imported
    rows = load_rows(args.tokens)
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import score as scoring
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, args.dtype):
        loaded = load(args.checkpoint, mesh, dtype=args.dtype)
        nll_BT = scoring.score(loaded.params, loaded.model, Execution(), mesh, rows)
    value = {"nll": nll_BT.tolist(), "mean_nll": float(nll_BT.mean(dtype="float64"))}
    per_row = [f"row {i}: {row.mean():.4f}" for i, row in enumerate(nll_BT)]
    answer(args, value, [*per_row, f"mean: {value['mean_nll']:.6f} nats per token over {nll_BT.size} tokens"])
