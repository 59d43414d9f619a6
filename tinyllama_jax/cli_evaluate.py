"""The options of `eval` and `score`."""

from __future__ import annotations

from tinyllama_jax import verbs_evaluate


def add_evaluate(verb, as_json, dtype) -> None:
    sub = verb(
        "eval",
        verbs_evaluate.evaluate,
        "loss and bits per byte per domain, on held-out text or on a corpus",
        "tinyllama eval runs/demo --corpus notes=~/notes --json",
    )
    sub.add_argument("checkpoint", metavar="RUN|CKPT")
    sub.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="SOURCE",
        help="text as for `prepare`, or a token store (its validation text); default: the run's own store",
    )
    sub.add_argument("--sequences", type=int, default=0, help="windows per domain (0 = all)")
    sub.add_argument("--sequence-tokens", type=int, default=0, help="window length (0 = the run's)")
    sub.add_argument("--baselines", action="store_true", help="also fit n-grams on the tokens that the run saw")
    dtype(sub)
    as_json(sub)

    sub = verb(
        "score",
        verbs_evaluate.score,
        "negative log-likelihood, in nats, of every predicted token of given rows",
        "tinyllama score runs/demo --tokens rows.npy --json",
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    sub.add_argument("--tokens", required=True, metavar="FILE.npy", help="int32 [batch, time]")
    dtype(sub)
    as_json(sub)
