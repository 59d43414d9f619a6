"""prepare: what comes out, the same whoever makes it and in whatever pieces."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_cases import complaint, content

from tinyllama_jax.config import Recipe, replace
from tinyllama_jax.data import plan as planning
from tinyllama_jax.data.manifest import finalize
from tinyllama_jax.data.plan import HASH_RANGE, SCAN, TRAIN, digest_of, place_of
from tinyllama_jax.data.prepare import TOKENIZE, freeze, prepare, run
from tinyllama_jax.data.sources import Document
from tinyllama_jax.data.stdlib import python_documents
from tinyllama_jax.data.store import SPLITS, TokenStore
from tinyllama_jax.data.tokenizer import Tokenizer, write_tokenizer_json
from tinyllama_jax.errors import DataError


def kept_tokens(out: Path, split: str, domain: str) -> list[np.ndarray]:
    """The documents that begin in the windows of the store, as far as they are there."""
    part = TokenStore.open(out).split(split, domain)
    found = []
    for items in np.split(np.array(part.shards, object), np.flatnonzero(np.diff([s.item for s in part.shards])) + 1):
        first = sum(s.windows for s in part.shards[: part.shards.index(items[0])]) if items.size else 0
        windows = first + np.arange(sum(s.windows for s in items))
        row, marks, _ = part._stored(windows)
        found += np.split(row.reshape(-1), np.flatnonzero(marks.reshape(-1)))[1:]
    return found


# --- what comes out ---


def test_python_corpus_becomes_a_store_in_seconds(tmp_path):
    begin = time.process_time()
    out = prepare(Recipe(window_tokens=257), tmp_path / "python")
    assert time.process_time() - begin < 25
    opened = TokenStore.open(out)
    manifest = opened.manifest
    assert set(opened.domains) == {"prose", "code"} and opened.vocab_size == 2048
    assert manifest["python_version"] == sys.version.split()[0]
    for domain in opened.domains:
        documents = [d for d in python_documents() if d.domain == domain]
        train, validation = (manifest["splits"][split][domain] for split in SPLITS)
        dropped = train["dropped_documents"] + validation["dropped_documents"]
        assert train["documents"] + validation["documents"] + dropped == len(documents)
        assert train["bytes"] + validation["bytes"] == sum(len(d.text.encode()) for d in documents)
        assert 0.01 < validation["documents"] / len(documents) < 0.10
        assert 2.0 < train["bytes"] / train["tokens"] < 4.0
    assert opened.split("train", "code").tokens > 1_500_000


def test_every_document_in_kept_windows_is_its_text_and_the_rest_is_counted(recipe, tales, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    opened = TokenStore.open(out)
    tokenizer, splits = opened.tokenizer(), opened.manifest["splits"]
    originals = [file.read_text() for file in sorted(tales.iterdir())]
    found = {split: [tokenizer.decode(ids) for ids in kept_tokens(out, split, "tales")] for split in SPLITS}
    whole = {text for texts in found.values() for text in texts if text in originals}
    assert len(whole) > 15 and not set(found["train"]) & set(found["validation"])
    assert [text for text in originals if text in found["train"]] == [t for t in found["train"] if t in originals]
    encoded = sum(tokenizer.encode_document(text, "eos").size for text in originals)
    assert encoded == sum(splits[s]["tales"]["tokens"] + splits[s]["tales"]["dropped_tokens"] for s in SPLITS)
    begun = sum(len(texts) for texts in found.values())
    assert begun + sum(splits[s]["tales"]["dropped_documents"] for s in SPLITS) == len(originals)
    for text in set().union(*found.values()) - whole:  # cut at the end of an item's last window
        assert any(original.startswith(text.rstrip("\ufffd")) for original in originals)


@pytest.mark.parametrize("marks", ["eos", "bos", "both", "none"])
def test_marks_are_written_as_the_recipe_says(recipe, tmp_path, marks):
    out = prepare(replace(recipe, document_marks=marks, item_bytes=1 << 20), tmp_path / "store")
    assert TokenStore.open(out).manifest["document_marks"] == marks
    for document in kept_tokens(out, "train", "tales")[:-1]:
        assert ((document[0] == 1), (document[-1] == 2)) == (marks in ("bos", "both"), marks in ("eos", "both"))


def test_tokenizer_has_not_seen_the_validation_documents(tmp_path, monkeypatch):
    lines = [f"line {i} of ordinary text, again and again" for i in range(200)]
    held_out = {line for line in lines if place_of(digest_of(Document("d", line, ""))) < 0.1 * HASH_RANGE}
    assert held_out
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    seen = []
    real = planning.train_bpe
    monkeypatch.setattr(planning, "train_bpe", lambda texts, *a: real(seen.extend(texts) or seen, *a))
    prepare(Recipe(sources=(str(source),), vocab_size=290, validation_share=0.1, window_tokens=9), tmp_path / "store")
    assert sorted(seen) == sorted(set(lines) - held_out)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=30), st.floats(1e-6, 1 - 1e-6))
def test_split_depends_on_the_text_and_leaves_no_side_empty(tmp_path_factory, texts, share):
    texts = [f"{text}." for text in texts]

    def split(order: list[str]) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("split")
        (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        frozen = planning.Plan(
            folder, {"recipe": {"sources": [f"{folder}/d.jsonl"], "validation_share": share}} | EMPTY
        )
        frozen.items = [planning.Item(0, 0, tuple(frozen._sources[0].inputs()))]
        frozen.thresholds = planning._thresholds(frozen, planning.silent)
        return {text: frozen.split_of("d", digest_of(Document("d", text, ""))) for text in order}

    if len(set(texts)) > 1:
        chosen = split(texts)
        assert set(chosen.values()) == set(SPLITS) and split(texts[::-1] + texts) == chosen


EMPTY = {"thresholds": {}, "items": []}


def test_split_share_is_near_what_was_asked():
    places = [place_of(digest_of(Document("d", str(i), ""))) for i in range(20_000)]
    assert abs(np.mean([place < 0.05 * HASH_RANGE for place in places]) - 0.05) < 0.006


@pytest.mark.parametrize("lines", [["only one"], ["twice the same"] * 2])
def test_one_document_cannot_be_split(tmp_path, lines):
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    message = complaint(Recipe(sources=(str(tmp_path / "one.jsonl"),), vocab_size=300), tmp_path / "store")
    assert "'one'" in message and ".jsonl" in message
    assert not (tmp_path / "store").exists()


def test_too_little_text_for_one_window_is_said(recipe, tmp_path):
    message = complaint(replace(recipe, window_tokens=100_000), tmp_path / "store")
    assert "'tales'" in message and "--window-tokens" in message


def test_given_tokenizer_is_used_in_either_form(recipe, tmp_path):
    trained = prepare(recipe, tmp_path / "a")
    (tmp_path / "json").mkdir()
    write_tokenizer_json(trained / "tokenizer.model", tmp_path / "json" / "tokenizer.json")
    stores = [trained]
    for i, tokenizer in enumerate((trained / "tokenizer.model", tmp_path / "json")):
        stores.append(prepare(replace(recipe, tokenizer=str(tokenizer)), tmp_path / f"given{i}"))
        assert TokenStore.open(stores[-1]).tokenizer().sha256 == Tokenizer.load(tokenizer).sha256
    shards = [{k: v for k, v in content(path).items() if k.startswith(SPLITS)} for path in stores]
    assert shards[0] and shards[0] == shards[1] == shards[2]


def test_filters_and_empty_texts_are_counted(recipe, tales, tmp_path):
    (tales / "30.txt").write_text(" \n ")
    (tales / "31.txt").write_text("short")
    shutil.copy(tales / "20.txt", tales / "32.txt")
    out = prepare(replace(recipe, filters=("min_chars=100", "exact_duplicates")), tmp_path / "store")
    manifest = TokenStore.open(out).manifest
    assert manifest["recipe"]["filters"] == ["min_chars=100", "exact_duplicates"]
    assert manifest["removed"] == {"empty": 1, "exact_duplicates": 1, "min_chars=100": 3}
    assert manifest["read"]["documents"] == 33
    kept = sum(n["documents"] for _, _, n in manifest["groups"])
    assert kept == 33 - 5 == sum(manifest["lengths"]["tales"])


def test_near_duplicates_go_whoever_makes_the_items(recipe, tales, tmp_path):
    words = [f"word{i * i % 97}" for i in range(300)]
    (tales / "30.txt").write_text(" ".join(words))
    (tales / "31.txt").write_text(" ".join([*words[:150], "changed", *words[151:]]))
    recipe = replace(recipe, filters=("near_duplicates=0.9",), item_bytes=1000)
    first = prepare(recipe, tmp_path / "a")
    assert TokenStore.open(first).manifest["removed"]["near_duplicates"] >= 1
    assert content(prepare(recipe, tmp_path / "b", processes=2)) == content(first)


# --- in pieces ---


def test_same_bytes_whatever_the_workers_and_the_pieces(recipe, tmp_path):
    whole = content(prepare(recipe, tmp_path / "a"))
    assert len([name for name in whole if name.startswith("items/")]) > 5
    assert content(prepare(recipe, tmp_path / "b", processes=2)) == whole
    frozen = freeze(recipe, tmp_path / "c")
    for share in (2, 0, 1):
        run(planning.load(tmp_path / "c"), range(share, len(frozen.items), 3))
    finalize(frozen)
    assert content(tmp_path / "c") == whole
    finalize(frozen)
    run(frozen, range(len(frozen.items)))
    assert freeze(recipe, tmp_path / "c").sha256 == frozen.sha256 and content(tmp_path / "c") == whole


def test_finalize_names_what_is_missing(recipe, tmp_path):
    frozen = freeze(recipe, tmp_path / "store")
    run(frozen, [0, 2])
    with pytest.raises(DataError, match=r"items are not done: 1, 3.*--items 1:"):
        finalize(frozen)
    with pytest.raises(DataError, match="no manifest.json yet; give the same prepare command again"):
        TokenStore.open(tmp_path / "store")


DATATROVE = """
import sys
from datatrove.executor.local import LocalPipelineExecutor
from tinyllama_jax.data.datatrove_adapter import PrepareItems

