"""Sources: what is read, in which order, and what is said about bad input."""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard

from tinyllama_jax.config import DataError
from tinyllama_jax.data import corpora
from tinyllama_jax.data.corpora import Document, docstrings_of, open_source, python_documents, without_docstrings

ROOT = Path(__file__).parents[1]


def complaint(spec) -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(str(spec)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(spec) -> list[str]:
    return [document.text for document in open_source(str(spec))]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- paths ---


def test_folder_is_read_recursively_in_sorted_order_without_hidden_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "B.txt", ".git/x.txt", "a/.hidden.txt", "picture.png", "c.jsonl"):
        write(tmp_path / name, '{"text": "line"}\n' if name.endswith("jsonl") else name)
    found = [Path(d.origin).relative_to(tmp_path).as_posix() for d in open_source(str(tmp_path))]
    assert found == ["B.txt", "a/b/c.py", "a/z.md", "b.txt", "c.jsonl:1"]


def test_domain_is_the_stem_or_what_is_written_before_the_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tales.v2.jsonl", '{"text": "a"}')
    write(tmp_path / "x=y" / "a.txt", "a")
    assert list(open_source("tales.v2.jsonl")) == [Document("tales.v2", "a", "tales.v2.jsonl:1")]
    assert [d.domain for d in open_source("web=tales.v2.jsonl")] == ["web"]
    assert [d.domain for d in open_source("eq=x=y")] == ["eq"]
    message = complaint("x=y")  # an existing path is a path; its name is no domain
    assert "DOMAIN=x=y" in message


def test_text_is_kept_as_written_but_for_the_byte_order_mark(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbf  two\r\nlines \n\n")
    write(tmp_path / "b.txt", " \n\t")  # nothing visible
    assert texts(tmp_path) == ["  two\r\nlines \n\n"]


def test_missing_and_unusable_paths_are_named(tmp_path):
    assert str(tmp_path / "none") in complaint(tmp_path / "none")
    message = complaint(write(tmp_path / "a.parquet", "x"))
    assert "a.parquet" in message and ".jsonl.zst" in message
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(tmp_path / "empty")
    assert "blank.txt" in complaint(write(tmp_path / "blank.txt", "\n \n"))


def test_invalid_utf8_names_file_and_byte(tmp_path):
    message = complaint(write(tmp_path / "a.txt", b"good \xff bad"))
    assert "a.txt" in message and "byte 5" in message


def test_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert "b.txt" in complaint(tmp_path)


# --- jsonl ---


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"content": "no text"}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
    ],
    ids=["cut", "other field", "number", "no object", "not UTF-8", "surrogate", "deep"],
)
def test_bad_jsonl_line_names_file_and_line(tmp_path, line):
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    message = complaint(file)
    assert f"{file}:3" in message
    assert len(message) < 500


def zst_of(lines: list[str]) -> bytes:
    return zstandard.ZstdCompressor().compress("".join(json.dumps({"text": t}) + "\n" for t in lines).encode())


def test_zst_is_read_across_frames_and_chunks(tmp_path):
    rows = [os.urandom(300_000).hex() for _ in range(8)]  # compressed larger than the reader's chunk
    file = write(tmp_path / "a.jsonl.zst", zst_of(rows[:5]) + zst_of(rows[5:]))
    assert texts(file) == rows
    assert next(iter(open_source(str(file)))).domain == "a"


def test_damaged_and_truncated_zst_are_not_taken_for_the_end(tmp_path):
    whole = zst_of(["some text " * 50, os.urandom(50_000).hex()])
    assert "fetch" in complaint(write(tmp_path / "a.jsonl.zst", whole[:-100]))
    assert "fetch" in complaint(write(tmp_path / "b.jsonl.zst", b"\0" * 50 + whole))


# --- Python ---


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
        "import sys; from hashlib import sha256; from tinyllama_jax.data.corpora import python_documents as p; "
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
    files = corpora._python_files(root)
    assert len(files) > 300
    for file in files[::20]:
        source = corpora._python_source(file)
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
