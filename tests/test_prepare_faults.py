"""prepare in trouble: whatever happens, nothing is lost, nothing is half written, and one line says what to do."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepare_cases import complaint, content

from tinyllama_jax.config import Recipe, replace
from tinyllama_jax.data import plan as planning
from tinyllama_jax.data.manifest import finalize
from tinyllama_jax.data.plan import SCAN
from tinyllama_jax.data.prepare import TOKENIZE, WAIT, freeze, prepare, run
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.errors import DataError, Unfinished

ROOT = Path(__file__).parents[1]


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


@pytest.fixture
def given(recipe, tmp_path) -> Recipe:
    """With a tokenizer given, so that large corpora are not read before their items are."""
    shutil.copy(prepare(recipe, tmp_path / "first") / "tokenizer.model", tmp_path)
    shutil.rmtree(tmp_path / "first")
    return replace(recipe, tokenizer=str(tmp_path / "tokenizer.model"))


# --- inputs ---


def test_unusable_sources_and_tokenizers_leave_nothing_behind(recipe, tales, tmp_path):
    out = tmp_path / "deep" / "store"
    assert "none" in complaint(Recipe(sources=(str(tmp_path / "none"),)), out)
    assert "trained" in complaint(Recipe(sources=recipe.sources, vocab_size=100_000), out)
    assert "none.model" in complaint(Recipe(sources=recipe.sources, tokenizer=str(tmp_path / "none.model")), out)
    (tales / "99.txt").write_bytes(b"\xff")
    assert "99.txt" in complaint(recipe, out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_input_fails_its_item_alone(given, tales, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(planning, "SCANNED_BYTES", 0)
    whole = content(prepare(given, tmp_path / "whole"))
    good = (tales / "12.txt").read_bytes()
    (tales / "12.txt").write_bytes(good[:50] + b"\xff" + good[51:])
    message = complaint(given, tmp_path / "store", processes=processes)
    assert "12.txt" in message and "byte 50" in message and "kept" in message
    frozen = planning.load(tmp_path / "store")
    done = {path.name for path in (tmp_path / "store" / "items").iterdir()}
    assert len(done) == len(frozen.items) - 1
    (tales / "12.txt").write_bytes(good)
    prepare(given, tmp_path / "store", processes=processes)
    assert content(tmp_path / "store") == whole


def test_input_of_another_size_is_refused_and_a_new_plan_keeps_the_other_items(given, tales, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SCANNED_BYTES", 0)
    out = tmp_path / "store"
    frozen = freeze(given, out)
    run(frozen, range(len(frozen.items) - 1))
    before = {path: path.stat().st_mtime_ns for path in (out / "train").rglob("*.bin")}
    assert before
    with open(tales / "29.txt", "a") as file:
        file.write("One line more.")
    message = complaint(given, out)
    assert "29.txt" in message and "bytes" in message and "plan.json" in message
    (out / "plan.json").unlink()
    prepare(given, out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert content(out) == content(prepare(given, tmp_path / "again"))


def test_input_that_disappears_is_named(given, tales, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SCANNED_BYTES", 0)
    frozen = freeze(given, tmp_path / "store")
    (tales / "05.txt").unlink()
    with pytest.raises(DataError, match=r"05\.txt"):
        run(frozen, range(len(frozen.items)))


def test_edited_plan_and_exchanged_tokenizer_are_refused(recipe, tmp_path):
    frozen = freeze(recipe, tmp_path / "store")
    file = tmp_path / "store" / "plan.json"
    good = file.read_text()
    file.write_text(good.replace('"validation_share": 0.2', '"validation_share": 0.1'))
    assert "damaged" in complaint(recipe, tmp_path / "store")
    file.write_text(good)
    model = tmp_path / "store" / "tokenizer.model"
    shutil.copy(prepare(replace(recipe, vocab_size=310), tmp_path / "other") / "tokenizer.model", model)
    with pytest.raises(DataError, match=r"tokenizer\.model: is not the tokenizer of plan\.json"):
        run(frozen, [0])


@pytest.mark.parametrize("what", ["record", "shard"])
def test_damaged_item_is_made_again(recipe, tmp_path, what):
    frozen = freeze(recipe, tmp_path / "store")
    run(frozen, range(len(frozen.items)))
    damaged = sorted((tmp_path / "store" / "items").glob("*.json"))[1]
    if what == "shard":
        damaged = next((tmp_path / "store" / "train" / "tales").glob("000001-*.idx"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(DataError, match="items are not done: 1;"):
        finalize(frozen)
    run(frozen, range(len(frozen.items)))
    finalize(frozen)
    assert content(tmp_path / "store") == content(prepare(recipe, tmp_path / "whole"))


def test_duplicates_wait_for_every_signature(recipe, tmp_path):
    recipe = replace(recipe, filters=("exact_duplicates",))
    frozen = freeze(recipe, tmp_path / "store")
    half = range(0, len(frozen.items), 2)
    with pytest.raises(Unfinished, match="sign") as caught:
        run(frozen, half)
    assert caught.value.exit_status == 75
    run(frozen, range(1, len(frozen.items), 2))
    run(frozen, half)
    finalize(frozen)
    assert content(tmp_path / "store") == content(prepare(recipe, tmp_path / "whole"))


# --- the disk ---


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_is_one_line_and_what_is_done_is_kept(recipe, tales, tmp_path, mount, processes):
    for i in range(30, 60):
        (tales / f"{i}.txt").write_text(f"Tale {i}. " + "The fox met another fox in the wood. " * 150)
    disk = mount("size=256k")
    message = complaint(recipe, disk / "store", processes=processes)
    assert "No space left" in message and "free space" in message
    assert not (disk / "store" / "manifest.json").exists()
    assert not list((disk / "store" / "items").glob(".*"))
    done = {record.stem for record in (disk / "store" / "items").glob("*.json")}
    shards = [path for path in (disk / "store").rglob("*.bin") if path.name[:6] in done]
    kept = {path: path.stat().st_mtime_ns for path in shards}
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    prepare(recipe, disk / "store", processes=processes)
    assert kept and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(disk / "store") == content(prepare(recipe, tmp_path / "whole"))


PREAMBLE = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
from tinyllama_jax.config import Recipe
from tinyllama_jax.errors import DataError
from tinyllama_jax.data.prepare import prepare

def main():
    recipe = Recipe(sources=(sys.argv[1],), vocab_size=300, validation_share=0.2, window_tokens=17, item_bytes=2500)
    work(recipe, Path(sys.argv[2]))

if __name__ == "__main__":
    main()
"""


