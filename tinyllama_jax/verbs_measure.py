"""The verb `measure`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from tinyllama_jax.errors import UsageError
from tinyllama_jax.terminal import answer, say


def measure(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab import measures
    from tinyllama_jax.lab.runs import Run

    given = _given(args)
    if args.sequences is not None and args.sequences < 0:
        raise UsageError(f"--sequences {args.sequences}: it cannot be negative")
    # All are looked at before the first is measured: a wrong name should not wait behind an hour's work.
    runs = [Run(directory) for directory in args.runs]
    asked = [measures.asked(run, given) for run in runs]
    values, lines = [], []
    for run, config in zip(runs, asked, strict=True):
        if not run.finished:
            say(f"{run.directory}: the run is not finished; its newest checkpoint is measured")
        value = measures.measure(Path(run.directory), config, sequences=args.sequences, dtype=args.dtype or "", say=say)
        values.append({"directory": str(run.directory), "name": run.name} | value)
        lines += _table(values[-1])
    answer(args, {"runs": values}, lines)


def _given(args: argparse.Namespace) -> dict[str, tuple]:
    """The options as fields of the evaluation; those of them that were given."""
    found: dict[str, tuple] = {}
    for field, text in (("beyond_tokens", args.beyond), ("beyond_ropes", args.rope), ("decode", args.decode)):
        if words := tuple(word.strip() for word in text.split(",") if word.strip()):
            found[field] = words
    if "beyond_ropes" in found and "beyond_tokens" not in found:
        raise UsageError("--rope says how --beyond is measured; give that too, such as --beyond 256,512")
    if "beyond_tokens" in found:
        try:
            found["beyond_tokens"] = tuple(int(word) for word in found["beyond_tokens"])
        except ValueError:
            raise UsageError(f"--beyond {args.beyond}: lengths in tokens, such as 256,512") from None
    return found


def _table(value: dict[str, Any]) -> list[str]:
    lines = [f"{value['directory']}: {value['name']}"]
    beyond = value.get("beyond", {})
    if beyond:
        about = value["provenance"]["beyond"]
        windows = sum(about["windows"].values())
        lines.append(f"  step {about['step']}, {windows} windows of {about['window_tokens']} tokens, nats per token")
        lines.append(
            f"  {'RoPE':<12}{'window':>8}{'loss':>10}{'± se':>9}{'first':>10}{'last':>10}  sixteenth of a window"
        )
    for rope, lengths in beyond.items():
        for length, at in lengths.items():
            numbers = (at["loss"], at["loss_se"], at["by_position"][0], at["by_position"][-1])
            loss, se, first, last = (math.nan if x is None else x for x in numbers)
            lines.append(f"  {rope:<12}{length:>8}{loss:>10.4f}{se:>9.4f}{first:>12.4f}{last:>12.4f}")
    if "decode" in value:
        about = value["provenance"]["decode"]
        lines.append(
            f"  step {about['step']}, {about['devices']} x {about['device_kind']}, {about['dtype']}; the cache takes "
            f"{value['cache_bytes_per_token']:,} bytes a token"
        )
        lines.append(f"  {'rows':<6}{'context':>9}{'decode tokens/s':>18}{'prefill tokens/s':>18}{'cache bytes':>15}")
    for rows, contexts in value.get("decode", {}).items():
        for context, at in contexts.items():
            speeds = f"{at['tokens_per_s']:>18,.1f}{at['prefill_tokens_per_s']:>18,.0f}"
            lines.append(f"  {rows[1:]:<6}{context[1:]:>9}{speeds}{at['cache_bytes']:>15,}")
    return lines
