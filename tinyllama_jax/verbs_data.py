"""Verbs about data: `prepare` and its steps, `prepare view`, `prepare tokenizer`, `inspect STORE`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from tinyllama_jax.config import Recipe
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.terminal import Progress, answer


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(
        sources=tuple(args.sources),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        document_marks=args.document_marks,
        validation_share=args.validation_share,
        filters=tuple(args.filters),
        window_tokens=args.window_tokens,
        packing=args.packing,
        item_bytes=count(args.item_bytes),
    )


def prepare(args: argparse.Namespace) -> None:
    from tinyllama_jax.data.prepare import prepare

    with Progress() as progress:
        out = prepare(recipe_of(args), args.out, processes=_workers(args), progress=progress)
    _answer_store(args, out)


def plan(args: argparse.Namespace) -> None:
    from tinyllama_jax.data.prepare import freeze

    with Progress() as progress:
        frozen = freeze(recipe_of(args), args.out, progress)
    inputs, size = sum(len(item.inputs) for item in frozen.items), sum(item.bytes for item in frozen.items)
    n = len(frozen.items)
    tasks = min(n, 1000)  # what Slurm allows in an array by default
    value = {
        "plan": str(frozen.folder / "plan.json"),
        "sha256": frozen.sha256,
        "items": n,
        "inputs": inputs,
        "bytes": size,
    }
    lines = [
        f"{value['plan']}: {n:,} items of {inputs:,} files, {size / 1e9:.2f} GB; SHA-256 {frozen.sha256}",
        f"next, on a cluster: tinyllama launch prepare --out {args.out} --items {tasks} --on slurm  (or gke, tpu, sky)",
        f"or by hand, on as many machines as there are: tinyllama prepare run --out {args.out} --items 0:{n}",
        f"and then, once: tinyllama prepare finalize --out {args.out}",
    ]
    answer(args, value, lines)


def run(args: argparse.Namespace) -> None:
    from tinyllama_jax.data import plan
    from tinyllama_jax.data.prepare import run

    frozen = plan.load(args.out)
    numbers = item_numbers(args.items, len(frozen.items))
    with Progress() as progress:
        run(frozen, numbers, _workers(args), progress)
    answer(args, {"store": args.out, "items": len(numbers)}, [f"{args.out}: {len(numbers)} items are done"])


def finalize(args: argparse.Namespace) -> None:
    from tinyllama_jax.data import plan
    from tinyllama_jax.data.manifest import finalize

    _answer_store(args, finalize(plan.load(args.out)))


def view(args: argparse.Namespace) -> None:
    from tinyllama_jax.data.store import TokenStore
    from tinyllama_jax.data.views import make_view

    named = [word.rpartition("=") for word in args.tokens]
    budgets = {domain: count(tokens) for domain, _, tokens in named}
    if "" in budgets and len(named) > 1 or len(budgets) < len(named):
        raise UsageError(f"--tokens {' '.join(args.tokens)}: give one number, or DOMAIN=NUMBER once for each domain")
    tokens = budgets[""] if "" in budgets else budgets
    _answer_store(args, make_view(TokenStore.open(args.store), tokens, args.out, seed=args.seed))


def tokenizer(args: argparse.Namespace) -> None:
    if not (args.add or args.train):
        raise UsageError("nothing to add: give --add TOKEN for control tokens, --train SOURCE --pieces N for text")
    if args.pieces < 0 or bool(args.train) != bool(args.pieces):
        raise UsageError("--train SOURCE... and --pieces N, a number above 0, need each other")
    base = _tokenizer_of(args.base)
    from tinyllama_jax.data import tokenizer_extend as extension
    from tinyllama_jax.data.tokenizer import Tokenizer

    out = extension.extend_by(base, args.out, tokens=args.add, sources=args.train, pieces=args.pieces)
    old, new, controls = Tokenizer.load(base), Tokenizer.load(out), extension.controls(out)
    value = {"tokenizer": str(out), "base": str(base), "base_vocab_size": old.vocab_size, "vocab_size": new.vocab_size}
    value |= {"sha256": new.sha256, "control": {token: controls[token] for token in args.add}}
    lines = [f"{out}: {new.vocab_size:,} words, of which {old.vocab_size:,} are those of {base}, with the same ids"]
    lines += [f"  {i:>7} {token}" for token, i in value["control"].items()]
    answer(args, value, lines)


def _tokenizer_of(base: str) -> Path:
    """A tokenizer's folder or file: that one, or the one kept with a checkpoint."""
    path = Path(base)
    if path.is_file() or any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return path
    if not path.is_dir() and "@" not in base:
        raise DataError(f"{base}: no such tokenizer; name its folder or file, or a run or checkpoint that has one")
    from tinyllama_jax.train import saved

    return saved.resolve(base) / "tokenizer"


