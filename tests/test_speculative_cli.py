"""`generate --draft` end to end on eight devices, its check of itself, and which checkpoints go together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.data.tokenizer import Tokenizer, write_tokenizer_json
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import speculative_published, speculative_rule, vocabularies
from tinyllama_jax.generate.load import Loaded
from tinyllama_jax.train import durable, saved

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def steps(finished):
    """The finished run's last checkpoint and an earlier one of the same run."""
    found = durable.steps(finished / "checkpoints")
    return f"{finished}@{found[-1]}", f"{finished}@{found[0]}"


def generate(capsys, target, draft, *words):
    status = main(["generate", target, "--draft", draft, "--prompt", "The", "--max-new-tokens", "40", "--json", *words])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def test_greedy_answers_are_checked_token_by_token(steps, capsys):
    status, value, _ = generate(capsys, *steps, "--temperature", "0", "--self-check", "--ignore-eos")
    told = value["speculative"]
    assert status == 0 and told["identical"] is True and told["speed_up"] > 0 and told["plain_seconds"] > 0
    assert len(value["tokens"][0]) == 40 and 0 <= told["accepted"] <= told["proposed"]
    assert told["tokens_per_round"] == pytest.approx(40 / (40 - told["accepted"]))
    assert [row["speed_up"] for row in told["published"][:3]] == [1.82, 1.87, 1.76]
    assert [row["acceptance_rate"] for row in told["published"][3:]] == [0.615, 0.719]


@pytest.mark.slow
def test_sampled_answers_are_checked_by_what_is_known_of_them(steps, capsys):
    words = ("--temperature", "1", "--top-k", "40", "--self-check", "--ignore-eos", "--prompt", "If the")
    status, value, _ = generate(capsys, *steps, *words)
    assert status == 0
    for part in value["speculative"]["check"].values():
        assert part["holds"] and abs(part["measured"] - part["expected"]) <= part["within"]


def test_a_difference_is_an_error_of_one_line(steps, capsys, monkeypatch):
    from tinyllama_jax.generate import sample

    real = sample.generate
    other = lambda *args, **options: [row[:7] + [row[7] ^ 1] + row[8:] for row in real(*args, **options)]  # noqa: E731
    monkeypatch.setattr(sample, "generate", other)
    status, value, err = generate(capsys, *steps, "--temperature", "0", "--self-check", "--ignore-eos")
    assert status == 1 and value["speculative"]["identical"] is False
    assert "row 0, new token 7: plain decoding gives" in err and err.count("\n") == 1
    gap = float(err.split("differ by ")[1].split()[0])
    assert gap < 0, "the token that was put there is not the likeliest"


def test_options_without_a_draft_are_refused(finished, capsys):
    assert main(["generate", str(finished), "--prompt", "The", "--self-check"]) == 2
    assert "--self-check goes with --draft" in capsys.readouterr().err
    assert main(["generate", str(finished), "--prompt", "The", "--draft", "nowhere"]) == 78
    assert "nowhere: no such directory" in capsys.readouterr().err


def test_published_numbers_follow_from_their_rows():
    rows = speculative_published.published()
    assert len(rows) == 5 and all(row["source"] and row["setting"] for row in rows)


# -- which checkpoints go together -------------------------------------------------------------------------


@pytest.fixture
def loaded(finished, tmp_path):
    """Makes a checkpoint's folder and model, with a copy of the run's tokenizer for `change` to alter."""
    path = saved.resolve(finished)
    model = saved.model_of(saved.read_meta(path))

    def make(name, vocab_size=512, change=None):
        folder = tmp_path / name / "tokenizer"
        shutil.copytree(path / "tokenizer", folder)
        if change:
            change(folder)
        return Loaded(folder.parent, replace(model, vocab_size=vocab_size), None, {})

    return make


def chat(folder):
    """The same vocabulary with three tokens behind it, as TinyLlama-Chat's of 32003."""
    path = write_tokenizer_json(folder / "tokenizer.model", folder / "tokenizer.json")
    (folder / "tokenizer.model").unlink()
    spec = json.loads(path.read_text())
    spec["added_tokens"] += [
        spec["added_tokens"][0] | {"id": 512 + i, "content": text}
        for i, text in enumerate(("[PAD]", "<|im_start|>", "<|im_end|>"))
    ]
    path.write_text(json.dumps(spec))


def swapped(folder):
    chat(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def test_a_vocabulary_may_go_on_behind_the_other(loaded):
    base, longer = loaded("base"), loaded("chat", 515, chat)
    assert Tokenizer.load(longer.path / "tokenizer").vocab_size == 515
    assert vocabularies.common_ids(base, base) == 512
    assert vocabularies.common_ids(base, longer) == vocabularies.common_ids(longer, base) == 512
    padded = loaded("padded", 640, chat)  # ids that no token has
    assert vocabularies.common_ids(padded, longer) == 515


def test_other_tokenizers_are_refused(loaded):
    base, other = loaded("base"), loaded("swapped", 515, swapped)
    with pytest.raises(ConfigError, match=r"base and .*swapped have different tokenizers: id 300 is '.*' in the first"):
        vocabularies.common_ids(base, other)
    bare = [loaded(f"bare{n}", n, shutil.rmtree) for n in (512, 513)]
    with pytest.raises(ConfigError, match="holds no tokenizer to compare"):
        vocabularies.common_ids(base, bare[0])
    with pytest.raises(ConfigError, match="512 ids and .*513"):
        vocabularies.common_ids(*bare)
    assert vocabularies.common_ids(bare[0], bare[0]) == 512


def test_the_interval_is_as_wide_as_it_says():
    """Of sums of 300 draws with probabilities 0.9, fewer than the chance are outside, and not all far inside."""
    draws = np.random.default_rng(0).random((20_000, 300)) < 0.9
    off = np.abs(draws.sum(1) - 270)
    assert (off > speculative_rule.interval(27, 0.01)).mean() < 0.01 < (off > speculative_rule.interval(27, 0.5)).mean()


@pytest.mark.slow
def test_the_benchmark_measures_and_predicts(steps, tmp_path):
    words = ("--draft-tokens", "2", "--new-tokens", "8", "--repeats", "1", "--out", tmp_path / "measured.json")
    command = [sys.executable, ROOT / "benchmarks/speculative.py", "--target", steps[0], "--draft", steps[1], *words]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode == 0
    record = json.loads((tmp_path / "measured.json").read_text())
    assert record["failed"] == [] and [m["temperature"] for m in record["measured"]] == [0, 1]
    for m in record["measured"]:
        assert m["speed_up"]["measured"] > 0 < m["speed_up"]["paper"] and 1 <= m["tokens_per_round"]["predicted"] <= 3
