"""A study: the rows of a runs table, what can be asked of them, and the curves of the run directories behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.errors import UserError
from tinyllama_jax.lab.fit.points import AS_NEW, Points, clusters
from tinyllama_jax.lab.runs import Run

Row = Mapping[str, Any]

ONE_EPOCH = 1.01  # epochs up to which a run repeats nothing


class Study:
    """Rows as lab/table.py describes them; every column may be missing.

    rows: one for each run.  folder: where relative run directories are looked for.
    """

    def __init__(self, name: str, rows: Sequence[Row], folder: Path):
        self.name, self.folder = name, folder
        self.rows = [_collected(row) for row in rows]

    @cached_property
    def finished(self) -> list[Row]:
        """Runs that have come to their end with a finite loss; only these are fitted or compared."""
        return [row for row in self.rows if _ended(row) and math.isfinite(number(row, "loss"))]

    @cached_property
    def unfinished(self) -> list[Row]:
        known = set(map(id, self.finished))
        return [row for row in self.rows if id(row) not in known]

    @cached_property
    def fitted(self) -> list[Row]:
        """Finished runs with what a law of loss needs, less trunks whose branches decay."""
        trunks = _trunks(self.rows)
        return [row for row in self.finished if _complete(row) and id(row) not in trunks]

    @cached_property
    def fresh(self) -> list[Row]:
        """Those whose text may count as new."""
        return [row for row in self.fitted if epochs(row) <= AS_NEW]

    @cached_property
    def repeated(self) -> list[Row]:
        """Those with what a law of repetition needs, of one epoch or of many."""
        return [row for row in self.fitted if number(row, "unique_tokens") > 0]

    def validation(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mean loss over domains) as they were measured on the way; empty without a run directory."""
        run = self._run(row)
        if run is None or not run.domains:
            return np.empty(0), np.empty(0)
        tokens = run.column("tokens", "validation")
        loss = np.mean([run.column(f"domains.{domain}.loss", "validation") for domain in run.domains], axis=0)
        return _finite(tokens, loss)

    def training(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, loss) of every step; empty without a run directory."""
        run = self._run(row)
        return (np.empty(0), np.empty(0)) if run is None else _finite(run.column("tokens"), run.column("loss"))

    def _run(self, row: Row) -> Run | None:
        name = row.get("directory")
        if not name:
            return None
        for path in (self.folder / str(name), Path(str(name)), self.folder / Path(str(name)).name):
            if (path / "run.json").is_file():
                try:
                    return Run(path)
                except UserError:
                    return None  # the table has what can be told without it
        return None


def number(row: Row, key: str) -> float:
    """A number of the row; NaN where it has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def column(rows: Iterable[Row], key: str) -> np.ndarray:
    return np.array([number(row, key) for row in rows], float)


def epochs(row: Row) -> float:
    """Passes over the unique tokens; 1 where the row does not say."""
    said = number(row, "epochs")
    if math.isfinite(said):
        return said
    unique, tokens = number(row, "unique_tokens"), number(row, "tokens")
    return tokens / min(unique, tokens) if unique > 0 and tokens > 0 else 1.0


def compute(row: Row) -> float:
    """Training FLOPs, 6 N D where the row does not say."""
    said = number(row, "flops")
    return said if said > 0 else 6 * number(row, "parameters") * number(row, "tokens")


def seed(row: Row) -> Any:
    return row.get("seed", row.get("config.seed"))


def points(rows: Sequence[Row]) -> Points:
    """For a fit; rows of one `group` share their noise."""
    group = [str(row.get("group") or row.get("name") or i) for i, row in enumerate(rows)]
    unique = column(rows, "unique_tokens")
    tokens = column(rows, "tokens")
    return Points.of(
        column(rows, "parameters"),
        tokens,
        column(rows, "loss"),
        U=np.where(unique > 0, unique, tokens),
        C=np.array([compute(row) for row in rows]),
        group=np.array(group),
    )


def alike(values: np.ndarray, ratio: float) -> np.ndarray:
    """A number for each value, growing with it; one number for those within `ratio` of a neighbour."""
    return clusters(np.asarray(values, float), ratio)


def _collected(row: Row) -> dict[str, Any]:
    """Without what is not known, and with lists again where a table has a column for each element."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name, _, index = key.rpartition(".")
        if name.startswith("measure.") and name.endswith(".by_position") and index.isdigit():
            found.setdefault(name, {})[int(index)] = math.nan if value is None else value
        elif value is not None:
            found[key] = value
    return {k: [v[i] for i in sorted(v)] if isinstance(v, dict) else v for k, v in found.items()}


def _trunks(rows: Sequence[Row]) -> set[int]:
    """Rows of a constant rate from which others fork: what they reach before a decay is no point of a law."""
    groups = {row.get("group") for row in rows if row.get("group") != row.get("name")}
    return {
        id(row)
        for row in rows
        if row.get("config.lr.kind") == "constant" and row.get("group") in groups and not row.get("config.fork.run")
    }


def _ended(row: Row) -> bool:
    if "status" in row:
        return row["status"] == "finished"
    planned = number(row, "planned_tokens")
    return not planned > number(row, "tokens")  # a table from elsewhere may say neither


def _complete(row: Row) -> bool:
    return all(number(row, key) > 0 for key in ("parameters", "tokens", "loss"))


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype != float or y.dtype != float:
        return np.empty(0), np.empty(0)
    ok = np.isfinite(x) & np.isfinite(y)
    return x[ok], y[ok]
