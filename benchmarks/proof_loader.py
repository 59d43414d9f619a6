"""Proof that reading is fast from the first batch on, anywhere in a run, in memory that the corpus does not decide.

    make proof-loader        # two minutes; 15 MB of disk beside files that are holes

Makes stores of 10**8 and 10**9 tokens in two sources: real indices, document places and checksums over tokens that are
all 0, which a file system keeps as holes.  So nothing here is about disks, and the speed claimed is that of files which
the system has in its cache; `speed_uncached` includes the filling of that cache.  Each measurement is a process of its
own on one core: mixed, shuffled, every window checked against its CRC32, with segment ids, positions and masks of
documents.
Writes results/proof_loader.json.  Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lines import RESULTS, ROOT, origin, spread

from tinyllama_jax.config import Data, Stage
from tinyllama_jax.data import durable, shards, store
from tinyllama_jax.data.shards import BIN, DOC, IDX, Shard

SEQUENCE, ROWS = 2048, 512  # what a node of TinyLlama v1.0 read for a step
SHARES = {"prose": 0.7, "code": 0.3}
STEPS = 1_000_000  # of the run that is read from
SHARD_WINDOWS = 1 << 18  # 1 GiB
PATTERNS = 16  # of where documents begin; two in a window on average

SPEED = 50e6  # tokens per second of processor time, all threads together: other programs may be using the core too
COLD_SECONDS = 2.0
SEEK_RATIO = 1.5  # time to any batch over that to the first
MEMORY_BYTES = 8 << 20  # between the two sizes


def make_store(folder: Path, tokens: int) -> Path:
    """A token store whose tokens are all 0, about `tokens` of them."""
    length, random = SEQUENCE + 1, np.random.default_rng(0)
    dtype, places = np.dtype("<u2"), shards.place_dtype(length)
    patterns = [np.sort(random.choice(length, n, replace=False)).astype(places) for n in random.poisson(2, PATTERNS)]
    crcs = [shards.window_crc(bytes(length * dtype.itemsize), p.tobytes(), p.size, length) for p in patterns]
    splits = {"train": {}, "validation": {}}
    for item, (domain, share) in enumerate(SHARES.items()):
        windows, made = int(tokens * share) // length, []
        for first in range(0, windows, SHARD_WINDOWS):
            pattern = np.arange(min(SHARD_WINDOWS, windows - first)) % PATTERNS
            counts = np.array([p.size for p in patterns])[pattern]
            index = np.zeros(pattern.size + 1, shards.INDEX_DTYPE)
            index["crc"][:-1], index["used"][:-1] = np.array(crcs, np.uint32)[pattern], length
            index["before"][1:] = np.cumsum(counts)
            documents = np.concatenate([patterns[i] for i in pattern])
            name = f"{item:06d}-{len(made):02d}"
            path = folder / "train" / domain / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}{BIN}").touch()
            os.truncate(f"{path}{BIN}", pattern.size * length * dtype.itemsize)
            Path(f"{path}{IDX}").write_bytes(index.tobytes())
            Path(f"{path}{DOC}").write_bytes(documents.tobytes())
            sha256 = {suffix: _sha256(Path(f"{path}{suffix}")) for suffix in (BIN, IDX, DOC)}
            made.append(Shard(name, item, pattern.size, documents.size, sha256))
        splits["train"][domain] = {
            "windows": windows,
            "tokens": windows * length,
            "documents": sum(shard.documents for shard in made),
            "bytes": 4 * windows * length,
            "shards": [dataclasses.asdict(shard) for shard in made],
        }
    tokenizer = random.bytes(500_000)  # as large as TinyLlama's; only its hash is looked at
    (folder / "tokenizer.model").write_bytes(tokenizer)
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    manifest = {
        "format_version": store.FORMAT_VERSION,
        "window_tokens": length,
        "packing": "none",
        "dtype": dtype.str,
        "tokenizer": {"files": {"tokenizer.model": sha256}, "sha256": sha256, "vocab_size": 32000},
        "splits": splits,
    }
    durable.write_record(folder / store.MANIFEST, manifest)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pipeline(folder: Path):
    from tinyllama_jax.data.pipeline import Pipeline
    from tinyllama_jax.schedules import Plan

    batch = ROWS * SEQUENCE
    plan = Plan((Stage(name="s", tokens=STEPS * batch, batch_tokens=batch, mixture=SHARES),), SEQUENCE)
    data = Data(store=str(folder), sequence_tokens=SEQUENCE, document_masking=True)
    return Pipeline(store.TokenStore.open(folder), data, plan, 1, vocab_size=32000)


# --- what a process of its own measures


def cold(folder: Path, started: float) -> dict:
    """From the start of the interpreter to the first batch; imports apart."""
    imports = time.perf_counter()
    import grain  # noqa: F401

    import tinyllama_jax.data.pipeline  # noqa: F401

    opening = time.perf_counter()
    batches = pipeline(folder).iterate(0, STEPS)
    next(batches)
    ready = time.perf_counter()
    batches.close()
    return {"first_batch_s": ready - opening, "imports_s": opening - imports, "process_s": time.time() - started}


def speed(folder: Path, seconds: float) -> dict:
    """Tokens per second through the prefetch thread, this process and all its threads on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    batches, rates, processor = pipeline(folder).iterate(0, STEPS), [], []
    next(batches)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        wall, cpu, read = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < seconds / 8:
            read += next(batches)[1]["tokens"].size
        rates.append(read / (time.perf_counter() - wall))
        processor.append(read / (time.process_time() - cpu))
    batches.close()
    return {
        "tokens_per_s": spread(rates),
        "tokens_per_processor_s": spread(processor),
        "peak_resident_bytes": _peak(),
    }


