"""Shards: what is read is what was written, or the damaged file is named."""

import gc
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import documents, flip, make_store, truncate

from tinyllama_jax.data import store
from tinyllama_jax.data.shards import BIN, DOC, IDX, ShardReader, ShardWriter, place_dtype, read_index, token_dtype
from tinyllama_jax.data.storage import Storage
from tinyllama_jax.data.windows import InARow
from tinyllama_jax.errors import DataError

W = 17


def write(folder, windows, dtype="<u2", shard_windows=5):
    """windows: (tokens, places, used) each."""
    writer = ShardWriter(folder, 3, W, np.dtype(dtype), shard_windows)
    for tokens, places, used in windows:
        writer.add(tokens[None], [places], [used])
    writer.close()
    return writer.shards


def random_windows(count, seed=0, top=1 << 16):
    random = np.random.default_rng(seed)
    for _ in range(count):
        used = int(random.integers(1, W + 1))
        places = np.flatnonzero(random.random(used) < 0.3)
        yield random.integers(0, top, W), places, used


@pytest.fixture
def shard(tmp_path):
    return tmp_path, write(tmp_path, random_windows(4))[0]


def read(folder, shard, window, dtype="<u2"):
    reader = ShardReader(Storage(folder), ".", shard, W, np.dtype(dtype))
    tokens = np.empty(W, dtype)
    places, used = reader.read(window, tokens.data)
    return tokens, places, used


@pytest.mark.parametrize("dtype, top", [("<u2", 1 << 16), ("<u4", 1 << 32)])
def test_every_window_comes_back_from_every_shard(tmp_path, dtype, top):
    written = list(random_windows(13, top=top))
    shards = write(tmp_path, written, dtype)
    assert [(s.name, s.item, s.windows) for s in shards] == [
        ("000003-00", 3, 5),
        ("000003-01", 3, 5),
        ("000003-02", 3, 3),
    ]
    for number, (tokens, places, used) in enumerate(written):
        got = read(tmp_path, shards[number // 5], number % 5, dtype)
        np.testing.assert_array_equal(got[0], tokens)
        np.testing.assert_array_equal(got[1], places)
        assert got[2] == used
    for s in shards:
        assert {suffix: (tmp_path / (s.name + suffix)).stat().st_size for suffix in (BIN, IDX, DOC)} == s.sizes(
            W, np.dtype(dtype)
        )


def test_every_flipped_bit_of_every_file_is_found_by_the_windows_it_belongs_to(shard):
    folder, one = shard
    for suffix in (BIN, IDX, DOC):
        file = folder / (one.name + suffix)
        original = file.read_bytes()
        for offset in range(len(original)):
            flip(file, offset)
            damaged = []
            for window in range(one.windows):
                try:
                    read(folder, one, window)
                except DataError as error:
                    assert one.name in str(error) and f"window {window} " in str(error) and "\n" not in str(error)
                    damaged.append(window)
            # Of the index's last record only the number of documents means something.
            meaningless = suffix == IDX and offset // 12 == one.windows and not 4 <= offset % 12 < 8
            assert bool(damaged) != meaningless, (suffix, offset)
            file.write_bytes(original)


@pytest.mark.parametrize("suffix", [BIN, IDX, DOC])
def test_shard_cut_short_while_it_is_open_is_found(shard, suffix):
    folder, one = shard
    reader = ShardReader(Storage(folder), ".", one, W, np.dtype("<u2"))
    tokens = np.empty(W, "<u2")
    reader.read(one.windows - 1, tokens.data)
    truncate(folder / (one.name + suffix), 1)
    with pytest.raises(DataError, match=f"{one.name}{suffix}: ends at byte"):
        for window in range(one.windows):  # the last window may have no document
            reader.read(window, tokens.data)


def test_missing_file_is_named(shard):
    folder, one = shard
    (folder / (one.name + DOC)).unlink()
    with pytest.raises(DataError, match=f"{one.name}{DOC}: cannot be read"):
        read(folder, one, 0)


def test_whole_index_is_checked(shard):
    folder, one = shard
    index = read_index(Storage(folder), ".", one)
    assert index["before"][-1] == one.documents and len(index) == one.windows + 1
    flip(folder / (one.name + IDX), 2)
    with pytest.raises(DataError, match="checksum"):
        read_index(Storage(folder), ".", one)


def test_a_file_that_is_there_is_not_overwritten(shard):
    folder, _ = shard
    with pytest.raises(FileExistsError):
        write(folder, random_windows(1))


@pytest.mark.parametrize("ids, tokens, places", [(65_536, "<u2", "<u2"), (65_537, "<u4", "<u4")])
def test_widths_follow_the_vocabulary_and_the_window(ids, tokens, places):
    assert token_dtype(ids).str == tokens and place_dtype(ids).str == places


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(2, 20))
def test_documents_in_a_row_are_cut_where_windows_end(sizes, window):
    given_documents = [np.full(size, number) for number, size in enumerate(sizes)]
    packer = InARow(window)
    blocks = [block for tokens in given_documents for block in packer.add(tokens)] + list(packer.finish())
    rows = np.concatenate([np.empty(0, int), *(tokens.ravel() for tokens, _, _ in blocks)])
    everything = np.concatenate([np.empty(0, int), *given_documents])
    np.testing.assert_array_equal(rows, everything[: everything.size // window * window])
    assert packer.dropped_tokens == everything.size % window
    places = [place for _, given_places, _ in blocks for place in given_places]
    begins = np.concatenate([np.empty(0, int), *(number * window + place for number, place in enumerate(places))])
    np.testing.assert_array_equal(begins, (np.cumsum(sizes, dtype=int) - sizes)[: begins.size])
    assert begins.size + packer.dropped_documents == len(sizes)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_files_stay_few_however_many_shards_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MOST_OPEN_SHARDS", 4)
    opened = make_store(tmp_path / "s", {"a": documents(300)}, W, shard_windows=10)
    split = opened.split("train", "a")
    assert len(split.shards) > 50
    gc.collect()
    before = open_files()
    split.read(np.arange(split.windows(W)), W)
    assert before < open_files() <= before + 3 * 4
    del split, opened
    gc.collect()
    assert open_files() == before


def test_open_files_respect_the_limit_of_the_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        assert store._open_shards() == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store._open_shards() == min(soft // 6, store.MOST_OPEN_SHARDS)
