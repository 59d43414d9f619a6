"""Readers: every document comes through whole, whatever is in it; whatever is wrong with a file is said."""

import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data import readers
from tinyllama_jax.data.readers import rows
from tinyllama_jax.errors import DataError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def texts(file: Path, column: str = "text") -> list[str]:
    return [text for _, text, _ in rows(file, column)]


def complaint(file: Path, *columns) -> str:
    with pytest.raises(DataError) as caught:
        list(rows(file, *columns))
    message = str(caught.value)
    assert str(file) in message and "\n" not in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(records: list) -> bytes:
    return "".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in records).encode()


def zst(data: bytes, **settings) -> bytes:
    return zstandard.ZstdCompressor(**settings).compress(data)


def parquet(file: Path, columns: dict, **settings) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **settings)
    return file


PACKED = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".json.gz": gzip.compress, ".jsonl.zst": zst}


# --- what comes through ---


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(ANY_TEXT, max_size=8), escaped=st.booleans())
def test_every_text_comes_back_from_every_form(tmp_path_factory, documents, escaped):
    folder = tmp_path_factory.mktemp("forms")
    lines = "".join(json.dumps({"text": d}, ensure_ascii=escaped) + "\n" for d in documents).encode()
    for suffix, pack in PACKED.items():
        assert texts(write(folder / f"a{suffix}", pack(lines))) == documents
    assert texts(parquet(folder / "a.parquet", {"text": pyarrow.array(documents, pyarrow.string())})) == documents
    for document in documents:
        assert texts(write(folder / "a.txt", "\ufeff" + document)) == [document]


def test_sixteen_megabytes_in_one_document(tmp_path):
    long = "0123456789 abcde\n" * (1 << 20)
    for suffix, pack in PACKED.items():
        assert texts(write(tmp_path / f"a{suffix}", pack(jsonl(["before", long, "after"])))) == [
            "before",
            long,
            "after",
        ]
    assert texts(parquet(tmp_path / "a.parquet", {"text": ["before", long, "after"]})) == ["before", long, "after"]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_memory_is_bounded_by_a_document_not_by_the_file(tmp_path, suffix):
    """40 MB of text in a small file: in a few chunks of the reader, all would be there at once."""
    document = "one and the same text " * 2000
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(file, {"text": [document] * 1000}, use_dictionary=False, compression="zstd", write_batch_size=8)
    else:
        write(file, PACKED[suffix](jsonl([document] * 1000)))
    assert file.stat().st_size < 1_000_000
    tracemalloc.start()
    count = arrow = 0
    for _, text, _ in rows(file):
        count += text == document
        arrow = max(arrow, pyarrow.total_allocated_bytes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak < 8_000_000 and arrow < 12_000_000


def test_zst_across_frames_checksums_skippable_frames_and_chunks(tmp_path):
    documents = [os.urandom(300_000).hex() for _ in range(4)]  # compressed larger than the reader's buffer
    first, second = jsonl(documents[:3]), jsonl(documents[3:])
    skippable = b"\x5e\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    data = zst(first, write_checksum=True) + skippable + streamed.compress(second) + streamed.flush() + zst(b"")
    assert texts(write(tmp_path / "a.jsonl.zst", data)) == documents
    rest = zst(first[:500_000]) + zst(first[500_000:]) + skippable  # a line across two frames
    assert texts(write(tmp_path / "b.jsonl.zst", rest)) == documents[:3]
    assert (
        texts(write(tmp_path / "c.jsonl.gz", gzip.compress(first[:999]) + gzip.compress(first[999:]))) == documents[:3]
    )


def test_blank_lines_are_no_documents_and_empty_texts_are(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\n{"text": ""}\n \t\r\n{"text": " \\n"}\r\n{"text": "a"}')
    assert list(rows(file)) == [(f"{file}:2", "", {}), (f"{file}:4", " \n", {}), (f"{file}:5", "a", {})]


def test_columns_and_fields_by_dotted_name(tmp_path):
    records = [
        {"id": 7, "doc": {"body": "a"}, "meta": {"set": "web", "ok": True, "none": None, "many": [1, "\u00e9"]}},
        {"id": None, "doc": {"body": "b"}, "meta": {"set": "\ud800"}, "meta.ok": "flat"},
    ]
    wanted = ("id", "meta.set", "meta.ok", "meta.none", "meta.many")
    (_, a, first), (_, b, second) = rows(write(tmp_path / "a.jsonl", jsonl(records)), "doc.body", wanted)
    assert (a, b) == ("a", "b")
    assert first == {"id": "7", "meta.set": "web", "meta.ok": "true", "meta.none": "", "meta.many": '[1, "\u00e9"]'}
    assert second == {"id": "", "meta.set": "?", "meta.ok": "flat"}  # what is not there is left out
    table = {"n": [1.5, None], "doc": [{"body": "a"}, {"body": "b"}], "meta": [{"set": "x"}, {"set": None}]}
    file = parquet(tmp_path / "a.parquet", table)
    assert list(rows(file, "doc.body", ("n", "meta.set"))) == [
        (f"{file}#0", "a", {"n": "1.5", "meta.set": "x"}),
        (f"{file}#1", "b", {"n": "", "meta.set": ""}),
    ]


def test_parquet_rows_are_numbered_through_its_groups(tmp_path):
    documents = [f"row {n}" for n in range(1000)]
    file = parquet(tmp_path / "a.parquet", {"content": documents, "big": ["x"] * 1000}, row_group_size=170)
    assert list(rows(file, "content")) == [(f"{file}#{n}", text, {}) for n, text in enumerate(documents)]
    binary = parquet(tmp_path / "b.parquet", {"text": pyarrow.array(["\u00e9".encode()], pyarrow.binary())})
    assert texts(binary) == ["\u00e9"]


# --- what is refused ---


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"content": "no text"}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        b'{"text": "a"} {"text": "b"}',
        b'{"n": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=["cut", "other field", "number", "no object", "not UTF-8", "surrogate", "null", "two", "digits", "deep"],
)
def test_bad_jsonl_line_names_file_and_line(tmp_path, line):
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    message = complaint(file)
    assert f"{file}:3" in message and len(message) < 500 + len(str(file))
    packed = write(tmp_path / "a.jsonl.zst", zst(file.read_bytes()))
    assert f"{packed}:3" in complaint(packed)


