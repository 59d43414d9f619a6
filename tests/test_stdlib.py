"""The standard library as a corpus: prose and code apart, nothing else touched, the same everywhere."""

import ast
import io
import subprocess
import sys
import tokenize
from hashlib import sha256
from pathlib import Path

import pytest

from tinyllama_jax.data import stdlib
from tinyllama_jax.data.sources import Input, open_source, parse
from tinyllama_jax.data.stdlib import docstrings_of, python_documents, without_docstrings

ROOT = Path(__file__).parents[1]


def test_python_corpus_has_prose_and_code_and_no_tests():
    documents = python_documents()
    by_domain = {domain: [d for d in documents if d.domain == domain] for domain in ("prose", "code")}
    assert sum(map(len, by_domain.values())) == len(documents)
    size = {domain: sum(len(d.text) for d in ds) for domain, ds in by_domain.items()}
    assert size["prose"] > 1_500_000 and size["code"] > 5_000_000
    assert any(d.origin.endswith(":FORMATTING") or "topics.py:" in d.origin for d in by_domain["prose"])
    parts = {part for d in documents for part in d.origin.split(":")[0].split("/")}
    assert not parts & {"test", "tests", "site-packages", "idle_test", "_bundled", "__pycache__"}
    assert parts >= {"asyncio", "heapq.py", "json"}
    heapq = {d.domain: d.text for d in documents if d.origin == "heapq.py"}
    assert "Heap queue" in heapq["prose"] and "def heappush" not in heapq["prose"]
    assert "def heappush" in heapq["code"] and "Push item onto heap" not in heapq["code"]


def digest_of(documents) -> str:
    return sha256(repr([(d.domain, d.origin, d.text) for d in documents]).encode()).hexdigest()


def test_python_corpus_does_not_depend_on_process_or_installed_packages():
    script = (
        "import sys; from hashlib import sha256; from tinyllama_jax.data.stdlib import python_documents as p; "
        "assert not any('site-packages' in x for x in sys.path); "
        "print(sha256(repr([(d.domain, d.origin, d.text) for d in p()]).encode()).hexdigest())"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest_of(python_documents())


def stripped(tree: ast.Module) -> ast.Module:
    """The same removal on the tree, written the other way round."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
                if not node.body and not isinstance(node, ast.Module):
                    node.body = [ast.Pass()]
    return tree


def without_pass(tree: ast.Module) -> str:
    """Dump in which a `pass` beside other statements does not count: it does nothing."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list) and len(body) > 1:
                setattr(node, name, [s for s in body if not isinstance(s, ast.Pass)] or [ast.Pass()])
    return ast.dump(tree)


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.string for t in tokens if t.type == tokenize.COMMENT]


def test_docstrings_are_removed_from_the_library_and_nothing_else():
    root = Path(ast.__file__).parent
    files = stdlib.python_files(root)
    assert len(files) > 300
    for file in files[::20]:
        source = stdlib._python_source(file)
        result = without_docstrings(source, ast.parse(source))
        assert without_pass(ast.parse(result)) == without_pass(stripped(ast.parse(source))), file
        assert not docstrings_of(ast.parse(result)), file
        assert comments(result) == comments(source), file


@pytest.mark.parametrize(
    "source, expected",
    [
        ('"""m"""\nx = 1\n', "x = 1\n"),
        ("def f():\n    'd'\n", "def f():\n    pass\n"),
        ("def f(): 'd'\n", "def f(): pass\n"),
        ("def f(): 'd'; return 1\n", "def f(): pass; return 1\n"),
        ("class A:\n    'd'  # why\n    x = 1\n", "class A:\n    pass  # why\n    x = 1\n"),
        ("def f():\n    ('a'\n     'b')\n    return 1\n", "def f():\n    return 1\n"),
        ("def f():\n    'd'\n    'not a docstring'\n    g()\n", "def f():\n    pass\n    'not a docstring'\n    g()\n"),
        ("if x:\n    pass\nelse:\n    def f():\n        'é'; return 'é'\n", None),
        ("try:\n    pass\nexcept E:\n    class A:\n        'd'\n        y = 2\n", None),
        ("'m'\n", ""),
        ("async def f():\n    '''a\n    b'''\n    def g():\n        'c'\n    return g\n", None),
        ("def f():\n    f'not {x}'\n", "def f():\n    f'not {x}'\n"),
        ("match x:\n    case 1:\n        def f():\n            'd'\n            return 2\n", None),
    ],
)
def test_docstring_removal_keeps_layout_and_meaning(source, expected):
    result = without_docstrings(source, ast.parse(source))
    assert expected is None or result == expected
    assert without_pass(ast.parse(result)) == without_pass(stripped(ast.parse(source)))


def test_the_library_is_one_input_of_a_source():
    source = parse("python")
    (given,) = source.inputs()
    assert given == Input(".", source.size(given)) and given.bytes > 5_000_000
    assert Path(source.where(given)) == Path(ast.__file__).parent
    assert tuple(source.documents(given)) == tuple(open_source("python")) == python_documents()
    assert source.layout == "python"
