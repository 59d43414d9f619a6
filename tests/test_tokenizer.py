"""Tokenizer: Llama's settings, the same ids from both file forms, nothing lost on the way back."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data import tokenizer as module
from tinyllama_jax.data.long_text import encode_in_parts
from tinyllama_jax.data.stdlib import python_documents
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.errors import ConfigError, DataError

VOCAB = 1024
TEXTS = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "\n\n\ttabs\r\nand lines\n\n",
    "1234567890 3.14159 0x7fff",
    "\u00e9 e\u0301 \ufb01 \u00bd \u4f60\u597d \U0001f642\U0001f468\u200d\U0001f469 \u0627\u0644",
    "\x00\x01\x7f",
    "<s> </s> <unk> <0x41> [INST]",
    "    " * 20 + "deep\n" + "=" * 77,
]
# SentencePiece writes a space as U+2581 and so cannot tell the two apart.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=80)
REPETITIVE = st.text(" =-_ae\n1()", max_size=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe((d.text for d in python_documents()[::6]), VOCAB, folder / "tokenizer.model")
    (folder / "json").mkdir()
    write_tokenizer_json(folder / "tokenizer.model", folder / "json" / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def fast(folder) -> Tokenizer:
    return Tokenizer.load(folder / "json")


def complaint(function, *arguments, error=DataError) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vocabulary_is_laid_out_as_llamas(model):
    sp = model._backend.sp
    assert (model.vocab_size, sp.unk_id(), model.bos_id, model.eos_id, sp.pad_id()) == (VOCAB, 0, 1, 2, -1)
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    pieces = [sp.id_to_piece(i) for i in range(259, VOCAB)]
    assert not [p for p in pieces if any(c.isdigit() for c in p.strip("\u2581")) and len(p.strip("\u2581")) > 1]
    assert "\u2581" * 4 in pieces  # indentation is one piece
    assert sp.encode("a\nb", out_type=str)[1] == "<0x0A>"


def test_training_is_deterministic_and_sampling_too(tmp_path, monkeypatch):
    texts = [d.text for d in python_documents()[:60]]
    monkeypatch.setattr(module, "SAMPLED_LINES", 700)
    files = [train_bpe(texts, 400, tmp_path / name) for name in ("a.model", "b.model")]
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.undo()
    assert train_bpe(texts, 400, tmp_path / "c.model").read_bytes() != files[0].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model", "c.model"]


def test_long_lines_are_learned_from(tmp_path):
    file = train_bpe(["sesquipedalian " * 1000], 300, tmp_path / "tokenizer.model")
    assert len(Tokenizer.load(file).encode("sesquipedalian")) == 1


def test_json_form_has_equal_ids_on_the_library_and_on_odd_texts(model, fast):
    documents = [d.text for d in python_documents()[::7]]
    assert len(documents) > 100
    for text in documents + TEXTS:
        ids = model.encode(text)
        assert fast.encode(text) == ids
        assert model.decode(ids) == fast.decode(ids) == text


@given(st.one_of(ANY_TEXT, REPETITIVE))
@settings(max_examples=400, deadline=None)
def test_any_text_has_equal_ids_and_comes_back(model, fast, text):
    ids = model.encode(text)
    assert fast.encode(text) == ids
    assert model.decode(ids) == fast.decode(ids) == text
    assert all(0 <= i < VOCAB for i in ids)


# -- long texts ----------------------------------------------------------------------------------------------------

# What stresses joins: runs, spaces in both spellings, digits, bytes in place of pieces, letters of several bytes.
STRESS = st.lists(
    st.one_of(
        st.text(" ab\n\u2581=_1e\u00e9\u4f60\U0001f642", max_size=30),
        st.builds(
            lambda text, n: text * n,
            st.sampled_from(["a", " ", "\n", "=", "ab", "\u2581", "\u4f60", "return "]),
            st.integers(1, 99),
        ),
    ),
    max_size=8,
).map("".join)


def in_parts(tokenizer: Tokenizer, text: str, part_bytes: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", part_bytes)
        assert tokenizer._guard is not None
        return tokenizer.encode(text)


@given(STRESS, st.sampled_from([1, 2, 7, 50, 120, 300]))
@settings(max_examples=300, deadline=None)
def test_long_text_in_parts_equals_the_whole_in_both_forms(model, fast, text, part_bytes):
    whole = model._backend.sp.encode(text)
    assert in_parts(model, text, part_bytes) == in_parts(fast, text, part_bytes) == whole


def scribble(seed: int, alphabet: str, length: int) -> str:
    """Runs and repetitions of random words."""
    random = np.random.default_rng(seed)
    text = []
    while sum(map(len, text)) < length:
        word = "".join(random.choice(list(alphabet), random.integers(1, 6)))
        text.append(word * int(random.integers(1, 9)))
    return "".join(text)[:length]


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "a0 ", "01a\u4f60 ", "ab=\u00e9-_"])
def test_vocabularies_full_of_overlapping_pieces(tmp_path, alphabet):
    """Pieces of two or three letters leave every way to join open, and what is joined depends on what follows."""
    corpus = [scribble(seed, alphabet, 500) for seed in range(40)]
    file = train_bpe(corpus, 300, tmp_path / "tokenizer.model")
    both = Tokenizer.load(file), Tokenizer.load(write_tokenizer_json(file, tmp_path / "tokenizer.json"))
    for seed in range(100, 130):
        text = scribble(seed, alphabet + "\n", 2000)
        whole = both[0]._backend.sp.encode(text)
        for tokenizer in both:
            assert in_parts(tokenizer, text, 40 + seed) == whole == tokenizer._backend.encode(text).tolist()


@pytest.mark.parametrize("letters", range(180, 200))
@pytest.mark.parametrize("part_bytes", [50, 52])
def test_joins_that_the_very_end_of_the_text_decides(letters, part_bytes):
    """Pieces ab, bc, cd, ... of which the later is the better: the text is joined from its end in pairs."""
    alphabet = "".join(chr(0x100 + i) for i in range(200))
    ids = {piece: i for i, piece in enumerate([*alphabet, *map("".join, zip(alphabet, alphabet[1:], strict=False))])}

    def encode(data: bytes) -> np.ndarray:
        text = data.decode()
        odd = len(text) % 2
        alone = [ids[text[0]]] if odd else []
        return np.array(alone + [ids[text[i : i + 2]] for i in range(odd, len(text), 2)], np.int32)

    sizes = np.array([len(piece.encode()) for piece in ids], np.int32)
    data = alphabet[:letters].encode()
    np.testing.assert_array_equal(encode_in_parts(data, encode, encode, sizes, part_bytes), encode(data))


def test_newer_json_form_that_rewrites_spaces_itself(fast, model, tmp_path):
    spec = json.loads(fast.files[0].read_text())
    spec |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": False}}
    spec["pre_tokenizer"]["prepend_scheme"] = "first"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    newer = Tokenizer.load(tmp_path)
    for text in (" leading space and \u2581 both\n" * 40, "a b" * 300):
        assert in_parts(newer, text, 30) == newer._backend.encode(text).tolist()
    spec["pre_tokenizer"]["split"] = True  # words are encoded alone
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path)._guard is None


def test_user_defined_pieces_and_a_newline_among_them(tmp_path):
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    symbols = ["\n", "\n\n", "<|x|>", "abcabc", " =" * 7]
    file = trained(tmp_path / "tokenizer.model", model_type="bpe", user_defined_symbols=symbols, **rules)
    tokenizer = Tokenizer.load(file)
    assert tokenizer._guard[0] == "\x00"
    for seed in range(40):
        random = np.random.default_rng(seed)
        text = "".join(random.choice([*symbols, "a", "abc", " ", "\n", "bc", "<|", "return", "\u4f60"], 400))
        assert in_parts(tokenizer, text, 50 + 7 * seed) == tokenizer._backend.sp.encode(text)


def test_other_kinds_of_vocabulary_are_encoded_whole(tmp_path):
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds = [
        {"model_type": "unigram", "byte_fallback": True, **rules},
        {"model_type": "bpe", **rules},  # letters without an id become one <unk> together
        {"model_type": "bpe", "byte_fallback": True},  # rewrites letters
        {"model_type": "bpe", "byte_fallback": True, "treat_whitespace_as_suffix": True, **rules},
    ]
    files = [trained(tmp_path / f"{i}.model", **kind) for i, kind in enumerate(kinds)]
    for file in [*files, byte_level(tmp_path, "<s>", "</s>")]:
        tokenizer = Tokenizer.load(file)
        assert tokenizer._guard is None
        text = "the quick \ufb01 \u4f60\u597d fox " * 30
        whole = tokenizer.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PART_BYTES", 10)
            assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("unit", ["a", " ", "=", "\u4f60", "def f(x): return x\n", "nospacesbutletters0123"])
def test_time_is_linear_in_the_length(model, fast, unit):
    for tokenizer in (model, fast):

        def seconds(characters, tokenizer=tokenizer):
            text = (unit * (characters // len(unit) + 1))[:characters]
            times = []
            for _ in range(2):
                begin = time.process_time()
                tokenizer.encode_document(text, "eos")
                times.append(time.process_time() - begin)
            return min(times)

        seconds(1000)
        assert seconds(1 << 19) / seconds(1 << 15) < 2 * 16


def test_marks_frame_the_document_and_text_never_becomes_one(model, fast):
    for tokenizer in (model, fast):
        plain = tokenizer.encode("a <s> b</s>")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(plain)
        framed = {m: tokenizer.encode_document("a <s> b</s>", m).tolist() for m in ("none", "bos", "eos", "both")}
        assert framed == {"none": plain, "bos": [1, *plain], "eos": [*plain, 2], "both": [1, *plain, 2]}
        assert tokenizer.encode_document("a", "eos").dtype == np.int32
        assert tokenizer.decode(framed["both"]) == "a <s> b</s>"
    assert "document_marks" in complaint(model.encode_document, "a", "begin", error=ConfigError)


def test_token_bytes_add_up_to_the_document(model, fast):
    sizes = model.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (VOCAB,)
    assert sizes[[0, 1, 2]].tolist() == [0, 0, 0] and (sizes[3:259] == 1).all() and (sizes[259:] > 0).all()
    np.testing.assert_array_equal(fast.token_bytes(), sizes)
    for text in TEXTS[1:] + [python_documents()[3].text]:
        assert sizes[model.encode_document(text, "both")].sum() == len(text.encode()) + 1  # the space put before it


def test_folder_prefers_the_model_and_copies_load_again(folder, tmp_path, model, fast):
    assert Tokenizer.load(folder).files == (folder / "tokenizer.model",)
    odd = tmp_path / "llama2.model"
    odd.write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "copy").mkdir()
    Tokenizer.load(odd).copy_to(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.sha256 == model.sha256 and copy.encode("x y") == model.encode("x y")
    (tmp_path / "json").mkdir()
    fast.copy_to(tmp_path / "json")
    assert Tokenizer.load(tmp_path / "json").sha256 == fast.sha256 != model.sha256


def byte_level(folder: Path, begin="<|begin_of_text|>", end="<|end_of_text|>") -> Path:
    """A small vocabulary built like Llama 3's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([d.text for d in python_documents()[:20]], trainer)
    tokenizer.add_special_tokens([begin, end])
    tokenizer.enable_truncation(5)  # as some published files do; a corpus must not be cut
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_byte_level_json_takes_its_marks_from_the_config_beside_it(tmp_path):
    file = byte_level(tmp_path)
    message = complaint(Tokenizer.load, file)
    assert "bos_token" in message and "tokenizer_config.json" in message
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (400, 401, 402)
    sizes = tokenizer.token_bytes()
    for text in TEXTS + ["<|begin_of_text|> is text"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 400 not in ids
        assert sizes[tokenizer.encode_document(text, "both")].sum() == len(text.encode())
    (tmp_path / "copy").mkdir()
    tokenizer.copy_to(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_id == 401
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|gone|>"}))
    assert "<|gone|>" in complaint(Tokenizer.load, tmp_path)


def test_unusable_tokenizers_are_named(tmp_path, folder):
    assert "none" in complaint(Tokenizer.load, tmp_path / "none")
    assert "tokenizer.json" in complaint(Tokenizer.load, tmp_path)
    for name, content in (
        ("a.model", b"garbage"),
        ("b.model", (folder / "tokenizer.model").read_bytes()[:500]),
        ("c.json", b"{"),
        ("d.json", b"{}"),
        ("e.json", b'{"model": {"type": "Nonsense"}}'),
    ):
        (tmp_path / name).write_bytes(content)
        assert name in complaint(Tokenizer.load, tmp_path / name)


def trained(path: Path, **settings) -> Path:
    model = io.BytesIO()
    lines = [line for d in python_documents()[:40] for line in d.text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def test_vocabulary_without_marks_or_of_another_kind_is_refused(tmp_path):
    no_eos = trained(tmp_path / "a.model", model_type="bpe", eos_id=-1)
    assert "EOS" in complaint(Tokenizer.load, no_eos)
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    unigram = trained(tmp_path / "b.model", model_type="unigram", **identity)
    normalising = trained(tmp_path / "c.model", model_type="bpe", byte_fallback=True)
    for file in (unigram, normalising):
        assert file.name in complaint(write_tokenizer_json, file, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_vocabulary_that_does_not_fit_the_text_is_one_line(tmp_path):
    text = ["the quick brown fox " * 3]
    too_large = complaint(train_bpe, text, 5000, tmp_path / "t.model")
    limit = int(too_large.split("at most ")[-1].split()[0])
    assert 259 < limit < 400
    assert Tokenizer.load(train_bpe(text, limit, tmp_path / "t.model")).vocab_size == limit
    (tmp_path / "t.model").unlink()
    assert "at least" in complaint(train_bpe, text, 100, tmp_path / "t.model")
    assert "no text" in complaint(train_bpe, [], 500, tmp_path / "t.model")
    assert "vocab_size" in complaint(train_bpe, text, 0, tmp_path / "t.model", error=ConfigError)
    assert not list(tmp_path.iterdir())
