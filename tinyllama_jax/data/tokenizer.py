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

from tinyllama_jax.config import ConfigError, DataError

MODEL_FILE, JSON_FILE, JSON_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPACE = "\u2581"  # how SentencePiece spells a space.  Written in a text, it is a space too and decodes as one.
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # of a vocabulary trained here, as in Llama

# Training looks at this many lines at most, sampled from all of them, and skips no long line but cuts it.
SAMPLED_LINES = 4_000_000
LINE_BYTES = 4192
LONG_TEXT = 1 << 20  # characters; longer texts are encoded in parts, for SentencePiece needs 50 bytes for each

Marks = Literal["eos", "bos", "both", "none"]


class Tokenizer:
    """Text to ids and back.

    vocab_size: ids lie in [0, vocab_size); bos_id, eos_id; sha256 of the vocabulary file;
    files: what to copy beside a checkpoint so that `load` finds the same tokenizer there.
    """

    def __init__(self, backend: _SentencePiece | _Json, bos_id: int, eos_id: int, files: tuple[Path, ...]):
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

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_document(self, text: str, marks: Marks) -> np.ndarray:
        """int32 [tokens]: the text with BOS before and/or EOS after it."""
        if marks not in ("eos", "bos", "both", "none"):
            raise ConfigError(f"document_marks is {marks!r}; it must be eos, bos, both or none")
        before = [self.bos_id] if marks in ("bos", "both") else []
        after = [self.eos_id] if marks in ("eos", "both") else []
        return np.array(before + self.encode(text) + after, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; BOS and EOS say nothing, bytes that form no UTF-8 become U+FFFD."""
        skipped = (self.bos_id, self.eos_id)
        return self._backend.decode([int(i) for i in ids if int(i) not in skipped])

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes of text that each id stands for; 0 for BOS, EOS and other control tokens.

        Summed over a document this is its length, plus one where the tokenizer puts a space before every text
        (as SentencePiece vocabularies of the Llama family do).
        """
        sizes = np.array([self._backend.piece_bytes(i) for i in range(self.vocab_size)], np.int32)
        sizes[[self.bos_id, self.eos_id]] = 0
        return sizes

    def copy_to(self, directory: str | Path) -> None:
        """Copies the files under the names that `load` looks for."""
        for file in self.files:
            standard = JSON_CONFIG_FILE if file.name == JSON_CONFIG_FILE else self._backend.file_name
            (Path(directory) / standard).write_bytes(file.read_bytes())


class _SentencePiece:
    file_name = MODEL_FILE

    def __init__(self, path: Path):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        self.vocab_size = self.sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONG_TEXT or not self._cuts_at_spaces:
            return self.sp.encode(text)
        ids = []
        for part in _cut_at_spaces(text):
            ids += self.sp.encode(part)
        return ids

    @functools.cached_property
    def _cuts_at_spaces(self) -> bool:
        """Whether a text may be encoded in parts: no piece crosses from a character into a space, so no merge does,
        and the space put before each part replaces the one that was cut away."""
        crossing = re.compile(f"[^{SPACE}]{SPACE}")
        pieces = (self.sp.id_to_piece(i) for i in range(self.vocab_size))
        return self.adds_space() and not any(crossing.search(piece) for piece in pieces)

    def adds_space(self) -> bool:
        return self.sp.encode("a", out_type=str)[0].startswith(SPACE)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def piece_bytes(self, i: int) -> int:
        if self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i):
            return 0
        return 1 if self.sp.is_byte(i) else len(self.sp.id_to_piece(i).replace(SPACE, " ").encode())


def _cut_at_spaces(text: str) -> Iterator[str]:
    """Parts of about LONG_TEXT characters whose join with " " is the text."""
    start = 0
    space = re.compile(f"(?<=[^ {SPACE}]) (?=.)", re.DOTALL)  # before the last character: no part is empty
    while found := space.search(text, start + LONG_TEXT):
        yield text[start : found.start()]
        start = found.end()
    yield text[start:]


class _Json:
    file_name = JSON_FILE

    def __init__(self, path: Path):
        spec = json.loads(path.read_bytes())
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<s>" in a text stays text
        self.pieces = {i: piece for piece, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self.pieces) + 1
        self.special = {t["id"] for t in spec.get("added_tokens", ()) if t.get("special")}
        self.added = {t["id"] for t in spec.get("added_tokens", ())}
        self.byte_fallback = bool(spec["model"].get("byte_fallback"))
        parts = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
        self.byte_level = '"ByteLevel"' in parts  # one character of a piece stands for one byte
        self.unk = spec["model"].get("unk_token")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def piece_bytes(self, i: int) -> int:
        piece = self.pieces.get(i)
        if piece is None or i in self.special or piece == self.unk:
            return 0
        if i in self.added:
            return len(piece.encode())
        if self.byte_level:
            return len(piece)
        if self.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return 1
        return len(piece.replace(SPACE, " ").encode())


def _load_model(cls: type[Tokenizer], path: Path) -> Tokenizer:
    try:
        backend = _SentencePiece(path)
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model; fetch the file again") from error
    bos, eos = backend.sp.bos_id(), backend.sp.eos_id()
    for name, i in (("BOS", bos), ("EOS", eos)):
        if i < 0:
            raise DataError(f"{path}: the vocabulary has no {name} token; take a tokenizer that has BOS and EOS")
    return cls(backend, bos, eos, (path,))


def _load_json(cls: type[Tokenizer], path: Path) -> Tokenizer:
    try:
        backend = _Json(path)
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


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a byte-pair vocabulary with the settings of Llama's and write it to `out` (a file, usually
    tokenizer.model); deterministic.  Ids: 0 unknown (unused, for bytes stand in), 1 BOS, 2 EOS, 3-258 bytes, then
    the pieces.  Raises DataError when the texts are too small or too varied for `vocab_size`.
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
    if not isinstance(backend, _SentencePiece):
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
    for text in (*_PROBES, " ".join(scores).replace(SPACE, " ")):
        if fast.encode(text, add_special_tokens=False).ids != sp.encode(text) or sp.decode(sp.encode(text)) != text:
            raise DataError(f"{model}: is no BPE vocabulary with plain text rules; it has no equal {JSON_FILE}")
    temporary = out.with_name(f".{out.name}.tmp")
    fast.save(str(temporary))
    temporary.replace(out)
    return out


# Texts that a vocabulary with other rules (unigram pieces, normalisation, dropped spaces) encodes or decodes otherwise.
_PROBES = (
    "",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two spaces,\n\n\tand a tab; trailing \n",
    "\ufb01 \u00bd \u00e9 e\u0301 \u4f60\u597d \U0001f642",
    "def f(x):\n    return [x ** 2 for _ in range(100)]  # <s> </s> <unk> <0x41>",
)
