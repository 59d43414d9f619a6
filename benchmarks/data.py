"""Speed of the loader: tokens per second of one core, and what that is of a training step.

    python benchmarks/data.py                                   # a minute, 8 MB of disk beside files that are holes
    python benchmarks/data.py --tokens 1e8 --tokens-per-s 20000
    python benchmarks/data.py --store data/slim-star --out FILE

Measured is what training does: `Pipeline.iterate`, whose one thread mixes the sources by their tokens, shuffles, checks
every window against its CRC32, numbers documents and positions, masks, and batches; all threads together have one core.
Then `put_batch`, on a CPU device: what it costs the host, without the copy to an accelerator.

The store is a real one, or one that is made for this (made_store.py).  Batches are read twice, and the second time
they are in the system's cache: so nothing here is about disks but `uncached` and the start, of which the cache has
nothing.  Every measurement is a process of its own.  Other programs only make things slower: of several runs, the
fastest says what reading costs, in processor time.

Prints one line of JSON.  Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from lines import ROOT, emit, origin, spread
from made_store import make_store

from tinyllama_jax.config import Data, Mesh, Stage
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.errors import DataError, UserError

BATCH_TOKENS = 1 << 20  # what a node of TinyLlama v1.0 read for a step
STEPS = 1_000_000  # of the run that is read from
PARTS = 8  # of a measurement of speed
SEEK_STEPS = (0, 1, STEPS // 3, STEPS // 2, STEPS - 1)
TRAINING = 75_000  # tokens per second of the fastest device that is hoped for

SPEED = 50e6  # tokens per second of processor time, all threads together
SHARE = 0.01  # of a step's time, with one worker
FIRST_SECONDS = 2.0  # of processor time, from the start of the interpreter to the first batch
SEEK_RATIO = 1.1  # time to any batch over that to the first


def sources(opened: TokenStore) -> dict[str, int]:
    """Training tokens of each source that fills a window; DataError if none does."""
    splits = {name: opened.split("train", name) for name in opened.domains}
    found = {name: split.tokens for name, split in splits.items() if split.windows(opened.window_tokens)}
    if not found:
        raise DataError(f"{opened.path}: has no window to train on; prepare it with more text")
    return found


def pipeline(folder: Path, batch_tokens: int):
    """Of a run with documents masked: STEPS steps, the store's windows, its sources mixed by their tokens."""
    from tinyllama_jax.data.pipeline import Pipeline
    from tinyllama_jax.schedules import Plan

    opened = TokenStore.open(folder)
    length = opened.window_tokens - 1
    batch = max(1, batch_tokens // length) * length
    plan = Plan((Stage(name="s", tokens=STEPS * batch, batch_tokens=batch, mixture=sources(opened)),), length)
    data = Data(store=str(folder), sequence_tokens=length, document_masking=True)
    return Pipeline(opened, data, plan, 1, vocab_size=opened.vocab_size)


# --- what a process of its own measures


def cold(folder: Path, batch_tokens: int, started: float) -> dict:
    """From the start of the interpreter to the first batch: seconds by the clock, all of them and parts, and of the
    processor."""
    imports = time.perf_counter()
    import grain  # noqa: F401

    import tinyllama_jax.data.pipeline  # noqa: F401

    opening = time.perf_counter()
    batches = pipeline(folder, batch_tokens).iterate(0, STEPS)
    next(batches)
    ready = time.perf_counter()
    batches.close()
    return {
        "first_batch_s": ready - opening,
        "imports_s": opening - imports,
        "process_s": time.time() - started,
        "processor_s": time.process_time(),
    }


def speed(folder: Path, batch_tokens: int, seconds: float) -> dict:
    """Tokens per second through the read-ahead thread: `uncached` for so many seconds, then the same batches again."""
    read = pipeline(folder, batch_tokens)

    def part(batches: Iterator, seconds: float, steps: int) -> tuple[float, float, int]:
        """Reads for so long and at least so many steps -> tokens per second and per processor second, and the steps."""
        wall, cpu, tokens, done = time.perf_counter(), time.process_time(), 0, 0
        while done < steps or time.perf_counter() - wall < seconds:
            tokens += next(batches)[1]["tokens"].size
            done += 1
        return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu), done

    def all_parts(parts: Iterable[tuple[float, int]]) -> tuple[dict, list[int]]:
        batches = read.iterate(0, STEPS)
        next(batches)
        rates, processor, steps = zip(*(part(batches, *each) for each in parts), strict=True)
        batches.close()
        return {"tokens_per_s": spread(rates), "tokens_per_processor_s": spread(processor)}, steps

    uncached, steps = all_parts([(seconds / PARTS, 1)] * PARTS)
    return {**all_parts([(0, n) for n in steps])[0], "uncached": uncached, "peak_resident_bytes": _peak()}


