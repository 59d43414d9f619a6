"""Attention on its own: how fast, and how exact, each implementation is on this machine's device.

    python benchmarks/attention.py             speeds: JSON lines, a table last
    python benchmarks/attention.py --parity    errors against float32: benchmarks/results/attention-KIND.json
    python benchmarks/attention.py --implementations triton,cudnn --lengths 8192 --heads 32/32

Speeds are of implementation x documents per row x direction x shape: on a GPU or TPU 16,384 tokens in rows of 2048 and
8192, 32 query heads on 4 and 32 key/value heads of 64, bfloat16; on a CPU something small that shows the program works.
TFLOP/s count what is visible (attention_contenders.operations).  With documents, `speedup_over_causal` is over the same
implementation's time without, and `of_ideal` that times the share of blocks that are left to visit.

Inputs are standard normal, another set for each of the calls of a program, and each call waits for the one before.
Programs are called without a pause until a sample is long enough to read a clock by; a time is the median of the
samples.  What cannot run here is a line with `skipped` and the reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attention_contenders as contenders
import attention_parity
import jax
from attention_contenders import Shape, Unable
from lines import RESULTS, emit, isolated, origin, slug, spread

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.flops import peak_flops

DIRECTIONS = ("forward", "forward_backward")


def program(run: Callable, direction: str) -> Callable:
    """(sets of (q, k, v, do), more) -> results of one call per set, each after the one before."""

    def one(q, k, v, do, more):
        if direction == "forward":
            return (run(q, k, v, *more),)
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, *more), q, k, v)
        return out, *pull(do)

    def several(sets, more):
        results = []
        for arrays in sets:
            if results:  # kernels that do not depend on each other may run at the same time
                arrays, results[-1] = jax.lax.optimization_barrier((arrays, results[-1]))
            results.append(one(*arrays, more))
        return results

    return jax.jit(several)


def timed(call: Callable[[], Any], calls: int, samples: int, sample_s: float) -> list[float]:
    """Seconds per attention call, of which `call` makes `calls`, one number per sample."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - begin
    repeats = max(1, round(sample_s / once))
    found = []
    for sample in range(samples + 1):
        begin = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        if sample:  # the first one warms up
            found.append((time.perf_counter() - begin) / (repeats * calls))
    return found


def cell(name: str, shape: Shape, per_row: int, direction: str, args: argparse.Namespace) -> dict:
    """The numbers of one cell, or `skipped`."""
    ids = contenders.document_ids(shape, per_row)
    try:
        entrant = contenders.contender(name, shape, ids)
        sets = [contenders.arrays(shape, seed, entrant.context) for seed in range(args.sets)]
        with entrant.context():
            begin = time.perf_counter()
            compiled = program(entrant.run, direction).lower(sets, entrant.more).compile()
            compile_s = time.perf_counter() - begin
            seconds = timed(lambda: compiled(sets, entrant.more), args.sets, args.samples, args.sample_seconds)
    except (Unable, ConfigError) as error:
        return {"skipped": str(error)}
    except Exception as error:  # a peer may fail in many ways, and the others are still worth their time
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text:
            return {"skipped": "does not fit the device's memory"}
        return {"skipped": f"{type(error).__name__}: {text[:300]}"}
    ms = spread([1000 * s for s in seconds])
    rate = contenders.operations(shape, ids, direction) / (ms["median"] / 1000)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "ms": ms,
        "tflops": round(rate / 1e12, 4),
        **({"of_peak": round(rate / peak, 4)} if peak else {}),
        "block_ratio": round(contenders.ideal_ratio(shape, ids), 4),
        **({"documents_as": entrant.documents_as} if ids is not None else {}),
        "compile_s": round(compile_s, 2),
    }


def speeds_of(name: str, args: argparse.Namespace, common: dict) -> list[dict]:
    """All cells of one implementation, each a line as soon as it is measured; for a process of its own."""
    device, found = jax.devices()[0].device_kind, []
    with args.file.open("a") as file:
        for shape in args.shapes:
            for direction in args.directions:
                causal = None
                for per_row in args.documents:
                    line = {"benchmark": "attention", "implementation": name, "documents": per_row}
                    line |= {"direction": direction, **shape._asdict()}
                    if time.time() > args.until:
                        line |= {"skipped": "no time left"}
                    else:
                        line |= cell(name, shape, per_row, direction, args)
                    if per_row == 1 and "ms" in line:
                        causal = line["ms"]["median"]
                    elif causal and "ms" in line:
                        speedup = causal / line["ms"]["median"]
                        line |= {
                            "speedup_over_causal": round(speedup, 3),
                            "of_ideal": round(speedup * line["block_ratio"], 3),
                        }
                    found.append(line)
                    emit({**line, "device": device, **common}, file)
    return found


