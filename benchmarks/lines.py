"""What every benchmark shares: a JSON line that says what made it, and a process of its own for a measurement."""

from __future__ import annotations

import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "libtpu",
    "tokamax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def isolated(function: Callable, *arguments) -> Any:
    """What the function returns, in a process of its own: it has the device to itself and gives all memory back.

    Raises what the function raises, or BrokenProcessPool when the process ends under it.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def device() -> dict:
    """The first device, and how many there are.  The process that asks has the device from then on."""
    import jax

    first = jax.devices()[0]
    about = " ".join(first.client.platform_version.split())
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count(), "about": about}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def origin() -> dict:
    """What made a line: the command as typed, the day, the versions."""
    program = Path(sys.argv[0]).resolve()
    name = program.relative_to(ROOT) if program.is_relative_to(ROOT) else program.name
    command = shlex.join(["python", str(name), *sys.argv[1:]])
    return {"command": command, "date": datetime.date.today().isoformat(), "versions": versions()}


def spread(values: Sequence[float], digits: int = 4) -> dict:
    """Median, extremes and number of repeated measurements, to so many significant digits."""
    median, low, high = (float(f"{x:.{digits}g}") for x in (statistics.median(values), min(values), max(values)))
    return {"median": median, "min": low, "max": high, "n": len(values)}


def slug(kind: str) -> str:
    """A device's kind as part of a file name: 'NVIDIA H200' -> 'nvidia-h200'."""
    return "-".join("".join(c if c.isalnum() else " " for c in kind.lower()).split())


def conclude(record: dict, failed: Sequence[str], out: Path) -> int:
    """Writes a proof's record with what failed of it, to stdout and the file; -> the exit status."""
    record = record | {"failed": list(failed)}
    emit(record)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    for text in failed:
        print(f"{record['benchmark']}: {text}", file=sys.stderr)
    return int(bool(failed))


def emit(line: dict, *files: TextIO | None) -> None:
    """One line of JSON to stdout, and to files that are not None, at once: what follows may end the process."""
    text = json.dumps(line)
    print(text, flush=True)
    for file in files:
        if file is not None:
            file.write(text + "\n")
            file.flush()
