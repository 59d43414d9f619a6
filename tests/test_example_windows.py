"""From examples to windows: whole, in one split, packed without loss, and pairs side by side."""

# ruff: noqa: F811  (fixtures are imported by name)

import hypothesis
import numpy as np
import pytest
from example_cases import PAIR_W, W, documents, everything, files, made, make, pair, rendered, talk, vocabulary, write  # noqa: F401  (fixtures)
from hypothesis import strategies as st

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate.loss import held_out
from tinyllama_jax.finetune import packing
from tinyllama_jax.finetune.collect import held_out as apart
from tinyllama_jax.finetune.store import ExampleSplit, window_dtype
from tinyllama_jax.generate.templates import Message


def test_every_example_is_whole_in_one_split_and_one_window(made):
    for domain, numbers in (("talks", range(120)), ("others", range(200, 230))):
        held, learned = (list(documents(made, split, domain)) for split in ("validation", "train"))
        assert sorted(held + learned) == sorted(rendered(made, talk(n)) for n in numbers)
        assert len(held) == round(0.05 * len(numbers)) and not set(held) & set(learned)
        for split in ("train", "validation"):
            part, found = made.split(split, domain), everything(made, split, domain)
            assert found.tokens_NT.dtype == found.documents_NT.dtype == found.used_N.dtype == np.int32
            assert found.learned_NT.dtype == bool and found.reference_N2 is None
            assert part.tokens == found.used_N.sum() and part.learned == found.learned_NT.sum()
    assert made.domains == ("talks", "others") and made.parent is None and not made.storage.remote
    assert made.split("train", "talks").windows(W) < 120, "several to a window"


@pytest.mark.parametrize("packing_", ["single", "concatenated"])
def test_packings_hold_the_same_examples(make, files, made, packing_):
    store = make(f"talks={files}/talks.jsonl", packing=packing_)
    whole = {split: sorted(documents(made, split, "talks")) for split in ("train", "validation")}
    if packing_ == "single":
        assert {split: sorted(documents(store, split, "talks")) for split in whole} == whole
        assert store.split("train", "talks").windows(W) == store.split("train", "talks").documents == 114
        return
    for split, expected in whole.items():  # one stream, cut where windows end, the last one padded
        found = everything(store, split, "talks")
        assert (found.used_N[:-1] == W).all()
        stream = np.concatenate([row[:used] for row, used in zip(found.tokens_NT, found.used_N, strict=True)])
        bos = np.flatnonzero(stream == 1)
        assert sorted(tuple(part.tolist()) for part in np.split(stream, bos[1:])) == [ids for ids, _ in expected]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.integers(2, 24), min_size=1, max_size=60), st.sampled_from(list(packing.PACKERS)))
def test_packing_loses_and_changes_nothing(tmp_path_factory, sizes, how):
    """All tokens and learned marks, in whole examples whatever their order; in a stream in the same order."""
    random = np.random.default_rng(sum(sizes))
    given = [packing.flagged(random.integers(1, 300, n), random.random(n) < 0.5) for n in sizes]
    parts = [(one, one[::-1][:1]) for one in given] if how == "pairs" else [(one,) for one in given]
    path = tmp_path_factory.mktemp("packed") / "x.windows"
    entry = packing.write(path, parts, how, 25, 300)
    split = packing_split(path, entry, 25)
    found = split.read(np.arange(entry["windows"]), 25)
    flat = [packing.flagged(*row) for row in zip(found.tokens_NT, found.learned_NT, strict=True)]
    pieces = [
        tuple(row[:used][numbers[:used] == n].tolist())
        for row, numbers, used in zip(flat, found.documents_NT, found.used_N, strict=True)
        for n in range(numbers[used - 1] + 1)
    ]
    wanted = [tuple(part.tolist()) for both in parts for part in both]
    if how == "concatenated":
        assert [i for piece in pieces for i in piece] == [i for piece in wanted for i in piece]
    else:
        assert sorted(pieces) == sorted(wanted)
    assert entry["tokens"] == sum(map(len, wanted)) and entry["documents"] == len(wanted)
    for row, used in zip(flat, found.used_N, strict=True):
        assert not row[used:].any()
    if how == "best_fit":
        assert sum(sorted(found.used_N)[:2]) > 25 or len(found.used_N) == 1, "two windows that fit into one"


def packing_split(path, entry, window_tokens):
    return ExampleSplit(path, entry, window_tokens, window_dtype(window_tokens, 300))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 30), min_size=1, max_size=50), st.floats(0.0, 0.99))
def test_equal_examples_are_on_one_side_and_no_side_is_empty(hashes, share):
    hashes = np.array(hashes, np.uint64)
    if np.unique(hashes).size < 2:
        with pytest.raises(DataError, match="1 different examples"):
            apart(hashes, share)
        return
    held = apart(hashes, share)
    assert held.any() and not held.all() and not set(hashes[held]) & set(hashes[~held])
    assert np.unique(hashes[held]).size == min(
        max(round(share * np.unique(hashes).size), 1), np.unique(hashes).size - 1
    )


