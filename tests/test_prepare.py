"""prepare: one whole store or none, the same for the same recipe, whatever happens meanwhile."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_jax.config import DataError, Recipe
from tinyllama_jax.data import prepare as module
from tinyllama_jax.data.corpora import Document, python_documents
from tinyllama_jax.data.prepare import ENCODE, SCAN, TRAIN, WAIT, prepare
from tinyllama_jax.data.store import SPLITS, TokenStore
from tinyllama_jax.data.tokenizer import Tokenizer, write_tokenizer_json

ROOT = Path(__file__).parents[1]


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "tales"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"Tale {i}. " + "Once upon a time there was a fox. " * (i + 1))
    return folder


@pytest.fixture
def recipe(corpus) -> Recipe:
    return Recipe(sources=(str(corpus),), vocab_size=300, validation_share=0.2)


def complaint(*arguments, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


def texts_of(out: Path, split: str, domain: str) -> list[str]:
    opened = TokenStore.open(out, full_check=True)
    part, tokenizer = opened.split(split, domain), opened.tokenizer()
    tokens, documents = part.read(np.array([0]), part.tokens)
    return [tokenizer.decode(tokens[documents == i]) for i in range(part.documents)]


# --- the default corpus ---


def test_python_corpus_becomes_a_store_in_seconds(tmp_path):
    begin = time.process_time()
    out = prepare(Recipe(), tmp_path / "python")
    assert time.process_time() - begin < 20
    opened = TokenStore.open(out, full_check=True)
    assert opened.domains == ("prose", "code") and opened.vocab_size == 2048
    manifest = opened.manifest
    assert manifest["python_version"] == sys.version.split()[0]
    for domain in opened.domains:
        documents = [d for d in python_documents() if d.domain == domain]
        recorded = manifest["domains"][domain]
        assert recorded["documents"] == len(documents)
        assert recorded["bytes"] == sum(len(d.text.encode()) for d in documents)
        train, validation = (opened.split(split, domain) for split in SPLITS)
        assert train.documents + validation.documents == len(documents)
        assert 0.01 < validation.documents / len(documents) < 0.10
        assert 2.0 < train.bytes / train.tokens < 4.0
    assert opened.split("train", "code").tokens > 1_500_000


# --- what comes out ---


def test_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    first, second = prepare(recipe, tmp_path / "a"), prepare(recipe, tmp_path / "b")
    assert content(first) == content(second)
    assert not leftovers(first) and not leftovers(second)


def test_every_document_is_in_one_split_and_keeps_its_order(recipe, corpus, tmp_path):
    out = prepare(recipe, tmp_path / "store", shard_tokens=1000)
    train, validation = (texts_of(out, split, "tales") for split in SPLITS)
    originals = [f.read_text() for f in sorted(corpus.iterdir())]
    assert sorted(train + validation) == sorted(originals)
    assert train == [t for t in originals if t in train]
    assert 1 <= len(validation) <= 15


@pytest.mark.parametrize("marks", ["eos", "bos", "both", "none"])
def test_marks_are_written_as_the_recipe_says(corpus, tmp_path, marks):
    out = prepare(Recipe(sources=(str(corpus),), vocab_size=300, document_marks=marks), tmp_path / "store")
    opened = TokenStore.open(out)
    assert opened.manifest["document_marks"] == marks
    part = opened.split("train", "tales")
    tokens, documents = part.read(np.array([0]), part.tokens)
    for document in (tokens[documents == i] for i in range(part.documents)):
        assert ((document[0] == 1), (document[-1] == 2)) == (marks in ("bos", "both"), marks in ("eos", "both"))


def test_tokenizer_has_not_seen_the_validation_documents(tmp_path):
    lines = [f"line {i} of ordinary text, again and again" for i in range(200)]
    place = {line: module._Scan().add(Document("d", line, "")) for line in lines}
    held_out = [line for line in lines if place[line] < 0.1 * module.HASH_RANGE]
    assert held_out
    source = tmp_path / "d.jsonl"
    recipe = Recipe(sources=(str(source),), vocab_size=290, validation_share=0.1)
    seen = []
    real = module.train_bpe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_bpe", lambda texts, *a: real(seen.extend(texts) or seen, *a))
        source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(recipe, tmp_path / "store")
    assert sorted(seen) == sorted(set(lines) - set(held_out))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=30), st.floats(1e-6, 1 - 1e-6))
def test_split_depends_on_the_text_and_leaves_no_side_empty(texts, share):
    def split(order):
        scan = module._Scan()
        places = {text: scan.add(Document("d", text, "")) for text in order}
        return {text: module._split_of(place, scan, share) for text, place in places.items()}

    chosen = split(texts)
    assert split(texts[::-1] + texts) == chosen
    assert len(set(texts)) < 2 or set(chosen.values()) == {"train", "validation"}


def test_split_share_is_near_what_was_asked():
    scan = module._Scan()
    places = [scan.add(Document("d", str(i), "")) for i in range(20_000)]
    share = np.mean([module._split_of(place, scan, 0.05) == "validation" for place in places])
    assert abs(share - 0.05) < 0.006


@pytest.mark.parametrize("lines", [["only one"], ["twice the same"] * 2])
def test_one_document_cannot_be_split(tmp_path, lines):
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    message = complaint(Recipe(sources=(str(tmp_path / "one.jsonl"),), vocab_size=300), tmp_path / "store")
    assert "'one'" in message and ".jsonl" in message
    assert not (tmp_path / "store").exists() and not leftovers(tmp_path / "store")


def test_given_tokenizer_is_used_in_either_form(recipe, corpus, tmp_path):
    trained = prepare(recipe, tmp_path / "a")
    (tmp_path / "json").mkdir()
    write_tokenizer_json(trained / "tokenizer.model", tmp_path / "json" / "tokenizer.json")
    stores = []
    for i, tokenizer in enumerate((trained / "tokenizer.model", tmp_path / "json")):
        given_one = Recipe(sources=recipe.sources, tokenizer=str(tokenizer), validation_share=0.2)
        stores.append(TokenStore.open(prepare(given_one, tmp_path / f"given{i}")))
        assert stores[-1].tokenizer().sha256 == Tokenizer.load(tokenizer).sha256
    for name in ("train/tales/00000.bin", "validation/tales/00000.bin"):
        assert len({(path / name).read_bytes() for path in (trained, *(s.path for s in stores))}) == 1


def test_progress_is_told_per_phase(recipe, tmp_path):
    seen = []
    out = prepare(recipe, tmp_path / "store", progress=lambda *a: seen.append(a))
    assert list(dict.fromkeys(phase for *_, phase in seen)) == [SCAN, TRAIN, ENCODE]
    manifest = TokenStore.open(out).manifest
    assert seen[-1] == (30, sum(manifest["splits"][s]["tales"]["tokens"] for s in SPLITS), ENCODE)


# --- a store that is there already ---


def test_second_call_returns_at_once_even_without_the_sources(recipe, corpus, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    shutil.rmtree(corpus)
    seen = []
    assert prepare(recipe, out, progress=lambda *a: seen.append(a)) == out
    assert not seen and {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_store_of_another_recipe_is_kept_and_the_difference_named(recipe, corpus, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    before = content(out)
    for field, value in (
        ("vocab_size", 310),
        ("document_marks", "bos"),
        ("validation_share", 0.3),
        ("sources", (str(corpus), "python")),
        ("tokenizer", str(out)),
    ):
        other = Recipe(**{**module.dataclasses.asdict(recipe), field: value})
        message = complaint(other, out)
        assert f"{field}=" in message and "--out" in message
    assert content(out) == before


def test_tokenizer_that_changed_since_is_noticed(recipe, tmp_path):
    first = prepare(recipe, tmp_path / "a")
    second = prepare(Recipe(sources=recipe.sources, vocab_size=310), tmp_path / "b")
    shutil.copytree(first, tmp_path / "tokenizer")
    given_one = Recipe(sources=recipe.sources, tokenizer=str(tmp_path / "tokenizer" / "tokenizer.model"))
    out = prepare(given_one, tmp_path / "store")
    assert prepare(given_one, out) == out
    shutil.copy(second / "tokenizer.model", tmp_path / "tokenizer")
    assert "another tokenizer" in complaint(given_one, out)


def test_damaged_store_is_reported_not_replaced(recipe, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    file = out / "train" / "tales" / "00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    before = content(out)
    assert str(file) in complaint(recipe, out)
    assert content(out) == before


def test_anything_else_under_that_name_is_left_alone(recipe, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("notes", "file"):
        assert "no token store" in complaint(recipe, tmp_path / name)
    assert (tmp_path / "notes" / "important.txt").read_text() == (tmp_path / "file").read_text() == "keep"
    assert "cannot be written" in complaint(recipe, tmp_path / "file" / "store")
    (tmp_path / "empty").mkdir()
    TokenStore.open(prepare(recipe, tmp_path / "empty"))


# --- trouble on the way ---


def test_unusable_sources_and_tokenizers_leave_nothing_behind(recipe, corpus, tmp_path):
    out = tmp_path / "deep" / "store"
    assert "none" in complaint(Recipe(sources=(str(tmp_path / "none"),)), out)
    assert "trained" in complaint(Recipe(sources=recipe.sources, vocab_size=100_000), out)
    assert "none.model" in complaint(Recipe(sources=recipe.sources, tokenizer=str(tmp_path / "none.model")), out)
    (corpus / "99.txt").write_bytes(b"\xff")
    assert "99.txt" in complaint(recipe, out)
    assert not list(out.parent.iterdir())


def test_sources_that_change_meanwhile_are_noticed(recipe, corpus, tmp_path):
    def meddle(documents, tokens, phase):
        if phase == TRAIN:
            (corpus / "00.txt").write_text("another tale")

    assert "changed" in complaint(recipe, tmp_path / "store", progress=meddle)
    assert not (tmp_path / "store").exists() and not leftovers(tmp_path / "store")


def test_full_disk_is_one_line_and_leaves_nothing(recipe, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = complaint(recipe, tmp_path / "store")
    assert "No space left" in message and "free space" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tales"]


PREAMBLE = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
from tinyllama_jax.config import DataError, Recipe
from tinyllama_jax.data.prepare import prepare
recipe, out = Recipe(sources=(sys.argv[1],), vocab_size=300, validation_share=0.2), Path(sys.argv[2])
"""


