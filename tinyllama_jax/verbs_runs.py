"""The verb `runs`: the table of runs, to a person, a program or a file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama_jax.errors import UsageError
from tinyllama_jax.terminal import answer, say

UNKNOWN = "–"


def runs(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab import table
    from tinyllama_jax.verbs_lab import where

    names = args.columns.split(",") if args.columns else []
    if "" in names:
        raise UsageError(f"--columns {args.columns}: expected names with commas between them")
    if args.out:
        table.check_suffix(args.out)  # before minutes of reading
    found = table.select(table.rows(args.paths), where(args))
    if args.sort:
        found = table.sort(found, args.sort)
    shown = [[show(row) for row in found] for show in USUAL.values()]
    header = list(USUAL)
    if names:
        found = table.pick(found, names)
        header, shown = names, [[_plain(row[name]) for row in found] for name in names]
    if args.out:
        table.write(found, args.out)
        say(f"{args.out}: {len(found)} runs")
    answer(args, {"runs": found}, aligned(header, shown))


def aligned(header: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: numbers to the right, words to the left."""
    padded = []
    for name, cells in zip(header, columns, strict=True):
        width = max(map(len, (name, *cells)))
        right = all(cell[0] in "-0123456789" or cell == UNKNOWN for cell in cells if cell)
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)])
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def si(value: float) -> str:
    """Three or four digits and a letter: 968.9M, 1.23B."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 0.99995 * 10**power:
            return f"{value / 10**power:.4g}{letter}"
    return f"{value:.4g}"


def scientific(value: float) -> str:
    """3.21e17."""
    exponent = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.3g}" if exponent < 4 else f"{value:.2e}".replace("e+", "e")


def _known(name: str, show: Callable[[Any], str]) -> Callable[[dict], str]:
    return lambda row: UNKNOWN if row.get(name) is None else show(row[name])


def _loss(row: dict) -> str:
    if row.get("loss") is None:
        return UNKNOWN
    return f"{row['loss']:.4f}" + (f" ± {row['loss_se']:.4f}" if row.get("loss_se") is not None else "")


def _plain(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# What a person is shown: heading -> cell of a row.
USUAL: dict[str, Callable[[dict], str]] = {
    "name": _known("name", str),
    "status": _known("status", str),
    "N": _known("parameters", si),
    "D": _known("tokens", si),
    "epochs": _known("epochs", lambda value: f"{value:.3g}"),
    "FLOPs": _known("flops", scientific),
    "loss ± se": _loss,
    "best": _known("best_loss", "{:.4f}".format),
    "tok/s": _known("tokens_per_s", si),
}
