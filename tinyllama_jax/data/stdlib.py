"""The Python standard library as text: a corpus that is on every machine, prose and code."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.data.sources import Document
from tinyllama_jax.errors import DataError

# Tests, bundled wheels, installed packages and, in `encodings`, 1.4 MB of generated character tables.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|site-packages|dist-packages|tests?|idle_test|_bundled|config-.*|lib-dynload|encodings"
)

PROSE, CODE = {"domain": "prose"}, {"domain": "code"}  # for filters: --filter keep:domain=prose


def library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def library_bytes() -> int:
    """The size of the files that `python_documents` reads."""
    return sum(file.stat().st_size for file in python_files(library()))


@functools.lru_cache(maxsize=1)
def python_documents() -> tuple[Document, ...]:
    """The standard library as two domains: `prose`, its docstrings per module and the help topics of `pydoc_data`,
    and `code`, its sources without docstrings.  Nothing that was installed is read, so the text depends on the
    Python release alone (some Linux distributions split a few modules off)."""
    root = library()
    prose, code = [], []
    for file in python_files(root):
        origin = file.relative_to(root).as_posix()
        source = _python_source(file)
        tree = ast.parse(source)
        if origin.startswith("pydoc_data/"):
            prose += [
                Document("prose", topic, f"{origin}:{name}", fields=PROSE) for name, topic in _string_entries(tree)
            ]
            continue
        docstrings = docstrings_of(tree)
        if docstrings:
            prose.append(Document("prose", "\n\n".join(docstrings) + "\n", origin, fields=PROSE))
        program = without_docstrings(source, tree).lstrip("\n")
        if program.strip():
            code.append(Document("code", program, origin, fields=CODE))
    if not code or not prose:
        raise DataError(f"{root}: this Python carries no sources of its standard library; name a folder of text")
    return tuple(prose + code)


def python_files(root: Path) -> list[Path]:
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