def test_invalid_utf8_names_file_and_byte(tmp_path):
    assert "byte 5" in complaint(write(tmp_path / "a.txt", b"good \xff bad"))
    column = pyarrow.array([b"good", b"go\xffd"], pyarrow.binary())
    assert "#1: byte 2" in complaint(parquet(tmp_path / "a.parquet", {"text": column}))
    assert "#1: byte 2" in complaint(
        parquet(tmp_path / "b.parquet", {"text": column.cast(pyarrow.string(), safe=False)})
    )


def test_missing_columns_are_named_with_those_that_are_there(tmp_path):
    table = {"content": ["a"], "lang": ["en"]}
    message = complaint(parquet(tmp_path / "a.parquet", table))
    assert "'text'" in message and "'content', 'lang'" in message and "?text=" in message
    assert "'lan'" in complaint(tmp_path / "a.parquet", "content", ("lan",))
    assert "'content', 'lang'" in complaint(write(tmp_path / "a.jsonl", jsonl([{"content": "a", "lang": "en"}])))
    assert "#1" in complaint(parquet(tmp_path / "b.parquet", {"text": ["a", None]}))


BODY = jsonl([os.urandom(40).hex() + str(n) for n in range(3000)])


@pytest.mark.parametrize("pack", [zst, lambda d: zst(d, write_checksum=True), gzip.compress], ids=["zst", "sum", "gz"])
def test_a_compressed_file_that_was_cut_anywhere_is_refused(tmp_path, pack):
    whole = pack(BODY) + pack(b"") + pack(jsonl(["the last"]))
    suffix = ".jsonl.gz" if pack is gzip.compress else ".jsonl.zst"
    file = tmp_path / f"a{suffix}"
    assert len(texts(write(file, whole))) == 3001
    borders = {len(pack(BODY)), len(pack(BODY) + pack(b""))}  # where a shorter file would be whole
    cuts = {0, 1, 3, 5, 10, 17, len(whole) - 1, len(whole) - 4, *random.Random(1).sample(range(len(whole)), 60)}
    cuts |= {border + more for border in borders for more in (-1, 1, 2, 4, 8)}
    for cut in cuts - borders:
        assert "again" in complaint(write(file, whole[:cut])), cut
    for border in borders:
        assert len(texts(write(file, whole[:border]))) == 3000


def test_a_frame_cut_between_its_blocks_is_refused(tmp_path):
    blocks = zstandard.ZstdCompressor().compressobj()
    begun = blocks.compress(BODY[:100_000]) + blocks.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert (
        zstandard.ZstdDecompressor().decompressobj().decompress(begun) == BODY[:100_000]
    )  # nothing seems to be missing
    assert "middle" in complaint(write(tmp_path / "a.jsonl.zst", begun))


@pytest.mark.parametrize("pack", [lambda d: zst(d, write_checksum=True), gzip.compress], ids=["zst", "gz"])
def test_a_flipped_bit_in_a_file_with_checksums_is_refused(tmp_path, pack):
    whole = pack(BODY)
    file = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    for place in random.Random(2).sample(range(20, len(whole)), 40):
        complaint(write(file, whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]))
    for damaged in (b"\0" * 50 + whole, whole + b"rubbish after the end", b"plain text, not compressed"):
        complaint(write(file, damaged))


def test_damaged_parquet_is_refused(tmp_path):
    documents = [os.urandom(20).hex() for _ in range(2000)]
    file = parquet(tmp_path / "a.parquet", {"text": documents}, write_page_checksum=True, compression="zstd")
    whole = file.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        assert "fetch" in complaint(write(file, whole[:cut]))
    for place in random.Random(3).sample(range(200, len(whole) // 2), 20):  # inside of the pages
        assert "fetch" in complaint(write(file, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]))
    assert "fetch" in complaint(write(file, "no parquet at all, but long enough to be one"))


def test_unknown_unreadable_and_missing_files(tmp_path):
    assert ".jsonl.zst" in complaint(write(tmp_path / "a.docx", "x"))
    for suffix in readers.READERS:
        complaint(tmp_path / f"gone{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        complaint(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize(("suffix", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_a_package_that_is_not_installed_is_named(tmp_path, suffix, package):
    """With a name that hides the package from a fresh process."""
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path; from tinyllama_jax.errors import DataError\n"
        "from tinyllama_jax.data.readers import rows\n"
        f"try: list(rows(Path('a{suffix}')))\n"
        "except DataError as error: print(error)"
    )
    environment = {"PYTHONPATH": str(Path(readers.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert f"a{suffix}" in run.stdout and f"pip install {package}" in run.stdout
