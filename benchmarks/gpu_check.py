"""Does the program train on this machine's GPU, exactly, precisely and how fast: one call, one JSON object per line.

    python benchmarks/gpu_check.py                                  # about 8 minutes; jax[cuda13], one NVIDIA GPU
    python benchmarks/gpu_check.py --cpu --preset t15 --steps 3 --sequence-tokens 128    # tries it out

resume     experiments.smoke:tiny twice, once killed and continued: the losses of every step side by side.
precision  the first steps of a model in bfloat16 and in float32, from the same weights on the same batch.
speed      the training step at several micro-batch sizes and rematerialisation policies (benchmarks/train_step.py).

Lines go to stdout and to gpu_check.jsonl in --out.  `ok` is null, and `why` says why, where the memory or the time was
not enough for a speed.  Exit status 1 when a check failed or no speed was measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from lines import RESULTS, device, isolated, versions
from real_runs import losses_of, records, train

NEEDED = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "sentencepiece", "tokenizers", "tqdm")

# (sequences in a micro-batch, remat, attention), the most promising first, in case the time does not suffice.
SPEEDS = (
    (8, "save_dots_and_attention", "auto"),
    (8, "none", "auto"),
    (16, "save_dots_and_attention", "auto"),
    (8, "full", "auto"),
    (8, "save_dots_and_attention", "triton"),
    (8, "save_dots_and_attention", "hopper"),
    (8, "save_dots", "xla"),
    (16, "full", "auto"),
)
RESUME_TOLERANCE = 0.02  # nats: sums in another order, amplified over 270 steps; a wrong batch or state is far above
PRECISION_TOLERANCE = 0.002  # of the loss; a bfloat16 has 8 bits, but a loss averages over tokens (CPU, 15M: 3e-5)


# -- resume ------------------------------------------------------------------------------------------------


def resume(directory: Path, kill_after: int = 130) -> dict:
    """Losses of a whole run beside those of one that was killed after `kill_after` steps and continued."""
    whole, broken = directory / "whole", directory / "broken"
    experiment, settings = "experiments.smoke:tiny", [f"data.store={directory / 'store'}"]
    begin = time.perf_counter()
    train(experiment, whole, settings)
    seconds = time.perf_counter() - begin
    killed_at = train(experiment, broken, settings, kill_after=kill_after)
    train(experiment, broken, settings)
    one, other = losses_of(whole), losses_of(broken)
    worst = max((abs(a - b) for a, b in zip(one, other, strict=True)), default=float("inf"))
    continued = [e["how"] for e in records(broken, "events") if e["kind"] == "start"][-1]
    return {
        "ok": worst <= RESUME_TOLERANCE and one[-1] < one[0] - 1 and continued.startswith("resumed"),
        "steps": len(one),
        "killed_after_step": killed_at,
        "continued": continued,
        "first_loss": one[0],
        "last_loss": one[-1],
        "last_loss_after_resume": other[-1],
        "equal_steps": sum(a == b for a, b in zip(one, other, strict=True)),
        "largest_difference": worst,
        "tolerance": RESUME_TOLERANCE,
        "whole_run_s": round(seconds, 1),
    }


# -- precision ---------------------------------------------------------------------------------------------


def first_losses(preset_name: str, dtype: str, steps: int, sequences: int, length: int) -> list[float]:
    """Losses of `steps` steps on one and the same random batch."""
    import jax
    import numpy as np

    from tinyllama_jax.config import Data, Execution, Run, Stage, replace
    from tinyllama_jax.presets import preset
    from tinyllama_jax.sharding import computing, make_mesh, replicated
    from tinyllama_jax.train import state as train_state
    from tinyllama_jax.train import step as train_step

    model = replace(preset(preset_name), compute_dtype=dtype)
    tokens = sequences * length
    run = Run(
        name="precision",
        model=model,
        data=Data(store="-", sequence_tokens=length),
        curriculum=(Stage(name="main", tokens=tokens, batch_tokens=tokens, mixture={"random": 1.0}),),
        execution=Execution(remat="full"),
    )
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (sequences, length + 1), np.int32)
    batch = {"tokens": windows[:, :-1], "targets": windows[:, 1:], "valid": np.ones((sequences, length), bool)}
    mesh = make_mesh(run.mesh)
    losses = []
    with computing(mesh, dtype):
        state, run_step = train_state.init(run, mesh), train_step.make_train_step(run)
        placed = train_step.put_batch(batch, 1, mesh, documents=False)
        for index in range(steps):
            lr, number = jax.device_put((np.float32(1e-4), np.int32(index)), replicated(mesh))
            state, metrics = run_step(state, placed, lr, number)
            losses.append(float(metrics["loss"]))
    return losses


def precision(preset_name: str, steps: int, sequences: int = 2, length: int = 512) -> dict:
    """bfloat16 beside float32, step by step."""
    exact, rounded = (isolated(first_losses, preset_name, d, steps, sequences, length) for d in ("float32", "bfloat16"))
    worst = max(abs(a - b) / a for a, b in zip(exact, rounded, strict=True))
    return {
        "ok": worst <= PRECISION_TOLERANCE and exact[-1] < exact[0],
        "model": preset_name,
        "batch_sequences": sequences,
        "sequence_tokens": length,
        "float32_losses": exact,
        "bfloat16_losses": rounded,
        "largest_relative_difference": worst,
        "tolerance": PRECISION_TOLERANCE,
    }


# -- speed -------------------------------------------------------------------------------------------------


def speed(preset_name: str, steps: int, length: int, micro: int, remat: str, attention: str) -> dict:
    """What benchmarks/train_step.py measures, two micro-batches to a step; or why there is nothing."""
    import train_step

    from tinyllama_jax.config import Data, Execution, Run, Stage
    from tinyllama_jax.presets import preset

    tokens = 2 * micro * length
    run = Run(
        name="speed",
        model=preset(preset_name),
        data=Data(store="-", sequence_tokens=length),
        curriculum=(Stage(name="main", tokens=tokens, batch_tokens=tokens, mixture={"random": 1.0}),),
        execution=Execution(micro_batch_sequences=micro, remat=remat, attention=attention),
    )
    result = train_step.tried(run, steps)
    if "failed" in result:
        raise RuntimeError(result["failed"])
    if "skipped" in result:
        return {"ok": None, **named(micro, remat, attention), "why": result["skipped"]}
    return {"ok": True, "model": preset_name, **named(micro, remat, attention), **result}


def named(micro: int, remat: str, attention: str) -> dict:
    return {"micro_batch_sequences": micro, "remat": remat, "attention": attention}


# ----------------------------------------------------------------------------------------------------------


def missing() -> list[str]:
    """Modules that the program cannot run without and that are absent here, or too old."""
    names = []
    for name in (*NEEDED, "tinyllama_jax.train.loop"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            names.append(error.name or name)
    return list(dict.fromkeys(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinyllama-1.1b", help="for precision and speed (tinyllama-1.1b)")
    parser.add_argument("--steps", type=int, default=8, help="per measurement (8)")
    parser.add_argument("--sequence-tokens", type=int, default=2048, metavar="N", help="for speed (2048)")
    parser.add_argument("--seconds", type=float, default=400, help="no measurement of speed begins later (400)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; says nothing about a GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    args = parser.parse_args()
    begin = time.monotonic()
    absent = missing()
    if absent:
        print(f"gpu_check: not installed, or too old: {', '.join(absent)}; see requirements.txt", file=sys.stderr)
        return 1
    if args.cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # one process at a time has the GPU to itself
    found = isolated(device)
    if not args.cpu and found["platform"] != "gpu":
        print(f"gpu_check: JAX finds no GPU here, only {found['kind']}; install jax[cuda13], or --cpu", file=sys.stderr)
        return 1
    common = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": found,
        "versions": versions(),
    }
    verdicts = []
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch, (args.out / "gpu_check.jsonl").open("a") as file:
        # The continued run is the program of the whole one, chosen kernels included, and need not be compiled again.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(scratch) / "cache")
        checks = [("resume", resume, (Path(scratch),)), ("precision", precision, (args.preset, args.steps))]
        checks += [("speed", isolated, (speed, args.preset, args.steps, args.sequence_tokens, *how)) for how in SPEEDS]
        for name, function, arguments in checks:
            if name == "speed" and time.monotonic() - begin > args.seconds:
                result = {"ok": None, **named(*arguments[-3:]), "why": "no time left"}
            else:
                try:
                    result = function(*arguments)
                except Exception as error:  # whatever it is, the other checks are still worth their time
                    result = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
            verdicts.append((name, result["ok"]))
            line = json.dumps({"check": name, **result, **common})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    failed = sorted({name for name, ok in verdicts if ok is False})
    if ("speed", True) not in verdicts:
        failed.append("speed (nothing measured)")
    seconds = time.monotonic() - begin
    print(f"gpu_check: {', '.join(failed) or 'nothing'} failed; {seconds:.0f} s; {file.name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
