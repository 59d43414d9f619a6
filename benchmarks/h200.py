"""The series of one NVIDIA GPU: the 1.1B step beside PyTorch, beside the card's limits, and on real data.

    python benchmarks/h200.py PIECE... [--out DIR] [--torch-python PATH]

Each piece ends within ten minutes and leaves OUT/PIECE/.  After each, all that lie there are put into one record,
OUT/KIND-DATE.json and, with the usual OUT, results/KIND-DATE.json (commit it); then the table of every row tried is
printed.  `all` is one after the other, the most telling first.  Exit status 1 when a piece failed or ran out of time;
the next ones still run.

{pieces}
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pieces
from lines import RESULTS, device, emit, isolated, origin, slug, spread
from pieces import STOP, Piece

# Each alone against none: what the search of train_step.py found fastest need not be what the compiler could do.
FLAGS = {
    "none": "",
    "no-rematerialisation": "--xla_disable_hlo_passes=rematerialization",
    "no-command-buffers": "--xla_gpu_enable_command_buffer=",
    "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "autotune-4": "--xla_gpu_autotune_level=4",
    "memory-slop-125": "--xla_gpu_memory_limit_slop_factor=125",
}
STEP = ("--steps", "20", "--seconds", STOP)


def _flag(name: str) -> Piece:
    command = ("train_step.py", "experiments.speed:gpu_flags", "--steps", "20", "--out", "{out}/train_step.jsonl")
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS", ""), FLAGS[name]]))
    return Piece(f"XLA_FLAGS {FLAGS[name] or 'as they are'}", [command], {"XLA_FLAGS": flags})


def series(torch_python: str) -> dict[str, Piece]:
    versus = ("versus_torch.py", "--device", "cuda", "--experiment", "experiments.speed:gpu_best", "--rounds", "1")
    versus += ("--torch-python", torch_python, "--out", "{out}/versus.jsonl")
    return {
        "ceilings": Piece("what the card does at most: a large product, a large copy", [("h200.py", "--ceilings")]),
        "parity": Piece(
            "errors of attention against float32; proves a kernel for `auto`",
            [("attention.py", "--parity", "--out", "{out}")],
        ),
        "step": Piece(
            "the search: every configuration of experiments.speed:gpu",
            [("train_step.py", "experiments.speed:gpu", *STEP, "--out", "{out}/train_step.jsonl")],
        ),
        "versus": Piece(
            "two of them and PyTorch by turns, compiled by block (the shortest to compile)",
            [(*versus, "--peer-options", "--compile-scope block --loss chunked")],
        ),
        "versus-model": Piece(
            "the same, PyTorch compiled as a whole, bfloat16 weights with masters",
            [(*versus, "--precision", "bf16-master", "--peer-options", "--compile default")],
        ),
        "end-to-end": Piece(
            "a real run, killed and continued: share of the synthetic speed, restart, saves",
            [
                ("real_runs.py", "end-to-end", "experiments.speed:gpu_train", "--kill-after", "30")
                + ("--minimum-share", "0.99", "--max-restart", "60", "--out", "{out}/end_to_end.jsonl")
            ],
        ),
        "exact": Piece(
            "deterministic=true: killed and continued with the same bits, and what that costs",
            [
                ("real_runs.py", "exact", "experiments.speed:exact", "--kill-after", "45")
                + ("--out", "{out}/exact.jsonl")
            ],
        ),
        "checkpoint": Piece(
            "saving and restoring the state of 1.1B parameters",
            [
                ("checkpoint.py", "--preset", "tinyllama-1.1b", "--rounds", "2", "--max-stall", "2")
                + ("--max-restore", "60", "--out", "{out}/checkpoint.jsonl")
            ],
        ),
        "decode": Piece(
            "generation beside the memory's bandwidth: one row, and 64 rows of 1024 tokens",
            [
                ("decode.py", "--preset", "tinyllama-1.1b", "--dtype", "bfloat16", "--pairs", "1x512,64x1024")
                + ("--new", "128", "--copy-gib", "4", "--minimum", "1x512=1200", "--minimum", "64x1024=39000")
                + ("--out", "{out}/decode.jsonl")
            ],
        ),
        "attention": Piece(
            "attention alone, rows of 2048, 32/4 heads: ours, cuDNN and the peers",
            [
                ("attention.py", "--lengths", "2048", "--heads", "32/4", "--documents", "1", "--seconds", STOP)
                + ("--out", "{out}")
            ],
        ),
        **{f"flags-{name}": _flag(name) for name in FLAGS},
    }


__doc__ = __doc__.replace("{pieces}", "\n".join(f"    {n:26}  {p.what}" for n, p in series("python").items()))


# --- the card's own limits


def ceilings(side: int = 8192, copy_bytes: int = 4 << 30, seconds: float = 2.0) -> dict:
    """TFLOP/s of side^3 bfloat16 products of random numbers, GB/s of copies (read and written), on the first device.

    A loop inside of one program, so that nothing but the device is timed.
    """
    import jax
    import jax.numpy as jnp

    def time_of(function, *arguments) -> list[float]:
        loop = jax.jit(lambda n, *a: jax.lax.fori_loop(0, n, lambda _, a: function(*a), a))
        jax.block_until_ready(loop(1, *arguments))
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            jax.block_until_ready(loop(8, *arguments))
            times.append((time.perf_counter() - begin) / 8)
        return times

    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    # Scaled, so that repeated products neither overflow nor become the zeros that are multiplied faster.
    product = time_of(lambda a, b: ((a @ b) * (side**-0.5), b), a, b)
    source = jax.random.normal(jax.random.key(2), (copy_bytes // 4,), jnp.float32)
    copy = time_of(lambda x: (x + 1.0,), source)
    return {
        "gemm_tflops": spread([2 * side**3 / s / 1e12 for s in product]),
        "copy_gb_per_s": spread([2 * copy_bytes / s / 1e9 for s in copy]),
        "gemm_side": side,
    }


# --- the record


def record(out: Path, found: dict) -> dict:
    """All pieces that lie in `out`, their lines without what is the same in all."""
    shared = ("versions", "date", "command")
    parts = {}
    for folder in sorted(path for path in out.iterdir() if (path / "output.log").exists()):
        lines = pieces.lines_of(folder)
        parts[folder.name] = [{k: v for k, v in line.items() if k not in shared} for line in lines]
    return {"benchmark": "h200", "device": found, **origin(), "pieces": parts}


def row(piece: str, line: dict) -> str:
    """A line of the table, from a measurement of train_step.py or of either side of versus_torch.py."""
    name = f"{piece} {line.get('side', '')} {line.get('configuration', '')}".replace("  ", " ")[:34]
    if why := line.get("skipped") or line.get("failed") or line.get("error"):
        return f"{name:34} {why[:86]}"
    speed = line.get("tokens_per_s") or dict.fromkeys(("median", "min", "max"), line["tok_s"])
    memory = line["peak_bytes"] / 2**30 if "peak_bytes" in line else line.get("peak_mem_gib")
    rest = {
        "6.3f": line.get("mfu_palm", line.get("mfu")),
        "6.1f": memory,
        "8.1f": line.get("compile_s", line.get("first_step_s")),
    }
    numbers = [f"{speed[key]:{width},.0f}" for key, width in (("median", 9), ("min", 8), ("max", 8))]
    numbers += [f"{'-':>{form[0]}}" if value is None else f"{value:{form}}" for form, value in rest.items()]
    return f"{name:34} {' '.join(numbers)}"


def table(parts: dict[str, list[dict]]) -> str:
    """Every row tried: tokens per second with its spread, share of the peak, memory, seconds of compilation."""
    rows = [f"{'':34} {'tokens/s':>9} {'min':>8} {'max':>8} {'MFU':>6} {'GiB':>6} {'compile':>8}"]
    lines = [(piece, line) for piece, found in parts.items() for line in found]
    rows += [row(*x) for x in lines if x[1].get("benchmark") == "train_step" or x[1].get("bench") == "train"]
    for _, line in lines:
        if line.get("bench") == "versus_torch":
            rows.append(f"ours over PyTorch: {line.get('ratio')} (fastest steps {line.get('ratio_fastest_step')})")
    by_flag = {
        piece.removeprefix("flags-"): line["tokens_per_s"]["median"]
        for piece, line in lines
        if piece.startswith("flags-") and "tokens_per_s" in line
    }
    if "none" in by_flag:
        rows += [f"flags {name}: {speed / by_flag['none']:.3f} of none" for name, speed in by_flag.items()]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(series("python"))
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="one of those above, or all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS / "h200")), metavar="DIR")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="the Python that has PyTorch")
    parser.add_argument("--limit", type=float, default=pieces.LIMIT, metavar="S", help=f"of a piece ({pieces.LIMIT})")
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ceilings:
        emit({"benchmark": "ceilings", **ceilings(), **origin()})
        return 0
    wanted = names if args.pieces == ["all"] else args.pieces
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        parser.error(f"{' '.join(unknown) or 'no piece'}: choose from {', '.join(names)}, or all")
    found = isolated(device)
    if found["platform"] != "gpu":
        print(f"h200: JAX finds no GPU here, only {found['kind']}; install jax[cuda13]", file=sys.stderr)
        return 78
    out, held, all_pieces = args.out.resolve(), [], series(args.torch_python)
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        shutil.rmtree(out / name, ignore_errors=True)
        held.append(pieces.run(name, all_pieces[name], out, args.limit))
        whole = record(out, found)
        path = out / f"{slug(found['kind'])}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(whole, indent=1) + "\n")
        if out.is_relative_to(RESULTS):
            shutil.copy(path, RESULTS / path.name)
    print(table(whole["pieces"]))
    print(f"h200: {path}", file=sys.stderr)
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
