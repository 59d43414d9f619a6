"""Proof that a run loses no step, and does none twice, when its processes are killed one at a time.

    make proof-kills        # 20 minutes on two cores

Trains a small run with two processes, then with four, as the command a user types.  One of them, chosen by chance, is
killed (-9) at an instant chosen by chance; the others must end by themselves with status 1 and one line that names it;
then all are started again, 20 times.  At the end the records are compared with those of an undisturbed run in one
process: every step once, the same batches, the same losses to 1e-5.  Writes results/proof_kills.json.  Exit status 1
when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lines import RESULTS, ROOT, origin, spread

sys.path.insert(0, str(ROOT / "tests"))

import many_hosts  # noqa: E402  (tests/ is a folder of programs, put on the path first)
import small_store  # noqa: E402

CLAIM = (
    "one process of several killed at random, again and again: the others end by themselves with one line that names "
    "it, and no step is lost and none is there twice"
)


def prove(count: int, kills: int, store: Path, whole: Path, folder: Path, chance: random.Random) -> dict:
    """`kills` restarts of a run of `count` processes.  Raises AssertionError when a claim does not hold."""
    workdir, begin, log = folder / f"run-{count}", time.perf_counter(), []
    argv = many_hosts.command(store, workdir)
    for number in range(kills):
        kill = many_hosts.kill_once(count, argv, workdir, chance)
        assert kill is not None, f"the run of {count} processes ended before kill {number + 1}"
        log.append(kill)
        print(f"{count} processes, kill {number + 1}: {kill}", file=sys.stderr, flush=True)
    many_hosts.run_to_the_end(count, argv, seconds=1200)
    steps = many_hosts.same_run(workdir, whole)
    seen = Counter(record["step"] for record in many_hosts.lines(workdir / "metrics.jsonl"))
    events = many_hosts.lines(workdir / "events.jsonl")
    return {
        "processes": count,
        "kills": len(log),
        "killed": {f"process {i}": n for i, n in sorted(Counter(kill.process for kill in log).items())},
        "at_steps": [kill.steps_done for kill in log],
        "starts": sum(event["kind"] == "start" for event in events),
        "seconds_until_the_others_ended": spread([kill.seconds for kill in log]),
        "steps": steps,
        "steps_done_again": sum(event["steps"] for event in events if event["kind"] == "cut_back"),
        "steps_lost": steps - len(seen),
        "steps_twice": sum(times > 1 for times in seen.values()),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument("--workdir", type=Path, help="where the runs go; default: the temporary directory")
    parser.add_argument("--out", type=Path, default=RESULTS / "proof_kills.json")
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    record = {
        "benchmark": "proof_kills",
        "claim": CLAIM,
        **origin(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "seed": seed,
        "peer_seconds": many_hosts.PEER_SECONDS,
    }
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="proof-kills-", dir=args.workdir))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    store, whole = small_store.make(folder / "data"), folder / "whole"
    undisturbed = many_hosts.command(store, whole)
    many_hosts.run_to_the_end(1, undisturbed, devices=2, environment=lambda i, address: {})
    try:
        record["runs"] = [prove(n, args.restarts, store, whole, folder, chance) for n in args.processes]
    except AssertionError as error:
        print(f"proof_kills: seed {seed}, runs kept in {folder}: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps(record), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
