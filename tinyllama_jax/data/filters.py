"""Which documents are left out of a store: small tests of one document, and two that compare all documents.

A filter is a word, in a recipe as on the command line:

    min_chars=200  max_chars=1000000              length in characters (Unicode code points)
    keep:FIELD=a,b  drop:FIELD=a,b                what a field of the document's metadata says, exactly
    exact_duplicates                              of documents with the same text the first stays
    near_duplicates=0.8                           the same for texts as similar as that (0, 1] or more; see `duplicates`
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinyllama_jax.data.sources import Document

EXACT, NEAR = "exact_duplicates", "near_duplicates"
Accepts = Callable[["Document"], bool]


@dataclass(frozen=True)
class Filters:
    """What a document must pass, in this order: `tests` (each with its word), `exact`, `near`."""

    tests: tuple[tuple[str, Accepts], ...] = ()
    exact: bool = False
    near: float | None = None  # Jaccard similarity from which two documents are duplicates

    @property
    def any_duplicates(self) -> bool:
        return self.exact or self.near is not None

    def refusal(self, document: Document) -> str | None:
        """The first of `tests` that refuses the document, or None.  Raises DataError for a document that a test cannot
        be applied to."""
        for word, accepts in self.tests:
            if not accepts(document):
                return word
        return None


def parse(specs: tuple[str, ...]) -> Filters:
    """The filters that the words say.  Raises ConfigError for one that is unknown, malformed or contradicts another."""
    tests, near = [], None
    for word in specs:
        name, field, value = re.fullmatch(r"([^:=]*)(?::([^=]*))?(?:=(.*))?", word, re.DOTALL).groups()
        if name not in KINDS:
            hint = nearest(name, KINDS) or f" (there are: {', '.join(KINDS)})"
            raise ConfigError(f"there is no filter {name!r}{hint}")
        make, example, takes_field, takes_value = KINDS[name]
        if (field is not None) != takes_field or (value is not None) != takes_value or field == "":
            raise ConfigError(f"filter {word!r} cannot be read; write it like {example}")
        try:
            made = make(field, value) if takes_field else make(value)
        except ValueError as error:
            raise ConfigError(f"filter {word!r}: {error}; write it like {example}") from error
        if name == NEAR:
            if near not in (None, made):
                raise ConfigError(f"filter {word!r} contradicts {NEAR}={near:g}; keep one of them")
            near = made
        elif made is not None:
            tests.append((word, made))
    return Filters(tuple(tests), EXACT in specs, near)


def _at_least(value: str) -> Accepts:
    least = _count(value)
    return lambda document: _characters(document, "min_chars") >= least


def _at_most(value: str) -> Accepts:
    most = _count(value)
    return lambda document: _characters(document, "max_chars") <= most


def _keep(field: str, value: str) -> Accepts:
    kept = frozenset(value.split(","))
    return lambda document: _field(document, field, "keep") in kept


def _drop(field: str, value: str) -> Accepts:
    dropped = frozenset(value.split(","))
    return lambda document: _field(document, field, "drop") not in dropped


def _exact(value: None) -> None:
    """Nothing to test in one document."""


def _similarity(value: str) -> float:
    try:
        similarity = float(value)
    except ValueError:
        similarity = math.nan
    if not 0 < similarity <= 1:
        raise ValueError(f"the similarity {value!r} is no number in (0, 1]")
    return similarity


# name -> how it is made, an example, whether it takes a :FIELD, whether it takes a =VALUE
KINDS: dict[str, tuple[Callable, str, bool, bool]] = {
    "min_chars": (_at_least, "min_chars=200", False, True),
    "max_chars": (_at_most, "max_chars=1000000", False, True),
    "keep": (_keep, "keep:lang=en,de", True, True),
    "drop": (_drop, "drop:lang=en,de", True, True),
    EXACT: (_exact, EXACT, False, False),
    NEAR: (_similarity, f"{NEAR}=0.8", False, True),
}


def _count(value: str) -> int:
    if not re.fullmatch("[0-9]+", value):
        raise ValueError(f"{value!r} is no number of characters")
    return int(value)


def _characters(document: Document, name: str) -> int:
    if document.tokens is not None:
        raise DataError(
            f"{document.origin}: holds tokens and no text, so {name} has no characters to count; leave that filter out"
        )
    return len(document.text)


def _field(document: Document, field: str, name: str) -> str:
    if field not in document.fields:
        hint = nearest(field, document.fields) or (
            f" (it has: {', '.join(sorted(document.fields))})" if document.fields else ""
        )
        raise DataError(
            f"{document.origin}: has no field {field!r}{hint} for filter {name!r}, which every document needs; add "
            f"`?fields={field}` to the source if that is missing, or leave the filter out"
        )
    return document.fields[field]
