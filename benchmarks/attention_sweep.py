"""Times the Triton kernels over block sizes, one pass at a time: what to write into their table (attention/triton.py).

    python benchmarks/attention_sweep.py                     on an NVIDIA GPU; at most 12 configurations a pass
    python benchmarks/attention_sweep.py --passes dq,dkv --lengths 8192

The forward pass is timed alone, dq and dkv within forward and backward, where the other passes stay as the table has
them.  A line of JSON per configuration: `block` is (held, walked, warps, stages), null for the table's, which comes
first; `ratio` is the time over that one's.  What does not compile or fit is a line with `skipped`.  The list at the end
is sorted by time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attention as speeds
import jax
from attention_contenders import Shape
from lines import RESULTS, emit, isolated, origin, slug

from tinyllama_jax.attention import triton

# (held, walked, warps, stages): powers of two around what others found best at this shape.
CANDIDATES = (
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (128, 32, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (64, 128, 4, 3),
    (64, 32, 4, 3),
)
DIRECTION = {"fwd": "forward", "dq": "forward_backward", "dkv": "forward_backward"}


def measure(which: str, block: Sequence[int] | None, shape: Shape, per_row: int, args: argparse.Namespace) -> dict:
    """One configuration of one pass, or the table's where `block` is None; for a process of its own."""
    name = "triton" if jax.default_backend() != "cpu" else "interpret:triton"
    if block is not None:
        for key, blocks in triton.BLOCKS.items():
            triton.BLOCKS[key] = blocks._replace(**{which: triton.Block(*block)})
    return speeds.cell(name, shape, per_row, DIRECTION[which], args)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", default="fwd,dq,dkv")
    parser.add_argument("--lengths", default="2048")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--heads", default="32/4")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--documents", default="1")
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="only so many of them")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--sample-seconds", type=float, default=0.05)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3600, help="nothing is begun later (3600)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    unknown = set(args.passes.split(",")) - set(DIRECTION)
    if unknown:
        parser.error(f"--passes: {', '.join(unknown)} is none of {', '.join(DIRECTION)}")
    kind, until = isolated(speeds.here)["kind"], time.time() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = map(int, args.heads.split("/"))
    rows, common = [], {"benchmark": "attention_sweep", "device": kind, **origin()}
    with (args.out / f"attention-sweep-{slug(kind)}.jsonl").open("w") as file:
        for length in map(int, args.lengths.split(",")):
            shape = Shape(args.tokens // length, length, heads, kv_heads, args.head_dim)
            for per_row in map(int, args.documents.split(",")):
                for which in args.passes.split(","):
                    usual = None
                    for block in (None, *CANDIDATES[: args.candidates]):
                        line = {"pass": which, "block": block, "documents": per_row, **shape._asdict()}
                        if time.time() > until:
                            line["skipped"] = "no time left"
                        else:
                            try:
                                line |= isolated(measure, which, block, shape, per_row, args)
                            except concurrent.futures.process.BrokenProcessPool:
                                line["skipped"] = "its process ended without an exception"
                        if "ms" in line:
                            usual = usual or line["ms"]["median"]
                            line["ratio"] = round(line["ms"]["median"] / usual, 3)
                            rows.append((length, per_row, which, line["ms"]["median"], line["ratio"], block))
                        emit({**line, **common}, file)
    for length, per_row, which, ms, ratio, block in sorted(rows, key=lambda row: row[:4]):
        print(f"{length:6} {per_row:3} {which:4} {ms:9.3f} ms {ratio:6.3f}  {block or 'as in the table'}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
