"""TinyLlama's packed files: the documents that went in come out, across files, fillers and both kinds of marks."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data import litpkds
from tinyllama_jax.data.sources import parse
from tinyllama_jax.errors import DataError

BOS, EOS = 1, 2


def pack(folder: Path, prefix: str, documents: list, size: int, *, rest: bool, dtype="<u2") -> list[Path]:
    """As the program that made such files does: chunks of `size` tokens that were filled with BOS before; the last,
    partly filled one is written only with `rest`."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = np.array([token for document in documents for token in document], dtype)
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    files = []
    for number, chunk in enumerate(chunks):
        if len(chunk) < size and not rest:
            break
        filled = np.full(size, BOS, dtype)
        filled[: len(chunk)] = chunk
        code = {"<u2": 8, "<i4": 4}[dtype]
        files.append(folder / f"{prefix}_{number:010d}.bin")
        files[-1].write_bytes(b"LITPKDS" + struct.pack("<QBQ", 1, code, size) + filled.tobytes())
    return files


def marked(documents: list[list[int]], marks: str) -> list[list[int]]:
    before, after = [BOS] * (marks in ("bos", "both")), [EOS] * (marks in ("eos", "both"))
    return [before + document + after for document in documents]


def read(spec: str):
    source = parse(spec)
    found = [document for given in source.inputs() for document in source.documents(given)]
    return [document.tokens.tolist() for document in found], source


def complaint(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        read(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BODIES = st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=30), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(
    bodies=BODIES, marks=st.sampled_from(litpkds.MARKS), size=st.integers(1, 40), dtype=st.sampled_from(["<u2", "<i4"])
)
def test_documents_come_back_whole_across_files(tmp_path_factory, bodies, marks, size, dtype):
    folder = tmp_path_factory.mktemp("packed")
    documents = marked(bodies, marks)
    files = pack(folder, "train_x_0", documents, size, rest=True, dtype=dtype)
    found, source = read(f"x=litpkds:{folder}?marks={marks}")
    assert found == documents
    total = sum(map(len, documents))
    assert source.dropped["filler_tokens"] == len(files) * size - total


@settings(max_examples=100, deadline=None)
@given(bodies=BODIES, marks=st.sampled_from(litpkds.MARKS), size=st.integers(1, 40))
def test_what_was_cut_off_with_the_last_chunk_is_all_that_is_missing(tmp_path_factory, bodies, marks, size):
    folder = tmp_path_factory.mktemp("packed")
    documents = marked(bodies, marks)
    files = pack(folder, "train_x_0", documents, size, rest=False)
    if not files:
        return
    found, source = read(f"x=litpkds:{folder}?marks={marks}")
    stream = [token for document in documents for token in document][: len(files) * size]
    filler = source.dropped["filler_tokens"]  # a BOS that nothing follows
    assert [token for document in found for token in document] == stream[: len(stream) - filler] and filler <= 1
    assert found[:-1] == documents[: len(found) - 1] and found[-1] == documents[len(found) - 1][: len(found[-1])]


def test_streams_are_apart_and_inputs_independent(tmp_path):
    one, two = marked([[5] * 9, [6] * 14], "eos"), marked([[7] * 3, [8] * 3], "eos")
    pack(tmp_path, "train_slim_0", one, 10, rest=True)
    pack(tmp_path, "train_slim_1", two, 10, rest=True)
    pack(tmp_path, "validation_slim_0", marked([[9]], "eos"), 10, rest=True)
    source = parse(f"x=litpkds:{tmp_path}")
    inputs = source.inputs()
    assert [given.path for given in inputs] == [
        f"train_slim_{i}_{j:010d}.bin" for i, j in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    apart = {given.path: [d.tokens.tolist() for d in source.documents(given)] for given in reversed(inputs)}
    assert [document for given in inputs for document in apart[given.path]] == one + two
    assert apart["train_slim_0_0000000002.bin"] == []  # the end of a document of the file before
    (last,) = source.documents(inputs[1])
    assert last.origin == f"{tmp_path / inputs[1].path}#0" and last.text == "" and last.tokens.dtype == np.int32
    assert read(f"x=litpkds:{tmp_path}?prefix=validation")[0] == [[9, EOS]]
    assert "?prefix=" in complaint(f"x=litpkds:{tmp_path}?prefix=train_star")


def test_other_ids(tmp_path):
    pack(tmp_path, "train_0", [[9, 1, 2, 7], [9, 3]], 6, rest=True)
    assert read(f"x=litpkds:{tmp_path}?marks=bos&bos=9&eos=8")[0] == [[9, 1, 2, 7], [9, 3]]


def test_wrong_marks_are_noticed(tmp_path):
    bodies = [[5] * 9, [6] * 14, [7] * 3]
    for marks in litpkds.MARKS:
        pack(tmp_path / marks, "train_0", marked(bodies, marks), 10, rest=True)
        for others in set(litpkds.MARKS) - {marks}:
            assert f"?marks={others}" in complaint(f"x=litpkds:{tmp_path / marks}?marks={others}")


def test_a_document_without_an_end_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(litpkds, "LONGEST_DOCUMENT", 50)
    pack(tmp_path, "train_0", [[5] * 100], 10, rest=True)
    assert "more than 50 tokens" in complaint(f"x=litpkds:{tmp_path}")


def test_files_of_another_kind_and_damaged_ones_are_refused(tmp_path):
    (file,) = pack(tmp_path, "train_0", marked([[5] * 9], "eos"), 10, rest=True)
    whole = file.read_bytes()
    damaged = {
        "LITPKDS": b"LITPKDT" + whole[7:],
        "header": whole[:20],
        "has 43 bytes, its header promises 44": whole[:-1],
        "has 45 bytes": whole + b"\0",
        "version 2": whole[:7] + struct.pack("<QBQ", 2, 8, 10) + whole[24:],
        "dtype 6": whole[:7] + struct.pack("<QBQ", 1, 6, 5) + whole[24:],
    }
    for words, content in damaged.items():
        file.write_bytes(content)
        message = complaint(f"x=litpkds:{tmp_path}")
        assert words in message and str(file) in message
    pack(tmp_path, "train_0", [[-5, EOS]], 2, rest=True, dtype="<i4")
    assert "-5" in complaint(f"x=litpkds:{tmp_path}")
