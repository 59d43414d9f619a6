"""The example store: the same at every reading, damage named, all there or nothing."""

# ruff: noqa: F811  (fixtures are imported by name)

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from example_cases import W, documents, files, made, make, talk, vocabulary, write  # noqa: F401  (fixtures)
from store_cases import flip, truncate

from tinyllama_jax.cli import main
from tinyllama_jax.config import Data, Stage
from tinyllama_jax.data.pipeline import Pipeline, valid_targets
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate.loss import held_out
from tinyllama_jax.finetune import describe
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.generate.chat import choose
from tinyllama_jax.schedules import Plan


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made.path, tmp_path / "copy"))


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


def test_the_tokenizer_says_how_dialogues_are_written(made):
    settings = json.loads((made.tokenizer_folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"].startswith("{{ bos_token }}") and "<|user|>" in settings["chat_template"]
    assert choose("auto", made.tokenizer_folder).name == "zephyr" == made.chat().template.name


def test_loss_on_all_and_marks_and_system(make, files):
    store = make(f"talks={files}/talks.jsonl", loss_on="all", empty_system=True, marks="eos")
    ids, learned = next(documents(store, "train", "talks"))
    assert ids[0] == 2 and not learned[0] and all(learned[1:])
    assert store.tokenizer().decode(ids[1:]).lstrip().startswith("<|system|>\n")


def test_batches_are_the_same_after_reopening(made):
    """Order and Pipeline take it as they take a token store; document masking hides neighbours."""
    schedule = Plan(
        (Stage(name="all", tokens=128 * 40, batch_tokens=128 * 4, mixture={"talks": 2.0, "others": 1.0}),), 128
    )
    data = Data(store=str(made.path), sequence_tokens=128, document_masking=True)
    pipelines = [Pipeline(s, data, schedule, 5, vocab_size=330) for s in (made, ExampleStore.open(made.path))]
    for step in (7, 0, 9):
        one, other = (pipeline.batch(step) for pipeline in pipelines)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["tokens"].shape == (4, 128) and one["valid"].any() and "reference" not in one
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
    with pytest.raises(ConfigError, match="set data.sequence_tokens=128"):
        held_out(made, 33, 0)


def test_a_store_of_the_same_is_left_and_one_of_another_refused(make, files, tmp_path):
    file = Path(shutil.copy(files / "talks.jsonl", tmp_path / "talks.jsonl"))
    out, told = tmp_path / "store", []
    before = make(file, out=out).manifest_sha256
    assert make(file, out=out, malformed_share=0.5).manifest_sha256 == before
    moved = shutil.copy(file, tmp_path / "moved.jsonl")
    assert make(f"talks={moved}", out=out).manifest_sha256 == before, "what is in the files counts"
    for options, words in (
        ({"template": "chatml"}, "examples.template: 'zephyr' then, 'chatml' now"),
        ({"window_tokens": 33}, "window_tokens: 129 then, 33 now"),
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
    assert "pairs of answers, one pair to windows of 129 tokens" in out and out.count("⟦") == 2 + 2


def test_new_tokens_lengthen_the_vocabulary(make, files):
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
