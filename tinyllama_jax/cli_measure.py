"""The options of `measure`."""

from __future__ import annotations

from tinyllama_jax import verbs_measure


def add_measure(verb, as_json) -> None:
    sub = verb(
        "measure",
        verbs_measure.measure,
        "measure finished runs as training does not: loss in longer windows, speed of generation, size of the cache",
        "tinyllama measure runs/tiny --beyond 256,512 --decode 1x128,8x512 --json",
    )
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run directory; its newest checkpoint is measured")
    sub.add_argument(
        "--beyond",
        default="",
        metavar="TOKENS,...",
        help="validation loss in windows of these lengths and of training's, on the same text (with no option here and "
        "below: what the run's evaluation.beyond_tokens, beyond_ropes and decode ask for)",
    )
    sub.add_argument(
        "--rope",
        default="",
        metavar="HOW,...",
        help="in longer windows: as-trained, linear, ntk, yarn (those that make sense for the model)",
    )
    sub.add_argument(
        "--decode", default="", metavar="ROWSxTOKENS,...", help="time generation of so many rows behind so many tokens"
    )
    sub.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="windows of the longest length per domain, 0 = all (as much text as the run's validation)",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute in (the run's)")
    as_json(sub)
