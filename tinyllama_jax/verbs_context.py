"""What `eval --passkey` and `eval --positions` do: whether a context longer than that of training works."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.terminal import say

ROPES = ("as-trained", "linear", "ntk", "yarn")  # those of evaluate.beyond, which imports jax


def section(args: argparse.Namespace) -> str:
    """Which of the two is asked for; empty for another kind of evaluation."""
    return "passkey" if args.passkey else "positions" if args.positions else ""


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that say nothing."""
    numbers(f"--{section(args)}", args.passkey or args.positions)
    if wrong := [rope for rope in words(args.rope) if rope not in ROPES]:
        raise UsageError(f"--rope {wrong[0]}: choose of {', '.join(ROPES)}")
    if not 2 <= args.choices <= args.keys:
        raise UsageError(f"--choices {args.choices}: must be at least 2 and at most --keys {args.keys}")
    depths(args)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> list[int]:
    found = [int(word) if word.isdecimal() else 0 for word in words(text)]
    if not found or min(found) < 1:
        raise UsageError(f"{option} {text}: lengths in tokens, such as 2048,4096")
    return sorted(set(found))


def depths(args: argparse.Namespace) -> list[float]:
    try:
        found = sorted({float(word) for word in words(args.depths)})
    except ValueError:
        found = []
    if not found or not all(0 <= depth <= 1 for depth in found):
        raise UsageError(f"--depths {args.depths}: shares of the filler before the key, such as 0,0.5,1")
    return found


def measure(args: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """The result for a checkpoint, together with what its run keeps of the same step under the same conditions."""
    from tinyllama_jax.evaluate import longer, records
    from tinyllama_jax.lab.measures import merged
    from tinyllama_jax.train import saved

    what = section(args)
    lengths = numbers(f"--{what}", args.passkey or args.positions)
    options: dict[str, Any] = {"ropes": words(args.rope), "dtype": args.dtype, "say": say}
    if what == "passkey":
        options |= {"depths": depths(args), "count": args.keys, "choices": args.choices, "seed": args.seed}
        value = longer.keys(checkpoint, lengths, **options)
    else:
        options |= {"corpus": args.corpus, "sequences": args.sequences}
        value = longer.positions(checkpoint, lengths, **options)
    run = records.run_of(saved.resolve(checkpoint))
    for kept in [] if run is None else records.read(run):
        if (kept["label"], kept["step"]) == (what, value["step"]) and isinstance(kept.get(what), dict):
            value = merged({name: x for name, x in kept.items() if name not in ("label", "file")}, value)
    return value


def draw(value: dict[str, Any], folder: str) -> None:
    """folder/passkey.png or folder/positions.png."""
    from tinyllama_jax.data.durable import write
    from tinyllama_jax.lab import context_plots
    from tinyllama_jax.lab.draw import png

    for name, figure in context_plots.figures(value).items():
        path = Path(folder) / f"{name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, png(figure))
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); name another --plots") from error
        say(f"drawn as {path}")


def table(value: dict[str, Any]) -> list[str]:
    lines = [f"{value['checkpoint']}: step {value['step']}, trained in windows of {value['trained_tokens']:,} tokens"]
    for what, form in (("passkey", _passkey), ("positions", _positions)):
        if what in value:
            lines += form(value[what], value["provenance"][what])
    return lines


def _passkey(found: dict[str, Any], about: dict[str, Any]) -> list[str]:
    depths = ", ".join(f"{depth:g}" for depth in about["depths"])
    lines = [f"  {about['keys']} keys at depths {depths}; one is the likeliest of {about['choices']} by chance"]
    lines[0] += f" in {100 * about['chance']:.1f} %"
    heads = f"{'said, %':>10}{'± se':>7}{'likeliest, %':>14}{'± se':>7}{'margin':>9}{'± se':>7}"
    lines.append(f"  {'RoPE':<12}{'window':>8}{heads}")
    for rope, lengths in found.items():
        for length, at in lengths.items():
            shares = "".join(
                f"{100 * at[name]:>{width}.1f}{_number(at[name + '_se'], 7, 1, 100)}"
                for name, width in (("exact", 10), ("accuracy", 14))
            )
            margin = f"{at['margin']:>9.2f}{_number(at['margin_se'], 7, 2)}"
            lines.append(f"  {rope:<12}{length:>8}{shares}{margin}")
    return [*lines, "  margin: nats by which a key is likelier where it was told than where others were"]


def _positions(found: dict[str, Any], about: dict[str, Any]) -> list[str]:
    windows = sum(about["windows"].values())
    lines = [f"  the same text at every length: {windows} windows of {about['window_tokens']:,} tokens, nats per token"]
    lines.append(f"  {'RoPE':<12}{'window':>8}{'loss':>10}{'± se':>9}{'first':>10}{'last':>10}  sixteenth of a window")
    for rope, lengths in found.items():
        for length, at in lengths.items():
            ends = "".join(_number(at["by_position"][i], 10, 4) for i in (0, -1))
            lines.append(f"  {rope:<12}{length:>8}{_number(at['loss'], 10, 4)}{_number(at['loss_se'], 9, 4)}{ends}")
    return lines


def short(value: dict[str, Any]) -> str:
    """The longest length of each treatment, in a line."""
    parts = []
    for rope, lengths in value[section_of(value)].items():
        length = max(lengths, key=int)
        at = lengths[length]
        number = f"{at['loss']:.4f}" if "loss" in at else f"{100 * at['accuracy']:.1f} %"
        parts.append(f"{rope} {length}: {number}")
    return ", ".join(parts)


def section_of(value: dict[str, Any]) -> str:
    return "passkey" if "passkey" in value else "positions"


def _number(value: float | None, width: int, digits: int, scale: float = 1.0) -> str:
    return f"{math.nan if value is None else scale * value:>{width}.{digits}f}"
