"""Small example stores for tests: dialogues and pairs by number, a vocabulary, and what the windows hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.config import Examples
from tinyllama_jax.data.tokenizer import train_bpe
from tinyllama_jax.finetune.prepare import prepare
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.generate.templates import Message

W = 129
PAIR_W = 257  # in which no pair of these is cut
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
