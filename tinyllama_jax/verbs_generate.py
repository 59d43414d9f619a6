"""What `generate` does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tinyllama_jax import verbs_speculative
from tinyllama_jax.errors import ConfigError, DataError, UserError
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
    given = read_given(args)
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample
    from tinyllama_jax.generate.load import load_serving, serving_mesh
    from tinyllama_jax.sharding import computing

    mesh = serving_mesh(args.checkpoint)
    with computing(mesh, args.dtype):
        loaded = load_serving(args.checkpoint, mesh, dtype=args.dtype, weights=args.weights)
        tokenizer, prompts, shown = encoded(loaded, given, args.stop)
        telling = Telling(tokenizer, prompts, args.stop, aloud=not args.json and len(prompts) == 1)
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
    value = {"tokens": answers, "text": telling.finish(), "prompt_tokens": prompts}
    show(args, value, shown, told=telling.aloud)


def read_given(args: argparse.Namespace):
    """What is to be continued: an array of --tokens, or a list of texts.  Raises DataError; imports no jax."""
    if args.tokens is None:
        return read_prompts(args.prompt_file) if args.prompt_file else args.prompt
    rows = load_rows(args.tokens)
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise DataError(f"--tokens {args.tokens}: must be integers [batch, time], not {rows.dtype} {list(rows.shape)}")
    return rows


def encoded(loaded, given, stop: Sequence[str] = ()):
    """The checkpoint's tokenizer, or None where ids are given and there is none; the prompts as ids; what is shown of
    them before their answers.  Raises ConfigError where texts or stop strings need a tokenizer."""
    from tinyllama_jax.generate.load import prompt_tokens

    try:
        tokenizer = loaded.tokenizer()
    except UserError:
        if isinstance(given, list):
            raise
        tokenizer = None  # ids in, ids out
    if tokenizer is None and stop:
        raise ConfigError(
            f"{loaded.path} holds no tokenizer, so that --stop {stop[0]!r} cannot be found in its answers"
        )
    if isinstance(given, list):
        return tokenizer, [prompt_tokens(tokenizer, loaded.marks, text) for text in given], given
    return tokenizer, given.tolist(), [""] * len(given)


def show(args: argparse.Namespace, value: dict, shown: Sequence[str], *, told: bool) -> None:
    """One JSON object with --json, else a line per row; nothing where the row was told while it grew."""
    if args.json:
        print(json.dumps(value))
    elif not told:
        for i, (row, text) in enumerate(zip(value["tokens"], value["text"], strict=True)):
            print(f"[{i}] {row}" if text is None else f"[{i}] {shown[i]}{text}")


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


class Telling:
    """The texts of the rows, which end at a stop string; of one row it is printed behind its prompt while it grows."""

    def __init__(self, tokenizer, prompts: Sequence[list[int]], stop: Sequence[str], *, aloud: bool):
        from tinyllama_jax.generate.text import Text

        self.texts = [Text(tokenizer, prompt, stop) for prompt in prompts] if tokenizer else None
        self.parts: list[list[str]] = [[] for _ in prompts]
        self.aloud = aloud and tokenizer is not None
        self._before = tokenizer.decode(prompts[0]) if self.aloud else ""

    def __call__(self, row: int, tokens: list[int]) -> bool:
        if self.texts is None:
            return False
        self._tell(row, self.texts[row].add(tokens))
        return self.texts[row].stopped

    def _tell(self, row: int, text: str) -> None:
        self.parts[row].append(text)
        if self.aloud:
            print(self._before + text, end="", flush=True)
            self._before = ""

    def finish(self) -> list[str] | list[None]:
        if self.texts is None:
            return [None] * len(self.parts)
        for row, text in enumerate(self.texts):
            self._tell(row, text.finish())
        if self.aloud:
            print()
        return ["".join(parts) for parts in self.parts]