def seek(folder: Path, batch_tokens: int, rounds: int) -> dict:
    """Processor seconds of the first call of `batch` of a new pipeline, for steps far apart."""
    times = {step: [] for step in SEEK_STEPS}
    pipeline(folder, batch_tokens).batch(0)
    for _ in range(rounds):
        for step, found in times.items():
            fresh = pipeline(folder, batch_tokens)
            begin = time.process_time()
            fresh.batch(step)
            found.append(time.process_time() - begin)
    return {f"batch_{step}_s": spread(found) for step, found in times.items()}


def put(folder: Path, batch_tokens: int, rounds: int) -> dict:
    """Processor milliseconds of `put_batch` for different batches, document ids among them, on one CPU device."""
    import jax

    from tinyllama_jax.sharding import make_mesh
    from tinyllama_jax.train.step import put_batch

    read, mesh, times = pipeline(folder, batch_tokens), make_mesh(Mesh(), jax.devices()[:1]), []
    for step in range(rounds + 2):
        batch = read.batch(step)
        begin = time.process_time()
        jax.block_until_ready(put_batch(batch, 1, mesh, documents=True))
        times.append(1000 * (time.process_time() - begin))
    return {"put_batch_ms": spread(times[2:])}  # the first ones warm JAX up


def memory(folder: Path, batch_tokens: int, batches: int) -> dict:
    """Largest resident memory after reading batches from all over the run, without the thread: how many batches are
    alive at the same time would depend on its pace."""
    read = pipeline(folder, batch_tokens)
    for step in np.linspace(0, STEPS - 1, batches).astype(int).tolist():
        read.batch(step)
    return {"peak_resident_bytes": _peak()}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


# --- all of it


