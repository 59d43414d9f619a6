"""The table of runs: one flat row for each (lab/row.py says which columns), in a JSONL or CSV file or as a data frame.

    found = table.rows(["runs/isoflop", "runs/extra.jsonl"])
    found = table.select(found, [("status", "finished"), ("config.model.kv_heads", "4")])
    table.write(found, "runs.jsonl")

Files keep a row's columns in the order of lab/row.py.  JSONL keeps every type.  In a CSV an empty cell is None, and
what reads as a number is one.  No jax here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_jax.configio import nearest
from tinyllama_jax.data import durable
from tinyllama_jax.errors import ConfigError, DataError, UsageError
from tinyllama_jax.lab.row import AFTER_DOMAINS, BEFORE_DOMAINS, FIXED, PER_DOMAIN, finite, leaves, read_json, row
from tinyllama_jax.terminal import say

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".csv")
# Columns of a CSV whose cells are words whatever they look like: a hash may have the form of a number.
_WORDS = {"name", "directory", "status", "fingerprint", "experiment", "group", "device_kind"}
_WORDS |= {"store", "tokenizer", "order", "git", "version", "jax", "config.name"}
_NAMED = 3  # of many damaged directories


# ---------------------------------------------------------------------------------------------------------
# from directories to rows


@dataclass
class _Found:
    row: Row
    time: float  # when it was last written to, in seconds since 1970
    measured: bool  # read from the run itself, not from a table


def rows(paths: Iterable[str | Path]) -> list[Row]:
    """One row for each run in `paths`: run directories, sweeps, folders of those, and tables that `write` wrote.

    A directory counts once, and so does a run (fingerprint and seed): the finished one is kept, then the newer one.
    Damaged run directories are left out and named in one line on stderr.
    Raises DataError when a path is none of these, or no run is left.
    """
    paths, found, damaged = [Path(path) for path in paths], [], []
    for path in paths:
        if path.is_dir():
            for member in _members(path):
                try:
                    found.append(member if isinstance(member, _Found) else _Found(row(member), _time(member), True))
                except DataError as error:
                    damaged.append((member, error))
        elif path.is_file():
            found += [_Found(made, _time(path), False) for made in read(path)]
        else:
            raise DataError(f"{path}: no such run, sweep or table; give what `train`, `sweep` or `runs` wrote")
    if damaged and found:
        names = ", ".join(str(directory) for directory, _ in damaged[:_NAMED])
        more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        say(f"left out, {len(damaged)} damaged: {names}{more} ({damaged[0][1]})")
    if not found:
        if damaged:
            raise damaged[0][1]
        raise DataError(f"{', '.join(map(str, paths)) or 'no path'}: no run there; give a directory that `train` wrote")
    _regroup([one.row for one in found])
    return [one.row for one in _once(found)]


def _members(folder: Path, depth: int = 0) -> Iterator[Path | _Found]:
    """Run directories in or below a folder, those that are damaged too, and rows of runs that failed without one."""
    if _is_run(folder):
        yield folder
        return
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=_natural)
    for path in inside:
        if _is_run(path):
            yield path
        elif depth == 0 and not path.name.isdigit():  # a folder of sweeps
            yield from _members(path, depth + 1)
    sweep = read_json(folder / "sweep.json")
    listed, failed = sweep.get("runs"), sweep.get("failed")
    for index, run in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(failed, dict) and isinstance(run, dict) and str(index) in failed:
            directory = folder / str(index)
            if not (directory / "run.json").exists():
                words = {"name": run.get("name"), "directory": str(directory), "status": "failed"}
                words |= {"fingerprint": run.get("fingerprint"), "group": run.get("name")}
                yield _Found(dict.fromkeys(FIXED) | words, 0.0, True)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("run.json", "metrics.jsonl", "validation.jsonl"))


def _natural(path: Path) -> tuple[bool, int, str]:
    return (False, int(path.name), "") if path.name.isdecimal() else (True, 0, path.name)


def _time(path: Path) -> float:
    for name in ("metrics.jsonl", "run.json", "."):
        try:
            return (path / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _regroup(found: list[Row]) -> None:
    """Branches of branches are in the trunk's group; runs that only share a name are in groups of their own."""
    place = {(_folder(made), made.get("name")): made for made in found}
    prints: dict[Any, set] = {}
    for made in found:
        prints.setdefault(made.get("name"), set()).add(made.get("fingerprint"))
    tops = []
    for made in found:
        top, passed = made, set()
        while top.get("group") != top.get("name") and id(top) not in passed:
            passed.add(id(top))
            top = place.get((_folder(top), top.get("group")), top)
        tops.append(top)
    groups = []
    for top in tops:
        shared = top.get("group") == top.get("name") and len(prints[top.get("name")]) > 1
        groups.append(f"{top['name']} ({str(top.get('fingerprint'))[:8]})" if shared else top.get("group"))
    for made, group in zip(found, groups, strict=True):
        if "group" in made:
            made["group"] = group


def _folder(made: Row) -> str:
    return os.path.dirname(os.path.realpath(str(made.get("directory") or "")))


