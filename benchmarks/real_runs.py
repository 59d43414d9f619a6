"""Whole runs with everything on: how much of the synthetic speed is left, what a restart costs, are the bits the same.

    python benchmarks/real_runs.py end-to-end experiments.speed:gpu_train --kill-after 30
    python benchmarks/real_runs.py exact experiments.speed:exact --kill-after 45

end-to-end  a run is killed (-9) and started again, with real data, records and checkpoints, and no compiled programs at
            first.  `share` is its speed over that of the same step on random tokens (train_step.py), of steps that
            neither compile nor follow a save; `loop_ms` what reading, records and the loop itself add to such a step
            (experiments.speed:host has next to nothing to compute); `saves_s` how long each save held the loop;
            `first_step_s` how long the first step was waited for, and `restart_s` the same after the kill, reading the
            checkpoint included.
exact       a whole run beside one that was killed and continued: ok when every loss has the same bits.  A third run
            without execution.deterministic says what it costs (`cost`: its speed over the deterministic one's, less 1).

One JSON line.  Exit status 1 when a claim fails: --minimum-share, --max-restart, or bits that differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import train_step
from lines import ROOT, emit, origin, spread

from tinyllama_jax.errors import UserError


def records(run: Path, name: str) -> list[dict]:
    """The complete lines of a run's NAME.jsonl."""
    path = run / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in records(run, "metrics")]


def train(experiment: str, workdir: Path, settings: Sequence[str], *, kill_after: int | None = None) -> int | None:
    """Trains to the end, or kills it (-9) once so many steps are recorded; -> the steps that were there then.

    Raises RuntimeError when the run fails, or ends before it can be killed.
    """
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "tinyllama_jax", "train", experiment, *words, "--workdir", workdir]
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        while kill_after is not None and process.poll() is None and len(losses_of(workdir)) < kill_after:
            time.sleep(0.02)
        if kill_after is not None and process.poll() is None:
            process.kill()  # SIGKILL: it cannot prepare for it
        status = process.wait()
    finally:
        process.kill()
    if kill_after is None:
        if status:
            raise RuntimeError(f"{experiment} in {workdir} ended with {status}")
        return None
    if status != -signal.SIGKILL:
        raise RuntimeError(f"{experiment} ended with {status} before it could be killed after step {kill_after}")
    return len(losses_of(workdir))


def steady(run: Path) -> list[float]:
    """Tokens per second of the steps that neither compiled nor came right after a start, a save or a validation."""
    lines = records(run, "metrics")
    after = {e["step"] + 1 for e in records(run, "events") if e["kind"] in ("start", "saved", "evaluated")}
    # The device still writes or copies during the step after the next.
    calm = [x for x in lines if not x["timing"].get("compiled") and not {x["step"], x["step"] - 1} & after]
    return [x["timing"]["tokens_per_s"] for x in calm]


def end_to_end(experiment: str, settings: Sequence[str], kill_after: int, steps: int, folder: Path) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # so that the first start has to compile
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    settings, workdir = [*settings, f"data.store={folder / 'store'}"], folder / "run"
    killed = train(experiment, workdir, settings, kill_after=kill_after)
    train(experiment, workdir, settings)
    run = train_step.runs_of(experiment, settings)[0]
    synthetic = train_step.attempt(run, steps)
    events, speeds = records(workdir, "events"), steady(workdir)
    if "tokens_per_s" not in synthetic or not speeds:
        raise RuntimeError(f"nothing to compare: {synthetic}, {len(speeds)} steady steps")
    starts, first = ([e for e in events if e["kind"] == kind] for kind in ("start", "first_step"))
    waits = [line["timing"]["data_wait_s"] for line in records(workdir, "metrics")]
    tokens = run.curriculum[0].batch_tokens
    with_loop, without = tokens / statistics.median(speeds), tokens / synthetic["tokens_per_s"]["median"]
    return {
        "tokens_per_s": spread(speeds),
        "synthetic_tokens_per_s": synthetic["tokens_per_s"],
        "share": round(without / with_loop, 4),
        "loop_ms": round(1000 * (with_loop - without), 3),
        "data_wait_s": spread(waits[1:]),
        "saves_s": spread([e["seconds"] for e in events if e["kind"] == "saved"]),
        "first_step_s": round(first[0]["seconds"], 2),
        "first_step_compile_s": first[0]["compile_s"],
        "restart_s": round(first[-1]["seconds"], 2),
        "restart_compile_s": first[-1]["compile_s"],
        "restore_s": round(starts[-1]["restore_s"], 2),
        "killed_after_step": killed,
        "continued": starts[-1]["how"],
        "steps": len(waits),
        **{key: synthetic[key] for key in ("device", "parameters", "batch_sequences", "micro_batches", "attention")},
        **{key: synthetic[key] for key in ("mfu_palm", "mfu_causal", "peak_bytes") if key in synthetic},
    }


