"""The options of `fit` with its laws, and of `allocate`."""

from __future__ import annotations

from tinyllama_jax import verbs_lab

# Laws, each a verb with a help of its own.
FIT_STEPS = ("chinchilla", "isoflop", "repetition", "overtraining", "downstream")


def add_fit(verb, as_json) -> None:
    def data(sub, *columns: str) -> None:
        table = sub.add_mutually_exclusive_group(required=True)
        table.add_argument(
            "--csv", default="", metavar="FILE", help="one row per finished run, with a header (.jsonl without)"
        )
        table.add_argument(
            "--runs",
            action="append",
            default=[],
            metavar="PATH",
            help="the finished runs of a run directory, sweep, folder of them, or table of `runs` (repeatable)",
        )
        sub.add_argument(
            "--where",
            action="append",
            default=[],
            metavar="COLUMN=VALUE",
            help="only rows with this value (repeatable)",
        )
        for name, what, usual in (
            ("n", "parameters", verbs_lab.USUAL["N"]),
            ("d", "tokens seen, repeats included", verbs_lab.USUAL["D"]),
            ("unique", "unique tokens", verbs_lab.USUAL["U"]),
            ("c", "training FLOPs; 6 N D where there is none", verbs_lab.USUAL["C"]),
            ("loss", "held-out loss, nats per token", verbs_lab.USUAL["L"]),
        ):
            if name in columns:
                first = f"column of the {what} (the first there is of {', '.join(usual)})"
                sub.add_argument(f"--{name}-column", default="", metavar="NAME", help=first)
        if "group" in columns:
            sub.add_argument(
                "--group-column", default="", metavar="NAME", help="rows that share their noise are resampled together"
            )
        sub.add_argument("--draws", type=int, default=1000, metavar="N", help="resamples for the intervals (1000)")
        sub.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
        sub.add_argument(
            "--out", default="", metavar="FILE", help="also write the answer, with its resamples, for `allocate --law`"
        )
        as_json(sub)

    def robust(sub) -> None:
        sub.add_argument(
            "--delta", type=float, default=1e-3, metavar="D", help="Huber's width, in log loss (1e-3, as published)"
        )

    def compute(sub) -> None:
        sub.add_argument(
            "--compute",
            action="append",
            type=float,
            default=[],
            metavar="FLOPS",
            help="say the best N and D for this budget (the largest in the data, and ten times it; repeatable)",
        )

    def given(sub, what: str) -> None:
        sub.add_argument("--given", action="append", default=[], metavar="NAME=NUMBER", help=what)

    sub = verb(
        "fit",
        verbs_lab.fit,
        "fit a law to a table of runs, with intervals and warnings",
        "tinyllama fit chinchilla --csv runs.csv --json\n\n"
        "its laws (each has a --help):\n"
        "  tinyllama fit chinchilla     E + A/N^alpha + B/D^beta\n"
        "  tinyllama fit isoflop        the best N and D at each budget, and their exponents\n"
        "  tinyllama fit repetition     what repeated data is worth; three laws compared\n"
        "  tinyllama fit overtraining   E + (a M^eta + b M^-eta) C^-eta, M = D/N\n"
        "  tinyllama fit downstream     task error from loss",
    )
    sub.add_argument("law", nargs="?", default="", metavar="LAW")
    as_json(sub)

    sub = verb(
        "fit chinchilla",
        verbs_lab.fit_chinchilla,
        "fit E + A/N^alpha + B/D^beta, and say the best N and D for a budget",
        "tinyllama fit chinchilla --csv runs.csv --n-column params --d-column tokens --loss-column val_loss --json",
    )
    data(sub, "n", "d", "c", "loss", "group")
    sub.add_argument("--tied", action="store_true", help="alpha = beta")
    given(sub, "hold a constant, such as E=1.69 (repeatable)")
    compute(sub)
    robust(sub)

    sub = verb(
        "fit isoflop",
        verbs_lab.fit_isoflop,
        "find the best size at each compute budget and its power law",
        "tinyllama fit isoflop --csv runs.csv --c-column flops --window 4 --json",
    )
    data(sub, "n", "d", "c", "loss")
    sub.add_argument("--method", default="quadratic", choices=("quadratic", "akima"), help="(quadratic)")
    sub.add_argument(
        "--window", type=float, default=4.0, metavar="F", help="sizes within this factor of the lowest point (4)"
    )
    sub.add_argument(
        "--noise", type=float, default=None, metavar="SD", help="of log loss (the spread around the parabolas)"
    )
    compute(sub)

    sub = verb(
        "fit repetition",
        verbs_lab.fit_repetition,
        "fit what repeated data and excess parameters are worth, and compare three laws",
        "tinyllama fit repetition --csv runs.csv --unique-column unique_tokens --base c4 --json",
    )
    data(sub, "n", "d", "unique", "c", "loss", "group")
    sub.add_argument(
        "--law", default="effective", choices=("effective", "penalty", "saturating"), help="(effective: R_D and R_N)"
    )
    sub.add_argument(
        "--base",
        default="",
        choices=("", "c4"),
        help="the surface without repetition: c4 as published by Muennighoff et al. (fitted to the runs of one epoch)",
    )
    given(sub, "the surface's A, B, E, alpha and beta, all five, instead of --base (repeatable)")
    sub.add_argument(
        "--start",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="look into the valley around this point only (many starts, the lowest minimum; repeatable)",
    )
    robust(sub)

    sub = verb(
        "fit overtraining",
        verbs_lab.fit_overtraining,
        "fit loss in compute and tokens per parameter",
        "tinyllama fit overtraining --csv runs.csv --json",
    )
    data(sub, "n", "d", "c", "loss", "group")
    robust(sub)

    sub = verb(
        "fit downstream",
        verbs_lab.fit_downstream,
        "fit task error as epsilon - k exp(-gamma loss)",
        "tinyllama fit downstream --csv runs.csv --error-column error --json",
    )
    data(sub, "loss")
    sub.add_argument("--error-column", required=True, metavar="NAME", help="column of the error, 0 to 1")