def test_validation_of_its_own_is_never_learned(make, files, tmp_path):
    own = write(tmp_path / "test.jsonl", map(talk, (3, 4, 500)))
    store = make(f"talks={files}/talks.jsonl", validation_sources=(str(own),))
    held = sorted(documents(store, "validation", "talks"))
    assert held == sorted(rendered(store, talk(n)) for n in (3, 4, 500))
    assert not set(held) & set(documents(store, "train", "talks"))
    assert store.split("train", "talks").documents == 118 and store.manifest["dropped"] == {"held out as well": 2}
    both = f"a={files}/talks.jsonl", f"b={files}/others.jsonl"
    named = make(*both, validation_sources=(f"b={own}",))
    assert [named.split("validation", domain).windows(W) for domain in "ab"] == [0, 2]
    assert list(held_out(named, W, 0)) == ["b"]
    with pytest.raises(ConfigError, match="is named 'test', and sources are a, b"):
        make(*both, validation_sources=(str(own),))
    with pytest.raises(ConfigError, match="nothing would be held out"):
        make(*both, validation_share=0.0)
    with pytest.raises(DataError, match="source 'one': 1 different examples"):
        make(f"one={write(tmp_path / 'one.jsonl', [talk(1)] * 5)}")


def test_what_is_too_long_is_cut_or_dropped_and_counted(make, tmp_path):
    answer = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "whales " * 150}]}
    question = {"messages": [{"role": "user", "content": "whales " * 150}, {"role": "assistant", "content": "hi"}]}
    file = write(tmp_path / "x.jsonl", [answer, question, *map(talk, range(1, 9))])
    cut, dropped = make(file), make(file, too_long="drop")
    assert (cut.manifest["cut"], cut.manifest["dropped"]) == (1, {"no room for an answer": 1})
    assert (dropped.manifest["cut"], dropped.manifest["dropped"]) == (0, {"too long": 2})
    found = [d for split in ("train", "validation") for d in documents(cut, split, "x")]
    whole = rendered(cut, answer)
    assert (whole[0][:W], whole[1][:W]) in found, "it lost its end, and with it the EOS"
    assert len(found) == 9 and sum(dropped.split(s, "x").documents for s in ("train", "validation")) == 8


def test_pairs_stand_side_by_side_and_learn_their_answers(make, files):
    store = make(f"pairs={files}/pairs.jsonl", window_tokens=PAIR_W)
    assert store.pairs and store.manifest["packing"] == "pairs"
    chat, rows = store.chat(), {}
    for number in range(60):
        row = pair(number)
        prompt = chat.ids([Message("user", row["prompt"])])
        both = [
            chat.render([Message("user", row["prompt"]), Message("assistant", row[name])])[0].tolist()
            for name in ("chosen", "rejected")
        ]
        rows[tuple(both[0] + both[1])] = len(prompt), len(both[0])
    for split in ("train", "validation"):
        found = everything(store, split, "pairs")
        for tokens, numbers, used, learned in zip(*found[:4], strict=True):
            prompt, chosen = rows.pop(tuple(tokens[:used].tolist()))
            assert (numbers[:chosen] == 0).all() and (numbers[chosen:used] == 1).all()
            expected = [i >= prompt if i < chosen else i - chosen >= prompt for i in range(used)]
            assert learned[:used].tolist() == expected and not learned[used:].any()
    assert not rows
    values = {
        s: {"pairs": np.random.default_rng(1).random((store.split(s, "pairs").windows(PAIR_W), 2))}
        for s in ("train", "validation")
    }
    known = store.with_reference(values)
    assert np.allclose(
        known.split("train", "pairs").read([5, 2], PAIR_W).reference_N2, values["train"]["pairs"][[5, 2]]
    )
    assert store.split("train", "pairs").read([5], PAIR_W).reference_N2 is None
    with pytest.raises(ConfigError, match="reference values for"):
        store.with_reference({**values, "train": {"pairs": np.zeros((1, 2))}})


def test_long_pairs_lose_the_prompts_beginning_and_the_answers_end(make, tmp_path):
    long = {"prompt": " ".join(map(str, range(40))), "chosen": "whales " * 40, "rejected": "book " * 40}
    file = write(tmp_path / "x.jsonl", [long, *(dict(pair(n), prompt="hi", chosen="a") for n in range(3))])
    store = make(file, longest_prompt_tokens=20)
    prompt = store.chat().ids([Message("user", long["prompt"])])
    docs = [d for split in ("train", "validation") for d in documents(store, split, "x")]
    cut = [ids for ids, learned in docs if learned.index(True) == 20 and len(ids) == W // 2]
    assert len(cut) == 2 and store.manifest["cut"] == 1
    for ids in cut:
        assert ids[0] == prompt[0] and ids[1:20] == prompt[-19:]
    with pytest.raises(ConfigError, match="longest_prompt_tokens is 64; a window of 129 tokens holds two"):
        make(file, longest_prompt_tokens=64)
    with pytest.raises(ConfigError, match="leave examples.loss_on"):
        make(file, loss_on="all")


def test_mixed_and_meaningless_options_are_refused(make, files):
    with pytest.raises(ConfigError, match=r"pairs.jsonl:1: .* mixes pairs of answers with other examples"):
        make(f"{files}/talks.jsonl", f"{files}/pairs.jsonl")
    with pytest.raises(ConfigError, match="longest_prompt_tokens is for pairs"):
        make(f"{files}/talks.jsonl", longest_prompt_tokens=5)
    with pytest.raises(ConfigError, match="names no chat template; choose with examples.template=chatml"):
        make(f"{files}/talks.jsonl", template="auto")
