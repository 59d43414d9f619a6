"""Files from strangers: whatever bytes are in them, they are read or refused by one line, in little time and memory."""

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import json_files, tensor_files
from tinyllama_jax.interop.hf import hf_shapes, read_hf
from tinyllama_jax.interop.hf_config import model_to_hf

TINY = Model(vocab_size=24, d_model=8, layers=1, heads=2, kv_heads=1, head_dim=4, d_ff=12, context_tokens=16)
MEMORY = 4_000_000  # bytes; the files have 6 kB, and a mutated header of a few
SECONDS = 2.0  # for one file of that size, on a machine that others use too

# What a stranger may write where a number, a name or an object is expected.
JUNK = (
    *(None, True, False, -1, 0, 1, 1.0, 2**31, 2**63, 2**64 - 4, -(2**70), 10**400, 1e308, "", "x", "F32", "\ud800"),
    *([], [0], [0, 0], [1] * 40, [2**62, 2], [True], [4.0], [[1]], {}, {"dtype": "F32"}, "a\nb", "../x.safetensors"),
)


def write(folder, header=None, data=None, **config):
    """A whole model's folder; `header` is bytes or an object."""
    header = header_of(TINY) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = bytes(4 * sum(int(np.prod(shape)) for shape in hf_shapes(TINY).values())) if data is None else data
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(model_to_hf(TINY, "float32") | config))
    return folder


def header_of(model):
    header, end = {}, 0
    for name, shape in hf_shapes(model).items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    return header


def read_or_refused(read):
    """The line of the refusal, "" when it could be read; nothing else may happen."""
    begin = time.process_time()
    try:
        read()
        line = ""
    except (DataError, ConfigError) as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 600, line
        line.encode()  # it can be printed
    assert time.process_time() - begin < SECONDS
    return line


def refused(folder, *words):
    line = read_or_refused(lambda: read_hf(folder))
    assert line and all(word in line for word in words), (line, words)


def test_the_file_that_is_mutated_below_can_be_read(tmp_path):
    assert read_hf(write(tmp_path))[0] == TINY


def places(value, path=()):
    """The path of every value inside a JSON object."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def with_junk(value, path, junk):
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_junk(copy[path[0]], path[1:], junk)
    return copy


def test_every_value_of_a_header_and_a_config_replaced_by_junk(tmp_path):
    """300 and 200 seeded choices among all values and all junk; those that can still be read are counted."""
    rng, lines = np.random.default_rng(0), []
    header, config = header_of(TINY), model_to_hf(TINY, "float32")
    tracemalloc.start()
    for _ in range(300):
        options = list(places(header))
        changed = with_junk(header, options[rng.integers(len(options))], JUNK[rng.integers(len(JUNK))])
        write(tmp_path, header=changed)
        lines.append(read_or_refused(lambda: read_hf(tmp_path)))
    assert lines.count("") <= 30  # a number replaced by itself
    for _ in range(200):
        options = [path for path in places(config) if path]
        write(tmp_path)
        changed = with_junk(config, options[rng.integers(len(options))], JUNK[rng.integers(len(JUNK))])
        (tmp_path / "config.json").write_text(json.dumps(changed))
        read_or_refused(lambda: read_hf(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


def test_bytes_flipped_cut_and_put_in(tmp_path):
    whole = (write(tmp_path) / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    read = 0
    for case in range(400):
        damaged = bytearray(whole)
        at = int(rng.integers(length if case % 4 else 8))
        if case % 3 == 0:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif case % 3 == 1:
            del damaged[at : at + int(rng.integers(1, 40))]
        else:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 40)))
        (tmp_path / "model.safetensors").write_bytes(damaged)
        read += not read_or_refused(lambda: read_hf(tmp_path))
    assert read < 40  # a bit of a space or of the metadata


NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=8))
NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**63, 2**64, True, 1.5, None, "1"]))
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BF16", "I64", 3, []]), "shape": st.lists(NUMBERS, max_size=4)},
    optional={"data_offsets": st.lists(NUMBERS, max_size=3), "more": NUMBERS},
)
JSON = st.recursive(
    st.one_of(NUMBERS, NAMES), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner))
)
HEADER = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(NAMES, st.one_of(ENTRY, JSON), max_size=4).map(lambda header: json.dumps(header).encode()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=HEADER, data=st.binary(max_size=40), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_made_up_headers(tmp_path_factory, header, data, length):
    file = tmp_path_factory.getbasetemp() / "made_up.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    found = {}
    read_or_refused(lambda: found.update(tensor_files.read_header(file)))
    for stored in found.values():  # what is promised can be read
        assert tensor_files.read(stored).shape == stored.shape
    assert sum(tensor_files.read(stored).nbytes for stored in found.values()) in (0, len(data))


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())))
def test_json_is_an_object_or_a_value_error(data):
    try:
        assert isinstance(json_files.parse(data), dict)
    except ValueError as error:
        assert len(json_files.shown(str(error))) <= 80


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[" * 100_000, ["nested too deeply"]),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, ["nested too deeply"]),
        (b'{"a": {}, "a": {}}', ["given twice"]),
        ('{"é": 1}'.encode("utf-16"), ["UTF-8"]),
        (b'{"a": NaN}', ["NaN"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["header"]),
        (b'{"\\ud800\\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}', ["\\ud800\\n"]),
    ],
    ids=["array", "objects", "twice", "utf16", "nan", "digits", "name"],
)
def test_headers_that_no_writer_makes(header, words, tmp_path):
    refused(write(tmp_path, header=header), "model.safetensors", *words)


def test_tensors_must_fill_the_file_back_to_back(tmp_path):
    def two(a, b, data=16, dtype="F32"):
        entries = {
            name: {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
            for name, (begin, end) in (("a", a), ("b", b))
        }
        write(tmp_path, header=entries, data=bytes(data))
        return read_or_refused(lambda: tensor_files.read_header(tmp_path / "model.safetensors"))

    assert two((0, 8), (8, 16)) == two((8, 16), (0, 8)) == two((0, 0), (0, 16)) == ""
    assert "overlaps" in two((0, 8), (4, 12), 12) and "overlaps" in two((0, 16), (0, 16))
    assert "gap" in two((0, 4), (8, 16)) and "gap" in two((4, 8), (8, 16))
    assert "4 bytes that belong to no tensor" in two((0, 8), (8, 16), 20)
    assert "truncated" in two((0, 8), (8, 20))


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path):
    write(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        os.truncate(file.fileno(), 200_000_000)  # sparse
    tracemalloc.start()
    refused(tmp_path, "150000000", "100000000")
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize(
    "claim",
    [
        {"num_hidden_layers": 2**31 - 1},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**31 - 2},
        {"intermediate_size": 2**31 - 1},
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**30},
    ],
    ids=lambda claim: next(iter(claim)),
)
def test_a_config_that_claims_more_than_the_files_hold_reserves_nothing(claim, tmp_path):
    write(tmp_path, **claim)
    tracemalloc.start()
    refused(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["..", "../x.safetensors", "/x.safetensors", "a\0.safetensors", "", "x.bin", 3, None])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    write(tmp_path)
    index = {"weight_map": dict.fromkeys(hf_shapes(TINY), name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "weight_map")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    last = list(tensor_files.read_header(file).values())[-1]
    os.truncate(file, file.stat().st_size - 1)
    assert "cut short" in read_or_refused(lambda: tensor_files.read(last))
