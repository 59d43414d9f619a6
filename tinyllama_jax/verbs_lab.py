"""Verbs of the lab: `fit` with its laws, and `allocate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.terminal import answer

# What columns are called in runs tables, ours first; used where an option does not name one.  Capitals do not matter,
# nor does a space for an underscore.
USUAL = {
    "N": ("parameters", "params", "N", "n_params", "model_size"),
    "D": ("tokens", "D", "training_tokens"),
    "U": ("unique_tokens", "U"),
    "C": ("flops", "compute", "C", "training_flops", "training_flop"),
    "L": ("loss", "val_loss", "validation_loss", "L"),
}


def fit(args: argparse.Namespace) -> None:
    from tinyllama_jax.cli_lab import FIT_STEPS

    raise UsageError(f"name a law: {', '.join(FIT_STEPS)}{nearest(args.law, FIT_STEPS) if args.law else ''}")


def fit_chinchilla(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab.fit import chinchilla

    found = chinchilla.fit(
        _points(args),
        tied=args.tied,
        given=_numbers("--given", args.given),
        compute=args.compute,
        draws=_draws(args),
        seed=args.seed,
        delta=args.delta,
    )
    lines = [
        f"  at {at['compute']:.3g} FLOPs: N {at['N']:.5g}, D {at['D']:.5g}, {at['tokens_per_parameter']:.4g} tokens a "
        f"parameter ({at['ci95']['tokens_per_parameter'][0]:.3g} to {at['ci95']['tokens_per_parameter'][1]:.3g}), "
        f"loss {at['loss']:.4f}"
        for at in found.derived["optima"]
    ]
    _answer(args, found, lines)


def fit_isoflop(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab.fit import isoflop

    found = isoflop.fit(
        _points(args),
        method=args.method,
        window=args.window,
        noise=args.noise,
        compute=args.compute,
        draws=_draws(args),
        seed=args.seed,
    )
    lines = [
        f"  {at['compute']:.3g} FLOPs: N* {at['N']:.5g} ({at['ci95'][0]:.4g} to {at['ci95'][1]:.4g}), D* {at['D']:.5g}"
        for at in found.derived["optima"]
    ]
    _answer(args, found, lines, {"exponents": found.constants, "optima": found.derived["optima"]})


def fit_repetition(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab.fit import repeated, repetition

    base = _numbers("--given", args.given)
    if base and args.base:
        raise UsageError("--given and --base: one of them")
    if base and set(base) != set(repeated.PUBLISHED):
        raise UsageError(f"--given: all of {', '.join(repeated.PUBLISHED)} are needed, not {', '.join(base)}")
    found = repetition.fit(
        _points(args, "U"),
        law=args.law,
        base=repeated.PUBLISHED if args.base else base or None,
        start=_numbers("--start", args.start) or None,
        draws=_draws(args),
        seed=args.seed,
        delta=args.delta,
    )
    lines = [f"  surface ({found.derived['base_from']}): " + _named(found.derived["base"])]
    if "effective_epochs" in found.derived:
        lines.append("  epochs are worth: " + _named(found.derived["effective_epochs"]))
    for name, row in found.quality["compared"].items():
        errors = ", ".join(f"{k} {100 * v['mean_relative_error']:.1f} %" for k, v in row.items() if isinstance(v, dict))
        lines.append(f"  {name:>10}: objective {row['objective']:.6g}, R² {row['r2']:.4f}, left out: {errors}")
    # With its own E, alpha and beta `saturating` has no surface below it.
    whole = found.constants if args.law == "saturating" else found.constants | found.derived["base"]
    _answer(args, found, lines, {"constants": whole})


def fit_overtraining(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab.fit import overtraining

    found = overtraining.fit(_points(args), draws=_draws(args), seed=args.seed, delta=args.delta)
    _answer(args, found)


def fit_downstream(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab.fit import overtraining
    from tinyllama_jax.lab.fit.points import numbers_of_rows, read_numbers

    rows = _rows(args)
    names = {"loss": args.loss_column or _usual(args.csv, "L", rows), "error": args.error_column}
    found = read_numbers(args.csv, names, where(args)) if rows is None else numbers_of_rows(rows, names, _source(args))
    fitted = overtraining.fit_downstream(found["loss"], found["error"], draws=_draws(args), seed=args.seed)
    _answer(args, fitted)


def allocate(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab import allocation, allocation_text, laws
    from tinyllama_jax.train.json_lines import plain

    ask = allocation.Question(
        law=laws.load(args.law),
        flops=args.flops,
        usd=args.usd,
        target=args.target,
        usd_per_hour=args.price,
        unique_tokens=args.unique,
        inference_tokens=args.inference,
        rule=args.rule,
        vocab_size=args.vocab_size,
        sequence_tokens=args.sequence_tokens,
        count=args.count,
    )
    allocation.check(ask)
    value = allocation.answer(ask)
    answer(args, plain(value), allocation_text.lines(value))


def _answer(args: argparse.Namespace, found, lines: list[str] = (), more: dict | None = None) -> None:
    from tinyllama_jax.train.json_lines import plain

    value = plain(found.as_json() | (more or {}))
    if "N" in value["data"]:
        value["data"]["N_column"] = args.n_column
    if args.out:
        _write(args, plain(value | {"draws": {name: drawn.tolist() for name, drawn in found.draws.items()}}))
    said = found.lines()
    first_warning = next((i for i, line in enumerate(said) if line.startswith("warning")), len(said))
    answer(args, value, [*said[:first_warning], *lines, *said[first_warning:]])


def _write(args: argparse.Namespace, value: dict) -> None:
    from tinyllama_jax.data import durable

    path = Path(args.out)
    try:
        durable.write(path, (json.dumps(value, indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written: {error.strerror}") from None


def _points(args: argparse.Namespace, *needed: str):
    from tinyllama_jax.lab.fit.points import Columns, of_rows, read_csv

    rows = _rows(args)
    asked = {
        "N": args.n_column,
        "D": args.d_column,
        "U": getattr(args, "unique_column", ""),
        "C": getattr(args, "c_column", ""),
        "L": args.loss_column,
        "group": getattr(args, "group_column", ""),
    }
    asked["C"] = asked["C"] or _usual(args.csv, "C", rows, optional=True)
    for name in ("N", "D", "L", *needed):
        asked[name] = asked[name] or _usual(args.csv, name, rows, optional=name in "ND" and bool(asked["C"]))
    if not asked["N"] and not asked["D"]:
        asked |= {name: _usual(args.csv, name, rows) for name in "ND"}  # both are missing: said by name
    args.n_column = asked["N"]  # said in the answer: what this law's N is
    if rows is None:
        return read_csv(args.csv, Columns(**asked), where(args))
    asked["group"] = asked["group"] or ("group" if args.runs else "")
    if not asked["U"] and all(row.get("unique_tokens") for row in rows):  # so that repeated text does not pass unseen
        asked["U"] = "unique_tokens"
    return of_rows(rows, Columns(**asked), _source(args))


def _rows(args: argparse.Namespace) -> list[dict] | None:
    """The rows of --runs, or of a table that is no CSV; None for a CSV."""
    from tinyllama_jax.lab import table

    if not args.runs and not args.csv.endswith(".jsonl"):
        return None
    return table.select(table.rows(args.runs) if args.runs else table.read(args.csv), where(args))


def _source(args: argparse.Namespace) -> str:
    return args.csv or ", ".join(args.runs)


def _usual(path: str, name: str, rows: list[dict] | None = None, *, optional: bool = False) -> str:
    """The first usual name that file or rows have; the first usual one, to be missed by name, when they have none."""
    from tinyllama_jax.lab.fit import csv_file

    names = csv_file.header(path) if rows is None else {column for row in rows for column in row}
    plain = {column.lower().replace(" ", "_"): column for column in reversed(list(names))}
    there = [plain[column.lower()] for column in USUAL[name] if column.lower() in plain]
    return there[0] if there else "" if optional else USUAL[name][0]


def where(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What --where asks for: (column, value); UsageError for what is not COLUMN=VALUE."""
    pairs = [text.partition("=") for text in args.where]
    for text, (column, equals, _) in zip(args.where, pairs, strict=True):
        if not (column and equals):
            raise UsageError(f"--where {text}: expected COLUMN=VALUE")
    return [(column, value) for column, _, value in pairs]


def _numbers(option: str, texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"{option} {text}: expected NAME=NUMBER") from None
    return found


def _draws(args: argparse.Namespace) -> int:
    if args.draws < 2:
        raise UsageError(f"--draws {args.draws}: at least 2")
    return args.draws


def _named(values: dict) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())