def seek(folder: Path, rounds: int) -> dict:
    """Seconds of the first call of `batch` of a new pipeline, for steps far apart."""
    times = {step: [] for step in (0, 1, STEPS // 2, STEPS - 1)}
    pipeline(folder).batch(0)
    for _ in range(rounds):
        for step, found in times.items():
            fresh = pipeline(folder)
            begin = time.perf_counter()
            fresh.batch(step)
            found.append(time.perf_counter() - begin)
    return {f"batch_{step}_s": spread(found) for step, found in times.items()}


def memory(folder: Path, batches: int) -> dict:
    """Largest resident memory after reading batches from all over the run, without the thread: how many batches are
    alive at the same time would depend on its pace."""
    read = pipeline(folder)
    for step in np.linspace(0, STEPS - 1, batches).astype(int).tolist():
        read.batch(step)
    return {"peak_resident_bytes": _peak()}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


def measured(name: str, folder: Path, argument: float, *, cached: bool = False) -> dict:
    """One of the functions above in a new interpreter, with all files of the store in the system's cache or none."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and file.read(1 << 20):
                pass
    command = [sys.executable, __file__, "--measure", name, str(folder), str(argument)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def prove(folder: Path, sizes: tuple[int, ...], *, runs: int, seconds: float, rounds: int) -> dict:
    """All measurements for stores of `sizes` tokens, made in `folder`: {size: {what: {...}}}.

    Other programs on the machine only make things slower: of several runs, the fastest says what reading costs.
    """
    results = {}
    for tokens in sizes:
        path = folder / f"{tokens:.0e}"
        path.mkdir()
        make_store(path, tokens)
        cold = [measured("cold", path, time.time()) for _ in range(runs)]
        uncached = measured("speed", path, seconds)
        speed = [measured("speed", path, seconds, cached=True) for _ in range(runs)]
        results[f"{tokens:.0e}"] = found = {
            "stored_tokens": sum(e["tokens"] for e in store.TokenStore.open(path).manifest["splits"]["train"].values()),
            "cold": {key: spread([run[key] for run in cold]) for key in cold[0]},
            "speed": max(speed, key=lambda run: run["tokens_per_processor_s"]["median"]),
            "speed_uncached": uncached,
            "speed_of_all_runs": [run["tokens_per_processor_s"]["median"] for run in speed],
            "seek": measured("seek", path, rounds),
            "memory": measured("memory", path, 20),
        }
        print(json.dumps({f"{tokens:.0e}": found}), flush=True)
    return results


def failures(results: dict, *, speed: float = SPEED, seek_ratio: float = SEEK_RATIO) -> list[str]:
    """The claims that the results do not keep."""
    failed = []
    for size, found in results.items():
        rate = found["speed"]["tokens_per_processor_s"]["median"]
        if rate < speed:
            failed.append(f"{size}: {rate / 1e6:.1f} million tokens a second, claimed {speed / 1e6:.0f}")
        if found["cold"]["first_batch_s"]["median"] > COLD_SECONDS:
            failed.append(f"{size}: the first batch took {found['cold']['first_batch_s']['median']} s")
        first, *others = (value["min"] for value in found["seek"].values())  # the least disturbed of each
        if max(others) > seek_ratio * first:
            failed.append(f"{size}: a later batch took {max(others):.3f} s, the first {first:.3f} s")
    peaks = [found["memory"]["peak_resident_bytes"] for found in results.values()]
    if max(peaks) - min(peaks) > MEMORY_BYTES:
        failed.append(f"memory differs by {(max(peaks) - min(peaks)) / 1e6:.1f} MB")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "proof_loader.json")
    args = parser.parse_args()
    if args.measure:
        name, folder, argument = args.measure
        functions = {"cold": (cold, float), "speed": (speed, float), "seek": (seek, int), "memory": (memory, int)}
        function, kind = functions[name]
        print(json.dumps(function(Path(folder), kind(float(argument)))))
        return 0
    with tempfile.TemporaryDirectory(prefix="proof-loader-") as folder:
        results = prove(Path(folder), (10**8, 10**9), runs=3, seconds=8, rounds=25)
    record = {
        "benchmark": "proof_loader",
        "claims": {
            "tokens_per_processor_s": SPEED,
            "first_batch_s": COLD_SECONDS,
            "later_batch_over_first": SEEK_RATIO,
            "memory_difference_bytes": MEMORY_BYTES,
        },
        **origin(),
        "rows": ROWS,
        "sequence_tokens": SEQUENCE,
        "results": results,
    }
    failed = failures(results)
    for line in failed:
        print(f"proof_loader: {line}", file=sys.stderr)
    if not failed:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{args.out}: all claims hold", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
