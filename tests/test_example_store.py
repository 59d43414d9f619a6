"""The example store: whole examples in windows, the same at every reading, damage named, all there or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from store_cases import flip, truncate

from tinyllama_jax.config import Data, Examples, Model, Stage, replace
from tinyllama_jax.data.pipeline import Pipeline, valid_targets
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate.loss import held_out
from tinyllama_jax.finetune import describe, packing
from tinyllama_jax.finetune import prepare as making
from tinyllama_jax.finetune.collect import held_out as apart
from tinyllama_jax.finetune.prepare import prepare
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.generate.templates import Message
from tinyllama_jax.schedules import plan

W = 65
WORDS = "the quick brown fox jumps over lazy dogs and reads a long book about whales in winter".split()


def talk(number: int) -> dict:
    """A dialogue of one or two turns, of another length for each number."""
    words = [WORDS[(number * 7 + i) % len(WORDS)] for i in range(3 + number % 11)]
    turns = [("user", " ".join(words)), ("assistant", f"{number} " + " ".join(reversed(words)))]
    turns += [("user", "more?"), ("assistant", "no")] * (number % 3 == 0)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pair(number: int) -> dict:
    prompt, chosen = (turn["content"] for turn in talk(number)["messages"][:2])
    return {"prompt": prompt, "chosen": chosen, "rejected": f"{number} no"}


def write(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_bpe([" ".join(WORDS) + "\n<|user|> <|assistant|>\n"] * 40, 330, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "talks.jsonl", map(talk, range(120)))
    write(folder / "others.jsonl", map(talk, range(200, 230)))
    write(folder / "pairs.jsonl", map(pair, range(60)))
    return folder


@pytest.fixture(scope="module")
def make(vocabulary, tmp_path_factory):
    def make(*sources, out=None, window_tokens=W, marks="bos", told=None, **options) -> ExampleStore:
        examples = Examples(sources=tuple(map(str, sources)), **{"template": "zephyr", **options})
        out = out or tmp_path_factory.mktemp("store") / "store"
        say = (lambda line: None) if told is None else told.append
        prepare(examples, out, window_tokens=window_tokens, tokenizer_folder=vocabulary, marks=marks, say=say)
        return ExampleStore.open(out)

    return make


@pytest.fixture(scope="module")
def made(make, files):
    return make(f"talks={files}/talks.jsonl", f"others={files}/others.jsonl")


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made.path, tmp_path / "copy"))


def everything(store, split, domain):
    part = store.split(split, domain)
    return part.read(np.arange(part.windows(store.window_tokens)), store.window_tokens)


def documents(store, split, domain):
    """(ids, learned) of each example as the windows have them."""
    found = everything(store, split, domain)
    for tokens, numbers, used, learned in zip(*found[:4], strict=True):
        for number in range(numbers[used - 1] + 1):
            mine = np.flatnonzero(numbers[:used] == number)
            yield tuple(tokens[mine].tolist()), tuple(learned[mine].tolist())


def rendered(store, row):
    ids, learned = store.chat().render([Message(**turn) for turn in row["messages"]])
    return tuple(ids.tolist()), tuple(learned.tolist())


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
    """Of any lengths: all tokens and learned marks, in whole examples, order apart; and in the same order in a stream."""
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
    from tinyllama_jax.finetune.store import ExampleSplit, window_dtype

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
    answer = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "whales " * 60}]}
    question = {"messages": [{"role": "user", "content": "whales " * 60}, {"role": "assistant", "content": "hi"}]}
    file = write(tmp_path / "x.jsonl", [answer, question, *map(talk, range(1, 9))])
    cut, dropped = make(file), make(file, too_long="drop")
    assert (cut.manifest["cut"], cut.manifest["dropped"]) == (1, {"no room for an answer": 1})
    assert (dropped.manifest["cut"], dropped.manifest["dropped"]) == (0, {"too long": 2})
    found = [d for split in ("train", "validation") for d in documents(cut, split, "x")]
    whole = rendered(cut, answer)
    assert (whole[0][:W], whole[1][:W]) in found, "it lost its end, and with it the EOS"
    assert len(found) == 9 and sum(dropped.split(s, "x").documents for s in ("train", "validation")) == 8


def test_pairs_stand_side_by_side_and_learn_their_answers(make, files):
    store = make(f"pairs={files}/pairs.jsonl")
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
        s: {"pairs": np.random.default_rng(1).random((store.split(s, "pairs").windows(W), 2))}
        for s in ("train", "validation")
    }
    known = store.with_reference(values)
    assert np.allclose(known.split("train", "pairs").read([5, 2], W).reference_N2, values["train"]["pairs"][[5, 2]])
    assert store.split("train", "pairs").read([5], W).reference_N2 is None
    with pytest.raises(ConfigError, match="reference values for"):
        store.with_reference({**values, "train": {"pairs": np.zeros((1, 2))}})


def test_long_pairs_lose_the_prompts_beginning_and_the_answers_end(make, tmp_path):
    long = {"prompt": " ".join(map(str, range(40))), "chosen": "whales " * 40, "rejected": "book " * 40}
    file = write(tmp_path / "x.jsonl", [long, *map(pair, range(1, 4))])
    store = make(file, longest_prompt_tokens=20)
    prompt = store.chat().ids([Message("user", long["prompt"])])
    docs = [d for split in ("train", "validation") for d in documents(store, split, "x")]
    cut = [ids for ids, learned in docs if learned.index(True) == 20 and len(ids) == W // 2]
    assert len(cut) == 2 and store.manifest["cut"] == 1
    for ids in cut:
        assert ids[0] == prompt[0] and ids[1:20] == prompt[-19:]
    with pytest.raises(ConfigError, match="longest_prompt_tokens is 32; a window of 65 tokens holds two"):
        make(file, longest_prompt_tokens=32)
    with pytest.raises(ConfigError, match="leave examples.loss_on"):
        make(file, loss_on="all")


def test_mixed_and_meaningless_options_are_refused(make, files):
    with pytest.raises(ConfigError, match=r"pairs.jsonl:1: .* mixes pairs of answers with other examples"):
        make(f"{files}/talks.jsonl", f"{files}/pairs.jsonl")
    with pytest.raises(ConfigError, match="longest_prompt_tokens is for pairs"):
        make(f"{files}/talks.jsonl", longest_prompt_tokens=5)
    with pytest.raises(ConfigError, match="names no chat template; choose with examples.template=chatml"):
        make(f"{files}/talks.jsonl", template="auto")


def test_malformed_rows_are_named_and_too_many_end_it(make, tmp_path):
    rows = [*map(talk, range(20)), {"messages": [{"role": "tool", "content": "x"}]}, {"messages": []}]
    file, told = write(tmp_path / "x.jsonl", rows), []
    with pytest.raises(DataError, match=r"2 of 22 rows cannot be used \(9.09 %, .*=0.01 allows 1 %\): \S+x.jsonl:21: "):
        make(file, out=tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"], "nothing is left behind"
    store = make(file, malformed_share=0.1, told=told)
    assert len(told) == 2 and told[1] == f"left out: {file}:22: messages is empty"
    assert (store.path / "malformed.txt").read_text().splitlines() == [line.removeprefix("left out: ") for line in told]
    assert store.manifest["read"]["rows"] == 22 and store.manifest["read"]["malformed"] == 2
    system = {"messages": [{"role": "system", "content": "x"}, *talk(1)["messages"]]}
    with pytest.raises(DataError, match="the template v0_1 has no system messages"):
        make(write(tmp_path / "y.jsonl", [system, talk(2)]), template="v0_1")


def test_text_needs_no_template_and_is_learned_whole(make, tmp_path):
    store = make(write(tmp_path / "x.jsonl", [{"text": f"{n} whales"} for n in range(9)]), template="auto")
    found = [d for split in ("train", "validation") for d in documents(store, split, "x")]
    assert store.manifest["template"] == "none" and len(found) == 9
    assert all(not learned[0] and all(learned[1:]) and ids[-1] == 2 for ids, learned in found)


def test_loss_on_all_and_marks_and_system(make, files):
    store = make(f"talks={files}/talks.jsonl", loss_on="all", empty_system=True, marks="eos")
    ids, learned = next(documents(store, "train", "talks"))
    assert ids[0] == 2 and not learned[0] and all(learned[1:])
    assert store.tokenizer().decode(ids[1:]).lstrip().startswith("<|system|>\n")


def test_batches_are_the_same_after_reopening(made):
    """Order and Pipeline take it as they take a token store; document masking hides neighbours."""
    schedule = plan(
        (Stage(name="all", tokens=64 * 40, batch_tokens=64 * 4, mixture={"talks": 2.0, "others": 1.0}),), 64
    )
    data = Data(store=str(made.path), sequence_tokens=64, document_masking=True)
    pipelines = [Pipeline(s, data, schedule, 5, vocab_size=330) for s in (made, ExampleStore.open(made.path))]
    for step in (7, 0, 9):
        one, other = (pipeline.batch(step) for pipeline in pipelines)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["tokens"].shape == (4, 64) and one["valid"].any() and "reference" not in one
        for row, targets, valid in zip(one["documents"], one["targets"], one["valid"], strict=True):
            assert set(targets[valid]) & {2}, "ends of answers are learned"
            assert not valid[np.flatnonzero(np.diff(row))].any(), "none across a border"
    windows = held_out(made, W, 0)
    assert {domain: len(found.tokens_NT) for domain, found in windows.items()} == {
        domain: made.split("validation", domain).windows(W) for domain in ("talks", "others")
    }
    assert sum(int(valid_targets(found, True).sum()) for found in windows.values()) == sum(
        made.split("validation", domain).learned for domain in made.domains
    )
    with pytest.raises(ConfigError, match="set data.sequence_tokens=64"):
        held_out(made, 33, 0)


def test_a_store_of_the_same_is_left_and_one_of_another_refused(make, files, tmp_path):
    file = Path(shutil.copy(files / "talks.jsonl", tmp_path / "talks.jsonl"))
    out, told = tmp_path / "store", []
    before = make(file, out=out).manifest_sha256
    assert make(file, out=out, malformed_share=0.5).manifest_sha256 == before
    assert make(shutil.copy(file, tmp_path / "moved.jsonl"), out=out, told=told).manifest_sha256 == before or told
    for options, words in (
        ({"template": "chatml"}, "examples.template: 'zephyr' then, 'chatml' now"),
        ({"window_tokens": 33}, "window_tokens: 65 then, 33 now"),
        ({"marks": "eos"}, "document_marks: 'bos' then, 'eos' now"),
    ):
        with pytest.raises(DataError, match=f"was made of something else .*{words}.*remove this one"):
            make(file, out=out, **options)
    flip(file, 30)
    with pytest.raises(DataError, match="the files of examples or their forms are others"):
        make(file, out=out)
    file.unlink()
    assert make(file, out=out, told=told).manifest_sha256 == before and "used as it is" in told[-1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    with pytest.raises(DataError, match="exists and is no example store"):
        make(f"{files}/talks.jsonl", out=tmp_path / "other")
    assert (tmp_path / "other" / "x").exists()


def test_damage_is_named_and_never_read(copy):
    record = ExampleStore.open(copy).split("train", "talks").dtype.itemsize
    file = copy / "train/talks.windows"
    for place in (0, 5, 9, record - 1):  # the checksum, the length, tokens, marks
        flip(file, 3 * record + place)
        part = ExampleStore.open(copy).split("train", "talks")
        part.read([2, 4], W)
        with pytest.raises(DataError, match="talks.windows: window 3 differs from its checksum"):
            part.read([2, 3], W)
        value, lines = describe.describe(copy, verify=True, samples=1)
        assert [finding.split(": ")[1] for finding in value["findings"]] == [
            "differs from its SHA-256 in the manifest",
            "window 3 differs from its checksum; the store is damaged, fetch or prepare the store again",
        ]
        flip(file, 3 * record + place)
    part = ExampleStore.open(copy).split("train", "talks")
    for ids in ([-1], [part.windows(W)]):
        with pytest.raises(IndexError):
            part.read(ids, W)
    truncate(file)
    with pytest.raises(DataError, match=r"talks.windows: has \d+ bytes, the manifest says"):
        ExampleStore.open(copy)
    with pytest.raises(DataError, match="talks.windows: ends at byte"):
        part.read([part.windows(W) - 1], W)
    file.unlink()
    with pytest.raises(DataError, match="talks.windows: part of the token store is missing"):
        ExampleStore.open(copy)


def test_a_damaged_manifest_or_tokenizer_is_named(copy):
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"vocab_size": 330', '"vocab_size": 331'))
    with pytest.raises(DataError, match="was edited or damaged"):
        ExampleStore.open(copy)
    manifest.write_text(text[:100])
    with pytest.raises(DataError, match="manifest.json: is damaged"):
        ExampleStore.open(copy)
    manifest.write_text(text)
    with pytest.raises(DataError, match="holds examples for fine-tuning and no running text"):
        TokenStore.open(copy)
    flip(copy / "tokenizer/tokenizer.model", 50)
    with pytest.raises(DataError, match="tokenizer.model: is not the file the manifest names"):
        ExampleStore.open(copy)
    manifest.unlink()
    with pytest.raises(DataError, match="is no example store"):
        ExampleStore.open(copy)


def test_inspect_shows_what_is_learned(made, files, make, capsys):
    from tinyllama_jax.cli import main

    assert main(["inspect", str(made.path), "--samples", "2", "--verify", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"] == [] and value["template"] == "zephyr" and value["read"]["rows"] == 150
    about = value["domains"]["talks"]["train"]
    assert about["documents"] == 114 and 0 < about["learned_share"] < 1 and 0 <= about["padding_share"] < 0.3
    sample = value["samples"][0]
    assert sample["text"].startswith("<s> <|user|>\n") and sample["text"].endswith("</s>⟧")
    assert sample["text"].split("<|assistant|>\n")[1].startswith("⟦") and len(value["samples"]) == 4
    store = make(f"pairs={files}/pairs.jsonl")
    assert main(["inspect", str(store.path), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "pairs of answers, one pair to windows of 65 tokens" in out and out.count("⟦") == 2 + 2


def test_new_tokens_lengthen_the_vocabulary(make, files):
    pytest.importorskip("tinyllama_jax.data.tokenizer_extend")
    store = make(f"talks={files}/talks.jsonl", template="chatml", new_tokens=("<|im_start|>", "<|im_end|>"))
    assert store.vocab_size == 332 == store.tokenizer().vocab_size
    ids, learned = next(documents(store, "train", "talks"))
    assert {330, 331} <= set(ids) and ids[-1] == 331 and learned[-1] and store.chat().stop_ids == (2, 331)


def test_a_failed_prepare_leaves_nothing(make, files, tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(DataError, match="cut.jsonl.gz"):
        make(f"{files}/talks.jsonl", f"{tmp_path}/cut.jsonl.gz", out=tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.jsonl.gz"]


@pytest.mark.faults
def test_killed_at_any_moment_the_same_command_makes_it(vocabulary, tmp_path):
    write(tmp_path / "talks.jsonl", map(talk, range(4000)))
    command = (
        "import sys\nfrom tinyllama_jax.config import Examples\nfrom tinyllama_jax.finetune.prepare import prepare\n"
        f"prepare(Examples(sources=('{tmp_path}/talks.jsonl',), template='zephyr'), sys.argv[1], window_tokens={W},"
        f" tokenizer_folder='{vocabulary}', marks='bos')\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", command, tmp_path / "whole"], check=True)
    took = time.monotonic() - started
    expected = ExampleStore.open(tmp_path / "whole").manifest["splits"]
    killed = 0
    for share in np.linspace(0.3, 1.0, 8):
        process = subprocess.Popen([sys.executable, "-c", command, tmp_path / "store"])
        time.sleep(share * took)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "store").exists():
            assert ExampleStore.open(tmp_path / "store").manifest["splits"] == expected
            shutil.rmtree(tmp_path / "store")
    assert killed >= 3
    subprocess.run([sys.executable, "-c", command, tmp_path / "store"], check=True)
    assert ExampleStore.open(tmp_path / "store").manifest["splits"] == expected
    left = {path.name for path in tmp_path.iterdir()} - {".store.lock"}
    assert left == {"talks.jsonl", "whole", "store"}, "what was killed is cleared away"
