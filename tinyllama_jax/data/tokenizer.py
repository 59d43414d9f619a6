"""Tokenizers: a SentencePiece `tokenizer.model` or a `tokenizer.json`, with the same ids for the same vocabulary.

Text is only ever text: `<s>` inside a document is three characters, never the BOS token.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import tokenizers

from tinyllama_jax.data.long_text import PART_BYTES, encode_in_parts
from tinyllama_jax.data.tokenizer_backends import (
    JSON_CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    PROBES,
    SPACE,
    JsonBackend,
    SentencePieceBackend,
)
from tinyllama_jax.errors import ConfigError, DataError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # of a vocabulary trained here, as in Llama

# Training looks at this many lines at most, sampled from all of them, and skips no long line but cuts it.
SAMPLED_LINES = 4_000_000
LINE_BYTES = 4192

Marks = Literal["eos", "bos", "both", "none"]


class Tokenizer:
    """Text to ids and back.

    vocab_size: ids lie in [0, vocab_size); bos_id, eos_id; sha256 of the vocabulary file;
    files: what to copy beside a checkpoint so that `load` finds the same tokenizer there.
    """

    def __init__(self, backend: SentencePieceBackend | JsonBackend, bos_id: int, eos_id: int, files: tuple[Path, ...]):
        self._backend = backend
        self.vocab_size: int = backend.vocab_size
        self.bos_id, self.eos_id = bos_id, eos_id
        self.files = files
        self.sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a file, or from a folder holding tokenizer.model (preferred) or tokenizer.json.

        A tokenizer.json names its BOS and EOS in tokenizer_config.json beside it, else they are `<s>` and `</s>`.
        Raises DataError when there is none, it is damaged, or BOS or EOS is missing.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).exists()]
            if not found:
                raise DataError(f"{path}: holds neither {MODEL_FILE} nor {JSON_FILE}; name the tokenizer's folder")
            path = found[0]
        if not path.exists():
            raise DataError(f"{path}: no such tokenizer; name a {MODEL_FILE}, a {JSON_FILE} or their folder")
        try:
            return _load_json(cls, path) if path.suffix == ".json" else _load_model(cls, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    @property
    def puts_before(self) -> list[int]:
        """The ids that the file itself says go before a text.  A SentencePiece model says nothing: none."""
        return self._backend.puts_before() if isinstance(self._backend, JsonBackend) else []

    def start(self, marks: Marks) -> list[int]:
        """The ids at the beginning of a text, whose documents are marked so: BOS if they begin with it, else the EOS
        that ended the document before, else none.  A model has never seen a mark that its documents did not carry."""
        return {"bos": [self.bos_id], "both": [self.bos_id], "eos": [self.eos_id], "none": []}[marks]

    @property
    def plain_bpe(self) -> bool:
        """Whether it joins bytes and characters by rank, and rewrites nothing but spaces: as Llama's does."""
        return self._backend.plain_bpe

    def encode(self, text: str) -> list[int]:
        return self._ids(text).tolist()

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, where also the added tokens that a tokenizer.json does not call special stay text."""
        return self._backend.encode_plain(text).tolist()

    def encode_further(self, text: str) -> list[int]:
        """As `encode_plain`, of a text that goes on behind another: where the vocabulary puts a space before every
        text, none is put.  (Byte-level vocabularies that put one put it here too.)"""
        before, ids = self._before
        return self._backend.encode_plain(before + text)[ids:].tolist()

    @functools.cached_property
    def _before(self) -> tuple[str, int]:
        """A character that is in no piece, so that nothing is joined with it, and the number of its ids; none where
        nothing is put before a text."""
        first = self._backend.piece(int(self._backend.encode_plain("a")[0])) or ""
        used = set().union(*self._backend.all_pieces())
        character = next((c for c in "\n\x00\x01\x02\ue000\uf8ff" if c not in used), None)
        if not first.startswith(SPACE) or character is None:
            return "", 0
        return character, self._backend.encode_plain(character).size

    def encode_document(self, text: str, marks: Marks) -> np.ndarray:
        """int32 [tokens]: the text with BOS before and/or EOS after it."""
        if marks not in ("eos", "bos", "both", "none"):
            raise ConfigError(f"document_marks is {marks!r}; it must be eos, bos, both or none")
        before = [self.bos_id] if marks in ("bos", "both") else []
        after = [self.eos_id] if marks in ("eos", "both") else []
        return np.concatenate([np.array(before, np.int32), self._ids(text), np.array(after, np.int32)])

    def _ids(self, text: str) -> np.ndarray:
        """int32 [tokens]; a long text in parts, with the same ids."""
        if len(text) <= PART_BYTES or self._guard is None:
            return self._backend.encode(text)
        data = text.replace(SPACE, " ").encode()  # they have the same ids, and now each has one byte
        guard, guarded = self._guard
        return encode_in_parts(
            data,
            lambda part: self._backend.encode(part.decode()),
            lambda part: self._backend.encode(guard + part.decode())[guarded:],
            self._sizes,
            PART_BYTES,
        )

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([self._backend.piece_bytes(i) for i in range(self.vocab_size)], np.int32)

    @functools.cached_property
    def _guard(self) -> tuple[str, int] | None:
        """A character that is in no piece, so that nothing is joined with it: behind it a part of a text is encoded as
        if nothing were before.  With the number of its own ids; None where texts cannot be encoded in parts."""
        if not self._backend.plain_bpe:
            return None
        used = set().union(*self._backend.all_pieces())
        guard = next((c for c in "\n\x00\x01\x02\ue000\uf8ff" if c not in used), None)
        return None if guard is None else (guard, self._backend.encode(guard).size)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; BOS and EOS say nothing, bytes that form no UTF-8 become U+FFFD."""
        skipped = (self.bos_id, self.eos_id)
        return self._backend.decode([int(i) for i in ids if int(i) not in skipped])

    def decode_further(self, ids: Iterable[int]) -> str:
        """As `decode`, of ids behind others: a space before the first word is part of the text."""
        before = self.encode_plain("x")
        return self.decode([*before, *ids]).removeprefix(self.decode(before))

    def pieces(self) -> list[str | None]:
        """What each id is spelled like in the vocabulary's file, by id; None for an id that stands for nothing."""
        return [self._backend.piece(i) for i in range(self.vocab_size)]

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes of text that each id stands for; 0 for BOS, EOS and other control tokens.

        Summed over a document this is its length, plus one where the tokenizer puts a space before every text
        (as SentencePiece vocabularies of the Llama family do).
        """
        sizes = self._sizes.copy()
        sizes[[self.bos_id, self.eos_id]] = 0
        return sizes

    def copy_to(self, directory: str | Path) -> None:
        """Copies the files under the names that `load` looks for."""
        for file in self.files:
            standard = JSON_CONFIG_FILE if file.name == JSON_CONFIG_FILE else self._backend.file_name
            (Path(directory) / standard).write_bytes(file.read_bytes())


def _load_model(cls: type[Tokenizer], path: Path) -> Tokenizer:
    try:
        backend = SentencePieceBackend(path)
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model; fetch the file again") from error
    bos, eos = backend.sp.bos_id(), backend.sp.eos_id()
    for name, i in (("BOS", bos), ("EOS", eos)):
        if i < 0:
            raise DataError(f"{path}: the vocabulary has no {name} token; take a tokenizer that has BOS and EOS")
    # Nothing here reads it, but it says which chat template and control tokens go with the vocabulary.
    config_file = path.with_name(JSON_CONFIG_FILE)
    return cls(backend, bos, eos, (path, config_file) if config_file.exists() else (path,))


def _load_json(cls: type[Tokenizer], path: Path) -> Tokenizer:
    try:
        backend = JsonBackend(path)
    except OSError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception for whatever it cannot parse
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a tokenizer.json ({reason}); fetch the file again") from error
    config_file = path.with_name(JSON_CONFIG_FILE)
    config = {}
    if config_file.exists():
        try:
            config = json.loads(config_file.read_bytes())
        except ValueError as error:
            raise DataError(f"{config_file}: not JSON ({error}); fetch the file again") from error
    ids = []
    for key, default in (("bos_token", "<s>"), ("eos_token", "</s>")):
        token = config.get(key) or default
        token = token["content"] if isinstance(token, dict) else token
        i = backend.tokenizer.token_to_id(token)
        if i is None:
            raise DataError(
                f"{path}: no token {token!r} for {key}; name it as {key} in {JSON_CONFIG_FILE} beside the file"
            )
        ids.append(i)
    return cls(backend, *ids, (path, config_file) if config else (path,))


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path, *, or_fewer: bool = False) -> Path:
    """Train a byte-pair vocabulary with the settings of Llama's and write it to `out` (a file, usually
    tokenizer.model); deterministic.  Ids: 0 unknown (unused, for bytes stand in), 1 BOS, 2 EOS, 3-258 bytes, then
    the pieces.  Raises DataError when the texts are too small (but with `or_fewer`) or too varied for `vocab_size`.
    """
    if vocab_size <= 0:
        raise ConfigError(f"vocab_size is {vocab_size}; it must be positive")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            hard_vocab_limit=not or_fewer,
            max_sentence_length=LINE_BYTES,
            input_sentence_size=SAMPLED_LINES,  # a sample bounds the memory; its seed is fixed in the library
            shuffle_input_sentence=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_error(str(error), vocab_size)) from error
    out = Path(out)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(out)
    return out


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, as the trainer wants them (a newline is then encoded as its byte, as in Llama).  It skips longer lines
    without a word, so they are cut, at a space where there is one."""
    limit = LINE_BYTES // 4  # characters; four bytes each at most
    for text in texts:
        for line in text.split("\n"):
            while len(line) > limit:
                cut = line.rfind(" ", 1, limit)
                cut = cut if cut > 0 else limit
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _training_error(message: str, vocab_size: int) -> str:
    what = f"a vocabulary of {vocab_size} cannot be trained"
    if found := re.search(r"value <= (\d+)", message):
        return f"{what}: the text has pieces for {found[1]} at most; set vocab_size to at most {found[1]} or add text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{what}: bytes and the text's characters alone need {found[1]}; set vocab_size to at least {found[1]}"
    if "sentences_.empty()" in message:
        return f"{what}: there is no text to train on; add text to the sources"
    return f"{what}: {' '.join(message.split())}"


