"""Longer vocabularies: every old id keeps its meaning, and new ones follow.

Control tokens, such as those of a chat template, never come out of a text.  Pieces of another language or domain do:
they make its texts shorter, as Chinese LLaMA's did (arXiv 2304.08177).  They are merged after all old pieces, for their
scores lie below (programs that followed that paper commonly score them 0, before all old ones): a text in which none of
them occurs has the ids that it had.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.data.tokenizer_backends import (
    CONTROL,
    JSON_CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    NORMAL,
    SPACE,
    append_pieces,
    never_used,
    read_pieces,
)
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.new_folder import new_folder

Piece = tuple[str, float, int]  # text, score, type
KEPT = ("chat_template.jinja", "generation_config.json")  # beside a vocabulary
BYTES_AND_MARKS = 259  # ids of a trained vocabulary that are no pieces of text
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def begins_with(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether the vocabulary of `new` is that of `old`, word for word, with perhaps more words behind it."""
    return new.pieces()[: old.vocab_size] == old.pieces()


def extend(source: str | Path, tokens: Sequence[str], out: str | Path) -> Path:
    """The tokenizer of a file or folder with more control tokens, as the new folder `out`; returns that.

    Ids follow the vocabulary in the order given; a control token that it has already keeps its id.  The files are read
    alike by `Tokenizer`, `generate.chat.control_ids` and Hugging Face's transformers.
    Raises DataError for a tokenizer that cannot be read or has such a word as ordinary text, ConfigError for an empty
    token and when `out` exists.
    """
    files, tokenizer = _files(Path(source)), Tokenizer.load(source)
    known = _controls(files, tokenizer)
    if wrong := [token for token in tokens if not token.strip() or token != token.strip()]:
        raise ConfigError(f"{wrong[0]!r} is no name for a control token: it is empty, or has a space at an end")
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if taken := set(new) & set(tokenizer.pieces()):
        raise DataError(f"{source}: {min(taken)!r} is a word of this vocabulary already, and no control token")
    return _write(files, tokenizer, known, [(token, 0.0, CONTROL) for token in new], Path(out))


def extend_pieces(
    source: str | Path, pieces: str | Path | Sequence[str], out: str | Path, *, count: int | None = None
) -> Path:
    """The tokenizer of a file or folder with more pieces of text, as the new folder `out`; returns that.

    source: with a SentencePiece BPE `tokenizer.model`.  pieces: another such model, or pieces in the order in which
    they are to be merged; the characters of each are added before it.  Left out are those that the vocabulary has, and
    those that no text would be given: whose parts are merged otherwise before.  count: of pieces to add; None = all.
    Raises DataError for vocabularies of another kind, and when fewer than `count` are left.
    """
    files, tokenizer = _files(Path(source)), Tokenizer.load(source)
    new = usable(source, _candidates(pieces), count)
    if not new or len(new) < (count or 0):
        raise DataError(f"{source}: {len(new)} pieces can be added, not {count or 'one'}; ask for fewer or add text")
    return _write(files, tokenizer, _controls(files, tokenizer), new, Path(out))


def extend_by(
    source: str | Path, out: str | Path, *, tokens: Sequence[str] = (), sources: Sequence[str] = (), pieces: int = 0
) -> Path:
    """`pieces` pieces that the text of `sources` suggests (`learn`), and behind them control tokens."""
    if not sources:
        return extend(source, tokens, out)
    candidates = learn(sources, source, pieces)
    if not tokens:
        return extend_pieces(source, candidates, out, count=pieces)
    with tempfile.TemporaryDirectory() as folder:
        return extend(extend_pieces(source, candidates, Path(folder) / "longer", count=pieces), tokens, out)


def usable(source: str | Path, candidates: Sequence[str], count: int | None = None) -> list[Piece]:
    """The first `count` candidates that the vocabulary of `source` lacks and would use, with their scores."""
    file = _files(Path(source)).get(MODEL_FILE)
    if file is None or not Tokenizer.load(file).plain_bpe:
        raise DataError(
            f"{source}: pieces of text can be added to a SentencePiece BPE {MODEL_FILE} only, with byte fallback"
        )
    old = read_pieces(file)
    known, lowest = {text for text, *_ in old}, math.floor(min(score for _, score, _ in old))
    words = [text.replace(" ", SPACE) for text in candidates]
    # Each behind its characters: `tokenizers` would take those that are no pieces for bytes, and never join them.
    words = [text for text in dict.fromkeys(part for word in words for part in (*word, word)) if text not in known]
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / MODEL_FILE
        for limit in (None, count):
            dead = set(words)
            while dead:
                chosen = [(text, float(lowest - 1 - rank), NORMAL) for rank, text in enumerate(words[:limit])]
                append_pieces(file, chosen, trial)
                dead = never_used(trial, len(old))
                words = [text for text in words if text not in dead]
    return chosen if words else []


def learn(specs: Sequence[str], source: str | Path, count: int) -> list[str]:
    """Pieces that the texts of these sources suggest, characters first, then in the order in which they were learned;
    enough that `count` of them are new to the vocabulary of `source` and of use.

    Documents that `prepare` would hold out unasked are not looked at.  Raises DataError when there are not enough.
    """
    size = BYTES_AND_MARKS + 2 * count
    while True:
        with tempfile.TemporaryDirectory() as folder:
            model = train_bpe(_texts(specs), size, Path(folder) / MODEL_FILE, or_fewer=True)
            candidates, learned = _candidates(model), len(read_pieces(model))
        found = len(usable(source, candidates, count))
        if found == count:
            return candidates
        if learned < size:
            raise DataError(
                f"{' '.join(specs)}: {found} pieces can be learned that {source} lacks, not {count}; ask for fewer or "
                "add text"
            )
        size *= 2


