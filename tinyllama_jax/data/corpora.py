"""Sources of text: folders, files, jsonl, and the Python standard library that is on every machine.

A source is written as on the command line of `prepare`: `python`, `PATH` or `DOMAIN=PATH`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama_jax.config import DataError

PYTHON = "python"  # the spec of the embedded corpus
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Document:
    domain: str
    text: str
    origin: str  # file, or file:line, for messages


def open_source(spec: str) -> Iterator[Document]:
    """The documents of one source, in an order that depends on nothing but its content and file names.

    `python` gives the domains `prose` and `code`; a path gives one domain, named by `DOMAIN=` or by the path's stem.
    A folder is searched for the suffixes in READERS, hidden names left out.  Texts without a visible character
    are skipped.  Raises DataError for a missing path, an unreadable or badly encoded file and an empty source; the
    path is checked here, the content while iterating.
    """
    if spec == PYTHON:
        return iter(python_documents())
    domain, path = parse_spec(spec)
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise DataError(f"{path}: no file ending in {_known()} below this folder; name another folder")
    elif path.exists():
        _reader(path)
        files = [path]
    else:
        raise DataError(
            f"{path}: no such file or folder; a source is '{PYTHON}', PATH or DOMAIN=PATH, relative to {Path.cwd()}"
        )
    return _documents(domain, path, files)


def parse_spec(spec: str) -> tuple[str, Path]:
    """`DOMAIN=PATH` or `PATH` -> (domain, path).  A `=` inside an existing path is part of the path."""
    left, equals, right = spec.partition("=")
    if equals and right and DOMAIN_NAME.fullmatch(left) and not Path(spec).exists():
        return left, Path(right)
    path = Path(spec)
    name = path.resolve().name
    suffix = _suffix(name)
    domain = name.removesuffix(suffix) if suffix and not path.is_dir() else name
    if not DOMAIN_NAME.fullmatch(domain):
        raise DataError(
            f"source {spec!r}: {domain!r} cannot name a domain (letters, digits, '_', '.', '-'); write DOMAIN={spec}"
        )
    return domain, path


def _documents(domain: str, path: Path, files: Iterable[Path]) -> Iterator[Document]:
    found = False
    for file in files:
        try:
            for origin, text in _reader(file)(file):
                if text.strip():
                    found = True
                    yield Document(domain, text, origin)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: byte {error.start} is not valid UTF-8; convert the file to UTF-8") from error
    if not found:
        raise DataError(f"{path}: holds no text; domain {domain!r} would be empty")


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError):
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    files = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".") and _suffix(name)]
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


# --- one reader per file name suffix: Path -> iterator of (origin, text) ---


def _read_plain(file: Path) -> Iterator[tuple[str, str]]:
    yield str(file), file.read_bytes().decode("utf-8-sig")  # a byte order mark is not text


def _read_jsonl(file: Path) -> Iterator[tuple[str, str]]:
    with file.open("rb") as lines:
        yield from _parse_jsonl(file, lines)


def _read_jsonl_zst(file: Path) -> Iterator[tuple[str, str]]:
    yield from _parse_jsonl(file, _lines(_decompress_zst(file)))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
}


def _suffix(name: str) -> str:
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


def _known() -> str:
    return ", ".join(READERS)


def _reader(file: Path) -> Callable[[Path], Iterator[tuple[str, str]]]:
    suffix = _suffix(file.name)
    if not suffix:
        raise DataError(f"{file}: unknown kind of file; the name must end in one of {_known()}")
    return READERS[suffix]


def _parse_jsonl(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        origin = f"{file}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
            raise DataError(f"{origin}: not a line of JSON ({error}); mend or remove the line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{origin}: has no field "text" that is a string; mend or remove the line')
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escaped lone surrogate is JSON, but no text
            raise DataError(f"{origin}: the text holds a lone surrogate at character {error.start}") from error
        yield origin, text


def _decompress_zst(file: Path) -> Iterator[bytes]:
    """All frames of a .zst file.  The library's own reader takes a truncated file for a finished one."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{file}: reading .zst needs the package zstandard; pip install zstandard") from error
    with file.open("rb") as compressed:
        frame = None
        while chunk := compressed.read(1 << 20):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise DataError(f"{file}: damaged zstd data ({error}); fetch the file again") from error
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise DataError(f"{file}: ends in the middle of its zstd data; fetch the file again")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []  # a line may span many chunks; joined once
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        for line in more:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


