"""Full fine-tuning, LoRA, QLoRA and a prefix side by side: held-out loss, memory, time.

    python benchmarks/finetune.py --base CKPT|HF_DIRECTORY --data docstrings --out experiments/results/finetune

One recipe after another of experiments/finetune.py, each a process of its own, on the same base, examples and order,
for as many epochs (--epochs).  A Hugging Face directory is imported first.  Per recipe: the held-out loss before and at
its best, the weights trained, bytes of the checkpoint, of state on the device, and at the peak (of the device where it
tells, else of the process), seconds per step and of the whole run.  Writes OUT.json and OUT.md; exit status 1 unless
every recipe lowers the held-out loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lines import ROOT, emit, origin
from real_runs import records

RECIPES = ("full", "lora", "qlora", "prefix")
TINYLLAMA = [sys.executable, "-m", "tinyllama_jax"]


def measure(command: Sequence[str]) -> int:
    """Runs it; -> the most memory that the process had, in bytes.  Raises RuntimeError when it fails."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def row(recipe: str, run: Path, resident: int) -> dict:
    """What the records of a run say."""
    validations, metrics = records(run, "validation"), records(run, "metrics")
    losses = [float(np.mean([d["loss"] for d in v["domains"].values()])) for v in validations]
    info = json.loads((run / "run.json").read_text())
    peaks = [v["timing"]["peak_memory_bytes"] for v in validations if "peak_memory_bytes" in v["timing"]]
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    seconds = [m["timing"]["step_s"] for m in metrics if "compiled" not in m["timing"]]
    adapter = info["config"]["adapter"] or {}
    return {
        "recipe": recipe,
        "base_weights": adapter.get("base_weights", "float32"),
        "trained_parameters": info["model"]["trained_parameters"],
        "parameters": info["model"]["parameters"]["total"],
        "steps": len(metrics),
        "loss_before": losses[0],
        "loss_best": min(losses),
        "loss_last": losses[-1],
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "peak_device_bytes": max(peaks, default=None),
        "peak_process_bytes": resident,
        "step_seconds_median": float(np.median(seconds)),
        "seconds": sum(m["timing"]["step_s"] for m in metrics),
    }


def table(rows: Sequence[dict]) -> list[str]:
    """As Markdown."""
    head = ["recipe", "base", "trained", "loss before", "best", "checkpoint MB", "peak MB", "s per step"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for r in rows:
        peak = r["peak_device_bytes"] or r["peak_process_bytes"]
        cells = [
            r["recipe"],
            r["base_weights"],
            f"{r['trained_parameters']:,} ({r['trained_parameters'] / r['parameters']:.1%})",
            f"{r['loss_before']:.4f}",
            f"{r['loss_best']:.4f}",
            f"{r['checkpoint_bytes'] / 1e6:.1f}",
            f"{peak / 1e6:,.0f}",
            f"{r['step_seconds_median']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a run, a checkpoint, or a Hugging Face directory")
    parser.add_argument("--data", action="append", default=[], help="as of `tinyllama finetune` (docstrings)")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--workdir", default="", help="keep the runs here")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for all")
    parser.add_argument(
        "--set-of", action="append", default=[], metavar="RECIPE:KEY=VALUE", help="for one, such as full:lr_peak=2e-5"
    )
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(args.workdir or scratch).absolute()
        base = args.base
        if (Path(base) / "config.json").exists():
            base = str(workdir / "base")
            measure([*TINYLLAMA, "import", "hf", args.base, "--out", base])
        rows = []
        for recipe in args.recipes.split(","):
            own = [s.partition(":")[2] for s in args.set_of if s.partition(":")[0] == recipe]
            settings = [f"epochs={args.epochs}", f"store={workdir / 'examples'}", *args.settings, *own]
            words = [word for setting in settings for word in ("--set", setting)]
            data = [word for path in args.data or ["docstrings"] for word in ("--data", path)]
            command = [*TINYLLAMA, "finetune", f"experiments.finetune:{recipe}", "--base", base, *data, *words]
            rows.append(row(recipe, workdir / recipe, measure([*command, "--workdir", str(workdir / recipe)])))
            emit({"benchmark": "finetune", **rows[-1]})
    lines = table(rows)
    print("\n".join(lines), file=sys.stderr)
    if args.out:
        value = {"benchmark": "finetune", "rows": rows, **origin()}
        args.out.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return 0 if all(r["loss_best"] < r["loss_before"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
