"""Speed of the project's own training step on random tokens: one JSON object per configuration, on stdout.

    python benchmarks/train_step.py experiments.smoke:demo
    python benchmarks/train_step.py experiments.effectiveness:gpu --steps 20
    python benchmarks/train_step.py experiments.tinyllama:tinyllama_120m --set execution.remat=none --set mesh.data=1

An experiment returns a Run or a list of Runs.  Measured is the first stage's batch, by the program that `train` runs.
Each configuration has a process of its own, so that memory is its own and an end of the process costs one line only.
The first one is the base of the ratios.

A step's time is the time between two readings of metrics, as in training: step t+1 is dispatched before the metrics of
step t are read.  Reading tokens from a store is not part of it.  A configuration that cannot run here is a line with
`skipped` or `failed`.  Exit status 1 when one failed, or none was measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lines import ROOT, emit, isolated, origin, spread

from tinyllama_jax import attention, configio, flops, mesh_rules
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, UsageError, UserError
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import computing, make_mesh, replicated
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step as train_step

WARM_UP = 3  # steps after the first that are not counted
DOCUMENTS = 4  # in a row, of random lengths, where the run masks documents


def runs_of(experiment: str, settings: Sequence[str]) -> list[Run]:
    """The Run or Runs of `module:function`, each with the settings.  Raises UsageError or ConfigError."""
    module_name, _, function_name = experiment.partition(":")
    for folder in (str(ROOT), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise UsageError(f"experiment {experiment!r}: {error}; write it as module:function") from error
    given = function()
    runs = list(given) if isinstance(given, (list, tuple)) else [given]
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise ConfigError(f"experiment {experiment!r} returned neither a Run nor a list of Runs")
    return [configio.override(run, settings) for run in runs]


def batch_of(run: Run, sequences: int) -> dict[str, np.ndarray]:
    """Random tokens, every position predicted; with document masking DOCUMENTS documents to a row."""
    length, random = run.data.sequence_tokens, np.random.default_rng(0)
    windows = random.integers(0, run.model.vocab_size, (sequences, length + 1), np.int32)
    borders = np.sort(random.integers(1, length, (sequences, DOCUMENTS - 1)), axis=1)
    documents = (np.arange(length) >= borders[:, :, None]).sum(axis=1).astype(np.int32)
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "documents": documents,
        "valid": np.ones((sequences, length), bool),
    }


def measure(run: Run, steps: int) -> dict:
    """One configuration's speed and memory on the devices of this process; raises ConfigError if it does not fit them.

    tokens_per_s        of all devices, over `steps` steps
    trace_s, compile_s  until the program is there; a persistent compilation cache is not used
    first_step_s        its first execution
    cpu_s               on a CPU: processor time of a step, of all cores, which other programs disturb less
    mfu_palm, _causal   share of the devices' peak; absent where the peak is not known (flops.py has the conventions)
    peak_bytes          most memory in use on the first device; absent where the device does not tell
    compiled_bytes      what the compiler's account says one device needs: arguments, results, temporaries
    """
    jax.config.update("jax_enable_compilation_cache", False)
    # A mesh of stated size takes so many devices; with -1 it takes all.
    stated = [getattr(run.mesh, axis) for axis in mesh_rules.AXES]
    mesh = make_mesh(run.mesh, None if -1 in stated else jax.devices()[: math.prod(stated)])
    length = run.data.sequence_tokens
    plan = Plan(run.curriculum, length)
    mesh_rules.check(run, plan.stages, mesh.shape)
    sequences = plan.stages[0].batch_sequences
    accumulation = mesh_rules.accumulation_steps(run, sequences)
    batch = batch_of(run, sequences)
    with computing(mesh, run.model.compute_dtype):
        chosen, _ = attention.choose(run.execution.attention, attention.Call.of(run))
        state = train_state.init(run, mesh)

        def inputs(index: int) -> tuple:
            placed = train_step.put_batch(batch, accumulation, mesh, documents=run.data.document_masking)
            return placed, *jax.device_put((np.float32(1e-4), np.int32(index)), replicated(mesh))

        def dispatch(index: int) -> Any:
            nonlocal state
            state, metrics = program(state, *inputs(index))
            return metrics

        begin = time.perf_counter()
        lowered = train_step.make_train_step(run).lower(state, *inputs(0))
        traced = time.perf_counter()
        program = lowered.compile()
        compiled = time.perf_counter()
        jax.block_until_ready((dispatch(0), state))
        first = time.perf_counter()
        for index in range(1, WARM_UP):
            jax.device_get(dispatch(index))
        pending, seconds, last = dispatch(WARM_UP), [], time.perf_counter()
        cpu = time.process_time()
        for index in range(WARM_UP + 1, WARM_UP + 1 + steps):
            following = dispatch(index)
            loss = float(jax.device_get(pending)["loss"])
            now = time.perf_counter()
            seconds.append(now - last)
            pending, last = following, now
        cpu_s = (time.process_time() - cpu) / steps
        jax.block_until_ready((pending, state))
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    device = jax.devices()[0]
    tokens = sequences * length
    peak = run.tracking.peak_flops_per_device or flops.peak_flops(device.device_kind)
    rate = tokens / statistics.median(seconds)
    memory, account = device.memory_stats() or {}, program.memory_analysis()
    return {
        "tokens_per_s": spread([tokens / s for s in seconds]),
        "step_ms": spread([1000 * s for s in seconds]),
        **({"cpu_s": float(f"{cpu_s:.4g}")} if device.platform == "cpu" else {}),
        "trace_s": round(traced - begin, 2),
        "compile_s": round(compiled - traced, 2),
        "first_step_s": round(first - compiled, 3),
        **(
            {
                f"mfu_{convention}": round(
                    flops.flops_per_token(run.model, length, convention) * rate / peak / mesh.size, 4
                )
                for convention in ("palm", "causal")
            }
            if peak
            else {}
        ),
        **({"peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}),
        "compiled_bytes": account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes,
        "last_loss": round(loss, 4),
        "attention": chosen,
        "parameters": flops.parameter_counts(run.model)["total"],
        "sequence_tokens": length,
        "batch_sequences": sequences,
        "micro_batches": accumulation,
        **({"documents_per_row": DOCUMENTS} if run.data.document_masking else {}),
        "execution": configio.to_dict(run.execution),
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
    }


def tried(run: Run, steps: int) -> dict:
    """`measure`, or why there is nothing: `skipped` for what this device cannot do, `failed` for what it should."""
    try:
        return measure(run, steps)
    except UserError as error:
        return {"skipped": str(error)}
    except Exception as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text:
            return {"skipped": f"does not fit the device's memory: {text[:300]}"}
        return {"failed": f"{type(error).__name__}: {text[:1000]}"}


def attempt(run: Run, steps: int) -> dict:
    """`tried` in a process of its own, which may end."""
    try:
        return isolated(tried, run, steps)
    except concurrent.futures.process.BrokenProcessPool:
        return {"failed": "its process ended without an exception"}


def changed(base: Run, run: Run) -> dict[str, Any]:
    """The settings in which `run` differs from `base`, but for the name: {'execution.remat': 'full'}."""

    def leaves(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {where: value}
        return {k: v for key, part in value.items() for k, v in leaves(part, f"{where}.{key}".strip(".")).items()}

    before, after = (leaves(configio.to_dict(r), "") for r in (base, run))
    return {key: value for key, value in after.items() if key != "name" and before.get(key) != value}


def ratios(measured: list[list[dict]]) -> list[dict]:
    """Speed, memory and compile time of each configuration over those of the first one, from all their rounds.

    speed is the ratio of the medians of all rounds; speed_min and speed_max are over the single rounds, each against
    the base of its own round, so that what the machine did meanwhile shows.
    """

    def median(lines: list[dict], key: str) -> float:
        values = [line[key]["median"] if isinstance(line[key], dict) else line[key] for line in lines]
        return statistics.median(values)

    base, found = measured[0], []
    for lines in measured:
        pairs = [(b, m) for b, m in zip(base, lines, strict=True) if "tokens_per_s" in b and "tokens_per_s" in m]
        if not pairs:
            found.append({})
            continue
        by_round = [m["tokens_per_s"]["median"] / b["tokens_per_s"]["median"] for b, m in pairs]
        bases, own = zip(*pairs, strict=True)
        found.append(
            {
                "speed": round(median(own, "tokens_per_s") / median(bases, "tokens_per_s"), 3),
                "speed_min": round(min(by_round), 3),
                "speed_max": round(max(by_round), 3),
                **({"cpu_s": round(median(own, "cpu_s") / median(bases, "cpu_s"), 3)} if "cpu_s" in own[0] else {}),
                "compiled_bytes": round(median(own, "compiled_bytes") / median(bases, "compiled_bytes"), 3),
                "compile_s": round(median(own, "compile_s") / max(median(bases, "compile_s"), 0.01), 2),
            }
        )
    return found


def table(names: list[str], found: list[dict]) -> str:
    """The ratios for a terminal; `cpu` is processor time, on a CPU."""
    width = max(map(len, names))
    rows = [f"{'':{width}}  {'speed':>6}  {'(rounds)':>13}  {'cpu':>6}  {'memory':>6}  {'compile':>7}"]
    for name, ratio in zip(names, found, strict=True):
        if not ratio:
            rows.append(f"{name:{width}}  not measured")
            continue
        rounds = f"{ratio['speed_min']:.2f} - {ratio['speed_max']:.2f}"
        rows.append(
            f"{name:{width}}  {ratio['speed']:6.2f}  {rounds:>13}  {ratio.get('cpu_s', '-'):>6}  "
            f"{ratio['compiled_bytes']:6.2f}  {ratio['compile_s']:7.2f}"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?", default="experiments.smoke:demo", help="module:function")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in every configuration")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (20)")
    parser.add_argument("--rounds", type=int, default=1, help="times each is measured, every other time backwards (1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no configuration is begun later")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.rounds < 1:
        parser.error("--steps and --rounds must be positive")
    try:
        runs = runs_of(args.experiment, args.set)
    except UserError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return error.exit_status
    begin, common = time.monotonic(), {"experiment": args.experiment, **origin()}
    measured: list[list[dict]] = [[] for _ in runs]
    with args.out.open("w") if args.out else open(os.devnull, "w") as file:
        for round_ in range(args.rounds):
            order = range(len(runs)) if round_ % 2 == 0 else reversed(range(len(runs)))
            for index in order:
                run = runs[index]
                in_time = time.monotonic() - begin <= args.seconds
                line = attempt(run, args.steps) if in_time else {"skipped": "no time left"}
                measured[index].append(line)
                head = {"benchmark": "train_step", "configuration": run.name, "changed": changed(runs[0], run)}
                emit({**head, "round": round_, **line, **common}, file)
        found = ratios(measured)
        if len(runs) > 1:
            names = [run.name for run in runs]
            by_name = dict(zip(names, found, strict=True))
            emit({"benchmark": "train_step_ratios", "base": runs[0].name, "ratios": by_name, **common}, file)
            print(table(names, found), file=sys.stderr)
    failed = any("failed" in line for lines in measured for line in lines)
    return 1 if failed or not any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
