"""A run beside a curve from elsewhere: a CSV with tokens (or steps) and loss, such as Weights & Biases exports.

Both curves are aligned by tokens on their common range and smoothed by the same window in tokens: the mean of the
straight lines between the points, so that it does not matter how densely each was logged.  At the beginning, where a
loss is steep, the window shrinks on both sides alike; the last values are means over half a window.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.lab.runs import Run

# What such columns are called, in the order of preference.  W&B puts the run's name before the metric: "run - loss".
TOKENS = (
    "tokens",
    "num_tokens",
    "total_tokens",
    "tokens_seen",
    "train/tokens",
    "train/total_tokens",
    "consumed_tokens",
)
STEPS = ("step", "steps", "global_step", "_step", "train/global_step", "iteration", "iter", "trainer/global_step")
LOSS = ("loss", "train_loss", "train/loss", "training_loss", "metric.train_loss", "lm_loss", "lm loss", "train/ce_loss")
WINDOW = 1 / 40  # of the common range, as in the other figures
POINTS = 800  # at which the curves are compared
SETTLED = 0.25  # of the common range: what was before it says little about the lag
STRETCH = 4.0  # tokens for the same loss, more or fewer, at most


@dataclass(frozen=True)
class Curve:
    """Loss in nats per token at increasing numbers of tokens."""

    name: str
    tokens: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """A run and its reference on common tokens, both smoothed; differences are run minus reference, in nats."""

    name: str
    tokens: np.ndarray
    run: np.ndarray
    reference: np.ndarray
    window_tokens: float
    lag: float  # share of tokens that the run needs more for the same loss; NaN where no stretch brings them together

    @property
    def difference(self) -> np.ndarray:
        return self.run - self.reference

    def as_json(self) -> dict:
        off = self.difference
        worst = int(np.argmax(np.abs(off)))
        return {
            "reference": self.name,
            "from_tokens": float(self.tokens[0]),
            "to_tokens": float(self.tokens[-1]),
            "window_tokens": float(self.window_tokens),
            "mean_difference": float(off.mean()),
            "mean_absolute_difference": float(np.abs(off).mean()),
            "largest_absolute_difference": float(abs(off[worst])),
            "largest_at_tokens": float(self.tokens[worst]),
            "final_difference": float(off[-1]),
            "lag_percent": None if math.isnan(self.lag) else 100 * self.lag,
        }

    def lines(self) -> list[str]:
        """For a person."""
        value = self.as_json()
        lag = (
            "no stretch of the tokens brings the two together"
            if value["lag_percent"] is None
            else f"{value['lag_percent']:+.2f} % of the tokens"
        )
        return [
            f"against {self.name}, from {value['from_tokens']:,.0f} to {value['to_tokens']:,.0f} tokens "
            f"(running mean over {value['window_tokens']:,.0f}):",
            f"  mean difference {value['mean_difference']:+.4f} nats, mean absolute "
            f"{value['mean_absolute_difference']:.4f}, largest {value['largest_absolute_difference']:.4f} at "
            f"{value['largest_at_tokens']:,.0f} tokens, final {value['final_difference']:+.4f}",
            f"  for the same loss: {lag}",
        ]


def parse_columns(text: str) -> dict[str, str]:
    """ "tokens=NAME,loss=NAME" -> {"tokens": NAME, ...}; `step` may stand for tokens.  UsageError for anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        what, equals, name = part.partition("=")
        if what not in ("tokens", "step", "loss") or not (equals and name):
            raise UsageError(f"--reference-columns {text}: expected tokens=NAME,loss=NAME or step=NAME,loss=NAME")
        found[what] = name
    if {"tokens", "step"} <= set(found):
        raise UsageError(f"--reference-columns {text}: tokens or step, not both")
    return found


def read(path: str | Path, columns: Mapping[str, str] | None = None, batch_tokens: float = 0) -> Curve:
    """A curve from a CSV with a header: sorted by tokens, the mean where several rows have the same.

    columns: names for "tokens" (or "step") and "loss"; usual names are found without.  batch_tokens: what a step
    counts, where the file has steps only.  Rows without a finite number in both columns are left out, as exporters
    write them for other metrics.  DataError, in one line, for a file that cannot be used.
    """
    path, columns = Path(path), dict(columns or {})
    header, rows = _rows(path)
    loss = _column(path, header, columns, "loss", LOSS)
    at = columns.get("tokens") or columns.get("step") or _usual(header, TOKENS)
    steps = "step" in columns
    if not at:
        at, steps = _usual(header, STEPS), True
    if not at:
        raise DataError(
            f"{path}: no column of tokens or steps is known by its name (there are: {', '.join(header)}); name one "
            "with --reference-columns tokens=NAME"
        )
    _known(path, header, at)
    if steps and not batch_tokens:
        raise DataError(
            f"{path}: column {at!r} counts steps; --reference-batch-tokens N says how many tokens each step has"
        )
    pairs = [(_number(row.get(at)), _number(row.get(loss))) for row in rows]
    pairs = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    if len(pairs) < 2:
        raise DataError(f"{path}: {len(pairs)} rows have numbers in both {at!r} and {loss!r}; a curve needs two")
    x, y = np.array(pairs).T
    tokens, member = np.unique(x, return_inverse=True)
    if len(tokens) < 2:
        raise DataError(f"{path}: every row has the same {at!r}; a curve needs two")
    mean = np.bincount(member, y) / np.bincount(member)
    return Curve(path.stem, tokens * (batch_tokens if steps else 1), mean)


