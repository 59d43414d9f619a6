"""Vocabularies into GGUF metadata and back; `tokenizers` and `sentencepiece` say whether the ids are the same."""

import json

import gguf
import numpy as np
import pytest
from gguf_cases import SMOL, TEXT, TEXTS, byte_level, rewritten
from test_hf import GQA, random_params, refusal

from tinyllama_jax.config import replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.data.tokenizer_backends import NORMAL, UNUSED, read_pieces
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.gguf import read_gguf, write_gguf
from tinyllama_jax.interop.gguf_tokenizer import RULES, vocabulary

MODEL = replace(GQA, vocab_size=520)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    train_bpe([TEXT], 300, folder / "tokenizer.model")
    return folder


def passed(folder, tmp_path, model=MODEL, marks="bos"):
    """(the file's fields by the package's reader, what is found in it)"""
    file = tmp_path / "m.gguf"
    write_gguf(random_params(model), model, file, tokenizer_folder=folder, marks=marks)
    (tmp_path / "back").mkdir()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    return fields, read_gguf(file, tmp_path / "back")


def assert_same(ours: Tokenizer, other: Tokenizer):
    assert (ours.vocab_size, ours.eos_id) == (other.vocab_size, other.eos_id)
    for text in (*TEXTS, TEXT):
        assert ours.encode(text) == other.encode(text), text
        assert ours.decode(ours.encode(text)) == other.decode(ours.encode(text)), text


