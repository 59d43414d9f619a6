"""The options of `generate`."""

from __future__ import annotations

from tinyllama_jax import verbs_generate
from tinyllama_jax.cli_speculative import add_speculative


def add_generate(verb, as_json, dtype) -> None:
    sub = verb(
        "generate",
        verbs_generate.generate,
        "continue prompts with a KV cache, many at a time",
        'tinyllama generate runs/demo --prompt "def main(" --max-new-tokens 64 --temperature 0.8 --top-p 0.95\n'
        "  tinyllama generate runs/demo --prompt-file prompts.jsonl --rows 32 --weights int8 --json",
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    given = sub.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for a batch")
    given.add_argument("--prompt-file", metavar="FILE", help='a prompt a line, or JSON lines with a "prompt" (.jsonl)')
    given.add_argument("--tokens", metavar="FILE.npy", help="int32 [batch, time], used as they are")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(128)")
    sampling(sub)
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer (repeatable)")
    sub.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    sub.add_argument(
        "--slide",
        action="store_true",
        help="go on past the model's context and forget the oldest tokens, instead of refusing",
    )
    sub.add_argument("--rows", type=int, default=32, metavar="N", help="prompts that are continued at a time (32)")
    serving(sub, dtype)
    add_speculative(sub)
    as_json(sub)


def sampling(sub) -> None:
    """How tokens are drawn."""
    sub.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (0.7)")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0 = off)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the nucleus of mass P (1 = off)")
    sub.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest (0 = off)"
    )
    sub.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="makes tokens of the prompt and the answer less likely (1 = off)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the draws (0)")


def serving(sub, dtype) -> None:
    """How the weights are kept and computed with."""
    dtype(sub)
    sub.add_argument(
        "--weights",
        default="dtype",
        choices=("dtype", "int8", "int4"),
        help="keep layers and head in the dtype of computing, or in so few bits",
    )
