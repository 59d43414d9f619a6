"""Proof that planning and reporting keep a person waiting for seconds.

    make proof-lab        # half a minute on two cores

a. `sweep --dry-run` of 210 runs on the pod, with time and price on a target: less than 2 s.
b. `report` of 200 finished runs, of ten isoFLOP budgets and of repeated data at two weight decays: less than 30 s each.

Both are the commands as a person types them, start of Python included.  Writes results/proof_lab.json; exit status 1
when one takes longer.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lines import RESULTS, ROOT, conclude, origin

sys.path.insert(0, str(ROOT / "tests"))

import synthetic_study as made  # noqa: E402

CLAIM = "210 runs are planned in less than 2 s and 200 runs reported in less than 30 s"
STUDY = """
from experiments.scaling import isoflop_pod
from tinyllama_jax.lab import sweep


def many():
    return sweep.checked(sweep.product(isoflop_pod(), {"seed": [0, 1, 2, 3, 4]}))
"""


def seconds(*words: str, cwd: Path) -> float:
    """How long `tinyllama WORDS` takes; raises CalledProcessError when it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "tinyllama_jax", *words]
    subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begin, 2)


def repetition() -> list[dict]:
    unique = [1e5 * 1.6**i for i in range(10)]
    return made.repetition(unique=unique, passes=(1, 2, 3, 4, 6, 8, 16))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "proof_lab.json")
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    record: dict = {"benchmark": "proof_lab", "claim": CLAIM, **origin(), "machine": machine}
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "many_runs.py").write_text(STUDY)
        plan = ("sweep", "many_runs:many", "--workdir", "s", "--dry-run", "--target", "h100:8", "--experiment-path")
        record["plan"] = {"runs": 210, "seconds": seconds(*plan, str(folder), cwd=ROOT), "limit_seconds": 2}
        tables = {"isoflop": made.isoflop([1e12 * 2**i for i in range(10)], 20), "repetition": repetition()[:200]}
        for study, rows in tables.items():
            made.write_table(folder / f"{study}.jsonl", rows)
            took = seconds("report", f"{study}.jsonl", "--out", study, cwd=folder)
            record[f"report_{study}"] = {"runs": len(rows), "seconds": took, "limit_seconds": 30}
    for part, found in record.items():
        if isinstance(found, dict) and found.get("seconds", 0) > found.get("limit_seconds", float("inf")):
            failed.append(f"{part}: {found['seconds']} s, more than {found['limit_seconds']}")
    return conclude(record, failed, args.out)


if __name__ == "__main__":
    sys.exit(main())
