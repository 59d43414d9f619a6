"""Sources of examples: what `examples.sources` names, as files and the rows in them.

A source is `docstrings[:PACKAGE,...]`, or [NAME=]PATH[?form=FORM&COLUMN=NAME]: a file or a folder of files that end in
.jsonl, .jsonl.gz, .jsonl.zst, .json (a list of rows, or lines), .json.gz (lines), .parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllama_jax.data import readers
from tinyllama_jax.data.sources import DOMAIN_NAME, below, unknown
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.finetune import docstrings
from tinyllama_jax.finetune.forms import COLUMNS, Example, Malformed, example, form_of
from tinyllama_jax.generate.templates import Message

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".parquet")
FORMS = ("auto", *COLUMNS)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    origin: str  # file:line, file#row or package:name
    example: Example | None
    reason: str = ""  # why there is none


@dataclass(frozen=True)
class Source:
    spec: str
    name: str  # of its domain
    path: Path | None  # None: docstrings
    form: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # of the form -> in the files
    packages: tuple[str, ...] = ()  # of docstrings

    def files(self) -> list[Path]:
        """Raises DataError when there is none that a reader exists for."""
        if self.path is None:
            return []
        if not self.path.exists():
            raise DataError(
                f"{self.path}: no such file or folder; a source of examples is [NAME=]PATH[?form=FORM&COLUMN=NAME] or "
                f"{docstrings.SPEC}, relative to {Path.cwd()}"
            )
        found = [self.path / name for name in below(self.path)] if self.path.is_dir() else [self.path]
        found = [file for file in found if file.name.endswith(SUFFIXES)]
        if not found:
            raise DataError(f"{self.path}: no file that ends in {', '.join(SUFFIXES)}; name one, or a folder of them")
        return found

    def identity(self) -> list[dict]:
        """What it is made of: files by their SHA-256, packages by their versions."""
        if self.path is None:
            return [{"name": name, "version": version} for name, version in docstrings.versions(self.packages).items()]
        return [{"name": str(file), "bytes": file.stat().st_size, "sha256": _sha256(file)} for file in self.files()]

    def rows(self) -> Iterator[Row]:
        """All of its rows in order; raises DataError for a file that cannot be read or decompressed."""
        if self.path is None:
            for origin, found in docstrings.examples(self.packages):
                yield Row(origin, found)
            return
        form = self.form
        for file in self.files():
            for origin, record in _records(file):
                try:
                    if isinstance(record, Malformed):
                        raise record
                    if form == "auto" and isinstance(record, Mapping):
                        form = self._form(record, origin)
                    if form == "auto":
                        raise Malformed("not a JSON object")
                    yield Row(origin, example(record, form, self.columns))
                except Malformed as error:
                    yield Row(origin, None, str(error))

    def first(self) -> Example | None:
        """The first example in it, which says what kind all are of."""
        if self.path is None:
            return Example((Message("user", "?"), Message("assistant", "!")))  # all parsing would be done twice
        return next((row.example for row in self.rows() if row.example is not None), None)

    def _form(self, record: Mapping, origin: str) -> str:
        """Of the first row that is one; all others must have it too."""
        renamed = {**record, **{column: record[name] for column, name in self.columns.items() if name in record}}
        try:
            return form_of(renamed)
        except Malformed as error:
            raise DataError(f"{origin}: {error}") from error


def parse(spec: str, form: str = "auto") -> Source:
    """The source that a spec names; nothing is read.  `=` and `?` inside of an existing path are part of it.

    Raises UsageError for options that there are not and DataError for a path that names no domain.
    """
    name, rest, query = "", spec, ""
    left, equals, right = rest.partition("=")
    if equals and right and DOMAIN_NAME.fullmatch(left) and not Path(rest).exists():
        name, rest = left, right
    word, colon, packages = rest.partition(":")
    if word == docstrings.WORD and not Path(rest).exists():
        names = tuple(filter(None, packages.split(",")))
        if colon and not names:
            raise UsageError(f"source {spec!r} names no package; write {docstrings.SPEC}")
        return Source(spec, name or docstrings.WORD, None, packages=names)
    if "?" in rest and not Path(rest).exists():
        rest, _, query = rest.rpartition("?")
    given: dict[str, str] = {}
    for setting in filter(None, query.split("&")):
        key, equals, value = setting.partition("=")
        if not equals or not value:
            raise UsageError(f"source {spec!r}: option {key!r} has no value; write {key}=VALUE")
        if key in given:
            raise UsageError(f"source {spec!r}: option {key!r} is given twice; leave one out")
        given[key] = value
    form = given.pop("form", form)
    if form not in FORMS:
        unknown(f"source {spec!r}: form", form, FORMS)
    columns = COLUMNS.get(form) or tuple(dict.fromkeys(column for each in COLUMNS.values() for column in each))
    for key in given:
        if key not in columns:
            unknown(f"source {spec!r}: option", key, ("form", *columns))
    return Source(spec, name or _name(spec, Path(rest)), Path(rest), form, given)


def _name(spec: str, path: Path) -> str:
    name = path.resolve().name
    suffix = next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), "")
    name = name if path.is_dir() else name.removesuffix(suffix)
    if not DOMAIN_NAME.fullmatch(name):
        raise DataError(f"source {spec!r}: {name!r} cannot name it (letters, digits, '_', '.', '-'); write NAME={spec}")
    return name


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(origin, row as JSON or parquet has it, or a Malformed)."""
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet(file)
        elif file.name.endswith(".json"):
            yield from _json(file)
        else:
            yield from _lines(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    for origin, values in readers.parquet_rows(file, None):
        try:
            yield origin, {name: value() for name, value in values.items()}
        except UnicodeDecodeError as error:
            yield origin, Malformed(f"byte {error.start} is not valid UTF-8")


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with contextlib.closing(readers.lines(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield f"{file}:{number}", _parsed(line.removeprefix(_BOM) if number == 1 else line)


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """A list of rows; what begins otherwise is lines."""
    with file.open("rb") as opened:
        begin = opened.read(4096).removeprefix(_BOM).lstrip()
    if not begin.startswith(b"["):
        yield from _lines(file)
        return
    rows = _parsed(file.read_bytes().removeprefix(_BOM))
    if isinstance(rows, Malformed):  # then none of it can be trusted
        raise DataError(f"{file}: {rows}; fetch the file again")
    for number, row in enumerate(rows):
        yield f"{file}#{number}", row


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        return Malformed(f"not JSON ({' '.join(str(error).split())[:120]})")


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
