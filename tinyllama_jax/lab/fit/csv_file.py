"""CSV files as people have them: commas, semicolons or tabs, spaces around cells, a byte order mark."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import DataError


def rows(path: Path, columns: Sequence[str], where: Sequence[tuple[str, str]]) -> list[tuple[int, dict]]:
    """(line, row) of a CSV that has these columns."""
    names = header(path)
    for column in (*columns, *(c for c, _ in where)):
        if names.count(column) != 1:
            there = nearest(column, names) or f" (there are: {', '.join(names)})"
            raise DataError(
                f"{path}: " + (f"{column!r} names two columns" if column in names else f"no column {column!r}{there}")
            )
    found = []
    for line, cells in _cells(path):
        if len(cells) > len(names) and any(cells[len(names) :]):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells for {len(names)} columns; quote what has a comma in it"
            )
        row = dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=False))
        if all(row[c] == v for c, v in where):
            found.append((line, row))
    if not found:
        chosen = " with " + ", ".join(f"{c}={v}" for c, v in where) if where else ""
        raise DataError(f"{path}: has no row{chosen}")
    return found


def header(path: str | Path) -> list[str]:
    """The names of a CSV's columns.  Raises DataError for a file that cannot be read or is empty."""
    for _, cells in _cells(Path(path), first=True):
        return cells
    raise DataError(f"{path}: is empty; a header and a row for each run are needed")


def _cells(path: Path, first: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(line, cells without the space around them) of the rows below the header, or of the header.

    Columns are parted by whichever of comma, semicolon and tab the header has most of.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            top = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=top.count), skipinitialspace=True)
            for number, cells in enumerate(reader):
                if first or (number and any(cells)):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no CSV in UTF-8: {error}") from error
