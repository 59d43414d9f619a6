"""Speed of the project's own training step on random tokens: one JSON object per model, on stdout.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --preset tinyllama-1.1b --batch-sequences 64 --micro-batch-sequences 16 --remat full

A step's time is the time between two readings of metrics, as in training: step t+1 is dispatched before the metrics of
step t are read.  Reading tokens from a store is not part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import typing
from collections.abc import Sequence

import jax
import numpy as np

from tinyllama_jax import attention, flops
from tinyllama_jax.config import Data, Execution, Mesh, Model, Run, Stage, UserError, replace
from tinyllama_jax.presets import preset
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import computing, make_mesh, replicated
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step as train_step

# What two CPU cores train in minutes; the size of the demo.
SMALL = Model(vocab_size=2048, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=32, d_ff=352, context_tokens=256)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    choices = {field: typing.get_args(hint) for field, hint in typing.get_type_hints(Execution).items()}
    parser = argparse.ArgumentParser(description="Speed of the training step; one JSON object per model on stdout.")
    parser.add_argument("--preset", action="append", help="repeatable; default: by what the devices can do")
    parser.add_argument("--sequence-tokens", type=int, help="default: the model's context, at most 2048")
    parser.add_argument("--batch-sequences", type=int, default=8, help="per optimizer step, over all devices")
    parser.add_argument("--micro-batch-sequences", type=int, default=0, help="0 = the whole batch at once")
    parser.add_argument("--remat", choices=choices["remat"], default="none", help="execution.remat")
    parser.add_argument("--attention", choices=choices["attention"], default="auto", help="execution.attention")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute dtype; default: the model's")
    parser.add_argument("--replica", type=int, default=1, help="mesh.replica; the other devices are mesh.data")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    return parser.parse_args(arguments)


def measure(name: str, model: Model, args: argparse.Namespace) -> dict:
    if args.dtype:
        model = replace(model, compute_dtype=args.dtype)
    length = args.sequence_tokens or min(model.context_tokens, 2048)
    batch_tokens = args.batch_sequences * length
    run = Run(
        name="benchmark",
        model=model,
        data=Data(store="-", sequence_tokens=length),
        curriculum=(Stage(name="main", tokens=batch_tokens, batch_tokens=batch_tokens, mixture={"random": 1.0}),),
        execution=Execution(
            attention=args.attention, remat=args.remat, micro_batch_sequences=args.micro_batch_sequences
        ),
        mesh=Mesh(replica=args.replica),
    )
    mesh = make_mesh(run.mesh)
    train_step.check_batches(run, Plan(run.curriculum, length), mesh)
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (args.batch_sequences, length + 1), np.int32)
    batch = {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "documents": np.zeros((args.batch_sequences, length), np.int32),
        "valid": np.ones((args.batch_sequences, length), bool),
    }
    with computing(mesh, model.compute_dtype):
        state = train_state.init(run, mesh)
        run_step = train_step.make_train_step(run)
        accumulation = train_step.accumulation_steps(run, args.batch_sequences)

        def dispatch(index: int):
            nonlocal state
            placed = train_step.put_batch(batch, accumulation, mesh, documents=False)
            lr, number = jax.device_put((np.float32(1e-4), np.int32(index)), replicated(mesh))
            state, metrics = run_step(state, placed, lr, number)
            return metrics

        begin = time.perf_counter()
        jax.device_get(dispatch(0))
        first_s = time.perf_counter() - begin
        jax.device_get(dispatch(1))
        pending, seconds, last = dispatch(2), [], time.perf_counter()
        for index in range(3, 3 + args.steps):
            following = dispatch(index)
            loss = float(jax.device_get(pending)["loss"])
            now = time.perf_counter()
            seconds.append(now - last)
            pending, last = following, now
        jax.device_get(pending)
    assert np.isfinite(loss), f"loss is {loss}"
    median = statistics.median(seconds)
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind)
    memory = device.memory_stats() or {}
    return {
        "benchmark": "train_step",
        "model": name,
        "parameters": flops.parameter_counts(model)["total"],
        "shape": {"d_model": model.d_model, "layers": model.layers, "heads": model.heads, "kv_heads": model.kv_heads},
        "vocab_size": model.vocab_size,
        "dtype": model.compute_dtype,
        "sequence_tokens": length,
        "batch_sequences": args.batch_sequences,
        "micro_batches": accumulation,
        "remat": args.remat,
        "attention": attention.choose(args.attention)[0],
        "tokens_per_s": round(batch_tokens / median, 1),
        "step_ms": {
            "median": round(1000 * median, 3),
            "p10": round(1000 * float(np.quantile(seconds, 0.1)), 3),
            "p90": round(1000 * float(np.quantile(seconds, 0.9)), 3),
        },
        "steps": args.steps,
        "first_step_s": round(first_s, 2),  # compilation is most of it
        "mfu_palm": peak
        and round(flops.flops_per_token(model, length) * batch_tokens / median / peak / jax.device_count(), 4),
        "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30 or None,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
    }


def main() -> int:
    args = options()
    try:
        if args.preset:
            models = {name: preset(name) for name in args.preset}
        elif jax.default_backend() == "cpu":
            models = {"small": SMALL}
        else:
            models = {name: preset(name) for name in ("tinyllama-120m", "tinyllama-1.1b")}
        for name, model in models.items():
            print(json.dumps(measure(name, model, args)), flush=True)
    except UserError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
