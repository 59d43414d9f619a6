"""Damaged GGUF files: read as they were, or refused in one line, in little time and memory; never a traceback."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from gguf_cases import byte_level, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import random_params

from tinyllama_jax.config import Model, Rope
from tinyllama_jax.data.tokenizer import train_bpe
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import gguf_file
from tinyllama_jax.interop.gguf import read_gguf, write_gguf

ROOT = Path(__file__).parent.parent
MODEL = Model(
    vocab_size=340,
    d_model=8,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=4,
    d_ff=8,
    rope=Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=8192),
)
BIG = (0, 1, 2, 0x7F, 0xFF, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def whole(request, tmp_path_factory):
    """(a folder, the file's bytes, where its tensors begin, the same without a checksum, as others write files)"""
    folder = tmp_path_factory.mktemp("whole")
    if request.param == "gpt2":
        byte_level(folder)
    else:
        train_bpe(["the quick brown fox jumps over the lazy dog\n" * 20], 288, folder / "tokenizer.model")
    write_gguf(random_params(MODEL), MODEL, folder / "m.gguf", kind="F16", tokenizer_folder=folder)
    header = gguf_file.read_header(folder / "m.gguf")
    rewritten(folder / "m.gguf", folder / "plain.gguf")
    begin = min(tensor.start for tensor in header.tensors.values())
    return folder, (folder / "m.gguf").read_bytes(), begin, (folder / "plain.gguf").read_bytes()


def outcome(folder: Path, data: bytes):
    """What is read, as bytes that can be compared, or None where the file is refused properly."""
    file = folder / "damaged.gguf"
    file.write_bytes(data)
    try:
        found = read_gguf(file, folder)
    except (DataError, ConfigError) as error:
        message = str(error)
        assert "\n" not in message and message.isprintable() and len(message) < 600, message
        return None
    return found.model, found.marks, [f.read_bytes() for f in found.tokenizer_files], _bytes(found.params)


def _bytes(node) -> list[bytes]:
    return [node.tobytes()] if isinstance(node, np.ndarray) else [b for key in sorted(node) for b in _bytes(node[key])]


def mutations(data: bytes, begin: int, seed: int, count: int):
    """Bits flipped, bytes and numbers replaced, ends cut off, pieces taken out, doubled or filled with noise."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        changed, at = bytearray(data), int(rng.integers(0, begin))
        kind = i % 6
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[at : at + 8] = int(rng.choice(np.array(BIG, np.uint64))).to_bytes(8, "little")
        elif kind == 2:
            del changed[int(rng.integers(0, len(data))) :]
        elif kind == 3:
            changed[at : at + int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 200))]
        else:
            changed[at:at] = changed[at : at + int(rng.integers(1, 200))]
        yield bytes(changed)


def test_a_file_with_a_checksum_is_read_as_it_was_or_refused(whole):
    folder, data, begin, _ = whole
    right = outcome(folder, data)
    assert right is not None and right[0] == MODEL
    refused = 0
    for changed in mutations(data, begin, 1, 150):
        found = outcome(folder, changed)
        assert found is None or found == right
        refused += found is None
    assert refused > 120
    rng = np.random.default_rng(2)
    for at in rng.integers(begin, len(data), 20):  # weights; a byte between two tensors counts too
        changed = bytearray(data)
        changed[at] ^= 1
        assert outcome(folder, bytes(changed)) is None


def test_a_file_without_one_is_refused_or_read(whole):
    """What no rule of the format contradicts cannot be known to be damage; it must be handled all the same."""
    folder, _, begin, plain = whole
    assert outcome(folder, plain) == outcome(folder, whole[1])
    results = [outcome(folder, changed) for changed in mutations(plain, begin - 200, 3, 150)]
    assert 60 < results.count(None) < len(results)


def test_every_beginning_of_a_file_is_refused(whole):
    folder, data, begin, plain = whole
    for source in (data, plain):
        for size in [*range(0, 400, 7), *range(400, begin, 997), begin, len(source) - 40]:
            assert outcome(folder, source[:size]) is None, size


VALUES = {
    "text": ("a\nb", "STRING"),
    "texts": (["x"] * 3, "ARRAY"),
    "numbers": ([3, 4], "ARRAY"),
    "not numbers": ([float("nan")] * 2, "ARRAY"),
    "not a number": (float("nan"), "FLOAT32"),
    "truth": (True, "BOOL"),
    "large": ((1 << 64) - 1, "UINT64"),
    "negative": (-1, "INT32"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_metadata_of_another_type(whole, kind, tmp_path):
    folder = whole[0]
    keys = [key for key in gguf_file.read_header(folder / "plain.gguf").metadata if key != "general.architecture"]
    assert len(keys) > 20
    for key in keys:
        file = rewritten(folder / "plain.gguf", tmp_path / "other.gguf", add=[(key, *VALUES[kind])])
        outcome(folder, file.read_bytes())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_changed_where(whole, data):
    folder, _, begin, plain = whole
    changed = bytearray(plain)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(begin, len(changed)) - 1))
        piece = data.draw(st.binary(max_size=16) | st.sampled_from(BIG).map(lambda n: n.to_bytes(8, "little")))
        changed[at : at + data.draw(st.integers(0, 16))] = piece
    outcome(folder, bytes(changed))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_behind_the_magic(whole, noise):
    assert outcome(whole[0], b"GGUF\x03\0\0\0" + noise) is None


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + version.to_bytes(4, "little") + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little") + rest


def text(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def info(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    numbers = b"".join(n.to_bytes(8, "little") for n in dims)
    parts = (text(name), len(dims).to_bytes(4, "little"), numbers, kind.to_bytes(4, "little"))
    return b"".join(parts) + offset.to_bytes(8, "little")


HOSTILE = {
    "not GGUF": (b"GGML" + bytes(40), "not a GGUF file"),
    "version": (header(0, 0, version=1), "version 1"),
    "big-endian": (header(0, 0, version=3 << 24), "big-endian"),
    "tensors": (header(1 << 62, 0), "cannot hold"),
    "keys": (header(0, 1 << 40), "cannot hold"),
    "key": (header(0, 1, (1 << 60).to_bytes(8, "little") + bytes(99)), "bytes long"),
    "value": (header(0, 1, text(b"k") + b"\x63\0\0\0" + bytes(99)), "unknown type 99"),
    "string": (header(0, 1, text(b"k") + b"\x08\0\0\0" + (1 << 40).to_bytes(8, "little")), "bytes long"),
    "strings": (header(0, 1, text(b"k") + b"\x09\0\0\0\x08\0\0\0" + (1 << 50).to_bytes(8, "little")), "cannot hold"),
    "numbers": (header(0, 1, text(b"k") + b"\x09\0\0\0\x0c\0\0\0" + (1 << 60).to_bytes(8, "little")), "cannot hold"),
    "nested": (header(0, 1, text(b"k") + b"\x09\0\0\0" * 2 + bytes(99)), "array of type 9"),
    "truth": (header(0, 1, text(b"k") + b"\x07\0\0\0\x02"), "truth value"),
    "twice": (header(0, 2, (text(b"k") + b"\0\0\0\0\x02") * 2), "there twice"),
    "utf-8": (header(0, 1, text(b"\xff") + bytes(20)), "UTF-8"),
    "line": (header(0, 1, text(b"a\nb\x1b[31m") + b"\x63\0\0\0" + bytes(20)), "a\\nb\\x1b[31m"),
    "dimensions": (header(1, 0, text(b"t") + b"\x05\0\0\0" + bytes(60)), "5 dimensions"),
    "empty": (header(1, 0, info(b"t", [4, 0], 0, 0) + bytes(64)), "multiple"),
    "huge": (header(1, 0, info(b"t", [1 << 63, 1 << 63], 0, 0) + bytes(64)), "cut short"),
    "type": (header(1, 0, info(b"t", [32], 99, 0) + bytes(64)), "type 99"),
    "other type": (header(1, 0, info(b"t", [256], 16, 0) + bytes(99)), "IQ2_XXS"),
    "block": (header(1, 0, info(b"t", [33], 8, 0) + bytes(64)), "Q8_0"),
    "offset": (header(1, 0, info(b"t", [4], 0, 7) + bytes(64)), "multiple of 32"),
    "outside": (header(1, 0, info(b"t", [4], 0, 1 << 62) + bytes(64)), "cut short"),
    "same name": (header(2, 0, info(b"t", [4], 0, 0) + info(b"t", [4], 0, 32) + bytes(99)), "there twice"),
    "overlap": (header(2, 0, info(b"a", [16], 0, 0) + info(b"b", [4], 0, 32) + bytes(199)), "overlaps"),
    "alignment": (header(0, 1, text(b"general.alignment") + b"\x04\0\0\0\x03\0\0\0"), "power of two"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name, tmp_path):
    data, words = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_gguf(tmp_path / "m.gguf", tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(DataError, match="no file"):
            read_gguf(path, tmp_path)


LARGE = """
    import resource, sys, time
    from pathlib import Path
    import gguf
    from tinyllama_jax.errors import DataError
    from tinyllama_jax.interop import gguf_file
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, begin = peak(), time.process_time()
    try:
        gguf_file.read_header(Path(sys.argv[1]))
    except DataError as error:
        print(round(peak() - before), round(time.process_time() - begin, 1), error)
"""


@pytest.mark.parametrize(
    "kind, words, mib",
    [
        (b"\x08", "more than 2097152 strings", 50),
        (b"\x0c", "cannot hold", 50),
        (b"", "larger than 128 MiB", 200),
    ],
)
def test_what_a_large_file_claims_is_not_believed(kind, words, mib, tmp_path):
    """Files with holes, of 8 GB, that could hold what their counts say: as many strings, numbers, or long strings."""
    count = (1 << 30) if kind == b"\x0c" else (1 << 22)
    value = b"\x09\0\0\0" + kind + b"\0\0\0" + count.to_bytes(8, "little")
    value = value if kind else b"\x08\0\0\0" + (100 << 20).to_bytes(8, "little")
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(header(0, 2, text(b"k") + value))
        if not kind:  # a hundred MiB, and again
            file.seek(100 << 20, os.SEEK_CUR)
            file.write(text(b"l") + value)
        file.truncate(8 << 30)
    run = [sys.executable, "-c", textwrap.dedent(LARGE), tmp_path / "m.gguf"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    used, seconds, said = done.stdout.split(" ", 2)
    assert words in said and int(used) < mib and float(seconds) < 5, done.stdout
