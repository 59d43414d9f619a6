"""The options of `chat`."""

from __future__ import annotations

from tinyllama_jax import verbs_chat

TEMPLATES = ("auto", "zephyr", "chatml", "v0_1", "alpaca", "none")  # generate/templates.py has them; imports are slow


def add_chat(verb, as_json, dtype) -> None:
    sub = verb(
        "chat",
        verbs_chat.chat,
        "talk with a chat model: on a terminal, or a message per line of standard input",
        'tinyllama chat ckpt --template zephyr --system "You are brief." --temperature 0.7 --top-k 50 --top-p 0.95\n\n'
        "on a terminal: /reset forgets, /system TEXT forgets and says who answers, /quit or Ctrl-D ends,\n"
        "Ctrl-C stops an answer",
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    add_model(sub)
    sub.add_argument("--system", default="", metavar="TEXT", help="said before the dialogue")
    sub.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (512)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (0.7)")
    sub.add_argument("--top-k", type=int, default=0, help="0 = off")
    sub.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    sub.add_argument("--min-p", type=float, default=0.0, help="0 = off")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="1 = off")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    dtype(sub)
    as_json(sub)


def add_model(sub) -> None:
    """How a model is read and spoken to; of `chat` and `serve`."""
    sub.add_argument(
        "--template", default="auto", choices=TEMPLATES, help="how dialogues are written (auto: as the tokenizer says)"
    )
    sub.add_argument(
        "--weights", default="dtype", choices=("dtype", "int8", "int4"), help="kept in so many bits (as --dtype)"
    )
