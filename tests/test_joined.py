"""Two stores as one: new text, and old text that is replayed."""

import numpy as np
import pytest
from store_cases import documents, make_store

from tinyllama_jax.config import Data, Stage, replace
from tinyllama_jax.data.joined import JoinedStore, reopen
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate.loss import held_out
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import start


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    new = make_store(folder / "new", {"law": documents(300, 1)})
    old = make_store(folder / "old", {"prose": documents(100, 2), "code": documents(80, 3)})
    return new, old


def test_a_replay_share_is_exact_and_windows_are_the_stores_own(stores):
    new, old = stores
    joined = JoinedStore(new, old)
    assert joined.domains == ("law", "replay/prose", "replay/code")
    mixture = {"law": 0.95, "replay/prose": 0.03, "replay/code": 0.02}
    plan = Plan((Stage(name="domain", tokens=4000 * 16, batch_tokens=8 * 16, mixture=mixture),), 16)
    pipeline = Pipeline(joined, Data(store="x", sequence_tokens=16), plan, 7, vocab_size=300)
    for step in (1, 37, 250, plan.total_steps):
        counts = pipeline.order.counts(step)
        for name, share in mixture.items():
            assert abs(counts[name] - share * step * 8) < 1
    by_source = {"law": new.split("train", "law"), "replay/prose": old.split("train", "prose")}
    source, window = pipeline.order.rows(3)
    batch = pipeline.batch(3)
    for row, (s, w) in enumerate(zip(source, window, strict=True)):
        if (split := by_source.get(pipeline.order.sources[s])) is not None:
            np.testing.assert_array_equal(batch["tokens"][row], split.read(np.array([w]), 17).tokens_NT[0, :-1])


def test_forgetting_is_measured_on_the_old_held_out_text(stores):
    new, old = stores
    windows = held_out(JoinedStore(new, old), 17, 2)
    assert list(windows) == ["law", "replay/prose", "replay/code"]
    expected = held_out(old, 17, 2)["code"].tokens_NT
    np.testing.assert_array_equal(windows["replay/code"].tokens_NT, expected)


def test_its_identity_is_that_of_both(stores, tmp_path):
    new, old = stores
    joined, reverse = JoinedStore(new, old), JoinedStore(old, new)
    assert len({new.manifest_sha256, old.manifest_sha256, joined.manifest_sha256, reverse.manifest_sha256}) == 4
    identity = start.store_identity(joined)
    assert identity["train_tokens"]["replay/code"] == old.split("train", "code").tokens
    again = reopen(identity)
    assert isinstance(again, JoinedStore) and again.manifest_sha256 == joined.manifest_sha256
    assert reopen(start.store_identity(new)).manifest_sha256 == new.manifest_sha256


def test_a_run_opens_both(stores, tmp_path):
    from quick_experiment import quick

    new, old = stores
    data = Data(store=str(new.path), sequence_tokens=16, replay_store=str(old.path))
    run = replace(quick(), data=data)
    assert start.open_store(run, tmp_path).domains == ("law", "replay/prose", "replay/code")
    part = start.open_store(replace(run, data=replace(data, unique_tokens=1700)), tmp_path)
    assert part.split("train", "law").windows(17) == 100, "a budget is one of new text"
    assert part.split("train", "replay/prose").windows(17) == old.split("train", "prose").windows(17)
    with pytest.raises(DataError, match="nowhere"):
        start.open_store(replace(run, data=replace(data, replay_store="nowhere")), tmp_path)
    with pytest.raises(DataError, match="has no train tokens of domain 'nothing'"):
        part.split("train", "replay/nothing")


def test_stores_that_do_not_fit_are_refused(stores, tmp_path):
    from small_store import make

    from tinyllama_jax.config import Recipe
    from tinyllama_jax.data.prepare import prepare
    from tinyllama_jax.data.store import TokenStore

    new, old = stores
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"Tale {i}. " + "A fox and a crow. " * 9)
    tokenizer = str(new.path / "tokenizer.model")
    recipe = Recipe(sources=(f"law={folder}",), tokenizer=tokenizer, document_marks="bos", window_tokens=17)
    marked = TokenStore.open(prepare(recipe, tmp_path / "marked"))
    with pytest.raises(DataError, match=f"{old.path}: its documents are marked by 'eos', .* by 'bos'"):
        JoinedStore(marked, old)
    other = TokenStore.open(make(tmp_path / "other"))
    with pytest.raises(DataError, match="its ids mean other words than those of"):
        JoinedStore(other, old)
    taken = make_store(tmp_path / "taken", {"replay/prose": documents(30)})
    with pytest.raises(DataError, match="'replay/prose' has the name of a replayed one"):
        JoinedStore(taken, old)


def test_packed_old_text_needs_its_own_length(stores, tmp_path):
    new, _ = stores
    packed = make_store(tmp_path / "packed", {"prose": documents(60, longest=12)}, 21, "best_fit")
    joined = JoinedStore(new, packed)
    assert joined.manifest["packing"] == "best_fit"
    with pytest.raises(ConfigError, match="packed into windows of 21 tokens"):
        held_out(joined, 17, 2)
