"""What a checkpoint costs: how long it holds the training loop, how long until it is safe, how long to come back.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.jsonl                # 3 minutes, 10 GB of disk
    python benchmarks/checkpoint.py --preset tinyllama-1.1b --max-stall 2 --max-restore 60   # a GPU: 44 GB of disk

The state is a preset's parameters and both of Adam's moments in float32, 12 bytes a parameter, filled with random
numbers; saved and restored by the class that `train` uses.  Two lines, on stdout and in --out:

checkpoint_raw   what the disk does by itself: as many bytes, in four files at once.
checkpoint
  first, periodic  a save in the background: `stall_s` until `save` returns, `complete_s` until it is committed; `first`
                   is the first one of a process, which may have to compile.  `slow_down` is the time of a step (matrix
                   products) while the save is written over that without one, `longest_step_s` the worst, and `cost_s`
                   what one save takes from training in all: the stall, and the part of the rest in which steps were
                   missing.
  stage_end        a save that is waited for and read back.
  resume           the first restore of a fresh process, nothing in the page cache (`from_disk`: the share of the bytes
                   that this process had to fetch; near 0 the system did not let go of its cache), with what it
                   compiles; checksums and fingerprints are verified, then every bit is compared with what was saved.
  warm             the same once more: from the page cache, compiled.

GB are 10**9 bytes.  Exit status 1 when a claim is not held or a restored bit differs, 78 without room on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from lines import device, emit, isolated, origin, spread

from tinyllama_jax import flops
from tinyllama_jax.errors import CheckpointError, UserError
from tinyllama_jax.presets import preset
from tinyllama_jax.train import durable

BYTES_PER_PARAMETER = 12
COPIES = 2.2  # on the disk at the same time: a save beside the one before, and a tenth
STREAMS = 4  # files that the raw measurement writes and reads at once
BLOCK_BYTES = 16 << 20
ALONE_SECONDS = 3.0  # of steps without a save
STEP_SECONDS = 0.02  # about


# -- the disk by itself ------------------------------------------------------------------------------------


def raw(folder: Path, n_bytes: int) -> dict[str, float]:
    """Seconds to write and fsync so many bytes, and to read them; `cold` only where the system lets go of its cache."""
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    size = n_bytes // STREAMS
    paths = [folder / f"raw-{i}" for i in range(STREAMS)]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for start in range(0, size, BLOCK_BYTES):
                file.write(block[: min(BLOCK_BYTES, size - start)])
            file.flush()
            os.fsync(file.fileno())

    def read(path: Path) -> None:
        buffer = bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def seconds(work: Callable[[Path], None]) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(work, paths))
        return time.perf_counter() - begin

    try:
        found = {"write": seconds(write)}
        found |= {"cold_read": seconds(read)} if forget(paths) else {}
        return found | {"warm_read": seconds(read)}
    except OSError as error:
        raise CheckpointError(f"{folder.parent}: {durable.one_line(error)}") from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def forget(paths: Sequence[Path]) -> bool:
    """Asks the system to drop these files from its cache; whether one can ask."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def fetched() -> int | None:
    """Bytes that this process has had read from a disk so far; None where the system does not count them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
    return None


# -- the state ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training(name: str):
    """(targets, make): shapes of a preset's training state, and make(seed) -> such a state of random numbers."""
    import jax
    import jax.numpy as jnp

    from tinyllama_jax.config import Data, Run, Stage
    from tinyllama_jax.sharding import computing, make_mesh
    from tinyllama_jax.train import state as train_state

    model = preset(name)
    stage = Stage(name="main", tokens=model.context_tokens, batch_tokens=model.context_tokens, mixture={"random": 1.0})
    data = Data(store="-", sequence_tokens=model.context_tokens)
    run = Run(name="checkpoint", model=model, data=data, curriculum=(stage,))
    mesh = make_mesh(run.mesh)
    with computing(mesh, model.compute_dtype):
        targets = train_state.abstract(run, mesh)
        leaves, structure = jax.tree.flatten(targets)

        @functools.partial(jax.jit, out_shardings=[leaf.sharding for leaf in leaves])
        def fill(seed):
            """A multiplication for each word: cheap to compile, and no two arrays or seeds alike."""
            made = []
            for index, leaf in enumerate(leaves):
                places = jnp.arange(math.prod(leaf.shape), dtype=jnp.uint32).reshape(leaf.shape)
                words = (places + seed * jnp.uint32(977) + jnp.uint32(index * 7919)) * jnp.uint32(0x9E3779B1)
                words ^= words >> 15
                values = (words * jnp.uint32(0x85EBCA77)).astype(jnp.float32) * 2.0**-32 - 0.5
                made.append(values.astype(leaf.dtype))
            return made

        yield targets, lambda seed: jax.block_until_ready(jax.tree.unflatten(structure, fill(np.uint32(seed))))


