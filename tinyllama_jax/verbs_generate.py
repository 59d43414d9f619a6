"""What `generate` does."""

from __future__ import annotations

import argparse
import json

from tinyllama_jax.config import Mesh
from tinyllama_jax.errors import DataError, UserError
from tinyllama_jax.train import saved


def load_rows(path: str):
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--tokens {path}: not a readable .npy file ({str(error).splitlines()[0]})") from error


def generate(args: argparse.Namespace) -> None:
    saved.resolve(args.checkpoint)  # before jax is imported
    rows = None if args.tokens is None else load_rows(args.tokens)
    if rows is not None and (rows.ndim != 2 or rows.dtype.kind not in "iu"):
        raise DataError(f"--tokens {args.tokens}: must be integers [batch, time], not {rows.dtype} {list(rows.shape)}")
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample
    from tinyllama_jax.generate.load import load, prompt_tokens
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, args.dtype):
        loaded = load(args.checkpoint, mesh, dtype=args.dtype)
        try:
            tokenizer = loaded.tokenizer()
        except UserError:
            if rows is None:
                raise
            tokenizer = None  # ids in, ids out
        if rows is None:
            prompts = [prompt_tokens(tokenizer, loaded.marks, text) for text in args.prompt]
        else:
            prompts = rows.tolist()
        stream = None
        if not args.json and len(prompts) == 1 and tokenizer is not None:
            stream = _Stream(tokenizer, prompts[0])
        answers = sample.generate(
            loaded.params,
            loaded.model,
            Execution(),
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            eos_id=tokenizer.eos_id if tokenizer and not args.ignore_eos else None,
            on_tokens=stream,
        )
    # Decoded behind the prompt: a continuation decoded alone loses the space that it may begin with.
    texts = [
        tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt)) if tokenizer else None
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    if args.json:
        print(json.dumps({"tokens": answers, "text": texts, "prompt_tokens": prompts}))
    elif stream is not None:
        print()
    else:
        shown = args.prompt if rows is None else [""] * len(prompts)
        for i, row in enumerate(answers):
            print(f"[{i}] {shown[i]}{texts[i]}" if tokenizer else f"[{i}] {row}")


class _Stream:
    """Prints a prompt and what follows as it grows; waits while a character's bytes are incomplete."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer, self.ids, self.printed = tokenizer, list(prompt), 0

    def __call__(self, emitted: list[int | None]) -> None:
        if emitted[0] is None:
            return
        self.ids.append(emitted[0])
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)
