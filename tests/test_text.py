"""Text as it grows: whole characters, spaces kept, stop strings found wherever tokens are cut."""

import numpy as np
import pytest

from tinyllama_jax.data.tokenizer import Tokenizer, write_tokenizer_json
from tinyllama_jax.generate.text import Text


@pytest.fixture(scope="module")
def tokenizer(small_store):
    return Tokenizer.load(small_store)


WORDS = "def main(x):\n    return x + 1  # größer als 東京 🦙 and back\n\n  The end."


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("prompt", ["", "The fox ", "def", "x"])
def test_pieces_make_up_the_whole(tokenizer, step, prompt):
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids = [*tokenizer.encode(WORDS), tokenizer.eos_id]
    text = Text(tokenizer, before)
    pieces = [text.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    whole = tokenizer.decode(before + ids).removeprefix(tokenizer.decode(before))
    assert "".join(pieces) + text.finish() == whole
    assert not any("\ufffd" in piece for piece in pieces) and len([p for p in pieces if p]) > 5


def test_bytes_that_are_no_character_come_at_the_end(tokenizer):
    broken = tokenizer.encode("🦙")[:-1]
    text = Text(tokenizer, [tokenizer.bos_id])
    assert text.add(tokenizer.encode("so")) == "so" and text.add(broken).strip(" ") == ""
    assert set(text.finish()) == {"\ufffd"} and text.finish() == ""


@pytest.mark.parametrize("stop", [["main"], ["zzz", "x):"], ["n(x):\n    ret"], ["ma", "main"], ["def"]])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop, step):
    ids = tokenizer.encode(WORDS)
    text = Text(tokenizer, [tokenizer.bos_id], stop)
    got = "".join(text.add(ids[i : i + step]) for i in range(0, len(ids), step))
    assert text.stopped and text.finish() == ""
    assert got == WORDS[: min(WORDS.find(s) for s in stop if s in WORDS)]


def test_what_only_begins_like_a_stop_string_is_held_back_and_told(tokenizer):
    text = Text(tokenizer, [tokenizer.bos_id], ["ABCD", ""])
    got = [text.add([i]) for i in tokenizer.encode("xABCx AB")]
    assert "".join(got) == "xABCx " and not text.stopped
    assert text.finish() == "AB" and "ABC" not in got


def test_a_text_does_not_depend_on_how_its_tokens_arrived(tokenizer, tmp_path):
    """Bytes in any order: most are no characters."""
    fast = Tokenizer.load(write_tokenizer_json(tokenizer.files[0], tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(3, fast.vocab_size, 300).tolist()
    texts = set()
    for size in (1, 2, 7, 300):
        text = Text(fast, [fast.bos_id])
        texts.add("".join(text.add(ids[i : i + size]) for i in range(0, 300, size)) + text.finish())
    assert len(texts) == 1
