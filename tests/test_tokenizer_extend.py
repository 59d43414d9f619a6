"""Longer vocabularies: old ids keep their meaning, and every program reads the same ids."""

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.data.tokenizer_extend import begins_with, extend, extend_pieces
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.generate.chat import TEMPLATES, Chat, Message, control_ids

CHAT = ("[PAD]", "<|im_start|>", "<|im_end|>")  # as TinyLlama's chat models v0.2 and v0.3 had them
PROSE = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items())[:25])
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰馀成岁律吕调阳云腾致雨露结为霜" * 4 + "。天地宇宙日月寒来"
TEXTS = (
    PROSE[:1500],
    "天地玄黄, 宇宙洪荒! 日月 and prose",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  x = [1, 2]\n\té",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """tokenizer.model of 400 words, alone."""
    folder = tmp_path_factory.mktemp("base")
    train_bpe([PROSE], 400, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def fast(folder, tmp_path_factory) -> Path:
    """The same vocabulary as tokenizer.json, alone."""
    path = tmp_path_factory.mktemp("fast")
    write_tokenizer_json(folder / "tokenizer.model", path / "tokenizer.json")
    return path


@pytest.mark.parametrize("form", ["folder", "fast"])
def test_control_tokens_follow_the_vocabulary(form, request, tmp_path):
    base = request.getfixturevalue(form)
    out = extend(base, CHAT, tmp_path / "out")
    old, new = Tokenizer.load(base), Tokenizer.load(out)
    assert new.vocab_size == 403 and begins_with(new, old) and not begins_with(old, new)
    assert new.pieces()[400:] == list(CHAT)
    assert {text: control_ids(out)[text] for text in CHAT} == {text: 400 + n for n, text in enumerate(CHAT)}
    assert (new.bos_id, new.eos_id) == (old.bos_id, old.eos_id)
    for text in TEXTS:
        assert new.encode(text) == old.encode(text), "a control token never comes out of a text"
    assert new.token_bytes()[400:].tolist() == [0, 0, 0]
    assert new.decode([*new.encode("Hi"), 401, 402]) == old.decode(old.encode("Hi"))
    chat = Chat(TEMPLATES["chatml"], new, [], control_ids(out))
    ids = chat.ids([Message("user", "Hi")])
    assert ids[0] == 401 and 402 in ids and chat.stop_ids == (new.eos_id, 402)
    again = extend(out, ["<|im_end|>", "<tool>"], tmp_path / "again")
    assert control_ids(again)["<|im_end|>"] == 402 and control_ids(again)["<tool>"] == 403


def test_what_was_beside_the_vocabulary_stays(fast, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes((fast / "tokenizer.json").read_bytes())
    settings = {"chat_template": "{{ '<|im_start|>' }}", "model_max_length": 2048, "auto_map": {"a": "b"}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").write_text("{{ x }}")
    out = extend(base, CHAT[1:], tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == settings["chat_template"] and config["model_max_length"] == 2048
    assert config["bos_token"] == "<s>" and "auto_map" not in config
    assert (out / "chat_template.jinja").read_text() == "{{ x }}"
    assert out / "tokenizer_config.json" in Tokenizer.load(out).files


def test_control_tokens_that_only_the_other_files_knew(folder, fast, tmp_path):
    """As in the folders of chat models whose tokenizer.model is the base's: its ids are not given away again."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (base / "tokenizer.json").write_bytes((extend(fast, CHAT, tmp_path / "chat") / "tokenizer.json").read_bytes())
    out = extend(base, ["<tool>"], tmp_path / "out")
    assert Tokenizer.load(out).pieces()[400:] == [*CHAT, "<tool>"]
    (base / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"407": {"content": "<x>"}}}))
    with pytest.raises(DataError, match=r"ids \[400, 401, 402, 407\], with gaps"):
        extend(base, ["<tool>"], tmp_path / "gaps")


def test_pieces_of_another_language(folder, tmp_path):
    second = train_bpe([CHINESE], 340, tmp_path / "tokenizer.model")
    out = extend_pieces(folder, second, tmp_path / "out")
    old, new = Tokenizer.load(folder), Tokenizer.load(out)
    assert begins_with(new, old) and new.vocab_size > 420
    chinese = "天地玄黄宇宙洪荒日月盈昃"
    assert len(new.encode(chinese)) < len(old.encode(chinese)) / 3
    for text in TEXTS:
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    # Old merges come first: a text without anything of the new language has the old ids.
    assert new.encode(PROSE) == old.encode(PROSE)
    assert Tokenizer.load(out / "tokenizer.json").encode(PROSE + chinese) == new.encode(PROSE + chinese)
    assert new.plain_bpe
    used = {i for piece in new.pieces()[400:] for i in new.encode(piece)}
    assert used >= set(range(400, new.vocab_size)), "no new row that no text is given"
    some = extend_pieces(folder, ["宇宙洪", old.pieces()[300], "宇宙"], tmp_path / "some")
    added = Tokenizer.load(some).pieces()[400:]
    assert added == ["宇", "宙", "洪", "宇宙洪", "宇宙"], "with the characters, without what is there"
    lost = extend_pieces(folder, ["宇宙洪荒", "宇"], tmp_path / "lost")
    assert Tokenizer.load(lost).pieces()[400:] == ["宇", "宙", "洪", "荒"], "no two pieces are joined to the word"
    few = extend_pieces(folder, second, tmp_path / "few", count=7)
    assert Tokenizer.load(few).pieces()[400:] == new.pieces()[400:407]


