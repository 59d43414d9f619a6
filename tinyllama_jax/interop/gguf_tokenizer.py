"""Tokenizers as GGUF metadata, as llama.cpp reads them; gguf_tokenizer_files.py is the way back.

A SentencePiece vocabulary (`llama`) is its pieces with scores and types.  A byte-level one (`gpt2`) is its tokens and
merges, and the name of a rule by which text is cut into words before; llama.cpp has the rules built in, so such a
tokenizer.json can be written only when it cuts text by one of those.  A tokenizer.json made from a SentencePiece
vocabulary becomes one again.

What stands before a prompt is what stood before the documents in training: nothing, BOS, or the EOS of the document
before.  llama.cpp has BOS or nothing, so in the third case EOS is named as BOS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_backends import (
    BYTE,
    CONTROL,
    JSON_CONFIG_FILE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    JsonBackend,
    read_pieces,
)
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.interop.gguf_file import short
from tinyllama_jax.interop.tensor_files import read_json

TEMPLATE_FILE = "chat_template.jinja"

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = _WORDS | {"use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
# Name in tokenizer.ggml.pre -> the steps of a tokenizer.json's pre-tokenizer, and whether a word that is a token as it
# stands is taken before any merge.
RULES: dict[str, tuple[list[dict], bool]] = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([_DIGITS, _WORDS], False),
    "llama-bpe": ([_SPLIT, _BYTES], True),
    "dbrx": ([_SPLIT, _BYTES], False),
}


@dataclass(frozen=True)
class Vocabulary:
    """metadata: by key, behind `tokenizer.`.  eos: its text."""

    metadata: dict[str, Any]
    chat_template: str
    eos: str


def vocabulary(folder: Path, rows: int, marks: str) -> Vocabulary:
    """What a file says of the tokenizer in `folder`, with a token for each of the model's `rows` ids.

    marks: how documents were marked in training.  Raises ConfigError for a tokenizer that llama.cpp would apply in
    another way, naming what differs.
    """
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{tokenizer.files[0]}: {tokenizer.vocab_size} ids are more than model.vocab_size={rows}; "
            "export with the tokenizer that the model was trained with"
        )
    file = tokenizer.files[0]
    found = _of_json(file) if file.suffix == ".json" else _of_model(file, tokenizer)
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    eos = tokens[tokenizer.eos_id]
    padding = rows - len(tokens)  # llama.cpp wants a token for every row
    tokens += _unused(padding, set(tokens), len(tokens))
    types += [UNUSED] * padding
    if "ggml.scores" in found:
        found["ggml.scores"] += [-1000.0] * padding
    template = _chat_template(folder)
    found |= {
        "ggml.bos_token_id": tokenizer.eos_id if marks == "eos" else tokenizer.bos_id,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.add_bos_token": marks != "none",
        "ggml.add_eos_token": False,
    }
    return Vocabulary(found | ({"chat_template": template} if template else {}), template, eos)


def _unused(count: int, taken: set[str], first: int) -> list[str]:
    names = [f"[PAD{first + i}]" for i in range(count)]
    if taken & set(names):
        raise ConfigError(f"the vocabulary has a token {names[0]} of its own; rows without a token cannot be named so")
    return names


def _of_model(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    pieces, backend = read_pieces(file), tokenizer._backend
    if not backend.plain_bpe or any(kind == USER_DEFINED for _, _, kind in pieces):
        raise ConfigError(
            f"{file}: llama.cpp would encode text in another way: it merges pieces by score, knows no unigram, no "
            "rewriting of text and no user-defined pieces; export hf instead"
        )
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [text for text, _, _ in pieces],
        "ggml.scores": [score for _, score, _ in pieces],
        "ggml.token_type": [kind for _, _, kind in pieces],
        "ggml.add_space_prefix": backend.adds_space(),
        "ggml.unknown_token_id": next(i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN),
    }


def _of_json(file: Path) -> dict[str, Any]:
    backend = JsonBackend(file)
    spec, model = backend.spec, backend.spec["model"]

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{file}: {what} has no equal in llama.cpp; export hf instead")

    if backend.byte_fallback and backend.plain_bpe:
        return _of_pieces(backend, refuse)
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise refuse(f"a vocabulary of type {short(model.get('type'))}")
    if spec.get("normalizer"):
        raise refuse(f"its normalizer {short(spec['normalizer'].get('type'))}")
    if (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise refuse(f"a decoder of type {short((spec.get('decoder') or {}).get('type'))}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refuse(f"{key}={short(model[key])}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if len(set(merges)) < len(merges) or not merges:
        raise refuse("a vocabulary with no merges" if not merges else "a merge that is listed twice")
    if not set(_byte_letters()) <= set(backend.pieces.values()):
        raise refuse("a vocabulary without all 256 bytes")
    added = {token["id"]: token for token in spec.get("added_tokens") or ()}
    for token in added.values():
        if not token["special"] and any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise refuse(f"the way in which token {short(token['content'])} takes the space around it")
    ids = range(max(backend.pieces) + 1)
    named = {i: backend.pieces[i] for i in ids if i in backend.pieces}
    tokens = [named.get(i) or f"[PAD{i}]" for i in ids]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": _rule(spec, refuse),
        "ggml.tokens": tokens,
        "ggml.token_type": [
            UNUSED if i not in named else NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED
            for i in ids
        ],
        "ggml.merges": merges,
    }


def _of_pieces(backend: JsonBackend, refuse: Any) -> dict[str, Any]:
    """A tokenizer.json of a SentencePiece vocabulary: of each piece every split into two pieces is one of the merges,
    in the order of the pieces' scores (data/tokenizer.py:write_tokenizer_json).  The scores come back as ranks."""
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in backend.spec["model"]["merges"]]
    scores: dict[str, float] = {}
    for (left, right), (before_left, before_right) in zip(merges, [("", ""), *merges[:-1]], strict=True):
        piece = left + right
        if piece != before_left + before_right:
            if piece in scores:
                raise refuse(f"piece {short(piece)}, whose merges have different ranks,")
            scores[piece] = -1.0 - len(scores)
    special, listed = {backend.pieces[i] for i in backend.special} | {backend.unk}, set(merges)
    letters = {p for p in backend.pieces.values() if p not in special and not _BYTE.fullmatch(p)}
    for piece in letters:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if letters.issuperset(pair) and pair not in listed:
                raise refuse(f"piece {short(piece)}, which is not merged from every two pieces that make it,")
    ids = range(max(backend.pieces) + 1)
    tokens = [backend.pieces.get(i) or f"[PAD{i}]" for i in ids]

    def kind(i: int) -> int:
        text = backend.pieces.get(i)
        if text is None:
            return UNUSED
        return (
            UNKNOWN if text == backend.unk else CONTROL if text in special else BYTE if text not in letters else NORMAL
        )

    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [scores.get(text, 0.0) for text in tokens],
        "ggml.token_type": [kind(i) for i in ids],
        "ggml.add_space_prefix": backend.pieces[int(backend.encode("a")[0])].startswith(SPACE),
        "ggml.unknown_token_id": tokens.index(backend.unk),
    }


