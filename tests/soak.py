"""Trains small runs for so many minutes, hurts them all the time, and compares what they leave with an undisturbed run.

    python tests/soak.py --minutes 60

Each run is started by the command a user types, in one process or in one and two by turns, and every start meets a
fault chosen by chance: kill -9 of one or all at any instant, a notice to stop, a process that stands still, a full
disk, a wall clock that jumps, and between starts the newest checkpoint damaged.  After each of them:

    it has ended with a status that a launcher may act on, one line that says why, and no Python stacks
    the records so far are those of the undisturbed run: every step once, the same batches, the same losses; bit for
    bit while it was always one process, to 1e-5 otherwise
    the next start goes on from the newest good checkpoint; a damaged one is set aside, none is deleted

Exit status 0 when all of that held for every run up to its end; 1 with the first that did not, and where its files are.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package, also where it is not installed

import small_store
from hosts import Hosts
from many_hosts import command, lines, run_to_the_end, same_run, steps_done
from soak_faults import CLOCK, Disk, Life, damage

from tinyllama_jax.lab.goodput import goodput

STAGE_STEPS = 500  # of three; fewer where there is less than an hour
FEWEST_FAULTS = 5  # however slow the machine is
FAULTS = ("kill_all", "kill_one", "terminate", "suspend", "fill_disk")  # methods of Life
DAMAGED, JUMPING = 0.35, 0.25  # shares of the starts
PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "grain", "numpy")


def arguments(store: Path, workdir: Path, stage_steps: int, *more: str) -> list[str]:
    """The run: at most some ten seconds of steps where nothing disturbs it, a save every second."""
    tokens = stage_steps * 8 * 32
    settings = (f"curriculum.{stage}.tokens={tokens}" for stage in ("basic", "continual", "cooldown"))
    saves = ("checkpoint.temporary_steps=0", "checkpoint.temporary_seconds=1", "checkpoint.retry_seconds=1")
    return command(store, workdir, *settings, *saves, *more)


class Soak:
    """Runs one after the other in `folder`; `tally` and `faults` say what happened."""

    def __init__(self, folder: Path, chance: random.Random, processes: int, minutes: float):
        self.folder, self.chance, self.processes = folder, chance, processes
        self.stage_steps = int(min(STAGE_STEPS, max(100, 60 * minutes)))
        self.faults, self.tally, self._deck = Counter(), Counter(), []
        self.store, self.whole = small_store.make(folder / "data"), folder / "whole"
        begin = time.monotonic()
        self._finish(self.whole, 1, "checkpoint.temporary_seconds=0")
        self.whole_seconds = time.monotonic() - begin
        self.disk = Disk(folder / "disk")

    def _environment(self, count: int) -> dict:
        """One process has two devices, so that it computes what two with one each do."""
        return {"devices": 2, "environment": lambda i, address: {}} if count == 1 else {}

    def _finish(self, workdir: Path, count: int, *settings: str) -> None:
        argv = arguments(self.store, workdir, self.stage_steps, *settings)
        run_to_the_end(count, argv, seconds=900, **self._environment(count))

    def run(self, deadline: float) -> None:
        """One run, hurt until it is at its end or there is just the time to let it end."""
        self.tally["runs"] += 1
        workdir = self.disk.place / f"run-{self.tally['runs']}"
        counts = (1,) if self.processes == 1 or self.chance.random() < 0.4 else (1, 2)
        exact, count, damaged = counts == (1,), counts[-1], {}
        print(f"run {self.tally['runs']} with {' or '.join(map(str, counts))} processes", file=sys.stderr, flush=True)
        while self._time_left(deadline) and not self._complete(workdir, damaged):
            if self.chance.random() < DAMAGED:
                self._damage(workdir / "checkpoints", damaged)
            before, count = count, self.chance.choice(counts)
            if before != count:
                self.faults["another number of processes"] += 1
            self._hurt(workdir, count, damaged)
            if steps_done(workdir):
                same_run(workdir, self.whole, exact=exact, so_far=True)
        self.tally["starts"] += 1
        if self.chance.random() < DAMAGED:  # also the last one
            self._damage(workdir / "checkpoints", damaged)
        self._finish(workdir, self.chance.choice(counts))
        self._judge(workdir, exact, damaged)
        shutil.rmtree(workdir)

    def _time_left(self, deadline: float) -> bool:
        return time.monotonic() + self.whole_seconds < deadline or sum(self.faults.values()) < FEWEST_FAULTS

    def _complete(self, workdir: Path, damaged: dict) -> bool:
        total = 3 * self.stage_steps
        return steps_done(workdir) == total and self._newest_good(workdir, damaged) == total

    def _hurt(self, workdir: Path, count: int, damaged: dict) -> None:
        name = self._draw(count)
        argv, extra = arguments(self.store, workdir, self.stage_steps), self._environment(count)
        if self.chance.random() < JUMPING:
            self.faults["jumping clock"] += 1
            argv[1:3] = ["-c", CLOCK]
            os.environ["SOAK_CLOCK"] = str(self.chance.randrange(2**32))
        expected = self._newest_good(workdir, damaged)
        at = steps_done(workdir)
        with Hosts(count, argv, **extra) as hosts:
            life = Life(hosts, workdir, self.disk, self.chance, self.stage_steps // 2)
            getattr(life, name)()
            start, said = life.began(), hosts.said(0)
        self.faults[name] += 1
        self.tally["starts"] += 1
        print(f"  {name}: {count} process(es), steps {at} -> {steps_done(workdir)}", file=sys.stderr, flush=True)
        if start is not None:
            assert start["step"] == expected, f"it went on from step {start['step']}, not {expected}:\n{said}"
        self._set_aside(workdir, damaged, all_of_them=start is not None)

    def _draw(self, count: int) -> str:
        """A fault, of which a run of so many processes is capable; each kind once before any comes again."""
        possible = {n for n in FAULTS if (n != "kill_one" or count > 1) and (n != "fill_disk" or self.disk.mounted)}
        if not possible & set(self._deck):
            self._deck = self.chance.sample(FAULTS, len(FAULTS))
        name = next(n for n in self._deck if n in possible)
        self._deck.remove(name)
        return name

    def _newest_good(self, workdir: Path, damaged: dict) -> int:
        """The step that the next start must go on from; what was committed last must be there."""
        folder = workdir / "checkpoints"
        if not folder.exists():
            return 0
        found = {}
        for path in folder.iterdir():
            name = path.name.removesuffix(".replaced")  # killed between the two renames of a commit
            if name.isdigit() and path.stat().st_ino not in damaged:
                found[int(name)] = path
        committed = [e["step"] for e in lines(workdir / "events.jsonl") if e["kind"] == "checkpoint_committed"]
        hurt = {int(path.name) for path in damaged.values()}
        if committed and committed[-1] not in hurt:
            assert committed[-1] in found, f"step {committed[-1]} was committed and is not there: {sorted(found)}"
        return max(found, default=0)

    def _damage(self, folder: Path, damaged: dict) -> None:
        """The newest checkpoint, unless it is the only good one or damaged already."""
        good = [p for p in folder.glob("*") if p.name.isdigit() and p.stat().st_ino not in damaged]
        newest = max((p for p in folder.glob("*") if p.name.isdigit()), default=None)
        if len(good) < 2 or newest not in good or list(folder.glob("*.replaced")):
            return
        damaged[newest.stat().st_ino] = newest
        self.faults[f"newest checkpoint: {damage(newest, self.chance)}"] += 1

    def _set_aside(self, workdir: Path, damaged: dict, *, all_of_them: bool) -> None:
        """Of the damaged checkpoints none was deleted, and nothing else was taken for damaged.

        all_of_them: a start has passed them, so that none has its old name."""
        there = {path.stat().st_ino: path for path in (workdir / "checkpoints").glob("*")}
        for inode, path in damaged.items():
            assert inode in there, f"{path}, damaged, was deleted"
            assert ".corrupt" in there[inode].name or not all_of_them, f"{path}, damaged, was not set aside"
        for inode, path in there.items():
            assert ".corrupt" not in path.name or inode in damaged, f"{path} was good"

    def _judge(self, workdir: Path, exact: bool, damaged: dict) -> None:
        """After the end."""
        steps = same_run(workdir, self.whole, exact=exact)
        self._set_aside(workdir, damaged, all_of_them=True)
        names = [path.name for path in (workdir / "checkpoints").iterdir()]
        assert not [name for name in names if ".tmp-" in name or name.endswith(".replaced")], names
        events, metrics = lines(workdir / "events.jsonl"), lines(workdir / "metrics.jsonl")
        assert events[-1]["kind"] == "finished", f"its last event is {events[-1]}"
        shares = [goodput(events, metrics)["goodput"], *(m["timing"].get("goodput") for m in metrics)]
        assert all(s is None or math.isnan(s) or 0 <= s <= 1 for s in shares), "a goodput beyond 0 to 1"
        self.tally["steps"] += steps
        self.tally["redone_steps"] += sum(event["steps"] for event in events if event["kind"] == "cut_back")
        self.tally["set_aside"] += len(damaged)

    def close(self, keep: bool) -> None:
        """keep: the run directories outlive the disk in memory."""
        if keep and self.disk.mounted:
            shutil.copytree(self.disk.place, self.folder / "kept", ignore=shutil.ignore_patterns("ballast"))
        self.disk.close()
        if not keep:
            shutil.rmtree(self.folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, help="of what happens when; default: another one every time")
    parser.add_argument("--workdir", type=Path, help="where the runs go; default: the temporary directory")
    parser.add_argument("--out", type=Path, help="a file for the result, which is printed as well")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2, help="of a run, at most")
    args = parser.parse_args()
    begin = time.monotonic()
    deadline = begin + 60 * args.minutes
    seed = random.randrange(2**32) if args.seed is None else args.seed
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=args.workdir))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    soak, failure = Soak(folder, random.Random(seed), args.processes, args.minutes), "interrupted"
    try:
        while sum(soak.faults.values()) < FEWEST_FAULTS or time.monotonic() + 2 * soak.whole_seconds < deadline:
            soak.run(deadline)
        failure = None
    except AssertionError as error:
        failure = str(error)
    finally:
        soak.close(keep=failure is not None)
    result = {
        "benchmark": "soak",
        "command": shlex.join(["python", "tests/soak.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "seed": seed,
        "faults": dict(sorted(soak.faults.items())),
        "left_out": [] if soak.disk.mounted else ["fill_disk: mounting a tmpfs is not permitted"],
        **{name: soak.tally[name] for name in ("runs", "starts", "steps", "redone_steps", "set_aside")},
        "verdict": "all held" if failure is None else "failed",
    }
    print(json.dumps(result), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if failure is not None:
        print(f"soak: seed {seed}, runs kept in {folder}: {failure}", file=sys.stderr)
    return failure is not None


if __name__ == "__main__":
    sys.exit(main())
