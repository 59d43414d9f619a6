"""The two file forms of a vocabulary behind one interface: text to ids, ids to text, and what each id stands for."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

MODEL_FILE, JSON_FILE, JSON_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPACE = "\u2581"  # how SentencePiece spells a space.  Written in a text, it is a space too and decodes as one.

# Texts that a vocabulary with other rules (unigram pieces, normalisation, dropped spaces) encodes or decodes otherwise.
PROBES = (
    "",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two spaces,\n\n\tand a tab; trailing \n",
    "\ufb01 \u00bd \u00e9 e\u0301 \u4f60\u597d \U0001f642",
    "def f(x):\n    return [x ** 2 for _ in range(100)]  # <s> </s> <unk> <0x41>",
)


class SentencePieceBackend:
    file_name = MODEL_FILE

    def __init__(self, path: Path):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        self.vocab_size = self.sp.get_piece_size()

    def encode(self, text: str) -> np.ndarray:
        return self.sp.encode(text, out_type="numpy")

    def encode_plain(self, text: str) -> np.ndarray:
        return self.encode(text)

    def all_pieces(self) -> list[str]:
        return [self.sp.id_to_piece(i) for i in range(self.vocab_size)]

    def piece(self, i: int) -> str | None:
        return self.sp.id_to_piece(i)

    @property
    def plain_bpe(self) -> bool:
        """Byte-pair pieces, whose scores are their ranks; every character has ids; nothing but spaces is rewritten."""
        sp, ids = self.sp, range(self.vocab_size)
        if sum(map(sp.is_byte, ids)) < 256 or any(map(sp.is_unused, ids)):
            return False
        plain = [text.replace(" ", SPACE) for text in PROBES]
        rewritten = [sp.normalize(text) for text in PROBES]
        return all(float(sp.get_score(i)).is_integer() for i in ids) and all(
            b in (a, SPACE + a) for a, b in zip(plain, rewritten, strict=True)
        )

    def adds_space(self) -> bool:
        return self.sp.encode("a", out_type=str)[0].startswith(SPACE)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def piece_bytes(self, i: int) -> int:
        if self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i):
            return 0
        return 1 if self.sp.is_byte(i) else len(self.sp.id_to_piece(i).replace(SPACE, " ").encode())


class JsonBackend:
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
        self.spec = spec
        self.byte_fallback = bool(spec["model"].get("byte_fallback"))
        parts = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
        self.byte_level = '"ByteLevel"' in parts  # one character of a piece stands for one byte
        self.unk = spec["model"].get("unk_token")

    def encode(self, text: str) -> np.ndarray:
        # The fast one does not look for the places of the ids in the text.
        return np.array(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def puts_before(self) -> list[int]:
        """The ids that its post-processor puts before a text."""
        bare, whole = (self.tokenizer.encode("a", add_special_tokens=more).ids for more in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]

    def encode_plain(self, text: str) -> np.ndarray:
        return np.array(self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, but every added token counts as special, so that none is looked for in a text."""
        if self.added == self.special:
            return self.tokenizer
        added = [token | {"special": True} for token in self.spec["added_tokens"]]
        plain = tokenizers.Tokenizer.from_str(json.dumps(self.spec | {"added_tokens": added}))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    def all_pieces(self) -> list[str]:
        return list(self.pieces.values())

    def piece(self, i: int) -> str | None:
        return self.pieces.get(i)

    @property
    def plain_bpe(self) -> bool:
        """Byte-pair pieces of whole texts, as those made from a SentencePiece vocabulary: a text is not cut into words,
        every character has an id, nothing but spaces is rewritten, nothing in a text is taken for an added token."""
        model = self.spec["model"]
        if model.get("type") != "BPE" or not set(map("<0x{:02X}>".format, range(256))) <= set(self.pieces.values()):
            return False
        if not self.byte_fallback or any(map(model.get, ("dropout", "ignore_merges", *_AFFIXES))):
            return False
        normalizer = self.spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        cutter = self.spec.get("pre_tokenizer")
        whole = {"type": "Metaspace", "replacement": SPACE, "split": False}
        spaces = _REPLACE in steps if cutter is None else all(cutter.get(key) == whole[key] for key in whole)
        return spaces and self.added == self.special and all(step in (_PREPEND, _REPLACE) for step in steps)

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


_AFFIXES = "continuing_subword_prefix", "end_of_word_suffix"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


# Types of pieces, in SentencePiece's protocol buffer as in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """(text, score, type) of every id in a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]


def append_pieces(model: Path, pieces: list[tuple[str, float, int]], out: Path) -> None:
    """A SentencePiece model with more pieces behind its own, and its own rules."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    out.write_bytes(proto.SerializeToString())


def never_used(model: Path, first: int) -> set[str]:
    """The pieces from id `first` on that not even a text of the piece alone gets: its parts are merged otherwise."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [sp.id_to_piece(i) for i in range(first, sp.get_piece_size())]
    ids = sp.encode(texts)
    return {text for i, (text, found) in enumerate(zip(texts, ids, strict=True), first) if found != [i]}


def write_pieces(path: Path, pieces: list[tuple[str, float, int]], bos: str, eos: str, adds_space: bool) -> None:
    """A SentencePiece BPE model of these pieces, with the rules of Llama's: bytes for what has no piece, and no text
    is rewritten.  adds_space: one is put before every text.  Raises ValueError for pieces of no such model."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError("no piece is of the type `unknown`")
    model = pb2.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = pb2.TrainerSpec.BPE, len(pieces), True
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = unknown, bos, eos
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = ids[unknown], ids[bos], ids[eos], -1
    rules = model.normalizer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", adds_space, False
    rules.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())
