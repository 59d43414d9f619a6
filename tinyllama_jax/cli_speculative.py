"""The options of `generate` that make it speculative."""

from __future__ import annotations


def add_speculative(sub) -> None:
    group = sub.add_argument_group("speculative decoding")
    group.add_argument("--draft", metavar="CKPT", help="a smaller model of the same vocabulary that guesses ahead")
    group.add_argument("--draft-tokens", type=int, metavar="K", help="guesses in a round (4); with --draft")
    group.add_argument(
        "--self-check",
        action="store_true",
        help="also decode plainly: compare the answers, or what is known of their distribution, and the time (--draft)",
    )