def write_tokenizer_json(model: str | Path, out: str | Path) -> Path:
    """The vocabulary of a SentencePiece BPE `tokenizer.model` as a `tokenizer.json` with the same ids, for programs
    that read only that form.  Raises DataError for a model of another kind (unigram, normalising), before writing.

    SentencePiece merges the pair whose result has the best score; `tokenizers` merges by a list of pairs.  So the
    list holds every split of every piece into two pieces, in the order of the pieces' scores.
    """
    model, out = Path(model), Path(out)
    backend = Tokenizer.load(model)._backend
    if not isinstance(backend, SentencePieceBackend):
        raise DataError(f"{model}: is not a SentencePiece model; a tokenizer.json can be used as it is")
    sp = backend.sp
    ids = range(sp.get_piece_size())
    vocabulary = {sp.id_to_piece(i): i for i in ids}
    special = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    scores = {
        sp.id_to_piece(i): sp.get_score(i)
        for i in ids
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
    }
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=sp.id_to_piece(sp.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [tokenizers.normalizers.Prepend(SPACE)] if backend.adds_space() else []
    strip = [tokenizers.decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    fast.normalizer = tokenizers.normalizers.Sequence([*prefix, tokenizers.normalizers.Replace(" ", SPACE)])
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            *strip,
        ]
    )
    fast.add_special_tokens([tokenizers.AddedToken(sp.id_to_piece(i), normalized=False, special=True) for i in special])
    fast.encode_special_tokens = True
    for text in (*PROBES, " ".join(scores).replace(SPACE, " ")):
        if fast.encode(text, add_special_tokens=False).ids != sp.encode(text) or sp.decode(sp.encode(text)) != text:
            raise DataError(f"{model}: is no BPE vocabulary with plain text rules; it has no equal {JSON_FILE}")
    temporary = out.with_name(f".{out.name}.tmp")
    fast.save(str(temporary))
    temporary.replace(out)
    return out
