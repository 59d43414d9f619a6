"""Stores in object storage: the same windows as from a local folder, kept in a cache that heals itself."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from store_cases import documents, flip, make_store

from tinyllama_jax.data import storage
from tinyllama_jax.data.storage import Storage
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.errors import DataError

W, ROOT = 17, Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    return Path(make_store(folder, {"a": documents(300), "b": documents(50)}, W, items=2, shard_windows=200).path)


@pytest.fixture
def remote(made):
    """URL of a copy in an object store that lives in this process."""
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/bucket/store", recursive=True)
    yield "memory://bucket/store"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(storage, "CACHE_BLOCK_BYTES", 512)


def everything(opened: TokenStore) -> list[np.ndarray]:
    parts = (opened.split(s, d) for s in ("train", "validation") for d in opened.domains)
    return [array for part in parts for array in part.read(np.arange(part.windows(W)), W)]


def assert_same(found: TokenStore, expected: TokenStore) -> None:
    for a, b in zip(everything(found), everything(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
def test_remote_store_gives_the_same_windows_and_tokenizer(made, remote, tmp_path, small_blocks, cached):
    local, opened = TokenStore.open(made), TokenStore.open(remote, cache=tmp_path / "cache" if cached else "")
    assert_same(opened, local)
    assert opened.path == remote and opened.manifest_sha256 == local.manifest_sha256
    tokenizer = opened.tokenizer()
    assert tokenizer.sha256 == local.tokenizer().sha256 and all(file.is_file() for file in tokenizer.files)
    assert opened.split("train", "a").windows(5) == local.split("train", "a").windows(5)


def test_files_under_a_url_with_a_protocol_of_files(made, tmp_path):
    assert_same(TokenStore.open(made.as_uri(), cache=tmp_path / "cache"), TokenStore.open(made))


def test_what_is_cached_is_not_fetched_again(made, remote, tmp_path, small_blocks):
    assert_same(TokenStore.open(remote, cache=tmp_path), TokenStore.open(made))
    opened = TokenStore.open(remote, cache=tmp_path)
    fsspec.filesystem("memory").rm("/bucket/store/train", recursive=True)
    assert_same(opened, TokenStore.open(made))
    assert not list(tmp_path.rglob(".*")), "leftovers"


def test_damaged_cache_is_fetched_again(made, remote, tmp_path, small_blocks):
    opened = TokenStore.open(remote, cache=tmp_path)
    assert_same(opened, TokenStore.open(made))
    for suffix in (".bin", ".idx", ".doc"):
        block = next(tmp_path.glob(f"*/train/a/*{suffix}/000000"))
        flip(block, 100)
        assert_same(opened, TokenStore.open(made))
        block.write_bytes(b"")
        assert_same(opened, TokenStore.open(made))


def test_a_cache_may_be_forgotten_while_others_read(remote, tmp_path, small_blocks):
    store = Storage(remote, tmp_path)
    files = [store.open("manifest.json") for _ in range(4)]
    whole = files[0].read(0, 600)  # two blocks

    def read(file) -> None:
        for _ in range(500):
            file.forget()
            assert file.read(0, 600) == whole

    with concurrent.futures.ThreadPoolExecutor(len(files)) as threads:
        list(threads.map(read, files))


def test_another_store_under_the_same_url_is_not_taken_from_the_cache(made, remote, tmp_path):
    everything(TokenStore.open(remote, cache=tmp_path / "cache"))
    other = make_store(tmp_path / "other", {"a": documents(300, 7), "b": documents(50, 8)}, W)
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket/store", recursive=True)
    memory.put(str(other.path), "/bucket/store", recursive=True)
    assert_same(TokenStore.open(remote, cache=tmp_path / "cache"), other)


@pytest.mark.parametrize("cached", [False, True])
def test_damage_at_the_source_is_found(remote, tmp_path, small_blocks, cached):
    memory = fsspec.filesystem("memory")
    name = next(path for path in memory.find("/bucket/store/train/a") if path.endswith(".bin"))
    whole, cache = memory.cat_file(name), str(tmp_path) if cached else ""
    damaged = bytearray(whole)
    damaged[40] ^= 1
    memory.pipe_file(name, bytes(damaged))
    split = TokenStore.open(remote, cache=cache).split("train", "a")
    assert "window 1 " in complaint(split.read, np.array([0, 1]), W)
    memory.pipe_file(name, whole)  # and when it is mended, so is what was cached
    split.read(np.array([0, 1]), W)


def test_truncated_and_missing_objects_are_found_when_opening_and_later(remote):
    memory = fsspec.filesystem("memory")
    name = next(path for path in memory.find("/bucket/store/train/a") if path.endswith(".bin"))
    whole = memory.cat_file(name)
    split = TokenStore.open(remote).split("train", "a")
    last = split.shards[0].windows - 1
    memory.pipe_file(name, whole[:-2])
    assert f"has {len(whole) - 2} bytes, the manifest says {len(whole)}" in complaint(TokenStore.open, remote)
    assert f"ends at byte {len(whole) - 2}" in complaint(split.read, np.array([last]), W)
    memory.rm(name)
    assert "is missing" in complaint(TokenStore.open, remote)
    assert "cannot be read" in complaint(split.read, np.array([last]), W)
    memory.rm("/bucket/store/tokenizer.model")
    assert "tokenizer.model" in complaint(TokenStore.open, remote)
    memory.rm("/bucket/store/manifest.json")
    assert "it goes on" in complaint(TokenStore.open, remote)
    assert "no token store" in complaint(TokenStore.open, "memory://elsewhere/store")


READER = """
import sys
import numpy as np
from tinyllama_jax.data import storage
from tinyllama_jax.data.store import TokenStore
storage.CACHE_BLOCK_BYTES = 512
split = TokenStore.open(sys.argv[1], cache=sys.argv[2]).split("train", "a")
ids = np.random.default_rng(int(sys.argv[3])).permutation(split.windows(17))
print(*np.bincount(split.read(ids, 17).tokens_NT.ravel()))
"""


def test_processes_may_share_a_cache(made, tmp_path):
    command = [sys.executable, "-c", READER, made.as_uri(), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    readers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True, env=environment) for seed in range(3)
    ]
    said = {reader.communicate(timeout=60)[0] for reader in readers}
    split = TokenStore.open(made).split("train", "a")
    tokens = split.read(np.arange(split.windows(W)), W).tokens_NT
    assert said == {" ".join(map(str, np.bincount(tokens.ravel()))) + "\n"}


def test_cache_that_cannot_be_written_is_one_line(remote, tmp_path):
    (tmp_path / "file").write_text("mine")
    split = TokenStore.open(remote, cache=tmp_path / "file").split("train", "a")
    assert "data.cache" in complaint(split.read, np.array([0]), W)
    assert (tmp_path / "file").read_text() == "mine"


def test_kinds_of_storage_that_cannot_be_read_are_one_line():
    assert "nowhere" in complaint(TokenStore.open, "nowhere://bucket/store")
    closed = complaint(TokenStore.open, "webhdfs://127.0.0.1:9/store")  # nobody listens there
    assert "cannot be read" in closed and "refused" in closed


class Failing(MemoryFileSystem):
    """A client with errors of its own, as that of Google's storage has."""

    protocol = "failing"

    def cat_file(self, path, start=None, end=None, **kwargs):
        raise RuntimeError("quota\nexceeded")


def test_errors_that_clients_invent_are_one_line():
    fsspec.register_implementation("failing", Failing, clobber=True)
    assert "RuntimeError: quota exceeded" in complaint(TokenStore.open, "failing://bucket/store")


def test_files_of_a_folder_and_below(made, remote, tmp_path):
    assert Storage(made).files() == Storage(remote).files() and len(Storage(made).files("train/a")) > 3
    assert Storage(made).files("none") == Storage(remote).files("none") == {}
    (tmp_path / "link").symlink_to(made / "train")
    (tmp_path / "nothing").symlink_to(made / "none")
    assert {name.partition("/")[0] for name in Storage(tmp_path).files()} == {"link"}
