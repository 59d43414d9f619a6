"""The options of `sweep`."""

from __future__ import annotations

from tinyllama_jax import verbs_sweep


def add_sweep(verb, settings, as_json) -> None:
    sub = verb(
        "sweep",
        verbs_sweep.sweep,
        "show what an experiment's list of runs is and costs, and run it on this machine",
        "tinyllama sweep experiments.scaling:isoflop_cpu --workdir runs/isoflop --dry-run\n"
        "  tinyllama sweep experiments.scaling:isoflop_cpu --workdir runs/isoflop --slots 2\n"
        "  tinyllama sweep experiments.scaling:isoflop_pod --workdir runs/isoflop --dry-run --target h100:8\n\n"
        "`launch` takes the same list to a cluster.  A run that is done is passed over, one that is half done goes on.",
    )
    sub.add_argument("experiment", metavar="MODULE:FUNCTION")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="run n goes to DIR/n; goes on with what is there")
    sub.add_argument("--runs", default="", metavar="N,M-K", help="these, numbered from 0 (all)")
    sub.add_argument("--dry-run", action="store_true", help="show the plan, start nothing")
    sub.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="MACHINE",
        help="say time and cost on this machine, as for `preflight` (repeatable)",
    )
    sub.add_argument("--price", type=float, metavar="USD", help="per device and hour (a dated list price)")
    sub.add_argument(
        "--max-cost", type=float, metavar="USD", help="exit with 78 when all runs together would cost more"
    )
    sub.add_argument(
        "--slots",
        type=int,
        default=0,
        metavar="N",
        help="runs at a time (one on each GPU; without GPUs one on all cores, which N divide among them)",
    )
    sub.add_argument("--gpus-per-run", type=int, default=0, metavar="N", help="(1)")
    sub.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="FILE",
        help="runs that this runs.jsonl has as finished need not be here (repeatable)",
    )
    sub.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="failures of a run without a new checkpoint (3)"
    )
    settings(sub)
    as_json(sub)
