"""verify: a sound store gives no finding; every damage gives its own, and all of them are told at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from store_cases import documents, flip, make_store, truncate

from tinyllama_jax.data import durable, verify_shard
from tinyllama_jax.data.duplicates import write_removals
from tinyllama_jax.data.shards import ShardWriter
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.verify import verify
from tinyllama_jax.data.views import make_view

W, ROOT = 17, Path(__file__).parent.parent


def make(folder: Path, packing: str = "none") -> Path:
    domains = {"prose": documents(150, 1, longest=15), "code": documents(60, 2, longest=15)}
    return Path(make_store(folder, domains, W, packing, items=2, shard_windows=30).path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verify")
    return {packing: make(folder / packing, packing) for packing in ("none", "best_fit")}


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["none"], tmp_path / "store"))


def one(path: Path, **keywords) -> str:
    (line,) = verify(path, **keywords)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("workers", [1, 2])
def test_sound_store_has_no_finding_and_all_of_it_is_read(made, packing, workers):
    seen = []
    assert verify(made[packing], workers=workers, progress=lambda *a: seen.append(a)) == []
    splits = TokenStore.open(made[packing]).manifest["splits"]
    total = [sum(entry[what] for s in splits.values() for entry in s.values()) for what in ("documents", "tokens")]
    assert seen[-1] == ("verify", *total, 1.0) and [s[3] for s in seen] == sorted(s[3] for s in seen)
    assert len(seen) == sum(len(entry["shards"]) for s in splits.values() for entry in s.values())


def test_chunks_and_shards_may_have_any_size(made, monkeypatch):
    for size in (1, 100, 1000):
        monkeypatch.setattr(verify_shard, "CHUNK_BYTES", size)
        assert verify(made["best_fit"]) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".doc"])
def test_every_flipped_byte_is_found(copy, suffix):
    file = min((copy / "train" / "prose").glob("*" + suffix))
    original = file.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(original), 12):
        flip(file, offset)
        lines = verify(copy)
        assert f"{file}: is not the file" in lines[0] and len(lines) in (1, 2, 3, 4)
        assert all(str(file.with_suffix("")) in line for line in lines)
        file.write_bytes(original)


def test_flipped_token_names_its_window_too(copy):
    file = min((copy / "train" / "prose").glob("*.bin"))
    flip(file, 3 * W * 2 + 4)
    lines = verify(copy)
    assert len(lines) == 2 and lines[1] == f"{file.with_suffix('')}: window 3: differs from its checksum"
    for window in range(10):
        flip(file, window * W * 2)
    assert "windows 0, 1, 2, 3, 4 and 5 more: differs" in verify(copy)[-1]


def test_all_findings_are_told_at_once(copy):
    first, *_, last = sorted((copy / "train" / "prose").glob("*.bin"))
    flip(first, 0)
    truncate(last)
    gone = min((copy / "validation" / "code").glob("*.doc"))
    gone.unlink()
    (copy / "train" / "prose" / "999999-00.bin").write_bytes(b"extra")
    (copy / "notes.txt").write_text("mine")
    flip(copy / "tokenizer.model", 300)
    (copy / "items" / "000001.json").unlink()
    (copy / "plan.json").write_text("{}")
    for workers in (1, 2):
        lines = verify(copy, workers=workers)
        wanted = [
            (copy / "notes.txt", "no part of the store"),
            (copy / "train" / "prose" / "999999-00.bin", "no part of the store"),
            (copy / "plan.json", "damaged"),
            (copy / "tokenizer.model", "SHA-256"),
            (copy / "items" / "000001.json", "cannot be read"),
            (last, "bytes, the manifest says"),
            (gone, "missing"),
            (first, "SHA-256"),
            (first.with_suffix(""), "window 0: differs"),
        ]
        assert len(lines) == len(wanted) and not any("\n" in line for line in lines)
        for line, (file, what) in zip(lines, wanted, strict=True):
            assert line.startswith(str(file)) and what in line


def test_manifest_that_cannot_be_read_is_the_finding(copy, tmp_path):
    (copy / "manifest.json").write_text("{")
    assert "manifest.json" in one(copy)
    (copy / "manifest.json").unlink()
    assert "it goes on" in one(copy)
    assert "no token store" in one(tmp_path / "none")


def rewrite(file: Path, change) -> None:
    """Edits a record and gives it a fitting checksum: only the counts can tell."""
    record = json.loads(file.read_bytes())
    change(record)
    durable.write_record(file, record)


@pytest.mark.parametrize(
    "what, change",
    [
        ("documents read", lambda m: m["read"].update(documents=5)),
        ("documents removed", lambda m: m["removed"].update({"max_chars=3": 1})),
        ("what sources left out", lambda m: m["source_dropped"].update(a=1)),
        ("group '' of code", lambda m: m["groups"][1][2].update(tokens=1)),
        ("group 'x' of code", lambda m: m["groups"].append(["code", "x", {"tokens": 1}])),
        ("the lengths in prose", lambda m: m["lengths"]["prose"].append(1)),
        ("content_sha256", lambda m: m.update(content_sha256="0")),
        ("train/prose", lambda m: m["splits"]["train"]["prose"].update(dropped_tokens=0)),
    ],
)
def test_counts_of_the_records_must_add_up_to_the_manifest(copy, what, change):
    rewrite(copy / "manifest.json", change)
    assert one(copy) == f"{copy}/items: the items' records do not add up to what the manifest says of {what}"


@pytest.mark.parametrize("what", ["windows", "tokens", "documents"])
def test_counts_of_the_shards_must_be_those_of_the_manifest(copy, what):
    rewrite(copy / "manifest.json", lambda m: m["splits"]["train"]["code"].update({what: 7}))
    rewrite(copy / "items" / "000002.json", lambda r: r["splits"]["train"]["code"].update({what: 7}))
    rewrite(copy / "items" / "000003.json", lambda r: r["splits"]["train"]["code"].update({what: 0}))
    line = one(copy)
    assert line.startswith(f"{copy}/train/code: holds ") and line.endswith(f" {what}, the manifest says 7")


def test_shards_must_be_those_of_the_records(copy):
    rewrite(copy / "items" / "000001.json", lambda r: r["splits"]["train"]["prose"]["shards"].pop())
    assert one(copy).endswith("of the shards of train/prose")


def test_another_plan_is_found(copy):
    rewrite(copy / "plan.json", lambda p: p["items"].append([]))
    lines = verify(copy)
    assert len(lines) == 2 and "not the plan" in lines[0] and "has 5 items, the manifest says 4" in lines[1]


def test_record_that_was_edited_is_found(copy):
    file = copy / "items" / "000001.json"
    file.write_text(file.read_text().replace('"item": 1', '"item": 3'))
    assert one(copy).startswith(f"{file}: was edited or damaged")


def test_lists_of_duplicates_are_checked_where_there_are_any(copy):
    file = copy / "items" / "000001.dup"
    write_removals(file, {3: "exact_duplicates"}, "0" * 64)
    assert verify(copy) == []
    flip(file, 100)
    assert one(copy) == f"{file}: differs from its checksum"


def test_wrong_tokenizer_is_found_though_its_hash_is_in_the_manifest(copy):
    rewrite(copy / "manifest.json", lambda m: m["tokenizer"].update(vocab_size=301, eos_id=5))
    lines = verify(copy)
    assert len(lines) == 2 and "vocab_size is 300, the manifest says 301" in lines[0] and "eos_id is 2" in lines[1]


def test_contents_that_only_a_faulty_writer_makes_are_found(tmp_path):
    """Hashes and checksums are right; what they cover is not."""
    row = np.arange(3, 3 + W)
    windows = [
        (row, [0, 5], W),
        (np.where(row == 7, 300, row), [], W),  # a token above the vocabulary
        (row, [5, 5], W),  # two documents at one place
        (row, [0, 9], 9),  # one behind the used tokens, and no padding there
        (row, [], 0),
    ]
    writer = ShardWriter(tmp_path, 0, W, np.dtype("<u2"), 100)
    for tokens, places, used in windows:
        writer.add(tokens[None], [np.array(places, int)], [used])
    writer.close()
    check = dict(window_tokens=W, dtype=np.dtype("<u2"), vocab_size=300)
    lines, counts = verify_shard.check_shard(str(tmp_path), ".", writer.shards[0], packed=True, **check)
    assert [line.partition("000000-00: ")[2] for line in lines] == [
        "windows 2, 3: documents begin where they cannot",
        "window 4: the index has an impossible number of tokens",
        "window 1: has tokens above the vocabulary of 300",
        "windows 3, 4: has something else than padding at its end",
    ]
    assert counts == (5, 3 * W + 9, 6)
    lines, _ = verify_shard.check_shard(str(tmp_path), ".", writer.shards[0], packed=False, **check)
    assert any("windows 3, 4: the index has an impossible" in line for line in lines)


def test_shard_that_shrinks_meanwhile_is_one_line(made, tmp_path):
    shutil.copytree(made["none"], tmp_path / "s")
    shard = TokenStore.open(tmp_path / "s").split("train", "prose").shards[0]
    truncate(tmp_path / "s" / "train" / "prose" / f"{shard.name}.bin")
    check = dict(window_tokens=W, dtype=np.dtype("<u2"), packed=False, vocab_size=300)
    (line,), counts = verify_shard.check_shard(str(tmp_path / "s"), "train/prose", shard, **check)
    assert "ends at byte" in line and not any(counts)


# --- views, object storage, killed ---


def test_view_is_verified_with_its_store(copy, tmp_path):
    view = make_view(TokenStore.open(copy), 40 * W, tmp_path / "view", seed=0)
    assert verify(view) == []
    (view / "more.txt").write_text("mine")
    flip(min((copy / "train" / "prose").glob("*.bin")), 0)
    lines = verify(view)
    assert str(view / "more.txt") in lines[0] and str(copy) in lines[1] and len(lines) == 3
    (view / "more.txt").unlink()
    shutil.rmtree(copy)
    make(copy)
    rewrite(view / "manifest.json", lambda m: m["splits"]["train"]["prose"].update(ids_sha256="0", documents=3))
    lines = verify(view)
    assert len(lines) == 2 and "documents is " in lines[0] and "ids_sha256 is " in lines[1]
    rewrite(copy / "manifest.json", lambda m: m.update(created_by="somebody else"))
    assert "bring that store back" in one(view)


def test_store_in_object_storage(made):
    memory = fsspec.filesystem("memory")
    memory.put(str(made["best_fit"]), "/verify/store", recursive=True)
    try:
        assert verify("memory://verify/store") == []
        name = next(path for path in memory.find("/verify/store/train/code") if path.endswith(".doc"))
        memory.pipe_file(name, memory.cat_file(name)[:-1])
        memory.pipe_file("/verify/store/more.txt", b"mine")
        lines = verify("memory://verify/store")
        assert "memory://verify/store/more.txt" in lines[0] and "the manifest says" in lines[1] and len(lines) == 2
    finally:
        memory.rm("/verify", recursive=True)


KILLED = """
import sys, time
from tinyllama_jax.data.verify import verify
def report(*a):
    print("going", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    verify(sys.argv[1], workers=2, progress=report)
"""


def test_workers_end_when_their_parent_is_killed(made, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(made["none"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout.readline() == "going\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
