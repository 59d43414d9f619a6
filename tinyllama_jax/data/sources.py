"""Sources of text: what a spec on the command line of `prepare` names, as inputs and the documents in them.

A spec is `python`, or [DOMAIN=][LAYOUT:]PATH[?key=value&key=value] with one of the layouts in `LAYOUTS`.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from tinyllama_jax.configio import nearest
from tinyllama_jax.data import readers
from tinyllama_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

PYTHON = "python"  # the spec of the corpus that needs no files
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Input(NamedTuple):
    """What is read in one go: a file, or rows of one."""

    path: str  # relative to the source's root, with slashes
    bytes: int
    part: int = 0  # of `parts` equal ranges of rows
    parts: int = 1


class Document(NamedTuple):
    domain: str
    text: str
    origin: str  # file, file:line or file#row, for messages
    group: str = ""  # subset that statistics are kept of: a RedPajama set, a programming language
    fields: Mapping[str, str] = {}  # metadata that filters may ask for, by dotted name; never changed
    tokens: np.ndarray | None = None  # int32, marks included, when the source is tokenised already; text is "" then


class Source:
    """Text below one path.  This one is the layout `files`: any folder or file that a reader exists for.

    fields: names of metadata that every document carries (`?fields=a,b.c`; a caller may add to them).
    dropped: what `documents` has left out so far, by reason, for whoever keeps count.
    """

    layout = "files"
    known: Mapping[str, str] = {"text": "text", "group": "", "fields": ""}  # options and their defaults
    suffixes = tuple(readers.READERS)
    holds_text = True

    def __init__(self, spec: str, domain: str, path: Path, given: Mapping[str, str]):
        self.spec, self.domain, self.path, self.given = spec, domain, path, dict(given)
        self.options = {**self.known, **given}
        self.fields = listed(self.options.get("fields", ""))
        self.text_column = self.options.get("text", "text")
        self.group_field = self.options.get("group", "")
        self.dropped: Counter[str] = Counter()

    @property
    def root(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    def inputs(self) -> list[Input]:
        """Sorted by the parts of their paths, hidden names left out.  Raises DataError when there is none."""
        if not self.path.exists():
            raise DataError(
                f"{self.path}: no such file or folder; a source is '{PYTHON}' or [DOMAIN=][LAYOUT:]PATH[?key=value], "
                f"relative to {Path.cwd()}"
            )
        names = self.files()
        if not names:
            raise DataError(f"{self.path}: {self.nothing()}")
        columns = sorted({"text", "group", "fields"} & self.given.keys())
        if columns and all(name.endswith(readers.PLAIN) for name in names):
            raise DataError(f"{self.path}: holds plain text, which has no columns; leave ?{columns[0]}= out")
        return [one for name in names for one in self.split(Input(name, self.size(Input(name, 0))))]

    def size(self, given: Input) -> int:
        """Bytes of the input as it is now.  Raises DataError when it is gone."""
        file = self.root / given.path
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file}: is no regular file; remove it or name another source")
        return share(status.st_size, given.part + 1, given.parts) - share(status.st_size, given.part, given.parts)

    def where(self, given: Input) -> str:
        part = f" (part {given.part + 1} of {given.parts})" if given.parts > 1 else ""
        return f"{self.root / given.path}{part}"

    def documents(self, given: Input) -> Iterator[Document]:
        """All documents of an input, those without a visible character too, in an order that depends on nothing but its
        content.  Raises DataError naming the place for what cannot be read, and for a file that has not the input's
        size.
        """
        size = self.size(given)
        if size != given.bytes:
            raise DataError(f"{self.where(given)}: has {size} bytes and had {given.bytes} when it was listed")
        return self.read(given)

    # What layouts differ in:

    def files(self) -> list[str]:
        """Paths relative to the root, sorted."""
        if self.path.is_dir():
            return [name for name in below(self.path) if name.endswith(self.suffixes)]
        return [self.path.name] if self.path.name.endswith(self.suffixes) else []

    def nothing(self) -> str:
        """What is wrong where there is no file."""
        if self.path.is_dir():
            return f"no file ending in {', '.join(self.suffixes)} below this folder; name another folder"
        return f"unknown kind of file; the name must end in one of {', '.join(self.suffixes)}"

    def split(self, given: Input) -> list[Input]:
        return [given]

    def group_of(self, path: str, fields: Mapping[str, str]) -> str:
        return fields.get(self.group_field, "")

    def read(self, given: Input) -> Iterator[Document]:
        wanted = tuple(dict.fromkeys(filter(None, (*self.fields, self.group_field))))
        for origin, text, fields in self.rows(given, wanted):
            yield Document(self.domain, text, origin, self.group_of(given.path, fields), fields)

    def rows(self, given: Input, fields: tuple[str, ...]) -> Iterator[readers.Row]:
        return readers.rows(self.root / given.path, self.text_column, fields)


def parse(spec: str) -> Source:
    """The source that a spec names; nothing is read.  `=`, `:` and `?` inside of an existing path are part of it.

    Raises UsageError for an unknown layout or option and DataError for a path that names no domain.
    """
    from tinyllama_jax.data.layouts import LAYOUTS, Library  # which are made of Source

    if spec == PYTHON:
        return Library(spec, PYTHON, Path(), {})
    rest, domain, layout, query = spec, "", Source.layout, ""
    left, equals, right = rest.partition("=")
    if equals and right and DOMAIN_NAME.fullmatch(left) and not Path(rest).exists():
        domain, rest = left, right
    left, colon, right = rest.partition(":")
    if colon and right and re.fullmatch(r"\w+", left) and not Path(rest).exists():
        layout, rest = left, right
    if "?" in rest and not Path(rest).exists():
        rest, _, query = rest.rpartition("?")
    if layout not in LAYOUTS:
        unknown(f"source {spec!r}: layout", layout, LAYOUTS)
    kind = LAYOUTS[layout]
    given: dict[str, str] = {}
    for setting in filter(None, query.split("&")):
        key, equals, value = setting.partition("=")
        if key in given:
            raise UsageError(f"source {spec!r}: option {key!r} is given twice; leave one out")
        if key not in kind.known:
            unknown(f"source {spec!r}: option", key, kind.known)
        if not equals:
            raise UsageError(f"source {spec!r}: option {key!r} has no value; write {key}=VALUE")
        given[key] = value
    return kind(spec, domain or _domain(spec, Path(rest)), Path(rest), given)


def _domain(spec: str, path: Path) -> str:
    name = path.resolve().name
    suffix = readers.suffix_of(name)
    domain = name.removesuffix(suffix) if suffix and not path.is_dir() else name
    if not DOMAIN_NAME.fullmatch(domain):
        raise DataError(
            f"source {spec!r}: {domain!r} cannot name a domain (letters, digits, '_', '.', '-'); write DOMAIN={spec}"
        )
    return domain


def open_source(spec: str) -> Iterator[Document]:
    """The documents of a source that have a visible character, in order.

    The path is checked here, the content while iterating.  Raises DataError for what cannot be read, for a source of
    tokens, and in the end for one that held no text.
    """
    source = parse(spec)
    if not source.holds_text:
        raise DataError(f"{source.path}: holds tokens and no text; `tinyllama prepare` makes a store of them")
    return _visible(source, source.inputs())


def _visible(source: Source, inputs: list[Input]) -> Iterator[Document]:
    found = False
    for given in inputs:
        for document in source.documents(given):
            if document.text and not document.text.isspace():
                found = True
                yield document
    if not found:
        raise DataError(f"{source.path}: holds no text; domain {source.domain!r} would be empty")


def unknown(what: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raises UsageError with the name that was perhaps meant."""
    hint = nearest(name, known) or f" (there are: {', '.join(known) or 'none'})"
    raise UsageError(f"{what} {name!r} is unknown{hint}")


def below(folder: Path) -> list[str]:
    """Paths of the files below a folder, relative to it, sorted by their parts; hidden names are left out.  Linked
    folders are read like others, except where they lead back to one that they lie in."""
    found: list[str] = []

    def visit(path: Path, before: str, within: frozenset[str]) -> None:
        real = os.path.realpath(path)
        if real in within:
            return
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                visit(Path(entry.path), f"{before}{entry.name}/", within | {real})
            else:
                found.append(before + entry.name)

    visit(folder, "", frozenset())
    return found


def listed(value: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(filter(None, value.split(",")))


def share(total: int, part: int, parts: int) -> int:
    """Where the part-th of `parts` equal ranges of [0, total) begins."""
    return total * part // parts
