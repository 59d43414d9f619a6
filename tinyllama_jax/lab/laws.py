"""Laws by name or from the file of a fit, with what is known of how far they may be trusted.  No jax here.

law = laws.load("fit.json")       # written by `tinyllama fit chinchilla --out fit.json`
law = laws.load("hoffmann")       # or by --json, without the resamples
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.fit import chinchilla, repeated
from tinyllama_jax.lab.fit.allocate import Law

COUNTS = ("total", "non_embedding", "matmul")  # definitions of N: flops.parameter_counts
_COUNT_OF = {"parameters": "total", "params": "total", "non_embedding": "non_embedding", "matmul": "matmul"}


@dataclass(frozen=True)
class Named:
    """A law and where it is from.  data: what the points of its fit cover (fit/points.py, span), as far as known."""

    name: str
    source: str
    law: Law
    draws: tuple[Law, ...] = ()
    count: str = "total"
    data: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # of its fit

    @property
    def most_compute(self) -> float | None:
        """FLOPs of the largest run in the fit."""
        span = self.data.get("compute")
        return float(span[1]) if span else None


# Constants as published, hoffmann with the digits of the paper's source; what their runs cover, as the papers say.
PUBLISHED = {
    "hoffmann": Named(
        "hoffmann",
        "Hoffmann et al., arXiv 2203.15556, approach 3",
        Law({"A": 406.40, "B": 410.73, "E": 1.6934, "alpha": 0.33917, "beta": 0.28491}),
        data={"N": [7e7, 1.6e10], "D": [5e9, 5e11], "compute": [6e18, 3e21]},
    ),
    "epoch": Named(
        "epoch",
        "Besiroglu et al., arXiv 2404.10102, from 240 points of Hoffmann et al.",
        Law({"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}),
        data={"N": [7e7, 1.6e10], "D": [5e9, 5e11], "compute": [6e18, 3e21]},
    ),
    "c4": Named(
        "c4",
        "Muennighoff et al., arXiv 2305.16264: C4, with the worth of repetition",
        Law({**repeated.PUBLISHED, "R_D": 15.387756, "R_N": 5.309743}),
        data={"N": [7e6, 8.7e9], "unique_tokens": [1e8, 1.78e11], "compute": [None, 9.3e21]},
    ),
}


def load(text: str) -> Named:
    """The published law of that name, or the one in the file of a fit.

    Raises DataError for a file that is none, ConfigError for a fit of something else than loss in N and D.
    """
    if text in PUBLISHED:
        return PUBLISHED[text]
    path = Path(text)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = f"published laws are {', '.join(PUBLISHED)}{nearest(text, PUBLISHED)}"
        raise DataError(f"--law {text}: there is no such file, and {known}") from None
    except OSError as error:
        raise DataError(f"--law {text}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"--law {text}: is not JSON; `tinyllama fit chinchilla --out FILE` writes one") from None
    constants = value.get("constants") if isinstance(value, dict) else None
    if not isinstance(constants, dict):
        raise DataError(f"--law {text}: has no constants; `tinyllama fit chinchilla --out FILE` writes such a file")
    try:
        law = _law(constants)
        draws = _draws(constants, value.get("draws") or {})
    except (TypeError, ValueError) as error:
        raise DataError(f"--law {text}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"--law {text}: {error}") from None
    data = value.get("data") if isinstance(value.get("data"), dict) else {}
    count = _COUNT_OF.get(str(data.get("N_column", "")), "total")
    warnings = tuple(str(text) for text in value.get("warnings") or ())
    return Named(path.stem, f"{text} ({value.get('law', 'a law')})", law, draws, count, data, warnings)


def _law(constants: Mapping[str, object]) -> Law:
    """Over-training's constants are those of a surface with equal exponents: alpha = beta = 2 eta."""
    numbers = {}
    for name, number in constants.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"the constant {name} is {number!r}, not a finite number")
        numbers[name] = float(number)
    if {"a", "b", "E", "eta"} <= set(numbers) and "gamma" not in numbers:
        six = 6 ** -numbers["eta"]
        exponent = 2 * numbers["eta"]
        numbers = {"A": six * numbers["a"], "B": six * numbers["b"], "E": numbers["E"]}
        numbers |= {"alpha": exponent, "beta": exponent}
    law = Law(numbers)
    for name in set(chinchilla.NAMES) & set(numbers):
        if not numbers[name] > 0:
            raise ValueError(f"the constant {name} is {numbers[name]:g}; it must be above 0")
    return law


def _draws(constants: Mapping[str, object], draws: object) -> tuple[Law, ...]:
    """One law for each resample; what was not resampled is held."""
    if not draws:
        return ()
    if not isinstance(draws, dict) or not all(isinstance(v, list) and v for v in draws.values()):
        raise ValueError("the draws are no lists of numbers")
    if len({len(values) for values in draws.values()}) != 1:
        raise ValueError("the draws of the constants have different lengths")
    rows = zip(*draws.values(), strict=True)
    # A draw that ran away to a value that JSON cannot hold says nothing.
    rows = [row for row in rows if None not in row]
    return tuple(_law({**constants, **dict(zip(draws, row, strict=True))}) for row in rows)