def table(lines: list[dict]) -> str:
    """What was measured, for a terminal; reasons for what was not, once per implementation."""
    rows = [f"{'':18} {'shape':>14} {'docs':>4} {'direction':>16} {'ms':>9} {'TFLOP/s':>8} {'of ideal':>8}"]
    skipped = {}
    for line in lines:
        if "ms" not in line:
            skipped.setdefault((line["implementation"], line["skipped"]), None)
            continue
        shape = f"{line['rows']}x{line['tokens']} {line['heads']}/{line['kv_heads']}"
        rows.append(
            f"{line['implementation']:18} {shape:>14} {line['documents']:4} {line['direction']:>16} "
            f"{line['ms']['median']:9.3f} {line['tflops']:8.1f} {line.get('of_ideal', ''):>8}"
        )
    return "\n".join(rows + [f"{name}: {why}"[:160] for name, why in skipped])


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parity", action="store_true", help="errors instead of speeds; exit status 1 past the limit")
    parser.add_argument(
        "--implementations", help="comma-separated; default: all (--parity: the kernels for this device)"
    )
    parser.add_argument("--documents", default="1,2,4,8", help="per row (1,2,4,8)")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--tokens", type=int, help="of all rows (16384; on a CPU 512)")
    parser.add_argument("--lengths", help="tokens of a row (2048,8192; on a CPU 256)")
    parser.add_argument("--heads", help="query heads/key-value heads (32/4,32/32; on a CPU 4/2)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--sample-seconds", type=float, default=0.05, help="least length of a sample (0.05)")
    parser.add_argument("--sets", type=int, default=4, help="sets of inputs, one per call of a program (4)")
    parser.add_argument("--seconds", type=float, default=3600, help="nothing is begun later (3600)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    args.until = time.time() + args.seconds
    return args


def settle(args: argparse.Namespace, on_cpu: bool) -> None:
    """Defaults by the kind of device, and the shapes.  Raises ConfigError for words that are none of the choices."""
    tokens = args.tokens or (512 if on_cpu else 16_384)
    lengths = [int(n) for n in (args.lengths or ("256" if on_cpu else "2048,8192")).split(",")]
    heads = [tuple(map(int, h.split("/"))) for h in (args.heads or ("4/2" if on_cpu else "32/4,32/32")).split(",")]
    args.complete = not (args.tokens or args.lengths or args.heads or on_cpu) and args.head_dim == 64
    args.documents = [int(n) for n in args.documents.split(",")]
    args.directions = args.directions.split(",")
    unknown = set(args.directions) - set(DIRECTIONS)
    if unknown:
        raise ConfigError(f"--directions: {', '.join(unknown)} is none of {', '.join(DIRECTIONS)}")
    if any(tokens % n for n in lengths):
        raise ConfigError(f"--tokens {tokens} is not a multiple of every one of --lengths {lengths}")
    args.shapes = [Shape(tokens // n, n, *h, args.head_dim, args.dtype) for n in lengths for h in heads]


def here() -> dict:
    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "everyone": contenders.everyone_here(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    found = isolated(here)  # this process must not hold the device
    try:
        settle(args, found["platform"] == "cpu")
    except (ConfigError, ValueError) as error:
        print(f"attention: {error}", file=sys.stderr)
        return 2
    common, kind = origin(), slug(found["kind"])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.parity:
        names = args.implementations.split(",") if args.implementations else attention_parity.KERNELS[found["platform"]]
        return attention_parity.report(names, args, args.out / f"attention-{kind}.json", {**found, **common})
    args.file = args.out / f"attention-speed-{kind}.jsonl"
    args.file.write_text("")
    measured = []
    for name in args.implementations.split(",") if args.implementations else found["everyone"]:
        try:
            measured += isolated(speeds_of, name, args, common)
        except concurrent.futures.process.BrokenProcessPool:
            why = {"implementation": name, "skipped": "its process ended; cells measured before that are in the file"}
            measured.append(why)
            with args.file.open("a") as file:
                emit({"benchmark": "attention", **why, "device": found["kind"], **common}, file)
    print(table(measured))
    return 0 if any("ms" in line for line in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
