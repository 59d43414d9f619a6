"""An instruction set that every machine has: questions about Python packages, answered by their documentation.

Sources are parsed, never imported.  Of each public module, class and function: what it does (the first paragraph of
its docstring), its signature, an example of its use.  The same versions give the same examples in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama_jax.data.stdlib import library, python_files
from tinyllama_jax.errors import DataError
from tinyllama_jax.finetune.forms import Example
from tinyllama_jax.generate.templates import Message

WORD = "docstrings"
SPEC = f"{WORD}[:PACKAGE,...]"
PYTHON = "python"  # the standard library
DEFAULT = (PYTHON, "numpy", "jax", "optax")  # what this package needs, and so has
_SKIPPED = re.compile(r"_?tests?|testing|conftest|__pycache__|_?vendor(ed)?|setup|benchmarks?")
_SHORTEST, _LONGEST, _EXAMPLE_LINES = 20, 800, 16  # characters of a paragraph, lines of an example
_QUESTIONS = {
    "what": ("What does {0} do?", "Explain {0} in a few words.", "What is {0} for?", "Tell me about {0}."),
    "signature": ("Write the signature of {0}.", "Which arguments does {0} take?", "How is {0} called?"),
    "example": ("Give an example of {0}.", "Show me how to use {0}.", "How would I use {0}?"),
}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Raises DataError for a package that is not installed."""
    return {name: _version(name) for name in packages or DEFAULT}


def examples(packages: Sequence[str] = ()) -> Iterator[tuple[str, Example]]:
    """(package:name, question and answer) of the packages, by default DEFAULT; a name is asked about once.

    Raises DataError for a package that is not installed, or has no documented sources.
    """
    for package in packages or DEFAULT:
        seen: set[str] = set()
        for module, file in _modules(package):
            for name, node in _public(module, _parsed(file)):
                if name not in seen:
                    seen.add(name)
                    for kind, answer in _answers(name, node):
                        yield f"{package}:{name}", _example(name, kind, answer)
        if not seen:
            raise DataError(f"docstrings: {package} has no sources with documentation; name another package")


def _version(package: str) -> str:
    if package == PYTHON:
        return platform.python_version()
    _folder(package)
    names = importlib.metadata.packages_distributions().get(package, ())
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or "unknown"


def _folder(package: str) -> Path:
    """Of a top-level package: finding that imports nothing."""
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError) as error:
        raise DataError(f"docstrings: package {package!r} cannot be found ({error})") from error
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"docstrings: there is no installed package {package!r}; name others, {PYTHON} for the standard library"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """(public dotted name, file): `numpy.linalg` for numpy/linalg/_linalg.py."""
    if package == PYTHON:
        root, files, first = library(), python_files(library()), ()
    else:
        root, first = _folder(package), (package,)
        files = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).parts)
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        if not any(map(_SKIPPED.fullmatch, parts)):
            named = [part for part in (*first, *parts) if not part.startswith("_")]
            if named:
                yield ".".join(named), file


def _parsed(file: Path) -> ast.Module:
    try:
        with tokenize.open(file) as text:
            return ast.parse(text.read())
    except (SyntaxError, UnicodeDecodeError, ValueError):  # some packages bring examples of what is no Python
        return ast.Module(body=[], type_ignores=[])
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _public(module: str, tree: ast.Module) -> Iterator[tuple[str, ast.Module | _Definition]]:
    """The module, its classes and functions, and the classes' methods, as far as their names are public."""
    yield module, tree
    for node in tree.body:
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, _Definition) and not inner.name.startswith("_"):
                    yield f"{module}.{node.name}.{inner.name}", inner


def _answers(name: str, node: ast.Module | _Definition) -> Iterator[tuple[str, str]]:
    docstring = (ast.get_docstring(node) or "").expandtabs()
    if not docstring:
        return
    summary = " ".join(docstring.split("\n\n")[0].split())
    if _SHORTEST <= len(summary) <= _LONGEST and not summary.startswith(">>>") and _encodes(summary):
        yield "what", summary if summary[-1] in ".!?:" else summary + "."
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        signature = f"{name}({_arguments(node)})"
        if len(signature) <= _LONGEST:
            yield "signature", signature
    if (code := _code(docstring)) and _encodes(code):
        yield "example", code


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Without annotations, which make them long, and without `self`."""
    arguments = node.args
    for one in (
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, (arguments.vararg, arguments.kwarg)),
    ):
        one.annotation = None
    text = ast.unparse(arguments)
    return re.sub(r"^(self|cls)(, (/, )?|$)", "", text)


def _code(docstring: str) -> str:
    """The first session of an interpreter in it, as far as it has no empty line."""
    lines = inspect.cleandoc(docstring).split("\n")
    begin = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>> ")), None)
    if begin is None:
        return ""
    end = next((i for i in range(begin, len(lines)) if not lines[i].strip()), len(lines))
    return inspect.cleandoc("\n" + "\n".join(lines[begin:end])) if end - begin <= _EXAMPLE_LINES else ""


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _example(name: str, kind: str, answer: str) -> Example:
    """The wording of the question is chosen by a hash of what it asks."""
    wordings = _QUESTIONS[kind]
    choice = hashlib.sha256(f"{kind} {name}".encode()).digest()[0] % len(wordings)
    return Example((Message("user", wordings[choice].format(name)), Message("assistant", answer)))
