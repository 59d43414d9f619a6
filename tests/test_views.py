"""Views: exactly so many windows of a store, the smaller inside the larger, and usable wherever a store is."""

import hashlib
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import documents, flip, make_store

from tinyllama_jax.data import durable, views
from tinyllama_jax.data.prepare import prepare
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.views import in_proportion, make_view
from tinyllama_jax.errors import ConfigError, DataError

W = 17
DOMAINS = {"prose": documents(300, 1), "code": documents(120, 2, longest=40), "few": documents(8, 3)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("views") / "store", DOMAINS, W, items=2, shard_windows=100)


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(opened: TokenStore, domain: str, split: str = "train") -> list[tuple]:
    part = opened.split(split, domain)
    windows = part.read(np.arange(part.windows(W)), W)
    return [tuple(row) + tuple(doc) for row, doc in zip(windows.tokens_NT, windows.documents_NT, strict=True)]


def test_view_holds_exactly_its_budget_of_the_windows_of_the_store(store, tmp_path):
    budget = 4321
    view = TokenStore.open(make_view(store, budget, tmp_path / "view", seed=3))
    assert sum(view.split("train", d).windows(W) for d in view.domains) == budget // W
    assert (view.domains, view.vocab_size, view.window_tokens) == (store.domains, store.vocab_size, W)
    for domain in view.domains:
        part, chosen = view.split("train", domain), rows(view, domain)
        everything = rows(store, domain)
        assert set(chosen) <= set(everything) and len(chosen) == len(set(chosen)) == part.windows(W)
        assert chosen != everything[: len(chosen)]  # a sample, not the beginning
        entry = view.manifest["splits"]["train"][domain]
        assert part.tokens == entry["tokens"] == len(chosen) * W
        ids = part.parent_ids(np.arange(len(chosen)))
        assert entry["ids_sha256"] == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        exact = Fraction(budget // W * len(everything), sum(len(rows(store, d)) for d in store.domains))
        assert abs(len(chosen) - exact) < 1
        assert rows(view, domain, "validation") == rows(store, domain, "validation")
        assert view.split("validation", domain).windows(5) == store.split("validation", domain).windows(5)
    assert view.tokenizer().sha256 == store.tokenizer().sha256
    assert view.manifest_sha256 == hashlib.sha256((tmp_path / "view" / "manifest.json").read_bytes()).hexdigest()
    assert [file.name for file in (tmp_path / "view").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_documents_and_tokens_are_those_that_begin_in_the_windows(tmp_path, packing):
    given = documents(300, 4, longest=30)
    store = make_store(tmp_path / "s", {"a": given}, 64, packing, shard_windows=7)
    part = TokenStore.open(make_view(store, 30 * 64, tmp_path / "v", seed=0)).split("train", "a")
    tokens, segments, used = part.read(np.arange(30), 64)[:3]
    assert part.tokens == used.sum()
    ids = part.parent_ids(np.arange(30))
    full = store.split("train", "a")
    begins = 0
    for window in ids:
        before = full.read(np.array([window - 1]), 64).tokens_NT[0, -1] if window else 2
        row = full.read(np.array([window]), 64)
        inside = row.documents_NT[0, row.used_N[0] - 1]
        begins += inside + int(packing == "best_fit" or before == 2)
    assert part.documents == begins
    assert (packing == "best_fit") == (used.min() < 64)


def test_smaller_views_lie_inside_larger_ones_and_the_largest_is_the_store(store, tmp_path):
    whole = sum(store.split("train", d).tokens for d in store.domains)
    before = {domain: [] for domain in store.domains}
    for budget in (W, 20 * W, 1000, 2000, 5000, whole - W, whole):
        view = TokenStore.open(make_view(store, budget, tmp_path / str(budget), seed=1))
        for domain in store.domains:
            now = rows(view, domain)
            assert now[: len(before[domain])] == before[domain]
            before[domain] = now
    assert {domain: sorted(given) for domain, given in before.items()} == {
        domain: sorted(rows(store, domain)) for domain in store.domains
    }


def test_budgets_per_domain_and_domains_without_one(store, tmp_path):
    view = TokenStore.open(make_view(store, {"prose": 1000, "code": 30 * W}, tmp_path / "v", seed=1))
    assert [view.split("train", d).windows(W) for d in ("prose", "code", "few")] == [1000 // W, 30, 0]
    assert rows(view, "few") == [] and rows(view, "few", "validation") == rows(store, "few", "validation")
    total = TokenStore.open(make_view(store, 5000, tmp_path / "total", seed=1))
    n = total.split("train", "prose").windows(W)
    assert rows(total, "prose")[: 1000 // W] == rows(view, "prose")[:n]  # one permutation, however it was asked


def test_seeds_give_other_windows(store, tmp_path):
    a, b = (TokenStore.open(make_view(store, 2000, tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert rows(a, "prose") != rows(b, "prose") and set(rows(a, "prose")) != set(rows(b, "prose"))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(0, 40), min_size=1, max_size=12))
def test_shares_grow_with_the_total_and_never_shrink(sizes):
    one_by_one, before = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    for total in range(sum(sizes.values()) + 1):
        given_ = in_proportion(total, sizes) if any(sizes.values()) else before
        assert sum(given_.values()) == total and all(before[d] <= given_[d] <= sizes[d] for d in sizes)
        assert given_ == one_by_one
        before = given_
        waiting = [(Fraction(2 * n + 1, sizes[d]), d) for d, n in one_by_one.items() if n < sizes[d]]
        if waiting:
            one_by_one[min(waiting)[1]] += 1


def test_shares_at_the_size_of_a_corpus_are_exact():
    sizes = {"slimpajama": 320_000_000_001, "starcoder": 143_600_000_003}
    given_ = in_proportion(50_000_000_000, sizes)
    assert sum(given_.values()) == 50_000_000_000
    assert abs(given_["starcoder"] - Fraction(50_000_000_000 * sizes["starcoder"], sum(sizes.values()))) <= Fraction(
        1, 2
    )


def test_windows_outside_of_the_view_are_index_errors_and_other_lengths_are_refused(store, tmp_path):
    part = TokenStore.open(make_view(store, 2000, tmp_path / "v", seed=0)).split("train", "prose")
    for window in (-1, part.windows(W)):
        with pytest.raises(IndexError):
            part.read(np.array([window]), W)
    for ask in (part.windows, lambda length: part.read(np.array([0]), length)):
        message = complaint(ask, 33)
        assert "data.sequence_tokens=16" in message and "--window-tokens 33" in message


def test_budgets_that_cannot_be_met_are_refused(store, tmp_path):
    out = tmp_path / "v"
    whole = sum(store.split("train", d).windows(W) for d in store.domains)
    assert f"ask for at most {whole * W}" in complaint(make_view, store, whole * W + W, out, seed=0)
    assert "fills no window" in complaint(make_view, store, W - 1, out, seed=0)
    assert "fills no window" in complaint(make_view, store, {"prose": -5}, out, seed=0)
    assert "'few'" in complaint(make_view, store, {"prose": 100, "few": 10**6}, out, seed=0)
    assert "'poems'" in complaint(make_view, store, {"poems": 100}, out, seed=0)
    assert not out.exists()
    assert make_view(store, whole * W, out, seed=0) == out


def test_the_same_view_again_is_left_alone_and_another_is_refused(store, tmp_path):
    out = make_view(store, 2000, tmp_path / "v", seed=0)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert make_view(store, 2000, out, seed=0) == out == make_view(store, 2000 // W * W, out, seed=0)
    assert "other windows" in complaint(make_view, store, 2100, out, seed=0)
    assert "other windows" in complaint(make_view, store, 2000, out, seed=1)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "no token store" in complaint(make_view, store, 2000, tmp_path / "notes", seed=0)
    assert "no token store" in complaint(make_view, store, 2000, tmp_path / "notes" / "mine.txt", seed=0)
    assert "cannot be written" in complaint(make_view, store, 2000, tmp_path / "notes" / "mine.txt" / "v", seed=0)
    assert "other windows" in complaint(make_view, store, 2000, make_store(tmp_path / "s", DOMAINS, W).path, seed=0)
    assert "inside" in complaint(make_view, store, 2000, store.path / "views" / "v", seed=0)
    (tmp_path / "empty").mkdir()  # what a killed one leaves
    TokenStore.open(make_view(store, 2000, tmp_path / "empty", seed=0))


def test_view_of_a_view_is_refused_with_what_to_do(store, tmp_path):
    view = TokenStore.open(make_view(store, 2000, tmp_path / "v", seed=0))
    assert str(store.path) in complaint(make_view, view, 1000, tmp_path / "w", seed=0)


# --- the store that it is of ---


@pytest.fixture
def pair(store, tmp_path) -> tuple[Path, Path]:
    copied = Path(shutil.copytree(store.path, tmp_path / "a" / "store"))
    return copied, make_view(TokenStore.open(copied), 2000, tmp_path / "a" / "views" / "v", seed=0)


def test_both_may_be_moved_together(pair, store, tmp_path, monkeypatch):
    expected = rows(TokenStore.open(pair[1]), "prose")
    (tmp_path / "a").rename(tmp_path / "b")
    assert rows(TokenStore.open(tmp_path / "b" / "views" / "v"), "prose") == expected
    (tmp_path / "link").symlink_to(tmp_path / "b" / "views" / "v")
    monkeypatch.chdir(tmp_path)
    assert rows(TokenStore.open("link"), "prose") == expected
    assert str(tmp_path) not in json.dumps(TokenStore.open("link").manifest)


def test_missing_or_changed_store_is_refused(pair):
    parent, view = pair
    aside = parent.rename(parent.with_name("aside"))
    message = complaint(TokenStore.open, view)
    assert str(view) in message and f"{parent}: is no token store" in message
    make_store(parent, DOMAINS | {"prose": documents(300, 9)}, W)
    message = complaint(TokenStore.open, view)
    assert str(view) in message and "bring that store back" in message
    shutil.rmtree(parent)
    aside.rename(parent)
    TokenStore.open(view)


def test_damage_of_the_store_is_found_through_the_view(pair):
    parent, view = pair
    part = TokenStore.open(view).split("train", "prose")
    for file in (parent / "train" / "prose").glob("*.bin"):
        flip(file, 5)
    broken = complaint(part.read, np.arange(part.windows(W)), W)
    assert "window 0 " in broken and str(parent) in broken
    os.truncate(file, 10)
    assert str(file) in complaint(TokenStore.open, view)


def test_view_with_a_damaged_index_under_it_is_not_made(pair, tmp_path):
    parent, _ = pair
    flip(next((parent / "train" / "prose").glob("*.idx")), 9)
    assert ".idx" in complaint(make_view, TokenStore.open(parent), {"prose": 5000}, tmp_path / "w", seed=0)
    assert not (tmp_path / "w").exists()


def test_edited_view_is_refused(pair):
    file = pair[1] / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    assert "edited or damaged" in complaint(TokenStore.open, pair[1])


def test_views_in_and_of_object_storage(store, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(store.path), "/views/store", recursive=True)
    try:
        remote = TokenStore.open("memory://views/store")
        local = TokenStore.open(make_view(store, 2000, tmp_path / "local", seed=0))
        of_remote = TokenStore.open(make_view(remote, 2000, tmp_path / "of_remote", seed=0), cache=tmp_path / "cache")
        assert rows(of_remote, "prose") == rows(local, "prose")
        relative = dict(local.manifest, view_of=dict(local.manifest["view_of"], path="../store"))
        relative["checksum"] = durable.checksum(relative)
        memory.pipe_file("/views/v/manifest.json", json.dumps(relative).encode())
        assert rows(TokenStore.open("memory://views/v"), "prose") == rows(local, "prose")
    finally:
        memory.rm("/views", recursive=True)


def test_making_and_reading_take_memory_that_the_number_of_ids_does_not_decide(store, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "CHUNK", 10)
    a = make_view(store, 4000, tmp_path / "a", seed=5)
    monkeypatch.undo()
    assert (make_view(store, 4000, tmp_path / "b", seed=5) / "manifest.json").read_bytes() == (
        a / "manifest.json"
    ).read_bytes()


def test_prepare_does_not_take_a_view_for_the_store_of_its_recipe(recipe, tmp_path):
    view = make_view(TokenStore.open(prepare(recipe, tmp_path / "store")), 100, tmp_path / "view", seed=0)
    assert "is a view" in complaint(prepare, recipe, view)
