"""What `serve` does."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os

from tinyllama_jax.errors import ConfigError, UsageError, UserError
from tinyllama_jax.terminal import say
from tinyllama_jax.train import saved

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(args: argparse.Namespace) -> None:
    host, key = _checked(args)
    path = saved.resolve(args.checkpoint)  # before jax is imported
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("serve needs aiohttp: pip install 'tinyllama_jax[serve]'")
    if host not in LOOPBACK and not key:
        say(f"warning: {host} can be reached from elsewhere, and no key is asked for (--api-key-env NAME)")
    import asyncio

    from tinyllama_jax.generate.chat import choose
    from tinyllama_jax.generate.ready import ready
    from tinyllama_jax.serve import run
    from tinyllama_jax.serve.app import Limits, Served

    template = None
    try:
        template = choose(args.template, path / "tokenizer")
    except ConfigError as error:
        say(f"no chat: {error}")
    made = ready(
        args.checkpoint, dtype=args.dtype, weights=args.weights, rows=args.rows, context_tokens=args.context_tokens
    )
    name = args.model_name or str(made.loaded.meta.get("name") or path.name)

    def started(host: str, port: int) -> None:
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        spoken = f"chat in {template.name}" if template else "no chat"
        say(f"{name} at {address}/v1: {args.rows} rows of {made.engine.context_tokens} tokens, {spoken}")
        if args.json:
            about = {"address": address, "host": host, "port": port, "model": name, "pid": os.getpid()}
            print(json.dumps(about | {"template": template.name if template else None}), flush=True)

    served = Served(
        name=name,
        tokenizer=made.tokenizer,
        start=made.start,
        chat=made.chat(template) if template else None,
        context_tokens=made.engine.context_tokens,
        vocab_size=made.loaded.model.vocab_size,
    )
    serving = run.serve(
        made.engine,
        served,
        host=host,
        port=args.port,
        waiting=args.queue,
        grace=args.grace,
        limits=Limits(body_bytes=args.max_body),
        key=key,
        inside=made.inside,
        started=started,
    )
    try:
        asyncio.run(serving)
    except UserError:
        raise
    except Exception as error:
        say(f"the engine failed, and the server ends: {type(error).__name__}; whoever waited was answered with 500")
        raise
    say("stopped")


def _checked(args: argparse.Namespace) -> tuple[str, str]:
    """The host and the key; raises UsageError and ConfigError for what is wrong with the options."""
    for option, value, least in (
        ("--rows", args.rows, 1),
        ("--queue", args.queue, 0),
        ("--max-body", args.max_body, 1),
        ("--grace", args.grace, 0),
        ("--context-tokens", args.context_tokens, 0),
    ):
        if not least <= value < float("inf"):
            raise UsageError(f"{option} {value}: must be at least {least}")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: must be from 0 to 65535")
    key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    if args.api_key_env and not key:
        raise ConfigError(f"--api-key-env {args.api_key_env}: this variable is not set, or empty")
    return args.host or "127.0.0.1", key
