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
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
_SHORTEST, _LONGEST, _EXAMPLE_LINES = 12, 800, 32  # characters of a paragraph, lines of an example
_QUESTIONS = {
    "what": ("What does {0} do?", "Explain {0} in a few words.", "What is {0} for?", "Tell me about {0}."),
    "signature": ("Write the signature of {0}.", "Which arguments does {0} take?", "How is {0} called?"),
    "example": ("Give an example of {0}.", "Show me how to use {0}.", "How would I use {0}?"),
}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Answers = list[tuple[str, str]]  # kind of question, answer; of a signature what follows the name


@dataclass
class _Module:
    """What the source of a module says."""

    public: bool  # no part of its name begins with _
    answers: dict[str, _Answers] = field(default_factory=dict)  # by definition: "", "norm", "Class.method"
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> module, name there
    stars: list[str] = field(default_factory=list)  # modules that all names are taken from


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Raises DataError for a package that is not installed."""
    return {name: _version(name) for name in packages or DEFAULT}


def examples(packages: Sequence[str] = ()) -> Iterator[tuple[str, Example]]:
    """(package:name, question and answer) of the packages, by default DEFAULT; a name is asked about once.

    Raises DataError for a package that is not installed, or has no documented sources.
    """
    for package in packages or DEFAULT:
        modules = {name: _read(name, file) for name, file in _files(package)}
        found = [(name, kind, answer) for name, answers in _named(modules) for kind, answer in answers]
        if not found:
            raise DataError(f"docstrings: {package} has no sources with documentation; name another package")
        for name, kind, answer in found:
            yield f"{package}:{name}", _example(name, kind, name + answer if kind == "signature" else answer)


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


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of each module."""
    if package == PYTHON:
        root, files, first = library(), python_files(library()), ()
    else:
        root, first = _folder(package), (package,)
        files = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).parts)
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        if not any(map(_SKIPPED.fullmatch, parts)):
            yield ".".join((*first, *parts)).removesuffix(".__init__"), file


def _read(name: str, file: Path) -> _Module:
    try:
        with tokenize.open(file) as text, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text.read())
    except (SyntaxError, UnicodeDecodeError, ValueError):  # some packages bring examples of what is no Python
        tree = ast.Module(body=[], type_ignores=[])
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    module = _Module(not any(part.startswith("_") for part in name.split(".")))
    module.answers[""] = _answers(tree)
    for node in _statements(tree):
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            module.answers[node.name] = _answers(node)
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, _Definition) and not inner.name.startswith("_"):
                    module.answers[f"{node.name}.{inner.name}"] = _answers(inner)
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(source)
                else:
                    module.imported[alias.asname or alias.name] = source, alias.name
    return module


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of the module, and of its `if` and `try`."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            yield from (*node.body, *node.orelse)
        else:
            yield node


def _named(modules: dict[str, _Module]) -> Iterator[tuple[str, _Answers]]:
    """Definitions by the shortest public name that a module gives them: `numpy.any` for numpy._core.fromnumeric.any.
    What has no public name is left out."""
    names: dict[tuple[str, str], str] = {}
    for place, module in modules.items():
        if not module.public:
            continue
        given = {name for name in (*module.imported, *module.answers) if name and "." not in name}
        for star in module.stars:
            given |= _all_names(modules, star, set())
        for name in sorted(name for name in given if not name.startswith("_")):
            if (home := _home(modules, place, name, set())) is not None:
                public = f"{place}.{name}"
                names[home] = min(names.get(home, public), public, key=lambda text: (text.count("."), len(text), text))
    for place, module in modules.items():
        for definition, answers in module.answers.items():
            first, _, method = definition.partition(".")
            public = names.get((place, first)) if first else place if module.public else None
            if public and answers:
                yield f"{public}.{method}" if method else public, answers


def _all_names(modules: dict[str, _Module], place: str, seen: set[str]) -> set[str]:
    module = modules.get(place)
    if module is None or place in seen:
        return set()
    seen.add(place)
    found = {name for name in (*module.answers, *module.imported) if "." not in name}
    return found.union(*(_all_names(modules, star, seen) for star in module.stars))


def _home(modules: dict[str, _Module], place: str, name: str, seen: set) -> tuple[str, str] | None:
    """Where what `place` calls by that name is defined: (module, name), None if not in this package."""
    module = modules.get(place)
    if module is None or (place, name) in seen:
        return None
    seen.add((place, name))
    if name in module.answers:
        return place, name
    if name in module.imported:
        return _home(modules, *module.imported[name], seen)
    return next(filter(None, (_home(modules, star, name, seen) for star in module.stars)), None)


def _answers(node: ast.Module | _Definition) -> _Answers:
    docstring = (ast.get_docstring(node) or "").expandtabs()
    if not docstring:
        return []
    found = []
    summary = " ".join(docstring.split("\n\n")[0].split())
    if _SHORTEST <= len(summary) <= _LONGEST and not summary.startswith(">>>") and _encodes(summary):
        found.append(("what", summary if summary[-1] in ".!?:" else summary + "."))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        signature = f"({_arguments(node)})"
        if len(signature) <= _LONGEST and _encodes(signature):
            found.append(("signature", signature))
    if (code := _code(docstring)) and _encodes(code):
        found.append(("example", code))
    return found


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
