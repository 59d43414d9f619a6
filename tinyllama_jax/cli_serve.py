"""The options of `serve`."""

from __future__ import annotations

from tinyllama_jax import verbs_serve
from tinyllama_jax.cli_chat import add_model


def add_serve(verb, as_json, dtype) -> None:
    sub = verb(
        "serve",
        verbs_serve.serve,
        "answer over HTTP as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models, /health, /stats",
        "tinyllama serve ckpt --port 8000 --rows 16 --dtype bfloat16",
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    sub.add_argument("--host", default="", help="address to listen on (127.0.0.1, which only this machine reaches)")
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="0 = any that is free, which is said (8000)")
    sub.add_argument("--model-name", default="", metavar="NAME", help="as clients know it (the checkpoint's name)")
    add_model(sub)
    sub.add_argument("--rows", type=int, default=8, metavar="N", help="answers that are computed at a time (8)")
    sub.add_argument("--queue", type=int, default=256, metavar="N", help="answers that may wait for a row (256)")
    sub.add_argument("--context-tokens", type=int, default=0, metavar="N", help="of each row (0 = the model's context)")
    sub.add_argument("--max-body", type=int, default=1_000_000, metavar="BYTES", help="of a request (1000000)")
    sub.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds for running answers at a stop (30)"
    )
    sub.add_argument(
        "--api-key-env", default="", metavar="NAME", help="environment variable that holds the key to ask for"
    )
    dtype(sub)
    as_json(sub)
