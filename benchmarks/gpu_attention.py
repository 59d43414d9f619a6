"""The first hour of our attention on a GPU, in pieces that each end within ten minutes, the most telling first.

    python benchmarks/gpu_attention.py PIECE [--out DIR]      one of the pieces below, or `all` one after the other

{pieces}

Everything lies in --out afterwards: attention-KIND.json (commit it: only a kind with that file may have a kernel of
ours chosen by default), JSON lines of speeds, and each piece's output.  Exit status 1 when a piece failed or ran out
of time; the next ones still run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pieces
from lines import RESULTS
from pieces import STOP, Piece

KERNELS = "triton,hopper,cudnn"


def _speed(what: str, *options: str) -> Piece:
    return Piece(what, [("attention.py", *options, "--seconds", STOP, "--out", "{out}")])


PIECES = {
    "parity": Piece(
        "errors of our kernels and of cuDNN against float32, rows of 2048 and 8192",
        [("attention.py", "--parity", "--out", "{out}")],
    ),
    "speed": _speed(
        "rows of 2048, 32/4 heads: ours, cuDNN and the peers, 1 to 8 documents to a row",
        *("--lengths", "2048", "--heads", "32/4"),
    ),
    "speed-mha": _speed(
        "the same with 32/32 heads, the shape that others publish",
        *("--lengths", "2048", "--heads", "32/32", "--documents", "1"),
    ),
    "speed-long": _speed(
        "rows of 8192, both head counts, without the ones that keep all scores",
        *("--lengths", "8192", "--documents", "1,4"),
        *("--implementations", f"{KERNELS},cudnn-mask,tokamax-mosaic,tokamax-triton"),
    ),
    "sweep": Piece(
        "block sizes of the Triton kernels, each pass",
        [("attention_sweep.py", "--seconds", STOP, "--out", "{out}")],
    ),
    "step": Piece(
        "the 1.1B training step: what each optimisation is worth",
        [
            ("train_step.py", "experiments.effectiveness:gpu", "--steps", "10", "--seconds", "480")
            + ("--out", "{out}/train_step.jsonl")
        ],
    ),
}
__doc__ = __doc__.replace("{pieces}", "\n".join(f"    {name:10}  {piece.what}" for name, piece in PIECES.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=[*PIECES, "all"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    args = parser.parse_args()
    names = list(PIECES) if args.piece == "all" else [args.piece]
    return 0 if all([pieces.run(name, PIECES[name], args.out.resolve()) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