def exact(experiment: str, settings: Sequence[str], kill_after: int, folder: Path) -> dict:
    """Losses of a whole run beside those of one that was killed and continued; and the speed of a third one."""
    settings = [*settings, f"data.store={folder / 'store'}"]
    whole, broken, free = folder / "whole", folder / "broken", folder / "free"
    train(experiment, whole, settings)
    killed = train(experiment, broken, settings, kill_after=kill_after)
    train(experiment, broken, settings)
    train(experiment, free, [*settings, "execution.deterministic=false"])
    one, other = losses_of(whole), losses_of(broken)
    speeds = {name: statistics.median(steady(folder / name)) for name in ("whole", "free")}
    return {
        "ok": one == other and one[-1] < one[0],
        "steps": len(one),
        "equal_steps": sum(a == b for a, b in zip(one, other, strict=True)),
        "largest_difference": max(abs(a - b) for a, b in zip(one, other, strict=True)),
        "killed_after_step": killed,
        "continued": [e["how"] for e in records(broken, "events") if e["kind"] == "start"][-1],
        "first_loss": one[0],
        "last_loss": one[-1],
        "cost": round(speeds["free"] / speeds["whole"] - 1, 4),
        "tokens_per_s": speeds["whole"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["end-to-end", "exact"])
    parser.add_argument("experiment", metavar="MODULE:FUNCTION")
    parser.add_argument("--kill-after", type=int, required=True, metavar="STEP", help="behind the first checkpoint")
    parser.add_argument("--steps", type=int, default=20, help="measured steps on random tokens (20)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minimum-share", type=float, default=0.0, metavar="SHARE", help="of the synthetic speed")
    parser.add_argument("--max-restart", type=float, default=float("inf"), metavar="S")
    parser.add_argument("--workdir", type=Path, help="where the runs go; default: the temporary directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the line there too")
    args = parser.parse_args(arguments)
    failed = []
    with tempfile.TemporaryDirectory(prefix="real-runs-", dir=args.workdir) as name:
        try:
            train_step.runs_of(args.experiment, args.set)  # wrong words are told before anything runs
            if args.what == "exact":
                found = exact(args.experiment, args.set, args.kill_after, Path(name))
                failed += [] if found["ok"] else [f"{found['steps'] - found['equal_steps']} losses differ"]
            else:
                found = end_to_end(args.experiment, args.set, args.kill_after, args.steps, Path(name))
                if found["share"] < args.minimum_share:
                    failed.append(f"{found['share']} of the synthetic speed, claimed {args.minimum_share}")
                if found["restart_s"] > args.max_restart:
                    failed.append(f"a restart took {found['restart_s']} s, claimed {args.max_restart}")
        except UserError as error:
            print(f"real_runs: {error}", file=sys.stderr)
            return error.exit_status
        except RuntimeError as error:
            found, failed = {}, [str(error)]
    line = {"benchmark": args.what, "experiment": args.experiment, **found, "failed": failed, **origin()}
    with args.out.open("w") if args.out else open(os.devnull, "w") as file:
        emit(line, file)
    for text in failed:
        print(f"real_runs: {text}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