def of_run(run: Run) -> Curve:
    """The training loss of a run.  DataError where it has fewer than two steps."""
    tokens, loss = run.column("tokens"), run.column("loss")
    if tokens.dtype == float and loss.dtype == float:
        ok = np.isfinite(tokens) & np.isfinite(loss)
        if ok.sum() > 1:
            return Curve(run.name, tokens[ok], loss[ok])
    raise DataError(f"{run.directory}: has no training loss yet that could be compared")


def compare(run: Curve, reference: Curve) -> Comparison:
    """The two on the tokens that both have.  DataError where these are none."""
    low = max(run.tokens[0], reference.tokens[0])
    high = min(run.tokens[-1], reference.tokens[-1])
    if not high > low:
        spans = [f"{curve.tokens[0]:,.0f} to {curve.tokens[-1]:,.0f}" for curve in (reference, run)]
        raise DataError(
            f"{reference.name}: no tokens in common: it has {spans[0]}, the run {spans[1]}; "
            "--reference-columns and --reference-batch-tokens say what the file counts"
        )
    spacing = max(float(np.median(np.diff(curve.tokens))) for curve in (run, reference))
    window = min(max(WINDOW * (high - low), 2 * spacing), 0.5 * (high - low))
    at = np.linspace(low, high, POINTS)
    smoothed = [smooth(curve.tokens, curve.loss, at, window) for curve in (run, reference)]
    return Comparison(reference.name, at, *smoothed, window, _lag(at, *smoothed))


def smooth(tokens: np.ndarray, loss: np.ndarray, at: np.ndarray, window: float) -> np.ndarray:
    """The mean of the polygon through the points over `window` tokens around each of `at` (increasing)."""
    half = np.minimum(window / 2, at - at[0])
    low, high = at - half, np.minimum(at + half, at[-1])
    areas = np.concatenate([[0.0], np.cumsum(np.diff(tokens) * (loss[1:] + loss[:-1]) / 2)])

    def area(x: np.ndarray) -> np.ndarray:
        left = np.clip(np.searchsorted(tokens, x, side="right") - 1, 0, len(tokens) - 2)
        return areas[left] + (x - tokens[left]) * (loss[left] + np.interp(x, tokens, loss)) / 2

    width = np.where(half > 0, high - low, 1.0)
    return np.where(half > 0, (area(high) - area(low)) / width, np.interp(at, tokens, loss))


def _lag(at: np.ndarray, run: np.ndarray, reference: np.ndarray) -> float:
    """s of the least mean |run(tokens (1 + s)) - reference(tokens)|; NaN where that is at the end of what was tried.

    A stretch and not the first passage of each level: the noisier of two curves would always come first.
    """
    begin = at[0] + SETTLED * (at[-1] - at[0])

    def miss(stretch: float) -> float:
        inside = (at >= max(begin, begin / stretch)) & (at * stretch <= at[-1])
        if inside.sum() < len(at) / 10:
            return math.inf
        return float(np.abs(np.interp(at[inside] * stretch, at, run) - reference[inside]).mean())

    tried = np.geomspace(1 / STRETCH, STRETCH, 121)
    for _ in range(3):  # ever finer
        misses = [miss(stretch) for stretch in tried]
        best = int(np.argmin(misses))
        if best in (0, len(tried) - 1) or not math.isfinite(misses[best - 1] + misses[best + 1]):
            return math.nan
        tried = np.geomspace(tried[best - 1], tried[best + 1], 21)
    return float(tried[10]) - 1


def _rows(path: Path) -> tuple[list[str], list[dict]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no CSV in UTF-8 ({error})") from None


def _column(path: Path, header: list[str], columns: Mapping[str, str], what: str, usual: tuple[str, ...]) -> str:
    name = columns.get(what) or _usual(header, usual)
    if not name:
        raise DataError(
            f"{path}: no column of {what} is known by its name (there are: {', '.join(header)}); name one with "
            f"--reference-columns {what}=NAME"
        )
    return _known(path, header, name)


def _known(path: Path, header: list[str], name: str) -> str:
    if name not in header:
        there = nearest(name, header) or f" (there are: {', '.join(header)})"
        raise DataError(f"{path}: no column {name!r}{there}")
    return name


def _usual(header: list[str], usual: tuple[str, ...]) -> str:
    """The first usual name that a column has, whatever its case, or with a run's name before it: "run - loss"."""
    for wanted in usual:
        for name in header:
            if wanted in (name.strip().lower(), name.rpartition(" - ")[2].strip().lower()):
                return name
    return ""


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