def same_bits(one, other) -> bool:
    """Whether two states are equal bit for bit; compared where they lie."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def differing(a, b):
        words = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (a, b)]
        return (words[0] != words[1]).sum(dtype=jnp.uint32)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return not any([int(differing(a, b)) for a, b in pairs])


class Steps:
    """Steps like those of a training loop, each about STEP_SECONDS long: the next is dispatched before one is read."""

    def __init__(self):
        import jax
        import jax.numpy as jnp

        cpu = jax.devices()[0].platform == "cpu"
        size, dtype = (512, jnp.float32) if cpu else (8192, jnp.bfloat16)

        @jax.jit
        def step(x_DD, times):
            x_DD = jax.lax.fori_loop(0, times, lambda _, x: (x @ x).astype(dtype) * jnp.asarray(1 / size, dtype), x_DD)
            return x_DD, x_DD[0, 0].astype(jnp.float32)

        self._step, self._times, self._x_DD = step, 1, jnp.ones((size, size), dtype)
        self.run(lambda: True)  # compiles
        times = 8
        self._times = times
        self._times = max(1, round(times * STEP_SECONDS / min(self.run(lambda: True)[0] for _ in range(5))))

    def run(self, ended: Callable[[], bool]) -> list[float]:
        """Steps until `ended`, at least one; the seconds of each."""
        seconds, (x_DD, pending) = [], self._step(self._x_DD, self._times)
        pending.block_until_ready()
        last = time.perf_counter()
        x_DD, pending = self._step(x_DD, self._times)
        while True:
            x_DD, following = self._step(x_DD, self._times)
            float(pending)
            now = time.perf_counter()
            seconds.append(now - last)
            last, pending = now, following
            if ended():
                pending.block_until_ready()
                return seconds

    def for_seconds(self, seconds: float) -> list[float]:
        end = time.perf_counter() + seconds
        return self.run(lambda: time.perf_counter() > end)


# -- what a process of its own measures --------------------------------------------------------------------


def saving(name: str, folder: Path, rounds: int) -> dict:
    """Periodic saves, then stage ends, of which the last one stays for `restoring`, with the state of seed `rounds`."""
    import jax

    from tinyllama_jax.train.checkpoint import Checkpoints

    periodic, ends = [], []
    with training(name) as (targets, make):
        leaves = jax.tree.leaves(targets)
        n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        steps, committed = Steps(), threading.Event()
        heard = lambda kind, step: committed.set() if kind == "committed" else None  # noqa: E731
        with Checkpoints(folder / "periodic", keep_temporary=1, on_event=heard) as checkpoints:
            checkpoints.restore(targets)  # there is none, but a run asks first
            for number in range(rounds + 1):
                state = make(number)  # anew: what jax has copied to the host once it does not copy again
                alone = steps.for_seconds(ALONE_SECONDS)
                committed.clear()
                begin = time.perf_counter()
                checkpoints.save(number + 1, state, {"step": number + 1}, permanent=False, blocking=False)
                stall = time.perf_counter() - begin
                # A save that fails commits nothing.
                during = steps.run(lambda: committed.is_set() or checkpoints.failed)
                complete = time.perf_counter() - begin
                checkpoints.wait()
                del state
                periodic.append(of_save(stall, complete, alone, during))
        shutil.rmtree(folder / "periodic")
        for number in range(1, rounds + 1):
            state = make(number)
            shutil.rmtree(folder / "end", ignore_errors=True)
            with Checkpoints(folder / "end", keep_temporary=1) as checkpoints:
                begin = time.perf_counter()
                checkpoints.save(number, state, {"step": number}, permanent=True, blocking=True)
                ends.append({"s": time.perf_counter() - begin})
            del state
    return {
        "first": periodic[0],
        "periodic": periodic[1:],
        "stage_end": ends,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "arrays": len(leaves),
        "bytes": n_bytes,
        "device": device(),
    }


def of_save(stall: float, complete: float, alone: list[float], during: list[float]) -> dict[str, float]:
    usual, while_saving = statistics.fmean(alone), statistics.fmean(during)
    return {
        "stall_s": stall,
        "complete_s": complete,
        "step_s": usual,
        "slow_down": while_saving / usual,
        "longest_step_s": max(during),
        "longest_step_alone_s": max(alone),
        "cost_s": stall + max(0.0, (complete - stall) * (1 - usual / while_saving)),
    }


def restoring(name: str, folder: Path, seed: int) -> dict:
    """One resume and one warm restore of what `saving` left."""
    import jax

    from tinyllama_jax.train.checkpoint import Checkpoints

    with training(name) as (targets, make), Checkpoints(folder / "end", keep_temporary=1) as checkpoints:
        jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the device is there
        forgotten = forget([path for path in (folder / "end").rglob("*") if path.is_file()])
        found, restored, equal, n_bytes = [], None, [], 0
        for _ in range(2):
            del restored
            before, begin = fetched(), time.perf_counter()
            _, restored, _ = checkpoints.restore(targets)
            jax.block_until_ready(restored)
            seconds, after = time.perf_counter() - begin, fetched()
            n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
            share = None if before is None or not forgotten else (after - before) / n_bytes
            found.append({"s": seconds, "from_disk": share})
            if not equal:
                expected = make(seed)
                equal.append(same_bits(restored, expected))
                del expected
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"resume": found[0], "warm": found[1], "bit_equal": equal[0], "bytes": n_bytes, "peak_resident_bytes": peak}


# ----------------------------------------------------------------------------------------------------------


def summary(measured: Sequence[dict], n_bytes: int, seconds: str | None = None) -> dict:
    """Spreads of what was measured several times, and GB/s of the field `seconds`."""
    keys = [key for key, value in measured[0].items() if value is not None]
    found = {key: spread([one[key] for one in measured]) for key in keys}
    if seconds:
        found["gb_per_s"] = spread([n_bytes / 1e9 / one[seconds] for one in measured])
    return found


def failures(line: dict, max_stall: float | None, max_restore: float | None) -> list[str]:
    """The claims that were not held, by their worst."""
    failed = [] if line["bit_equal"] else ["the restored state differs from the one that was saved"]
    stall = max(line["first"]["stall_s"], line["periodic"]["stall_s"]["max"])
    if max_stall is not None and stall > max_stall:
        failed.append(f"a save held the loop for {stall:.3f} s, claimed {max_stall:g}")
    restore = line["resume"]["s"]["max"]
    if max_restore is not None and restore > max_restore:
        failed.append(f"a restore took {restore:.2f} s, claimed {max_restore:g}")
    return failed


def measure(name: str, folder: Path, rounds: int) -> tuple[dict, dict]:
    """The two lines, without their origin."""
    parameters = flops.parameter_counts(preset(name))["total"]
    disk = [raw(folder, BYTES_PER_PARAMETER * parameters) for _ in range(rounds)]
    saved = isolated(saving, name, folder, rounds)
    restored = [isolated(restoring, name, folder, rounds) for _ in range(rounds)]
    n_bytes = saved["bytes"]
    common = {"preset": name, "parameters": parameters, "bytes": n_bytes, "rounds": rounds}
    rates = {f"{what}_gb_per_s": spread([n_bytes / 1e9 / one[what] for one in disk]) for what in disk[0]}
    line = {
        "benchmark": "checkpoint",
        **common,
        "arrays": saved["arrays"],
        "device": saved["device"],
        "processors": os.cpu_count(),
        "first": {key: float(f"{value:.4g}") for key, value in saved["first"].items()},
        "periodic": summary(saved["periodic"], n_bytes, "complete_s"),
        "stage_end": summary(saved["stage_end"], n_bytes, "s"),
        "resume": summary([one["resume"] for one in restored], n_bytes, "s"),
        "warm": summary([one["warm"] for one in restored], n_bytes, "s"),
        "bit_equal": all(one["bit_equal"] for one in restored),
        "peak_resident_bytes": {
            "saving": saved["peak_resident_bytes"],
            "restoring": max(one["peak_resident_bytes"] for one in restored),
        },
    }
    return {"benchmark": "checkpoint_raw", **common, **rates}, line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="t243", help="whose state is saved (t243)")
    parser.add_argument("--rounds", type=int, default=3, help="times everything is measured (3)")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="on the disk to measure (the folder for temporary files)"
    )
    parser.add_argument("--max-stall", type=float, metavar="S", help="claim: no save holds the loop for longer")
    parser.add_argument("--max-restore", type=float, metavar="S", help="claim: no restore takes longer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    args = parser.parse_args(arguments)
    workdir = args.workdir or Path(tempfile.gettempdir())
    if args.rounds < 1:
        parser.error("--rounds must be positive")
    if not workdir.is_dir():
        parser.error(f"--workdir {workdir}: no such folder")
    if args.out is not None and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: no such folder")
    try:
        need = COPIES * BYTES_PER_PARAMETER * flops.parameter_counts(preset(args.preset))["total"]
        free = shutil.disk_usage(workdir).free
        if free < need:
            raise CheckpointError(
                f"{workdir}: {free / 1e9:.1f} GB are free and {need / 1e9:.1f} GB are needed; free some, or name "
                "another --workdir or a smaller --preset"
            )
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=workdir) as folder:
            disk, line = measure(args.preset, Path(folder), args.rounds)
    except UserError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return error.exit_status
    failed = failures(line, args.max_stall, args.max_restore)
    claims = {"max_stall_s": args.max_stall, "max_restore_s": args.max_restore}
    with args.out.open("w") if args.out else open(os.devnull, "w") as file:
        emit({**disk, **origin()}, file)
        emit({**line, "claims": claims, "failed": failed, **origin()}, file)
    for text in failed:
        print(f"checkpoint: {text}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