def start(script: str, *arguments) -> subprocess.Popen:
    """A process of its own: a fork of the one that runs the tests would inherit its threads' locks."""
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


LIMITED = """
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as a full disk: part of a write succeeds
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    prepare(recipe, out)
except DataError as error:
    print(error)
"""


def test_write_that_the_system_refuses_half_way_leaves_nothing(corpus, tmp_path):
    said = start(LIMITED, corpus, tmp_path / "store").communicate(timeout=60)[0]
    assert said.count("\n") == 1 and "free space" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tales"]


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

whole = content(Path(sys.argv[3]))
for count in range(1, 100):
    calls = 0
    child = os.fork()
    if child == 0:
        for owner, name in ((os, "fsync"), (os, "rename"), (Path, "write_bytes"), (Path, "unlink")):
            setattr(owner, name, die_at(count, getattr(owner, name)))
        prepare(recipe, out)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = "none" if not out.exists() else "whole" if content(out) == whole else "HALF"
    print("killed" if killed else "finished", found)
    if not killed:
        break
    shutil.rmtree(out, ignore_errors=True)
"""


def test_killed_at_any_write_there_is_a_whole_store_or_none(recipe, corpus, tmp_path):
    reference, out = prepare(recipe, tmp_path / "reference"), tmp_path / "store"
    outcomes = start(KILLED, corpus, out, reference).communicate(timeout=120)[0].splitlines()
    assert len(outcomes) > 15 and outcomes[-1] == "finished whole"
    assert set(outcomes[:-1]) == {"killed none", "killed whole"}  # before and after the rename
    assert leftovers(out) == []  # the last one removed what the killed ones had left


SLOW = """
def progress(documents, tokens, phase):
    if documents <= 1:
        print(phase, flush=True)
    time.sleep(float(sys.argv[3]))

prepare(recipe, out, progress=progress)
print("done", flush=True)
"""


def test_of_two_processes_one_builds_and_the_other_waits(corpus, tmp_path):
    out = tmp_path / "store"
    first = start(SLOW, corpus, out, 0.005)
    assert first.stdout.readline().strip() == SCAN
    second = start(SLOW, corpus, out, 0)
    said = [process.communicate(timeout=60)[0].split("\n") for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert ENCODE in said[0] and said[1] == [WAIT, "done", ""]
    TokenStore.open(out, full_check=True)
    assert not leftovers(out)


def test_waiting_process_takes_over_when_the_builder_is_killed(corpus, tmp_path):
    out = tmp_path / "store"
    first = start(SLOW, corpus, out, 1.0)
    assert first.stdout.readline().strip() == SCAN
    second = start(SLOW, corpus, out, 0)
    assert second.stdout.readline().strip() == WAIT
    first.kill()
    first.communicate()
    assert ENCODE in second.communicate(timeout=60)[0] and second.returncode == 0
    TokenStore.open(out, full_check=True)
    assert not leftovers(out)