def start(folder: Path, script: str, *arguments) -> subprocess.Popen:
    """A process of its own: a fork of the one that runs the tests would inherit its threads' locks."""
    program = folder / f"program_{len(list(folder.glob('program_*')))}.py"
    imports, main = PREAMBLE.split("\n\n", 1)
    program.write_text(f"{imports}\n{script}\n{main}")
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


LIMITED = """
def work(recipe, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk: part of a write succeeds
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        prepare(recipe, out)
    except DataError as error:
        print(error)
"""


def test_write_that_the_system_refuses_half_way_leaves_nothing(tales, tmp_path):
    said = start(tmp_path, LIMITED, tales, tmp_path / "store").communicate(timeout=60)[0]
    assert said.count("\n") == 1 and "free space" in said
    assert not (tmp_path / "store").exists() and not leftovers(tmp_path / "store")


# --- killed ---


KILLED = """
def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def die_at(count, real):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call

def work(recipe, out):
    global calls
    whole = content(Path(sys.argv[3]))
    count, step = 1, int(sys.argv[4])
    while True:
        calls = 0
        child = os.fork()
        if child == 0:
            calls_of_path = ((Path, "write_bytes"), (Path, "unlink"))
            for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), *calls_of_path):
                setattr(owner, name, die_at(count, getattr(owner, name)))
            prepare(recipe, out)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not (killed and (out / "manifest.json").exists()):
            print("killed" if killed else "finished", "unfinished" if killed else content(out) == whole, flush=True)
        if not killed:
            break
        count += step
"""