def _texts(specs: Sequence[str]) -> Iterator[str]:
    from tinyllama_jax.config import Recipe
    from tinyllama_jax.data import plan, sources

    held_out = int(Recipe().validation_share * plan.HASH_RANGE)
    for source in [sources.parse(spec) for spec in specs]:
        for given in source.inputs():
            for document in source.documents(given):
                if document.tokens is None and plan.place_of(plan.digest_of(document)) >= held_out:
                    yield document.text


def _candidates(pieces: str | Path | Sequence[str]) -> list[str]:
    """Of a model: its characters, and then the rest by score; characters cost one id and save two bytes or more."""
    if not isinstance(pieces, str | Path):
        return list(pieces)
    file = _files(Path(pieces)).get(MODEL_FILE)
    if file is None:
        raise DataError(f"{pieces}: holds no {MODEL_FILE} to take pieces from")
    Tokenizer.load(file)  # raises DataError for what is no such model
    normal = [(len(text) > 1, -score, text) for text, score, kind in read_pieces(file) if kind == NORMAL]
    return [text for *_, text in sorted(normal)]


def _files(source: Path) -> dict[str, Path]:
    """A tokenizer's files by their usual names."""
    if source.is_dir():
        found = {name: source / name for name in (MODEL_FILE, JSON_FILE, JSON_CONFIG_FILE, *KEPT)}
    else:
        found = {JSON_FILE if source.suffix == ".json" else MODEL_FILE: source}
        found[JSON_CONFIG_FILE] = source.with_name(JSON_CONFIG_FILE)
    return {name: file for name, file in found.items() if file.is_file()}


def controls(source: str | Path) -> dict[str, int]:
    """The control tokens of a tokenizer's file or folder, by their text."""
    return _controls(_files(Path(source)), Tokenizer.load(source))


def _controls(files: dict[str, Path], tokenizer: Tokenizer) -> dict[str, int]:
    """Control tokens by text.  Raises DataError when the files count them otherwise than one after another."""
    spec, config = (_json(files.get(name)) for name in (JSON_FILE, JSON_CONFIG_FILE))
    try:
        found = {token["content"]: int(token["id"]) for token in spec.get("added_tokens") or ()}
        listed = config.get("added_tokens_decoder") or {}
        found |= {token["content"]: int(i) for i, token in listed.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{tokenizer.files[0]}: added tokens beside it are not listed as they should be") from error
    if MODEL_FILE in files:
        pieces = read_pieces(files[MODEL_FILE])
        found |= {text: i for i, (text, _, kind) in enumerate(pieces) if kind == CONTROL}
    beyond = sorted(i for i in found.values() if i >= tokenizer.vocab_size)
    if beyond != list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(beyond))):
        raise DataError(
            f"{tokenizer.files[0]}: the added tokens beside it have ids {beyond}, with gaps before or between"
        )
    return found


def _write(files: dict[str, Path], old: Tokenizer, known: dict[str, int], new: list[Piece], out: Path) -> Path:
    """Writes the extended tokenizer, with `known` control tokens that only the files beside the vocabulary knew."""
    beside = sorted((i, text) for text, i in known.items() if i >= old.vocab_size)
    added = [(text, 0.0, CONTROL) for _, text in beside] + new
    first = old.vocab_size
    with new_folder(out) as folder:
        if MODEL_FILE in files:
            append_pieces(files[MODEL_FILE], added, folder / MODEL_FILE)
            write_tokenizer_json(folder / MODEL_FILE, folder / JSON_FILE)
            before = _json(files.get(JSON_FILE)).get("post_processor")
            if before:
                _dump(folder / JSON_FILE, _json(folder / JSON_FILE) | {"post_processor": before})
        else:
            spec = _json(files[JSON_FILE])
            tokens = [{"id": first + n, "content": text, **FLAGS} for n, (text, *_) in enumerate(added)]
            _dump(folder / JSON_FILE, spec | {"added_tokens": [*(spec.get("added_tokens") or ()), *tokens]})
        _dump(folder / JSON_CONFIG_FILE, _config(files, old, added, first))
        for name in KEPT:
            if name in files:
                (folder / name).write_bytes(files[name].read_bytes())
        _check(folder, old, added)
    return out


def _config(files: dict[str, Path], old: Tokenizer, added: list[Piece], first: int) -> dict:
    """tokenizer_config.json: what was there, the control tokens, and the class that takes tokenizer.json as it is."""
    texts, config = old.pieces(), _json(files.get(JSON_CONFIG_FILE))
    named = {"bos_token": texts[old.bos_id], "eos_token": texts[old.eos_id]}
    if "<unk>" in texts:
        named["unk_token"] = "<unk>"
    flags = {str(first + n): {"content": text, **FLAGS} for n, (text, _, kind) in enumerate(added) if kind == CONTROL}
    decoder = (config.get("added_tokens_decoder") or {}) | flags
    forced = {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "added_tokens_decoder": decoder}
    return named | {key: value for key, value in config.items() if key != "auto_map"} | forced


def _check(folder: Path, old: Tokenizer, added: list[Piece]) -> None:
    """Raises DataError unless both forms have the old words, and the new ones behind them."""
    expected = [*old.pieces(), *(text for text, *_ in added)]
    for name in (MODEL_FILE, JSON_FILE):
        if (folder / name).exists() and Tokenizer.load(folder / name).pieces() != expected:
            raise DataError(f"{old.files[0]}: {name} would not have the new words behind the old ones; it has gaps")


def _json(file: Path | None) -> dict:
    if file is None:
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fetch the file again") from error
    return value if isinstance(value, dict) else {}


def _dump(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
