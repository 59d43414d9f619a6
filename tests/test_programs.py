"""Compiled programs are found again by the next start, and a damaged one is no more than a compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama_jax import programs

ROOT = Path(__file__).parent.parent


def train(store, workdir, cache, *settings) -> tuple[dict, str]:
    """(the event of the first step, stderr) of a run in a process of its own that keeps its programs below `cache`."""
    left_out = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    env |= {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    words = [f"data.store={store}", "evaluation.prompts=[]", *settings]
    command = [sys.executable, "-m", "tinyllama_jax", "train", "quick_experiment:quick", "--workdir", workdir]
    command += ["--experiment-path", ROOT / "tests", *(word for s in words for word in ("--set", s))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return next(event for event in events if event["kind"] == "first_step"), done.stderr


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def entries(cache):
    return sorted(cache.rglob(f"*{programs.ENTRY}"))


@pytest.fixture(scope="module")
def kept(small_store, tmp_path_factory):
    """(the cache that a run left, its losses, what it said)"""
    folder = tmp_path_factory.mktemp("programs")
    first, said = train(small_store, folder / "run", folder / "cache")
    assert first["programs_found"] == 0 and first["compile_s"] > 0.2 and first["seconds"] > first["compile_s"]
    assert "first step after" in said
    return folder / "cache", losses(folder / "run"), said


@pytest.mark.slow
def test_the_next_start_compiles_nothing_that_was_kept(kept, small_store, tmp_path):
    cache, expected, _ = kept
    for entry in entries(cache):
        assert entry.with_name(entry.name + programs.SEAL).read_text() == programs._sha256(entry)
    assert any(entry.name.startswith("jit_train_step") for entry in entries(cache))
    before = {entry: entry.stat().st_mtime_ns for entry in entries(cache)}
    again, said = train(small_store, tmp_path / "run", cache)
    assert again["programs_found"] > 0 and f"{again['programs_found']} programs found compiled" in said
    assert losses(tmp_path / "run") == expected
    after = {entry: entry.stat().st_mtime_ns for entry in entries(cache)}
    assert before.items() <= after.items()
    # What takes as long to compile as JAX asks for before it keeps something may be kept this time.
    assert not any(
        entry.name.startswith(("jit_train_step", "jit_batch_loss")) for entry in after.keys() - before.keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut short", "one bit", "unsealed"])
def test_what_is_not_what_was_written_is_compiled_again(how, kept, small_store, tmp_path):
    cache = kept[0]  # in its place, which is part of JAX's keys
    damaged = next(entry for entry in entries(cache) if entry.name.startswith("jit_train_step"))
    whole = damaged.read_bytes()
    if how == "cut short":
        damaged.write_bytes(whole[: len(whole) // 2])
    elif how == "one bit":
        damaged.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    else:  # its process was killed while it wrote
        damaged.write_bytes(whole[: len(whole) // 2])
        damaged.with_name(damaged.name + programs.SEAL).unlink()
    _, said = train(small_store, tmp_path / "run", cache)
    assert losses(tmp_path / "run") == kept[1]
    lines = [line for line in said.splitlines() if "removed, and compiled again" in line]
    assert "Traceback" not in said
    if how == "unsealed":  # removed without a word; where JAX has met it before, the next start writes it
        assert not lines and (not damaged.exists() or programs._whole(damaged))
    else:
        assert len(lines) == 1 and str(damaged) in lines[0]
        assert programs._whole(damaged) and damaged.with_name(damaged.name + programs.SEAL).exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_a_line_and_no_failure(kept, small_store, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    _, said = train(small_store, tmp_path / "run", tmp_path / "cache")
    assert sum("programs are not kept" in line for line in said.splitlines()) == 1
    assert losses(tmp_path / "run") == kept[1]


@pytest.mark.slow
def test_a_deterministic_run_keeps_its_programs_in_its_own_directory(kept, small_store, tmp_path):
    train(small_store, tmp_path / "run", tmp_path / "cache", "execution.deterministic=true")
    assert entries(tmp_path / "run" / "programs") and not entries(tmp_path / "cache")
    assert losses(tmp_path / "run") == kept[1]  # a CPU has nothing to leave out


def test_an_entry_that_cannot_be_unpacked_is_not_sealed(tmp_path, monkeypatch):
    import zstandard

    good, bad = (tmp_path / f"jit_{name}-0{programs.ENTRY}" for name in ("good", "bad"))
    packed = zstandard.ZstdCompressor().compress(os.urandom(1000))
    good.write_bytes(packed)
    bad.write_bytes(packed[:500])  # no space was left on the device
    monkeypatch.setattr(programs.NOW, "folder", tmp_path)
    programs.seal()
    assert not bad.exists() and good.with_name(good.name + programs.SEAL).read_text() == programs._sha256(good)


def test_the_sets_that_were_not_used_for_longest_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LIMIT_BYTES", 2500)
    for age, name in enumerate(("now", "new", "old", "older")):
        folder = tmp_path / "processor" / name
        folder.mkdir(parents=True)
        (folder / "entry").write_bytes(bytes(1000))
        os.utime(folder, (1e9 - age, 1e9 - age))
    programs._make_room(tmp_path / "processor" / "now")
    assert sorted(path.name for path in (tmp_path / "processor").iterdir()) == ["new", "now"]
