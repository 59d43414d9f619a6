"""JSON from elsewhere, read without trust: one object, keys once each, plain numbers, bounded depth and size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tinyllama_jax.errors import DataError

LIMIT = 100_000_000  # bytes; the largest that belong to models, tokenizer.json, have some tens of millions


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 `data`.

    Raises ValueError, with what is wrong in a few words, for everything else: other encodings, a key given twice
    (readers differ in which one counts), NaN and infinities, nesting beyond Python's depth.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} is given twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def shown(text: Any, limit: int = 80) -> str:
    """A name from a file in a message: as it is when short and printable, else quoted, escaped and cut."""
    if isinstance(text, str) and text.isprintable() and 0 < len(text) <= limit:
        return text
    quoted = ascii(text[:limit] if isinstance(text, (str, list)) else text)
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.  Raises DataError when it is missing, too large or not a JSON object."""
    try:
        if (size := path.stat().st_size) > LIMIT:
            raise DataError(f"{path} has {size} bytes; such a file of a model has {LIMIT} at most")
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a Hugging Face model directory holds one") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({_line(error)}); copy it again from its source") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def write_json(path: Path, value: dict) -> None:
    """Write `value` and force it to disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