def add_allocate(verb, as_json) -> None:
    sub = verb(
        "allocate",
        verbs_lab.allocate,
        "say the best parameters, tokens, batch and learning rate for a budget, and what TinyLlama's choice costs",
        "tinyllama allocate --law epoch --flops 1e21\n"
        "  tinyllama allocate --law fit.json --usd 5000 --target h100:8\n"
        "  tinyllama allocate --law c4 --flops 1e22 --unique 25e9 --json",
    )
    sub.add_argument(
        "--law",
        required=True,
        metavar="FILE|NAME",
        help="what `fit chinchilla|repetition|overtraining --out FILE` wrote, or a published law: hoffmann, epoch, c4 "
        "(with repetition)",
    )
    sub.add_argument("--flops", type=float, metavar="C", help="the budget in FLOPs, at 6 N a token")
    sub.add_argument("--usd", type=float, metavar="X", help="the budget in US dollars, spent on --target")
    sub.add_argument(
        "--target", default="", metavar="MACHINE", help="as for `preflight`: h100:8, a100-40g:2x8, v5e:4x4, ..."
    )
    sub.add_argument("--price", type=float, metavar="USD", help="per device and hour (a dated list price)")
    sub.add_argument(
        "--unique", type=float, metavar="TOKENS", help="that there are; more are repeats, by a law that values them"
    )
    sub.add_argument(
        "--inference", type=float, default=0.0, metavar="TOKENS", help="paid for from the same FLOPs, 2 N each (0)"
    )
    sub.add_argument(
        "--rule", default="olmo", choices=("olmo", "steplaw", "deepseek"), help="for batch and learning rate (olmo)"
    )
    sub.add_argument(
        "--count",
        default="",
        choices=("", "total", "non_embedding", "matmul"),
        help="what the law's N counts (the column it was fitted to; total)",
    )
    sub.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="of the model (32000)")
    sub.add_argument("--sequence-tokens", type=int, default=2048, metavar="N", help="(2048)")
    as_json(sub)