@pytest.mark.parametrize("kind", ["controls", "json", "pieces"])
def test_transformers_reads_the_same_ids(kind, folder, fast, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "pieces":
        out = extend_pieces(folder, ["天", "地", "天地", "宇宙"], tmp_path / "more")
        out = extend(out, CHAT, tmp_path / "out")
    else:
        out = extend(folder if kind == "controls" else fast, CHAT, tmp_path / "out")
    ours, theirs = Tokenizer.load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in TEXTS:
        if "<|" not in text:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    for text, i in control_ids(out).items():
        assert theirs.convert_tokens_to_ids(text) == i
    assert theirs.encode("<|im_start|>", add_special_tokens=False)[-1] == control_ids(out)["<|im_start|>"]
    assert set(CHAT) <= set(theirs.all_special_tokens) | set(theirs.get_added_vocab())


def test_what_cannot_be_added_is_refused(folder, fast, tmp_path):
    with pytest.raises(DataError, match="is a word of this vocabulary already"):
        extend(folder, [Tokenizer.load(folder).pieces()[300]], tmp_path / "out")
    for token in ("", " <x>"):
        with pytest.raises(ConfigError, match="no name for a control token"):
            extend(folder, [token], tmp_path / "out")
    with pytest.raises(DataError, match="SentencePiece BPE tokenizer.model only"):
        extend_pieces(fast, ["天"], tmp_path / "out")
    with pytest.raises(DataError, match="1 pieces can be added, not 5"):
        extend_pieces(folder, ["天"], tmp_path / "out", count=5)
    with pytest.raises(DataError, match="nowhere: no such tokenizer"):
        extend(tmp_path / "nowhere", ["<x>"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        extend(folder, ["<x>"], tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"] and not list(tmp_path.glob(".out*"))
    assert np.array_equal(Tokenizer.load(folder).token_bytes(), Tokenizer.load(fast).token_bytes())


def told(capsys, *argv, status: int = 0):
    assert main(["prepare", "tokenizer", *map(str, argv)]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err.strip().splitlines()[-1]


def test_words_learned_from_text(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"{i} " + CHINESE[i:])
    words = ["--base", folder, "--train", f"zh={text}", "--add", "<|im_start|>"]
    value = told(capsys, *words, "--pieces", 60, "--out", tmp_path / "out", "--json")
    assert (value["base_vocab_size"], value["vocab_size"]) == (400, 461)
    assert value["control"] == {"<|im_start|>": 460}
    old, new = Tokenizer.load(folder), Tokenizer.load(tmp_path / "out")
    assert value["sha256"] == new.sha256
    assert len(new.encode(CHINESE)) < len(old.encode(CHINESE)) / 3
    said = told(capsys, *words, "--pieces", 5000, "--out", tmp_path / "more", status=78)
    assert "pieces can be learned that" in said and "not 5000; ask for fewer or add text" in said


def test_the_base_may_be_a_checkpoint(folder, tmp_path, capsys):
    from tinyllama_jax.train.checkpoint import save_params

    kept = [folder / "tokenizer.model"]
    path = save_params(tmp_path / "ckpt", {"a": np.zeros(2, np.float32)}, {"step": 0}, tokenizer_files=kept)
    value = told(capsys, "--base", path, "--add", "<x>", "--out", tmp_path / "out", "--json")
    assert value["base"] == str(path / "tokenizer") and value["control"] == {"<x>": 400}


def test_wrong_words_end_in_one_line(folder, tmp_path, capsys):
    base, out = ("--base", folder), ("--out", tmp_path / "out")
    assert "nothing to add" in told(capsys, *base, *out, status=2)
    assert "need each other" in told(capsys, *base, "--train", tmp_path, *out, status=2)
    assert "need each other" in told(capsys, *base, "--add", "<x>", "--pieces", "5", *out, status=2)
    assert "nowhere: no such tokenizer" in told(capsys, "--base", "nowhere", "--add", "<x>", *out, status=78)
    assert "no complete checkpoint here" in told(capsys, "--base", tmp_path, "--add", "<x>", *out, status=78)
    assert "no name for a control token" in told(capsys, *base, "--add", "<x> ", *out, status=78)
    assert list(tmp_path.iterdir()) == []
