"""Measurements on a machine that is lent for minutes: pieces that each end in time, whatever the ones before did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lines import ROOT

LIMIT = 570  # seconds of a piece
STOP = "520"  # nothing is begun later; what has begun by then must end


class Piece(NamedTuple):
    what: str
    commands: Sequence[Sequence[str]]  # programs of this folder with their options; {out} is the piece's folder
    environment: Mapping[str, str] = {}


def run(name: str, piece: Piece, out: Path, limit: float = LIMIT) -> bool:
    """Whether the piece ended well; its output goes to the terminal and to OUT/NAME/output.log."""
    folder, begin, status = out / name, time.monotonic(), 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("w") as log:
        for program, *options in piece.commands:
            command = [sys.executable, ROOT / "benchmarks" / program, *(o.format(out=folder) for o in options)]
            left = limit - (time.monotonic() - begin)
            status = _run(command, piece.environment, log, left) if left > 1 else f"out of time after {limit} s"
            if status:
                break
    # JSON lines are in the files; what a person reads comes last.
    text = [line for line in (folder / "output.log").read_text().splitlines() if not line.startswith("{")]
    print("\n".join(text[-40:]))
    print(f"{name}: {status or 'done'}; {time.monotonic() - begin:.0f} s; {folder}", flush=True)
    return status == 0


def _run(command: list, environment: Mapping[str, str], log, limit: float) -> int | str:
    log.write(f"{' '.join(map(str, command))}\n")
    log.flush()
    common = {
        # The package from this checkout, and one process at a time has the GPU to itself.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | common | dict(environment),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # measurements are processes of their own
        process.wait()
        return f"out of time after {limit:.0f} s"


def lines_of(folder: Path) -> list[dict]:
    """The JSON lines that a piece printed."""
    log = folder / "output.log"
    text = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in text if line.startswith("{") and line.endswith("}")]