def _rule(spec: dict, refuse: Any) -> str:
    """The name under which llama.cpp knows how this tokenizer.json cuts text into words."""
    cutter = spec.get("pre_tokenizer") or {"type": "none"}
    steps = cutter.get("pretokenizers", []) if cutter["type"] == "Sequence" else [cutter]
    known = [{"use_regex": True, **s} if s["type"] == "ByteLevel" else s for s in steps]
    whole = bool(spec["model"].get("ignore_merges"))
    for name, (wanted, ignore_merges) in RULES.items():
        same = len(known) == len(wanted) and all(
            all(step.get(key) == value for key, value in want.items()) for step, want in zip(known, wanted, strict=True)
        )
        if same and whole == ignore_merges:
            return name
    raise refuse(f"its pre-tokenizer ({' + '.join(s['type'] for s in steps)}, ignore_merges={whole})")


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _chat_template(folder: Path) -> str:
    """The chat template in the folder, or an empty text.  The file of its own goes before tokenizer_config.json."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not (folder / JSON_CONFIG_FILE).is_file():
        return ""
    template = read_json(folder / JSON_CONFIG_FILE).get("chat_template") or ""
    if isinstance(template, list):  # several by name
        template = next((t.get("template", "") for t in template if t.get("name") == "default"), "")
    return template
