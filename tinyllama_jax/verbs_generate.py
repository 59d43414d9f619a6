"""What `generate` does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tinyllama_jax import verbs_speculative
from tinyllama_jax.errors import DataError, UserError
from tinyllama_jax.train import saved


def load_rows(path: str):
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--tokens {path}: not a readable .npy file ({str(error).splitlines()[0]})") from error


def generate(args: argparse.Namespace) -> None:
    if verbs_speculative.asked_for(args):
        return verbs_speculative.generate(args)
    saved.resolve(args.checkpoint)  # before jax is imported
    rows = None if args.tokens is None else load_rows(args.tokens)
    if rows is not None and (rows.ndim != 2 or rows.dtype.kind not in "iu"):
        raise DataError(f"--tokens {args.tokens}: must be integers [batch, time], not {rows.dtype} {list(rows.shape)}")
    shown = read_prompts(args.prompt_file) if args.prompt_file else args.prompt
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample
    from tinyllama_jax.generate.load import load_serving, prompt_tokens, serving_mesh
    from tinyllama_jax.sharding import computing

    mesh = serving_mesh(args.checkpoint)
    with computing(mesh, args.dtype):
        loaded = load_serving(args.checkpoint, mesh, dtype=args.dtype, weights=args.weights)
        try:
            tokenizer = loaded.tokenizer()
        except UserError:
            if rows is None:
                raise
            tokenizer = None  # ids in, ids out
        if rows is None:
            prompts = [prompt_tokens(tokenizer, loaded.marks, text) for text in shown]
        else:
            prompts = rows.tolist()
            shown = [""] * len(prompts)
        telling = _Telling(tokenizer, prompts, args.stop, aloud=not args.json and len(prompts) == 1)
        answers = sample.generate(
            loaded.params,
            loaded.model,
            Execution(),
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            eos_id=tokenizer.eos_id if tokenizer and not args.ignore_eos else None,
            slide=args.slide,
            rows=args.rows,
            on_tokens=telling,
        )
    texts = telling.finish()
    if args.json:
        print(json.dumps({"tokens": answers, "text": texts, "prompt_tokens": prompts}))
    elif not telling.aloud:
        for i, row in enumerate(answers):
            print(f"[{i}] {shown[i]}{texts[i]}" if tokenizer else f"[{i}] {row}")


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: JSON lines with a field `prompt` where it is named .jsonl, else one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"--prompt-file {path}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"--prompt-file {path}: not UTF-8 text") from None
    if not path.endswith(".jsonl"):
        prompts = [line for line in lines if line]
    else:
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, TypeError, KeyError):
                raise DataError(f'--prompt-file {path}: line {number} is no object with a "prompt"') from None
            if not isinstance(prompts[-1], str):
                raise DataError(f"--prompt-file {path}: the prompt of line {number} is no text")
    if not prompts:
        raise DataError(f"--prompt-file {path}: holds no prompt")
    return prompts


class _Telling:
    """The texts of the rows; printed while it grows where there is one.  Ends a row at a stop string."""

    def __init__(self, tokenizer, prompts: Sequence[list[int]], stop: Sequence[str], *, aloud: bool):
        from tinyllama_jax.generate.text import Text

        self.texts = [Text(tokenizer, prompt, stop) for prompt in prompts] if tokenizer else None
        self.parts: list[list[str]] = [[] for _ in prompts]
        self.aloud = aloud and tokenizer is not None

    def __call__(self, row: int, tokens: list[int]) -> bool:
        if self.texts is None:
            return False
        self._tell(row, self.texts[row].add(tokens))
        return self.texts[row].stopped

    def _tell(self, row: int, text: str) -> None:
        self.parts[row].append(text)
        if self.aloud:
            print(text, end="", flush=True)

    def finish(self) -> list[str] | list[None]:
        if self.texts is None:
            return [None] * len(self.parts)
        for row, text in enumerate(self.texts):
            self._tell(row, text.finish())
        if self.aloud:
            print()
        return ["".join(parts) for parts in self.parts]