@pytest.mark.parametrize("marks", ["bos", "eos", "both", "none"])
def test_sentencepiece_vocabularies(pieces, marks, tmp_path):
    fields, found = passed(pieces, tmp_path, marks=marks)
    (file,) = found.tokenizer_files
    ours, again = Tokenizer.load(pieces), Tokenizer.load(file)
    assert file.name == "tokenizer.model" and again.bos_id == ours.bos_id == 1
    assert_same(ours, again)
    assert found.marks == ("bos" if marks == "both" else marks)
    assert fields["tokenizer.ggml.add_bos_token"] is (marks != "none")
    assert fields["tokenizer.ggml.bos_token_id"] == (2 if marks == "eos" else 1)  # what stands before a prompt
    sp = ours._backend.sp
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 520 and len(set(tokens)) == 520
    assert tokens[:300] == [sp.id_to_piece(i) for i in range(300)]
    assert fields["tokenizer.ggml.scores"][:300] == [sp.get_score(i) for i in range(300)]
    assert types[:4] == [2, 3, 3, 6] and types[299:301] == [NORMAL, UNUSED]
    assert fields["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("rule", RULES)
def test_byte_level_vocabularies(rule, tmp_path):
    folder = byte_level(tmp_path / "tokenizer", rule)
    fields, found = passed(folder, tmp_path)
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == rule
    spec = json.loads((folder / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (types["<|im_end|>"], types["<tool>"], types["e"]) == (3, 4, 1)
    ours, again = Tokenizer.load(folder), Tokenizer.load(found.tokenizer_files[0])
    assert [file.name for file in found.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert ours.bos_id == again.bos_id
    assert_same(ours, again)
    assert again.encode("the<tool>fox") == ours.encode("the<tool>fox") != ours.encode("thefox")
    assert json.loads(found.tokenizer_files[1].read_text())["chat_template"] == "{{ x }}"


def test_a_model_like_smollm2_keeps_its_vocabulary(tmp_path):
    """Tied embeddings, nine query heads for three, theta 100000, and one token that begins and ends documents."""
    model = replace(SMOL, vocab_size=331)
    folder = byte_level(tmp_path / "tokenizer")
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ y }}")
    fields, found = passed(folder, tmp_path, model, "none")
    assert found.model == model and found.marks == "none"
    assert len(fields["tokenizer.ggml.tokens"]) == 331  # none was added
    assert fields["tokenizer.chat_template"] == "{{ y }}"
    assert_same(Tokenizer.load(folder), Tokenizer.load(found.tokenizer_files[0]))


def test_what_llama_cpp_would_encode_otherwise_is_refused(pieces, tmp_path):
    def refused(*words, rule="smollm", **changes):
        folder = byte_level(tmp_path / "changed", rule, **changes)
        refusal(ConfigError, lambda: vocabulary(folder, 520, "bos"), *words, "export hf instead")

    refused("normalizer 'NFC'", normalizer={"type": "NFC"})
    refused("Whitespace", "pre-tokenizer", pre_tokenizer={"type": "Whitespace"})
    refused(
        "ByteLevel",
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True},
    )
    refused("ignore_merges=True", model__ignore_merges=True)
    refused("ignore_merges=True", rule="gpt-2", model__ignore_merges=True)
    refused("dropout=0.5", model__dropout=0.5)
    refused("decoder of type None", decoder=None)
    refused("no merges", model__merges=[])
    spaced = byte_level(tmp_path / "spaced")
    spec = json.loads((spaced / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["lstrip"] = True
    (spaced / "tokenizer.json").write_text(json.dumps(spec))
    refusal(ConfigError, lambda: vocabulary(spaced, 520, "bos"), "<tool>", "space around")
    refusal(ConfigError, lambda: vocabulary(pieces, 299, "bos"), "300 ids", "vocab_size=299")


def test_a_json_of_sentencepiece_becomes_sentencepiece_again(pieces, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    write_tokenizer_json(pieces / "tokenizer.model", folder / "tokenizer.json")
    fields, found = passed(folder, tmp_path)
    (file,) = found.tokenizer_files
    assert file.name == "tokenizer.model" and fields["tokenizer.ggml.model"] == "llama"
    assert_same(Tokenizer.load(pieces), Tokenizer.load(file))
    assert fields["tokenizer.ggml.token_type"][:300] == [kind for _, _, kind in read_pieces(pieces / "tokenizer.model")]
    spec = json.loads((folder / "tokenizer.json").read_text())
    merges = spec["model"]["merges"]
    for changed, words in ((merges[1:], "every two pieces"), ([*merges, merges[0]], "different ranks")):
        spec["model"]["merges"] = changed
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        refusal(ConfigError, lambda: vocabulary(folder, 520, "bos"), words, "export hf instead")


def test_unigram_pieces_are_refused(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True
    )
    refusal(ConfigError, lambda: vocabulary(tmp_path, 520, "bos"), "unigram", "export hf instead")


def test_damaged_vocabularies_are_refused(pieces, tmp_path):
    passed(pieces, tmp_path)
    key = "tokenizer.ggml."

    def changed(*add, drop=(), source="m.gguf"):
        file = rewritten(tmp_path / source, tmp_path / "other.gguf", add=add, drop=drop)
        return lambda: read_gguf(file, tmp_path)

    refusal(DataError, changed(drop=[key + "tokens"]), "no tokens")
    refusal(DataError, changed((key + "tokens", ["a"] * 521, "ARRAY")), "521 tokens for 520")
    refusal(DataError, changed((key + "tokens", ["a"] * 520, "ARRAY")), "there twice")
    refusal(DataError, changed((key + "scores", [0.5], "ARRAY")), "scores")
    refusal(DataError, changed((key + "token_type", [1] * 520, "ARRAY")), "unknown")
    refusal(DataError, changed((key + "token_type", [9] * 520, "ARRAY")), "unknown type")
    refusal(DataError, changed((key + "bos_token_id", 300, "UINT32")), "bos_token_id is 300")
    refusal(DataError, changed((key + "eos_token_id", "x", "STRING")), "eos_token_id")
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "back").rename(tmp_path / "old")
    passed(byte_level(tmp_path / "tokenizer"), tmp_path)
    refusal(ConfigError, changed((key + "pre", "tekken", "STRING")), "tekken", "smollm")
    refusal(DataError, changed((key + "merges", ["a b c"], "ARRAY")), "merges")
    refusal(DataError, changed((key + "merges", ["漢 字"], "ARRAY")), "merges")
    refusal(DataError, changed(drop=[key + "merges"]), "merges")


def test_scores_of_others_may_be_of_any_size(pieces, tmp_path):
    """Fine-tuned vocabularies of others carry scores that are no ranks; the pieces' order is all that counts."""
    fields, _ = passed(pieces, tmp_path)
    halved = [float(np.float32(score) / 2) for score in fields["tokenizer.ggml.scores"]]
    file = rewritten(tmp_path / "m.gguf", tmp_path / "o.gguf", add=[("tokenizer.ggml.scores", halved, "ARRAY")])
    assert_same(Tokenizer.load(pieces), Tokenizer.load(read_gguf(file, tmp_path).tokenizer_files[0]))


def test_files_that_another_program_would_not_find(tmp_path):
    refusal(
        DataError, lambda: write_gguf(random_params(GQA), GQA, tmp_path / "m", tokenizer_folder=tmp_path), "neither"
    )
    assert list(tmp_path.iterdir()) == []