def is_store(path: str) -> bool:
    """Whether `inspect` is asked about tokens: a finished or unfinished store, or an address in object storage."""
    return "://" in path or any((Path(path) / name).is_file() for name in ("manifest.json", "plan.json"))


def inspect_store(args: argparse.Namespace) -> None:
    from tinyllama_jax.data.describe import describe
    from tinyllama_jax.data.storage import REMEDY
    from tinyllama_jax.finetune.store import is_example_store

    how = {"samples": args.samples, "seed": args.seed, "verify": args.verify}
    with Progress() as progress:
        if is_example_store(args.what):
            from tinyllama_jax.finetune import describe as of_examples

            value, lines = of_examples.describe(args.what, **how, progress=progress)
        else:
            value, lines = describe(args.what, **how, workers=_cores(), progress=progress)
    answer(args, value, lines)
    if value.get("findings"):
        raise DataError(f"{args.what}: {len(value['findings'])} things are wrong; {REMEDY}")


def count(text: str) -> int:
    """A number as people write it: 2049, 100M, 1.5B.  K, M, B (or G) and T are powers of 1000.

    Raises UsageError for anything else.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBGT]?)", text.strip().upper().replace("_", ""))
    scale = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
    if not found or not (value := float(found[1]) * 10 ** scale[found[2]]).is_integer() or value < 1:
        raise UsageError(f"{text!r} is no number above 0 such as 2049, 100M or 1.5B")
    return int(value)


def item_numbers(text: str, total: int) -> range:
    """`a:b` (b excluded, either may be missing) or `i/n` (the i-th of n shares, from 0) of `total` items.

    Raises UsageError for what is neither, or lies outside.
    """
    if found := re.fullmatch(r"(\d*):(\d*)", text):
        first, end = int(found[1] or 0), int(found[2] or total)
        if first < end <= total:
            return range(first, end)
    elif found := re.fullmatch(r"(\d+)/(\d+)", text):
        share, shares = int(found[1]), int(found[2])
        if share < shares:
            return range(share, total, shares)
    raise UsageError(
        f"--items {text}: the plan has items 0:{total}; write a:b with a < b <= {total}, or i/n with i < n"
    )


def _workers(args: argparse.Namespace) -> int:
    if args.workers < 0:
        raise UsageError(f"--workers {args.workers}: must be 0 (all cores) or more")
    return args.workers or _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _answer_store(args: argparse.Namespace, path: Path) -> None:
    from tinyllama_jax.data.store import SPLITS, TokenStore

    store = TokenStore.open(path)
    value = {"store": str(store.path), "vocab_size": store.vocab_size, "domains": {}}
    lines = [f"{store.path}: vocabulary {store.vocab_size}, windows of {store.window_tokens} tokens"]
    for domain in store.domains:
        value["domains"][domain] = {}
        for name in SPLITS:
            split = store.split(name, domain)
            windows = split.windows(store.window_tokens)
            value["domains"][domain][name] = {"documents": split.documents, "tokens": split.tokens, "windows": windows}
            counts = f"{split.documents:>11,} documents {split.tokens:>16,} tokens {windows:>11,} windows"
            lines.append(f"  {domain:<12} {name:<10} {counts}")
    value["removed"] = store.manifest.get("removed", {})  # a view has none
    value["source_dropped"] = store.manifest.get("source_dropped", {})
    left_out = [f"{n:,} {why}" for what in ("removed", "source_dropped") for why, n in value[what].items()]
    if left_out:
        lines.append("  left out: " + ", ".join(left_out))
    answer(args, value, lines)
