"""The options of `generate`."""

from __future__ import annotations

from tinyllama_jax import verbs_generate


def add_generate(verb, as_json, dtype) -> None:
    sub = verb(
        "generate",
        verbs_generate.generate,
        "continue prompts with a KV cache",
        'tinyllama generate runs/demo --prompt "def main(" --max-new-tokens 64 --temperature 0.8 --top-p 0.95',
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    given = sub.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for a batch")
    given.add_argument("--tokens", metavar="FILE.npy", help="int32 [batch, time], used as they are")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(128)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (0.7)")
    sub.add_argument("--top-k", type=int, default=0, help="0 = off")
    sub.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    sub.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    dtype(sub)
    as_json(sub)
