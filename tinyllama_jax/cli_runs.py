"""The options of `runs`."""

from __future__ import annotations

from tinyllama_jax import verbs_runs


def add_runs(verb, as_json) -> None:
    sub = verb(
        "runs",
        verbs_runs.runs,
        "one row for each run of run directories and sweeps: what it was, what it took, how it ended",
        "tinyllama runs runs/isoflop --where status=finished --sort flops\n"
        "  tinyllama runs runs/* --columns name,config.model.kv_heads,loss,tokens_per_s --out runs.csv",
    )
    sub.add_argument("paths", nargs="+", metavar="PATH", help="run directories, sweeps, folders of them, or tables")
    sub.add_argument("--out", default="", metavar="FILE", help="also write the table, as .jsonl or .csv")
    sub.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows with this value (repeatable)"
    )
    sub.add_argument(
        "--columns",
        default="",
        metavar="A,B,C",
        help="these columns only, such as name,config.seed,loss.prose (all; a person is shown the usual ones)",
    )
    sub.add_argument("--sort", default="", metavar="COLUMN", help="smallest first")
    as_json(sub)
