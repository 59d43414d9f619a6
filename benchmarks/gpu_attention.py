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
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lines import RESULTS, ROOT


class Piece(NamedTuple):
    what: str
    command: tuple[str, ...]


LIMIT = 570  # seconds of a piece
STOP = "520"  # nothing is begun later; what has begun by then must end
KERNELS = "triton,hopper,cudnn"
PIECES = {
    "parity": Piece(
        "errors of our kernels and of cuDNN against float32, rows of 2048 and 8192",
        ("attention.py", "--parity"),
    ),
    "speed": Piece(
        "rows of 2048, 32/4 heads: ours, cuDNN and the peers, 1 to 8 documents to a row",
        ("attention.py", "--lengths", "2048", "--heads", "32/4", "--seconds", STOP),
    ),
    "speed-mha": Piece(
        "the same with 32/32 heads, the shape that others publish",
        ("attention.py", "--lengths", "2048", "--heads", "32/32", "--documents", "1", "--seconds", STOP),
    ),
    "speed-long": Piece(
        "rows of 8192, both head counts, without the ones that keep all scores",
        (
            *("attention.py", "--lengths", "8192", "--documents", "1,4", "--seconds", STOP, "--implementations"),
            f"{KERNELS},cudnn-mask,tokamax-mosaic,tokamax-triton",
        ),
    ),
    "sweep": Piece(
        "block sizes of the Triton kernels, each pass",
        ("attention_sweep.py", "--seconds", STOP),
    ),
    "step": Piece(
        "the 1.1B training step: what each optimisation is worth",
        ("train_step.py", "experiments.effectiveness:gpu", "--steps", "10", "--seconds", "480"),
    ),
}
__doc__ = __doc__.replace("{pieces}", "\n".join(f"    {name:10}  {piece.what}" for name, piece in PIECES.items()))


def run(name: str, out: Path) -> bool:
    """Whether the piece ended well; its output goes to the terminal and to OUT/PIECE.log."""
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    program, *arguments = PIECES[name].command
    where = ("--out", directory / "train_step.jsonl" if program == "train_step.py" else directory)
    command = [sys.executable, ROOT / "benchmarks" / program, *arguments, *where]
    environment = {
        # The package from this checkout, and one process at a time has the GPU to itself.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    begin = time.monotonic()
    with (directory / "output.log").open("w") as log:
        log.write(f"{' '.join(map(str, command))}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # measurements are processes of their own
            process.wait()
            status = f"out of time after {LIMIT} s"
    # JSON lines are in the files; what a person reads comes last.
    text = [line for line in (directory / "output.log").read_text().splitlines() if not line.startswith("{")]
    print("\n".join(text[-40:]))
    print(f"gpu_attention: {name}: {status or 'done'}; {time.monotonic() - begin:.0f} s; {directory}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=[*PIECES, "all"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    args = parser.parse_args()
    names = list(PIECES) if args.piece == "all" else [args.piece]
    return 0 if all([run(name, args.out.resolve()) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
