"""Which step of a run was the best, from its validations alone.  No jax here."""

from __future__ import annotations

import math
from pathlib import Path

from tinyllama_jax.config import REPLAY
from tinyllama_jax.train.json_lines import read


def mean_loss(record: dict) -> float:
    """Of a line of validation.jsonl: the mean loss over its domains, but for those replayed against forgetting.
    NaN where one was not finite."""
    domains = record["domains"]
    own = {name: found for name, found in domains.items() if not name.startswith(REPLAY)} or domains
    losses = [math.nan if found["loss"] is None else found["loss"] for found in own.values()]
    return math.fsum(losses) / len(losses)


def losses(workdir: str | Path, until: int | None = None) -> list[tuple[int, float]]:
    """(step, mean loss) of the validations of a run, up to and including step `until`; [] when there are none."""
    path = Path(workdir) / "validation.jsonl"
    records = [line for line in read(path) if line.get("domains")] if path.exists() else []
    return [(line["step"], mean_loss(line)) for line in records if until is None or line["step"] <= until]


def best(found: list[tuple[int, float]], steps: list[int] | None = None) -> int | None:
    """The step of the lowest loss, the first one of equals; only `steps` count, if given.  None without any."""
    finite = [(loss, step) for step, loss in found if math.isfinite(loss) and (steps is None or step in steps)]
    return min(finite)[1] if finite else None


def waited(found: list[tuple[int, float]]) -> int:
    """How many validations in a row, up to the last one, were no better than the best before them."""
    lowest, count = math.inf, 0
    for _, loss in found:
        lowest, count = (loss, 0) if loss < lowest else (lowest, count + 1)
    return count
