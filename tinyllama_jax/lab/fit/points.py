"""The measured points of a fit: one row per finished run, from any CSV with named columns or the table of runs.

N   parameters            D   tokens seen, repeats included     U   unique tokens (repetition only)
C   training FLOPs        L   held-out loss, nats per token     group   what rows share: a model, a run, a seed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tinyllama_jax.errors import DataError
from tinyllama_jax.lab.fit import csv_file
from tinyllama_jax.lab.table import require

NUMBERS = ("N", "D", "U", "C", "L")
_MISSING = ("", "-", "na", "n/a", "none", "null")
_NOT_FINISHED = ("unfinished", "failed")  # of the column `status` of the table of runs


@dataclass(frozen=True)
class Columns:
    """Which column of the CSV holds what; an empty name is a quantity that the fit does without.

    Where there is a column C, one of N and D may be missing: C = 6 N D.
    """

    N: str = "params"
    D: str = "tokens"
    U: str = ""
    C: str = ""
    L: str = "loss"
    group: str = ""


# Passes over a text up to which a law without repetition takes all of it as new.  By Muennighoff et al., 2023
# (R_D* = 15.39), what is seen 1.5 times is worth 1.492 times itself: less than seeds change.
AS_NEW = 1.5


@dataclass(frozen=True)
class Points:
    """Columns of equal length; U and C are filled in where the file does not say (all unique; 6 N D)."""

    N: np.ndarray
    D: np.ndarray
    U: np.ndarray
    C: np.ndarray
    L: np.ndarray
    group: np.ndarray
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.L)

    def take(self, rows: np.ndarray) -> Points:
        return Points(*(getattr(self, name)[rows] for name in (*NUMBERS, "group")), self.notes)

    def some(self, most: int) -> Points:
        """So many of them, drawn without order; all where there are no more."""
        if len(self) <= most:
            return self
        return self.take(np.sort(np.random.default_rng(0).permutation(len(self))[:most]))

    def span(self) -> dict[str, object]:
        """What they cover: {"points", and [least, most] of "N", "D", "unique_tokens", "compute" and "loss"}."""
        named = {"N": self.N, "D": self.D, "unique_tokens": self.U, "compute": self.C, "loss": self.L}
        ends = {name: [float(values.min()), float(values.max())] for name, values in named.items()}
        return {"points": len(self), **ends}

    @classmethod
    def of(cls, N, D, L, *, U=None, C=None, group=None) -> Points:
        """From arrays; DataError when one has another length or a value that no run can have."""
        N, D, L = (np.asarray(x, float) for x in (N, D, L))
        U = D.copy() if U is None else np.asarray(U, float)
        C = 6 * N * D if C is None else np.asarray(C, float)
        group = np.arange(len(L)) if group is None else np.asarray(group)
        for name, values in zip(NUMBERS, (N, D, U, C, L), strict=True):
            if len(values) != len(L):
                raise DataError(f"{name} has {len(values)} values and the loss {len(L)}")
            if not (np.isfinite(values) & (values > 0)).all():
                raise DataError(f"{name}: every value must be finite and above 0")
        return cls(N, D, U, C, L, group)


def read_csv(path: str | Path, columns: Columns, where: Sequence[tuple[str, str]] = ()) -> Points:
    """The rows of a CSV with a header, those only whose columns have the values of `where`.

    Rows without a finite loss (a run that diverged or has not ended), and rows whose column `status`, where there is
    one, says "unfinished" or "failed", are left out and counted in `notes`.
    Raises DataError, with file and line, for everything else that is no positive number.
    """
    path = Path(path)
    rows = csv_file.rows(path, _names(columns), where)
    notes = []
    if not any(column == "status" for column, _ in where):
        going = [line for line, row in rows if row.get("status") in _NOT_FINISHED]
        rows = [(line, row) for line, row in rows if row.get("status") not in _NOT_FINISHED]
        if going:
            notes.append(f"{len(going)} row(s) of runs that are not finished are left out (line {_some(going)})")
    endless = [line for line, row in rows if not math.isfinite(_loss(row[columns.L]))]
    if endless:
        notes.append(f"{len(endless)} row(s) without a finite loss are left out (line {_some(endless)})")
    rows = [(f"{path}, line {line}", row) for line, row in rows if math.isfinite(_loss(row[columns.L]))]
    points = _points(str(path), rows, columns)
    return replace(points, notes=(*notes, *points.notes))


def of_rows(rows: Sequence[dict], columns: Columns, source: str = "the table of runs") -> Points:
    """The finished runs among rows of the table of runs (lab/table.py), with the checks of `read_csv`.

    Left out, and counted in `notes`: runs that are not finished or have no finite loss, and trunks, whose rate never
    decays: their loss is that of no run of their length.  A row without a status counts as finished.
    """
    require(rows, _names(columns), source)
    trunks = {row.get("group") for row in rows if row.get("group") != row.get("name")}
    kept, out = [], {}
    for row in rows:
        why = _why_not(row, columns, trunks)
        if why:
            out.setdefault(why, []).append(_place(row))
        else:
            kept.append((_place(row), row))
    told = [f"{len(names)} {why} ({_some(names)})" for why, names in out.items()]
    if not kept:
        raise DataError(f"{source}: no run to fit: {', '.join(told) or 'it has no row'}")
    points = _points(source, kept, columns)
    return replace(points, notes=(f"runs left out: {', '.join(told)}", *points.notes)) if told else points


def _why_not(row: dict, columns: Columns, trunks: set) -> str:
    if (status := row.get("status") or "finished") != "finished":
        return str(status)
    if row.get("config.lr.kind") == "constant" and row.get("group") in trunks and not row.get("config.fork.run"):
        return "trunk of branches that decay"
    return "" if math.isfinite(_loss(row.get(columns.L))) else "without a finite loss"


def numbers_of_rows(rows: Sequence[dict], names: dict[str, str], source: str = "the table of runs") -> dict:
    """As `read_numbers`, from the finished runs among rows of the table of runs."""
    require(rows, names.values(), source)
    kept = [(_place(row), row) for row in rows if (row.get("status") or "finished") == "finished"]
    if not kept:
        raise DataError(f"{source}: no run is finished")
    return {key: np.array([_number(place, c, row.get(c)) for place, row in kept]) for key, c in names.items()}


def _place(row: dict) -> str:
    return str(row.get("directory") or row.get("name"))


def _some(names: Sequence, most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def _names(columns: Columns) -> list[str]:
    return [column for column in vars(columns).values() if column]


def _points(source: str, rows: Sequence[tuple[str, dict]], columns: Columns) -> Points:
    """rows: with the place that is named when a value is no positive number."""
    if not rows:
        raise DataError(f"{source}: no row has a finite number in column {columns.L!r}")
    found = {
        name: [_number(place, column, row.get(column)) for place, row in rows]
        for name in NUMBERS
        if (column := getattr(columns, name))
    }
    # A run that says of no group stands alone.
    group = [str(row.get(columns.group) or place) for place, row in rows] if columns.group else None
    notes = []
    for missing, other in (("D", "N"), ("N", "D")):
        if missing not in found:
            found[missing] = np.array(found["C"]) / (6 * np.array(found[other]))
            notes.append(f"{missing} is in no column and is taken as C / (6 {other})")
    points = Points.of(found["N"], found["D"], found["L"], U=found.get("U"), C=found.get("C"), group=group)
    same = len(points) - len(set(zip(points.N, points.D, points.U, points.L, strict=True)))
    if same:
        notes.append(f"{same} row(s) repeat another exactly; if they are copies, the intervals are too narrow")
    return replace(points, notes=tuple(notes))


def read_numbers(path: str | Path, names: dict[str, str], where: Sequence[tuple[str, str]] = ()) -> dict:
    """Columns of positive numbers by the names given to them: {"loss": "val_loss"} -> {"loss": array}."""
    path = Path(path)
    rows = csv_file.rows(path, list(names.values()), where)
    return {
        key: np.array([_number(f"{path}, line {line}", c, row[c]) for line, row in rows]) for key, c in names.items()
    }


def _loss(value: str | float | None) -> float:
    """NaN for what is empty or says that there is none."""
    try:
        return math.nan if value is None or str(value).lower() in _MISSING else float(value)
    except ValueError:
        return 0.0  # something else than a number: said by _number, with its line


def _number(place: str, column: str, value: str | float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise DataError(f"{place}: {column} is {value!r}, not a positive number")
    return number


def clusters(values: np.ndarray, ratio: float = 1.25) -> np.ndarray:
    """The number, in increasing order, of the group that each value is in: neighbours within `ratio` are together."""
    order = np.argsort(values, kind="stable")
    jump = np.diff(np.log(values[order])) > math.log(ratio)
    number = np.empty(len(values), int)
    number[order] = np.concatenate([[0], np.cumsum(jump)])
    return number


def repeats(points: Points) -> list[str]:
    """A warning for laws that take every token as new, where many are not."""
    passes = points.D / points.U
    if not (many := int((passes > AS_NEW).sum())):
        return []
    text = f"{many} points saw their text up to {passes.max():.3g} times, which this law takes as new text"
    return [f"{text}: leave them out, or `fit repetition`"]


def check_span(points: Points, constants: int) -> list[str]:
    """Warnings about points that say little; DataError when they cannot determine so many constants."""
    if len(points) <= constants:
        raise DataError(f"{len(points)} points cannot determine {constants} constants: {constants + 1} could")
    warnings = list(points.notes)
    for name, what in (("N", "parameters"), ("D", "tokens")):
        values = getattr(points, name)
        distinct, span = _distinct(values), values.max() / values.min()
        if distinct < 3:
            raise DataError(f"only {distinct} distinct value(s) of {name} ({what}): its exponent needs three")
        if span < 10:
            warnings.append(f"{name} ({what}) spans a factor of {span:.1f} only; exponents want a decade or more")
    if len(points) < 3 * constants:
        warnings.append(f"{len(points)} points for {constants} constants; intervals will be optimistic")
    return warnings


def _distinct(values: np.ndarray, ratio: float = 1.02) -> int:
    """How many there are when what is within `ratio` of the one before counts as the same."""
    count, last = 0, 0.0
    for value in np.unique(values):
        if value > ratio * last:
            count, last = count + 1, value
    return count
