"""The tokenizer inside a GGUF file as the files that this package loads: tokenizer.model or tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_backends import (
    CONTROL,
    JSON_CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    write_pieces,
)
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.gguf_file import Header, short
from tinyllama_jax.interop.gguf_tokenizer import RULES
from tinyllama_jax.interop.tensor_files import write_json


def write_files(header: Header, rows: int, folder: Path) -> tuple[tuple[Path, ...], str]:
    """Rebuild the tokenizer of a file in `folder`; -> its files (none when there is none), and the documents' marks.

    Raises DataError for a vocabulary that is damaged, ConfigError for one of a kind that is not known here.
    """
    kind = header.get("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return (), "bos"
    if kind not in ("llama", "gpt2"):
        raise ConfigError(f"{header.path}: its tokenizer is of kind {short(kind)}; only llama and gpt2 can be imported")
    tokens, types = _tokens(header, rows)
    bos, eos = (_special(header, name, default, tokens) for name, default in (("bos", 1), ("eos", 2)))
    adds = header.get("tokenizer.ggml.add_bos_token", bool, kind == "llama")
    marks = "none" if not adds else "eos" if bos == eos else "bos"
    if kind == "llama":
        files = _write_model(header, tokens, types, bos, eos, folder)
    else:
        files = _write_json(header, tokens, types, folder)
    template = header.get("tokenizer.chat_template", str, "")
    settings = {"bos_token": tokens[bos], "eos_token": tokens[eos]} if kind == "gpt2" else {}
    settings |= {"chat_template": template} if template else {}
    if settings:
        write_json(folder / JSON_CONFIG_FILE, settings)
        files = (*files, folder / JSON_CONFIG_FILE)
    Tokenizer.load(files[0])  # raises DataError for what cannot be used
    return files, marks


def _tokens(header: Header, rows: int) -> tuple[list[str], list[int]]:
    """Texts and types, without what only fills up the model's rows."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= rows:
        count = f"{len(tokens)} tokens" if isinstance(tokens, list) else "no tokens"
        raise DataError(f"{header.path}: tokenizer.ggml.tokens has {count} for {rows} rows; copy the file again")
    types = np.full(len(tokens), NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise DataError(f"{header.path}: tokenizer.ggml.token_type does not fit the tokens; copy the file again")
    types = [int(kind) for kind in types]
    if len(set(tokens)) < len(tokens) or "" in tokens or not set(types) <= set(range(1, 7)):
        raise DataError(f"{header.path}: a token is empty, there twice or of an unknown type; copy the file again")
    while types[-1:] == [UNUSED] and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        del tokens[-1], types[-1]
    return tokens, types


def _special(header: Header, name: str, default: int, tokens: list[str]) -> int:
    found = header.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if type(found) is not int or not 0 <= found < len(tokens):
        raise DataError(f"{header.path}: tokenizer.ggml.{name}_token_id is {short(found)}; it must name a token")
    return found


def _write_model(
    header: Header, tokens: list[str], types: list[int], bos: int, eos: int, folder: Path
) -> tuple[Path, ...]:
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(tokens) or not np.isfinite(scores).all():
        raise DataError(f"{header.path}: tokenizer.ggml.scores does not fit the tokens; copy the file again")
    if bos == eos and "<s>" in tokens and types[tokens.index("<s>")] == CONTROL:
        bos = tokens.index("<s>")  # EOS was named as BOS for what stands before a prompt
    adds_space = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    pieces = [(text, float(scores[i]), types[i]) for i, text in enumerate(tokens)]
    try:
        write_pieces(folder / MODEL_FILE, pieces, tokens[bos], tokens[eos], adds_space)
    except ValueError as error:
        raise DataError(f"{header.path}: is no SentencePiece vocabulary ({error}); copy the file again") from None
    return (folder / MODEL_FILE,)


def _write_json(header: Header, tokens: list[str], types: list[int], folder: Path) -> tuple[Path, ...]:
    rule = header.get("tokenizer.ggml.pre", str, "default")
    if rule not in RULES:
        names = ", ".join(RULES)
        raise ConfigError(f"{header.path}: tokenizer.ggml.pre={short(rule)} is not known here; {names} are")
    merges = header.metadata.get("tokenizer.ggml.merges")
    ids = {text: i for i, text in enumerate(tokens)}
    pairs = [m.split(" ") for m in merges] if isinstance(merges, list) else []
    if not pairs or any(len(p) != 2 or not {*p, "".join(p)} <= ids.keys() for p in pairs):
        raise DataError(f"{header.path}: tokenizer.ggml.merges does not fit the tokens; copy the file again")
    steps, ignore_merges = RULES[rule]
    added = [
        {"id": i, "content": text, "special": types[i] == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, text in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    steps = [{"trim_offsets": True, **s} if s["type"] == "ByteLevel" else s for s in steps]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": ids,
        "merges": pairs,
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    write_json(folder / JSON_FILE, spec)
    return (folder / JSON_FILE,)