def _once(found: list[_Found]) -> list[_Found]:
    kept: dict[Any, _Found] = {}
    for number, one in enumerate(found):
        directory = one.row.get("directory")
        key = os.path.realpath(directory) if directory else number
        if key not in kept or (one.measured, one.time) >= (kept[key].measured, kept[key].time):
            kept[key] = one
    best: dict[Any, _Found] = {}
    for number, one in enumerate(kept.values()):
        print_ = one.row.get("fingerprint")
        key = (print_, one.row.get("seed")) if print_ else number
        rank = (one.row.get("status") == "finished", one.time)
        if key not in best or rank > (best[key].row.get("status") == "finished", best[key].time):
            best[key] = one
    if len(best) < len(kept):
        say(f"{len(kept) - len(best)} of {len(kept)} rows are of a run that is there twice: the finished one is kept")
    return list(best.values())


# ---------------------------------------------------------------------------------------------------------
# rows and columns


def columns(found: Iterable[Row]) -> list[str]:
    """Every column of the rows, in the order of lab/row.py; others behind, in that of their first appearance."""
    there = dict.fromkeys(name for made in found for name in made)

    def of(*prefixes: str) -> list[str]:
        return [name for prefix in prefixes for name in there if name.startswith(f"{prefix}.")]

    ordered = [*BEFORE_DOMAINS, *of(*PER_DOMAIN), *AFTER_DOMAINS, *of("config", "measure")]
    return [name for name in dict.fromkeys([*ordered, *there]) if name in there]


def require(found: Sequence[Row], names: Iterable[str], source: str = "the table of runs") -> None:
    """Raises DataError, with the nearest name, for a column that no row has."""
    there = columns(found)
    for name in names:
        if name not in there:
            others = [column for column in there if "." not in column]
            hint = nearest(name, there) or f" (there are: {', '.join(others)})"
            raise DataError(f"{source} has no column {name!r}{hint}")


def matches(value: Any, text: str) -> bool:
    """Whether a cell has the value that `text` says: numbers by value, None as nothing or `null`."""
    if value is None:
        return text in ("", "null", "none")
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def select(found: Sequence[Row], where: Sequence[tuple[str, str]]) -> list[Row]:
    """The rows that have all of these values; DataError for an unknown column, or when none has them."""
    require(found, [name for name, _ in where])
    kept = [made for made in found if all(matches(made.get(name), text) for name, text in where)]
    if found and not kept:
        name, _ = where[0]
        there = Counter(str(made.get(name)) for made in found).most_common(8)
        wanted = ", ".join(f"{name}={text}" for name, text in where)
        raise DataError(f"no run has {wanted}; {name} is {', '.join(value for value, _ in there)}")
    return kept


def sort(found: Sequence[Row], name: str) -> list[Row]:
    """By a column, smallest first; numbers before words, what is not known last."""
    require(found, [name])

    def key(made: Row) -> tuple:
        value = made.get(name)
        number = isinstance(value, (int, float))
        return value is None, not number, value if number else 0, "" if number else str(value)

    return sorted(found, key=key)


def pick(found: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows with these columns only, None where a row lacks one."""
    require(found, names)
    return [{name: made.get(name) for name in names} for made in found]


def frame(found: Sequence[Row]):
    """A pandas DataFrame with the columns in their order.  Raises ConfigError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise ConfigError("pandas is not installed, and `frame` needs it: pip install pandas") from None
    names = columns(found)
    return pandas.DataFrame([[made.get(name) for name in names] for made in found], columns=names)


# ---------------------------------------------------------------------------------------------------------
# files


def write(found: Sequence[Row], path: str | Path) -> None:
    """Replaces the table `path`, .jsonl or .csv; a reader sees the old one or the new one.

    Raises UsageError for another suffix, DataError when it cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    names = columns(found)
    text = io.StringIO(newline="")
    if path.suffix == ".csv":
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(made.get(name)) for name in names] for made in map(finite, found))
    else:
        for made in found:
            ordered = {name: made[name] for name in names if name in made}
            text.write(json.dumps(finite(ordered), ensure_ascii=False, allow_nan=False) + "\n")
    try:
        # Half a surrogate, which JSON can say and UTF-8 cannot, stays JSON's escape.
        durable.write(path, text.getvalue().encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; name another place") from None


def read(path: str | Path) -> list[Row]:
    """The rows of a table file.  Raises DataError with the line that is none, UsageError for another suffix."""
    path = Path(path)
    check_suffix(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text in UTF-8") from None
    return [finite(made) for made in (_read_csv if path.suffix == ".csv" else _read_jsonl)(path, text)]


def check_suffix(path: str | Path) -> None:
    """Raises UsageError for what is no table's name."""
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(f"{path}: a table's name ends in {' or '.join(SUFFIXES)}")


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            made = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error})") from None
        if not isinstance(made, dict):
            raise DataError(f"{path}, line {number}: is not a JSON object, as each line of a table is")
        yield {name: leaf for key, value in made.items() for name, leaf in leaves(value, key).items()}


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        names = next(reader, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{path}: has two columns {twice[0]!r}")
        for cells in reader:
            if len(cells) != len(names) and cells:
                raise DataError(f"{path}, line {reader.line_num}: has {len(cells)} cells for {len(names)} columns")
            if cells:
                yield {name: _value(name, cell) for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is not CSV ({error})") from None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def _value(name: str, cell: str) -> Any:
    if not cell:
        return None
    if name in _WORDS:
        return cell
    if cell in ("true", "false"):
        return cell == "true"
    for kind in (int, float):
        try:
            value = kind(cell)
        except ValueError:
            continue
        return value if kind is int or math.isfinite(value) else None
    return cell