# --- the Python standard library ---


# Tests, bundled wheels, installed packages and, in `encodings`, 1.4 MB of generated character tables.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|site-packages|dist-packages|tests?|idle_test|_bundled|config-.*|lib-dynload|encodings"
)


@functools.lru_cache(maxsize=1)
def python_documents() -> tuple[Document, ...]:
    """The standard library as two domains: `prose`, its docstrings per module and the help topics of `pydoc_data`,
    and `code`, its sources without docstrings.  Nothing that was installed is read, so the text depends on the
    Python release alone (some Linux distributions split a few modules off)."""
    root = Path(sysconfig.get_path("stdlib"))
    prose, code = [], []
    for file in _python_files(root):
        origin = file.relative_to(root).as_posix()
        source = _python_source(file)
        tree = ast.parse(source)
        if origin.startswith("pydoc_data/"):
            prose += [Document("prose", topic, f"{origin}:{name}") for name, topic in _string_entries(tree)]
            continue
        docstrings = docstrings_of(tree)
        if docstrings:
            prose.append(Document("prose", "\n\n".join(docstrings) + "\n", origin))
        program = without_docstrings(source, tree).lstrip("\n")
        if program.strip():
            code.append(Document("code", program, origin))
    if not code or not prose:
        raise DataError(f"{root}: this Python carries no sources of its standard library; name a folder of text")
    return tuple(prose + code)


def _python_files(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        top = Path(folder) == root
        folders[:] = [name for name in folders if not _SKIPPED_FOLDERS.fullmatch(name)]
        if top:  # also leaves _sysconfigdata out, which describes the machine
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            names = [name for name in names if name.removesuffix(".py") in sys.stdlib_module_names]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _python_source(file: Path) -> str:
    with tokenize.open(file) as text:  # honours a coding comment and turns every line end into \n
        return text.read()


def _string_entries(tree: ast.Module) -> list[tuple[str, str]]:
    """The `name: text` entries of the module's dictionary literals, sorted by name."""
    entries = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    entries.append((str(key.value), value.value.strip() + "\n"))
    return sorted(entries)


def _holders(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Nodes that have a docstring, in the order of the source.  Only statements are visited: nothing else can hold
    a definition, and expressions are most of the tree."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and _is_string(node.body[0]):
                yield node
        for name in ("finalbody", "orelse", "handlers", "cases", "body"):
            stack.extend(reversed(getattr(node, name, ())))


def docstrings_of(tree: ast.Module) -> list[str]:
    """Every docstring with visible text, dedented, in the order of the source."""
    cleaned = (inspect.cleandoc(node.body[0].value.value).strip() for node in _holders(tree))
    return [text for text in cleaned if text]


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source less its docstrings; comments and layout stay, and so does the program (docstrings apart).

    A docstring that has its lines to itself goes with them.  Where a statement is needed in its place (nothing else
    in the body, or a second string that would become the docstring), and where it shares a line, it becomes `pass`.
    """
    lines = source.encode().split(b"\n")  # ast counts columns in UTF-8 bytes
    for node in reversed(list(_holders(tree))):  # from the end, so that earlier positions stay true
        string, *others = node.body
        first, last = string.lineno - 1, string.end_lineno - 1
        before, after = lines[first][: string.col_offset], lines[last][string.end_col_offset :]
        needed = not others and not isinstance(node, ast.Module)
        needed |= bool(others) and _is_string(others[0])
        if needed or before.strip() or after.strip():
            lines[first : last + 1] = [before + b"pass" + after]
        else:
            del lines[first : last + 1]
    return b"\n".join(lines).decode()


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
