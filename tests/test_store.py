"""Token store: what is read is what was written, or the damaged file is named."""

import concurrent.futures
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from store_cases import documents, flip, make_store, truncate

from tinyllama_jax.data import store
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.errors import ConfigError, DataError

W = 17


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two domains, three items each, several shards per item."""
    folder = tmp_path_factory.mktemp("store") / "store"
    domains = {"prose": documents(90, 1), "code": documents(70, 2, longest=200)}
    return Path(make_store(folder, domains, W, items=3, shard_windows=40).path)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def runs(given: list[np.ndarray], items: int) -> list[np.ndarray]:
    """Each item's documents in a row."""
    n = len(given)
    return [np.concatenate(given[n * i // items : n * (i + 1) // items]) for i in range(items)]


@pytest.mark.parametrize("length", [W, 1, 2, 5, 16, 18, 34, 100, 300])
def test_windows_of_any_length_are_the_tokens_written(made, length):
    """They may straddle shards, but not items; what fills no window of the stored length was dropped for good."""
    opened = TokenStore.open(made)
    for domain, given in (("prose", documents(90, 1)), ("code", documents(70, 2, longest=200))):
        split = opened.split("train", domain)
        assert split.windows(W) == split.tokens // W
        rows, segments = [], []
        for row in runs(given, 3):
            row = row[: row.size // W * W]  # stored
            begins = np.append(0, np.cumsum(row == 2)[:-1])  # a document ends at EOS
            whole = row.size // length * length
            rows += np.split(row[:whole], range(length, whole, length)) if whole else []
            segments += np.split(begins[:whole], range(length, whole, length)) if whole else []
        assert split.windows(length) == len(rows)
        ids = np.random.default_rng(length).permutation(len(rows))
        got = split.read(ids, length)
        assert got.tokens_NT.dtype == got.documents_NT.dtype == got.used_N.dtype == np.int32
        np.testing.assert_array_equal(got.tokens_NT, np.array(rows)[ids])
        np.testing.assert_array_equal(got.documents_NT, np.array([s - s[0] for s in segments])[ids])
        assert (got.used_N == length).all()


def test_nothing_asked_is_nothing_read(made):
    for length in (W, 5):
        got = TokenStore.open(made).split("train", "prose").read(np.empty(0, np.int64), length)
        assert got.tokens_NT.shape == got.documents_NT.shape == (0, length) and got.used_N.shape == (0,)


def test_packed_windows_are_whole_or_refused(tmp_path):
    given = documents(200, 5, longest=40)
    opened = make_store(tmp_path / "s", {"a": given}, 64, "best_fit")
    split = opened.split("train", "a")
    got = split.read(np.arange(split.windows(64)), 64)
    assert got.used_N.sum() == split.tokens == sum(d.size for d in given) and got.used_N.min() < 64
    pieces = [
        tuple(row[:used][segments[:used] == i])
        for row, segments, used in zip(*got[:3], strict=True)
        for i in range(segments[used - 1] + 1)
    ]
    assert sorted(pieces) == sorted(map(tuple, given)) and len(pieces) == split.documents
    for ask in (split.windows, lambda length: split.read(np.array([0]), length)):
        with pytest.raises(ConfigError, match="packed into windows of 64 .* set data.sequence_tokens=63"):
            ask(32)


@pytest.mark.parametrize("length", [W, 5])
def test_window_that_does_not_exist_is_an_index_error(made, length):
    split = TokenStore.open(made).split("train", "prose")
    for window in (-1, split.windows(length)):
        with pytest.raises(IndexError):
            split.read(np.array([0, window]), length)


def test_domain_that_does_not_exist_is_named_with_those_that_do(made):
    message = complaint(TokenStore.open(made).split, "train", "poems")
    assert "poems" in message and "prose, code" in message


def test_wide_vocabularies_are_stored_wide(tmp_path):
    given = documents(40, 3, vocab_size=100_000)
    split = make_store(tmp_path / "s", {"a": given}, W, vocab_size=100_000).split("train", "a")
    row = np.concatenate(given)
    assert split.dtype.itemsize == 4 and row.max() > 65_535
    np.testing.assert_array_equal(split.read(np.arange(split.windows(W)), W).tokens_NT.ravel(), row[: split.tokens])


def test_threads_may_read_at_once(made):
    split = TokenStore.open(made).split("train", "code")
    ids = np.arange(split.windows(W))
    expected = split.read(ids, W).tokens_NT
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda seed: split.read(np.random.default_rng(seed).permutation(ids), W), range(30)):
            assert got.tokens_NT.sum() == expected.sum()
        order = [np.random.default_rng(seed).permutation(ids) for seed in range(30)]
        for some, got in zip(order, pool.map(lambda some: split.read(some, W), order), strict=True):
            np.testing.assert_array_equal(got.tokens_NT, expected[some])


# --- damage ---


def last_shard(split: Path) -> Path:
    return max(split.glob("*.bin"))


def test_flipped_token_is_found_when_it_is_read_and_not_before(copy):
    file = last_shard(copy / "train" / "prose")
    split = TokenStore.open(copy).split("train", "prose")
    here = int(split.first[-2])  # the last shard's first window
    flip(file, 3 * W * 2 + 5)
    split.read(np.arange(here + 3), W)
    split.read(np.arange(here + 4, split.windows(W)), W)
    for _ in range(2):  # and again at the next attempt
        message = complaint(split.read, np.array([0, here + 3]), W)
        assert str(file.with_suffix("")) in message and "window 3 " in message
    assert "window 3 " in complaint(split.read, np.arange(split.windows(5)), 5)


@pytest.mark.parametrize("suffix", [".idx", ".doc"])
def test_side_files_of_another_shard_are_found(copy, suffix):
    files = sorted((copy / "train" / "prose").glob("*" + suffix))
    first = next(f for f in files[1:] if f.stat().st_size >= files[0].stat().st_size)
    files[0].write_bytes(first.read_bytes()[: files[0].stat().st_size])
    split = TokenStore.open(copy).split("train", "prose")
    assert files[0].stem in complaint(split.read, np.arange(40), W)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".doc"])
@pytest.mark.parametrize("split, domain", [("train", "prose"), ("validation", "code")])
def test_truncated_or_missing_files_are_found_when_opening(copy, split, domain, suffix):
    file = last_shard(copy / split / domain).with_suffix(suffix)
    size = file.stat().st_size
    truncate(file)
    message = complaint(TokenStore.open, copy)
    assert f"{file}: has {size - 2} bytes, the manifest says {size}" in message and "again" in message
    file.unlink()
    assert f"{file}: part of the token store is missing" in complaint(TokenStore.open, copy)


def test_shard_cut_short_after_opening_is_found(copy):
    split = TokenStore.open(copy).split("train", "prose")
    ids = np.arange(split.windows(W))
    split.read(ids, W)
    file = last_shard(copy / "train" / "prose")
    truncate(file)
    assert str(file) in complaint(split.read, ids, W)


def test_shard_gone_after_opening_is_found(copy):
    split = TokenStore.open(copy).split("train", "prose")
    file = last_shard(copy / "train" / "prose")
    file.unlink()
    assert str(file) in complaint(split.read, np.arange(split.windows(W)), W)


def test_folder_gone_is_found(copy):
    shutil.rmtree(copy / "validation" / "code")
    assert "missing" in complaint(TokenStore.open, copy)


def test_files_that_the_manifest_does_not_list_change_nothing(made, copy):
    (copy / "train" / "prose" / "999999-00.bin").write_bytes(b"more")
    (copy / "notes.txt").write_text("mine")
    ids = np.arange(50)
    found = TokenStore.open(copy)
    np.testing.assert_array_equal(
        found.split("train", "prose").read(ids, W)[0], TokenStore.open(made).split("train", "prose").read(ids, W)[0]
    )
    assert found.domains == ("prose", "code")


def test_tokenizer_of_another_store_is_refused(copy):
    flip(copy / "tokenizer.model", 500)
    message = complaint(TokenStore.open, copy)
    assert "tokenizer.model" in message and "expected" in message
    (copy / "tokenizer.model").unlink()
    assert "tokenizer.model: part of the token store is missing" in complaint(TokenStore.open, copy)


def test_manifest_that_was_edited_cut_or_removed_is_refused(copy):
    file = copy / "manifest.json"
    original = file.read_text()
    for edited in (
        original[:100],
        "[]",
        original.replace('"document_marks": "eos"', '"document_marks": "bos"'),
        original.replace(f'"format_version": {store.FORMAT_VERSION}', '"format_version": 99'),
    ):
        assert edited != original
        file.write_text(edited)
        assert "manifest.json" in complaint(TokenStore.open, copy)
    file.unlink()
    assert "it goes on" in complaint(TokenStore.open, copy)
    (copy / "plan.json").unlink()
    assert "no token store" in complaint(TokenStore.open, copy)
    assert "no token store" in complaint(TokenStore.open, copy / "none")
    assert "no token store" in complaint(TokenStore.open, copy / "tokenizer.model")


def test_manifest_hash_identifies_the_data(made, copy):
    opened = TokenStore.open(made)
    assert opened.manifest_sha256 == TokenStore.open(copy).manifest_sha256
    tokenizer, recorded = opened.tokenizer(), opened.manifest["tokenizer"]
    assert recorded["sha256"] == tokenizer.sha256
    assert (recorded["vocab_size"], recorded["bos_id"], recorded["eos_id"]) == (300, 1, 2)
    assert json.dumps(opened.manifest).count(str(Path.cwd())) == 0


# --- speed ---


def test_windows_are_read_at_20_million_tokens_a_second(tmp_path):
    split = make_store(tmp_path / "s", {"a": documents(2000, longest=1000)}, 2049).split("train", "a")
    ids = np.random.default_rng(0).integers(0, split.windows(2049), (20, 64))
    split.read(ids[0], 2049)
    best = 0.0
    for batch in ids:  # the best of many: others use this machine too
        begin = time.perf_counter()
        split.read(batch, 2049)
        best = max(best, batch.size * 2049 / (time.perf_counter() - begin))
    assert best > 20e6
