"""Reading a run directory: what was configured, and what was measured, as numpy columns.

    run = Run("runs/demo")
    run.column("tokens"), run.column("loss"), run.column("mixture.prose"), run.column("timing.step_s")
    run.column("domains.prose.loss", "validation")

A run may be read while it is being written.  Every file but run.json may be missing.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.errors import DataError

TABLES = ("metrics", "validation")  # one record per step, in increasing steps
_SCALARS = (int, float, str)  # a tuple: `int | float | str` is made anew each time, and takes longer to ask
_NUMBERS_AS_TEXT = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "-inf": -math.inf, "-infinity": -math.inf}


def is_study(path: str | Path) -> bool:
    """Whether it is a sweep, another folder of runs, or a table of runs, and not the directory of one run."""
    path = Path(path)
    if path.is_dir():
        known = any((path / name).exists() for name in ("sweep.json", "runs.jsonl")) or any(path.glob("*/run.json"))
        return known and not (path / "run.json").exists()
    return path.is_file()


class Run:
    """One run directory.  Raises DataError (one line) when there is none, or its run.json cannot be used."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.info = _read_info(self.directory)

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.directory.name)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as nested dictionaries."""
        return _dictionary(self.info.get("config"))

    @property
    def plan(self) -> dict[str, Any]:
        """{"stages": [{"name", "start_step", "end_step", "start_tokens", ...}], "total_steps", "total_tokens"}."""
        return _dictionary(self.info.get("plan"))

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [stage for stage in self.plan.get("stages") or [] if isinstance(stage, dict)]

    @cached_property
    def metrics(self) -> Table:
        return Table(self.directory / "metrics.jsonl")

    @cached_property
    def validation(self) -> Table:
        return Table(self.directory / "validation.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Continuations {"step", "tokens", "prompt", "text"}; of one prompt at one step, the last written."""
        kept = {}
        for record in _Lines(self.directory / "samples.jsonl"):
            kept[record.get("step"), record.get("prompt")] = record
        return list(kept.values())

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What befell the run, in the order it was written: {"kind", "step", ...}."""
        return list(_Lines(self.directory / "events.jsonl"))

    @cached_property
    def rollbacks(self) -> list[dict[str, Any]]:
        """Where the run went back because too many steps in a row were skipped: {"from": step, "to": step}."""
        found = self._optional("rollbacks.json").get("rollbacks")
        return [back for back in found if isinstance(back, dict)] if isinstance(found, list) else []

    @cached_property
    def baselines(self) -> dict[str, Any]:
        """{"fitted_on_tokens", "domains": {name: {"unigram", "bigram", "model"}}}; empty when not measured."""
        return self._optional("baselines.json")

    def _optional(self, name: str) -> dict[str, Any]:
        try:
            return _dictionary(json.loads((self.directory / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def column(self, name: str, table: str = "metrics") -> np.ndarray:
        """One column of "metrics" or "validation", nested keys joined by dots: float64, or objects for text.

        A number that a record lacks is NaN, so that every column of a table is as long as its `step`; a column that
        no record has is all NaN.
        """
        if table not in TABLES:
            raise DataError(f"{self.directory}: no table {table!r}; choose one of {', '.join(TABLES)}")
        return (self.metrics if table == "metrics" else self.validation).column(name)

    @property
    def step(self) -> int:
        """Steps taken, 0 before the first."""
        steps = self.column("step")
        return int(steps[-1]) if len(steps) else 0

    @property
    def tokens(self) -> int:
        """Tokens seen, 0 before the first step."""
        tokens = self.column("tokens")
        return int(tokens[-1]) if len(tokens) and math.isfinite(tokens[-1]) else 0

    @property
    def last_step(self) -> int:
        """Where it ends, or ended because evaluation.patience was over; 0 when it has no plan."""
        return int(_dictionary(self.info.get("ended")).get("step") or self.plan.get("total_steps", 0))

    @property
    def finished(self) -> bool:
        return 0 < self.last_step <= self.step

    @property
    def domains(self) -> list[str]:
        """Validation domains, in the order in which they first appear."""
        return _between("domains.", ".loss", self.validation.names)

    @property
    def sources(self) -> list[str]:
        """Training sources, in the order in which they first appear."""
        found = _between("mixture.", "", self.metrics.names) + _between("epoch.", "", self.metrics.names)
        return list(dict.fromkeys(found))

    def last_validation(self, domain: str, measure: str = "loss") -> float:
        """The newest finite or non-finite value that was written for `domain`; NaN when there is none."""
        measured = self.column(f"domains.{domain}.tokens", "validation")
        values = self.column(f"domains.{domain}.{measure}", "validation")
        present = values[~np.isnan(measured)] if not np.isnan(measured).all() else values
        return float(present[-1]) if len(present) else math.nan


class Table:
    """A JSON-lines file of records with increasing `step`, flattened to columns while it is read.

    A resumed run may have written steps twice: steps at or after the step of a later record are dropped, so that
    what is left is the run as it finally went.  A line that is no record (the writer was killed in the middle of
    it) is left out and counted in `damaged_lines`.

    only: the columns that are wanted besides `step`, none = all; some of many are read several times as fast.
    """

    def __init__(self, path: Path, only: Sequence[str] = ()):
        columns: dict[str, _Column] = {}
        rows, records = 0, _Lines(path)
        wanted = [(name, name.split(".")) for name in dict.fromkeys(("step", *only))]
        for record in records:
            if not isinstance(record.get("step"), (int, float)):
                records.damaged += 1
                continue
            for name, value in _picked(record, wanted) if only else _flatten(record):
                column = columns.get(name)
                if column is None:
                    column = columns[name] = _Column()
                column.put(rows, value)
            rows += 1
        self.damaged_lines = records.damaged
        steps = columns["step"].values(rows) if rows else np.empty(0)
        later = np.minimum.accumulate(np.append(steps[1:], np.inf)[::-1])[::-1] if rows else steps
        self._kept = steps < later
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return int(self._kept.sum())

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            return np.full(len(self), math.nan)
        return self._columns[name].values(self._rows)[self._kept]


class _Column:
    """Numbers are kept in 8 bytes each: a run of a million steps must fit into a laptop's memory."""

    def __init__(self):
        self.numbers, self.texts = array("d"), {}

    def put(self, row: int, value: Any) -> None:
        if row > len(self.numbers):
            self.numbers.extend([math.nan] * (row - len(self.numbers)))
        if isinstance(value, str):
            number = _NUMBERS_AS_TEXT.get(value.lower())
            if number is None:
                self.texts[row] = value
        else:
            number = value
        self.numbers.append(math.nan if number is None else number)

    def values(self, rows: int) -> np.ndarray:
        numbers = np.full(rows, math.nan)
        numbers[: len(self.numbers)] = self.numbers
        if not self.texts:
            return numbers
        mixed = numbers.astype(object)
        mixed[list(self.texts)] = list(self.texts.values())
        return mixed


class _Lines:
    """The records of a JSON-lines file; what cannot be parsed is counted, not raised."""

    def __init__(self, path: Path):
        self.path, self.damaged = path, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        self.damaged += bool(line.strip())
                        continue
                    if isinstance(record, dict):
                        yield record
                    else:
                        self.damaged += 1
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from None


def _flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, _SCALARS):
            yield prefix + key, value


def _picked(record: dict[str, Any], wanted: list[tuple[str, list[str]]]) -> Iterator[tuple[str, Any]]:
    for name, keys in wanted:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, _SCALARS):
            yield name, value


def _between(prefix: str, suffix: str, names: list[str]) -> list[str]:
    end = -len(suffix) or None
    return [name[len(prefix) : end] for name in names if name.startswith(prefix) and name.endswith(suffix)]


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    if not directory.is_dir():
        raise DataError(f"{directory}: no such run directory; give the directory that `train` wrote")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory}: not a run directory, it has no run.json; give one that `train` wrote") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); restore it or train into another directory") from None
    if not isinstance(info, dict):
        raise DataError(f"{path}: holds no JSON object; restore it or train into another directory")
    return info