def measured(name: str, folder: Path, batch_tokens: int, argument: float) -> dict:
    """One of the functions above in a new interpreter on one core, with no file of the store in the system's cache.
    Raises CalledProcessError, after the process has said why."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--measure", name, str(folder), str(batch_tokens), str(argument)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(folder: Path, batch_tokens: int, tokens_per_s: float, *, runs: int, seconds: float, rounds: int) -> dict:
    """Speed, share of a step, start and seek of the store in `folder`."""
    folder = folder.resolve()  # the processes run elsewhere
    start = [measured("cold", folder, batch_tokens, time.time()) for _ in range(runs)]
    fast = [measured("speed", folder, batch_tokens, seconds) for _ in range(runs)]
    best = max(fast, key=lambda run: run["tokens_per_processor_s"]["median"])
    placed = measured("put", folder, batch_tokens, rounds)["put_batch_ms"]
    rate = best["tokens_per_processor_s"]["median"]
    return {
        **best,
        "tokens_per_processor_s_of_all_runs": [run["tokens_per_processor_s"]["median"] for run in fast],
        "share_of_step": share_of_step(batch_tokens, tokens_per_s, rate, placed["median"]),
        "put_batch_ms": placed,
        "start": {key: spread([run[key] for run in start]) for key in start[0]},
        "seek": measured("seek", folder, batch_tokens, rounds),
    }


def share_of_step(batch_tokens: int, tokens_per_s: float, loader_tokens_per_s: float, put_batch_ms: float) -> dict:
    """What the host does for a batch, over the time of a step that trains at `tokens_per_s`.

    loader: of the one thread that reads ahead while the device computes; loader_and_put: with `put_batch`, which the
    loop itself does.  A host with several devices trains at the sum of their speeds.
    """
    step_ms, loader_ms = 1000 * batch_tokens / tokens_per_s, 1000 * batch_tokens / loader_tokens_per_s
    found = {"step_ms": step_ms, "loader_ms": loader_ms, "put_batch_ms": put_batch_ms}
    found |= {"loader": loader_ms / step_ms, "loader_and_put": (loader_ms + put_batch_ms) / step_ms}
    return {"tokens_per_s": tokens_per_s, **{key: float(f"{value:.4g}") for key, value in found.items()}}


def failures(
    found: dict, *, speed: float = SPEED, first_s: float = FIRST_SECONDS, seek: float = SEEK_RATIO
) -> list[str]:
    """The claims that what `measure` found does not keep."""
    failed = []
    rate, first_batch = found["tokens_per_processor_s"]["median"], found["start"]["processor_s"]["min"]
    share, at = (found["share_of_step"][key] for key in ("loader_and_put", "tokens_per_s"))
    first, *others = (value["min"] for value in found["seek"].values())
    if rate < speed:
        failed.append(f"{rate / 1e6:.1f} million tokens a second, claimed {speed / 1e6:.0f}")
    if share > SHARE:
        failed.append(f"{100 * share:.2f} % of a step at {at:.0f} tokens a second, claimed {100 * SHARE:.0f} %")
    if first_batch > first_s:
        failed.append(f"the first batch took {first_batch:.2f} s from the start on, claimed {first_s:.1f} s")
    if max(others) > seek * first:
        failed.append(f"a later batch took {max(others):.4f} s, the first {first:.4f} s, claimed {seek} times that")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokens", type=float, default=1e9, help="of a store that is made for this (1e9)")
    which.add_argument("--store", type=Path, help="a token store or a view, in a local folder")
    parser.add_argument("--tokens-per-s", type=float, default=TRAINING, help="speed of training on this host (75000)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="what the host reads for a step (2**20)")
    parser.add_argument("--runs", type=int, default=3, help="processes that measure the speed (3)")
    parser.add_argument("--seconds", type=float, default=8, help="each of them (8)")
    parser.add_argument("--rounds", type=int, default=60, help="batches at each place of the run (60)")
    parser.add_argument("--out", type=Path, help="a file that the line is added to")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        if args.measure:
            return _measure_here(*args.measure)
        if args.tokens < 1e4 or min(args.tokens_per_s, args.batch_tokens, args.runs, args.seconds, args.rounds) <= 0:
            parser.error("--tokens must be at least 10000, and all other numbers positive")
        with tempfile.TemporaryDirectory(prefix="loader-") as made:
            folder = args.store or make_store(Path(made), int(args.tokens))
            opened = TokenStore.open(folder)
            length, tokens = opened.window_tokens - 1, sources(opened)
            batch_tokens = max(1, args.batch_tokens // length) * length
            about = {"sources": tokens, "sequence_tokens": length, "batch_tokens": batch_tokens}
            sizes = {"runs": args.runs, "seconds": args.seconds, "rounds": args.rounds}
            found = measure(folder, batch_tokens, args.tokens_per_s, **sizes)
    except UserError as error:
        print(f"data: {error}", file=sys.stderr)
        return error.exit_status
    except subprocess.CalledProcessError as error:  # the process has said why
        return error.returncode if error.returncode > 0 else 1
    failed = failures(found)
    line = {"benchmark": "data", **origin(), "made": not args.store, **about, **found, "failed": failed}
    if args.out:
        with args.out.open("a") as file:
            emit(line, file)
    else:
        emit(line)
    for text in failed:
        print(f"data: {text}", file=sys.stderr)
    return int(bool(failed))


def _measure_here(name: str, folder: str, batch_tokens: str, argument: str) -> int:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before there is a thread
    functions = {"cold": (cold, float), "speed": (speed, float), "seek": (seek, int), "put": (put, int)}
    function, kind = (functions | {"memory": (memory, int)})[name]
    print(json.dumps(function(Path(folder), int(batch_tokens), kind(float(argument)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