if __name__ == "__main__":
    store, log = sys.argv[1:]
    done = LocalPipelineExecutor([PrepareItems(store)], tasks=3, workers=2, logging_dir=log).run().stats[0].stats
    print("items", done["items"].total, "documents", done["documents"].total)
"""


def test_datatrove_runs_the_items(recipe, tmp_path):
    whole = content(prepare(recipe, tmp_path / "a"))
    frozen = freeze(recipe, tmp_path / "b")
    (tmp_path / "program.py").write_text(DATATROVE)  # its workers are forks, which JAX's threads would not survive
    argv = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "b"), str(tmp_path / "log")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120, check=True)
    assert done.stdout.split()[-4:] == ["items", str(len(frozen.items)), "documents", "30"]
    finalize(frozen)
    assert content(tmp_path / "b") == whole


def test_progress_is_told_per_phase(recipe, tmp_path):
    seen = []
    out = prepare(recipe, tmp_path / "store", progress=lambda *a: seen.append(a))
    assert list(dict.fromkeys(phase for phase, *_ in seen)) == [SCAN, TRAIN, TOKENIZE]
    splits = TokenStore.open(out).manifest["splits"]
    tokens = sum(splits[s]["tales"]["tokens"] + splits[s]["tales"]["dropped_tokens"] for s in SPLITS)
    assert seen[-1] == (TOKENIZE, 30, tokens, 1.0)
    shares = [share for phase, *_, share in seen if phase == TOKENIZE]
    assert shares == sorted(shares) and 0 < shares[len(shares) // 2] < 1


# --- a store that is there already ---


def test_second_call_returns_at_once_even_without_the_sources(recipe, tales, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    shutil.rmtree(tales)
    seen = []
    assert prepare(recipe, out, progress=lambda *a: seen.append(a)) == out
    assert not seen and {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_store_of_another_recipe_is_kept_and_the_difference_named(recipe, tales, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    before = content(out)
    for field, value in (
        ("vocab_size", 310),
        ("document_marks", "bos"),
        ("validation_share", 0.3),
        ("sources", (str(tales), "python")),
        ("tokenizer", str(out)),
        ("filters", ("min_chars=3",)),
        ("window_tokens", 20),
        ("packing", "best_fit"),
    ):
        message = complaint(replace(recipe, **{field: value}), out)
        assert field in message and "--out" in message
    assert content(out) == before


def test_tokenizer_that_changed_since_is_noticed(recipe, tmp_path):
    first = prepare(recipe, tmp_path / "a")
    second = prepare(replace(recipe, vocab_size=310), tmp_path / "b")
    shutil.copytree(first, tmp_path / "tokenizer")
    given_one = replace(recipe, tokenizer=str(tmp_path / "tokenizer" / "tokenizer.model"))
    out = prepare(given_one, tmp_path / "store")
    assert prepare(given_one, out) == out
    shutil.copy(second / "tokenizer.model", tmp_path / "tokenizer")
    assert "another tokenizer" in complaint(given_one, out)


def test_damaged_store_is_reported_not_replaced(recipe, tmp_path):
    out = prepare(recipe, tmp_path / "store")
    file = next((out / "train" / "tales").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-2])
    before = content(out)
    assert str(file) in complaint(recipe, out)
    assert content(out) == before


def test_anything_else_under_that_name_is_left_alone(recipe, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    assert "no token store" in complaint(recipe, tmp_path / "notes")
    assert "cannot be written" in complaint(recipe, tmp_path / "file")
    assert (tmp_path / "notes" / "important.txt").read_text() == (tmp_path / "file").read_text() == "keep"
    assert "cannot be written" in complaint(recipe, tmp_path / "file" / "store")
    (tmp_path / "empty").mkdir()
    TokenStore.open(prepare(recipe, tmp_path / "empty"))