@pytest.mark.parametrize("step", [0, 9])
def test_killed_at_any_write_it_goes_on(recipe, tales, tmp_path, step):
    """step 0: always at the third write, until nothing is left to do; else later and later."""
    reference, out = prepare(recipe, tmp_path / "reference"), tmp_path / "store"
    outcomes = start(tmp_path, KILLED, tales, out, reference, step or 7).communicate(timeout=200)[0].splitlines()
    assert len(outcomes) > 5 and outcomes[-1] == "finished True"
    assert set(outcomes[:-1]) == {"killed unfinished"}
    assert leftovers(out) == []


TWO = """
def work(recipe, out):
    def progress(phase, documents, tokens, share):
        if phase == "tokenize" and documents:
            print(phase, flush=True)
    prepare(recipe, out, processes=2, progress=progress)
"""


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_killed_workers_and_parents_leave_a_store_that_goes_on(tales, tmp_path):
    for i in range(30, 400):
        (tales / f"{i}.txt").write_text(f"Tale {i}. " + "The fox met another fox in the wood. " * 50)
    out = tmp_path / "store"
    for victim in ("worker", "parent"):
        process = start(tmp_path, TWO, tales, out)
        assert process.stdout.readline().strip() == TOKENIZE
        workers = workers_of(process.pid)
        os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)  # nobody works on for nobody
        assert not (out / "manifest.json").exists()
    process = start(tmp_path, TWO, tales, out)
    process.communicate(timeout=120)
    assert process.returncode == 0
    recipe = Recipe(sources=(str(tales),), vocab_size=300, validation_share=0.2, window_tokens=17, item_bytes=2500)
    assert content(out) == content(prepare(recipe, tmp_path / "whole"))


def test_killed_worker_is_told_in_one_line_with_status_75(recipe, tmp_path, monkeypatch):
    from tinyllama_jax.data import tasks as module

    frozen = freeze(recipe, tmp_path / "store")
    monkeypatch.setattr(module, "tokenize", _suicide)
    with pytest.raises(Unfinished, match="worker process was killed.*start again") as caught:
        run(frozen, range(len(frozen.items)), 2)
    assert caught.value.exit_status == 75


def _suicide(state, number, report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- two at once ---


SLOW = """
def work(recipe, out):
    def progress(phase, documents, tokens, share):
        if documents <= 1:
            print(phase, flush=True)
        time.sleep(float(sys.argv[3]))
    prepare(recipe, out, progress=progress)
    print("done", flush=True)
"""


def test_of_two_processes_one_builds_and_the_other_waits(tales, tmp_path):
    out = tmp_path / "store"
    first = start(tmp_path, SLOW, tales, out, 0.02)
    assert first.stdout.readline().strip() == SCAN
    second = start(tmp_path, SLOW, tales, out, 0)
    said = [process.communicate(timeout=60)[0].split("\n") for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert TOKENIZE in said[0] and said[1] == [WAIT, "done", ""]
    TokenStore.open(out)
    assert not leftovers(out)


def test_waiting_process_takes_over_when_the_builder_is_killed(tales, tmp_path):
    out = tmp_path / "store"
    first = start(tmp_path, SLOW, tales, out, 1.0)
    assert first.stdout.readline().strip() == SCAN
    second = start(tmp_path, SLOW, tales, out, 0)
    assert second.stdout.readline().strip() == WAIT
    first.kill()
    first.communicate()
    assert TOKENIZE in second.communicate(timeout=60)[0] and second.returncode == 0
    TokenStore.open(out)
    assert not leftovers(out)
