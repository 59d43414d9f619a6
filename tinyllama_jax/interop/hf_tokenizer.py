"""Tokenizer files that AutoTokenizer reads as training did.

tokenizer.model alone is not enough: transformers 5 rebuilds Llama's tokenizer around its pieces with another rule
for leading spaces (`"  x"` loses one, and indented code begins with some).  So a tokenizer.json that states
SentencePiece's own rules goes beside it, and tokenizer_config.json names the class that takes that as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tinyllama_jax.config import Model
from tinyllama_jax.data.tokenizer import JSON_CONFIG_FILE, JSON_FILE, MODEL_FILE, Tokenizer, write_tokenizer_json
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.json_files import read_json, write_json

# Files beside a vocabulary that say how to use it; nothing here reads them, but they must not be lost.
KEPT = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def find(folder: Path) -> tuple[tuple[Path, ...], str, tuple[str, ...]]:
    """(files, document marks, lines for the user) of the tokenizer in a foreign model's folder.

    Marks are `bos` or `eos` where that model's own tokenizer puts it before a text, else `none`, so that a prompt has
    the ids that the model was trained on.  Transformers goes by the post-processor in tokenizer.json; where there is
    only a SentencePiece model, by add_bos_token, which is true unless it is given.
    A vocabulary that cannot be used here is left out, and a line says so.
    """
    files = [folder / name for name in (MODEL_FILE, JSON_FILE, JSON_CONFIG_FILE, *KEPT)]
    files = [file for file in files if file.is_file()]
    vocabularies = [file for file in files if file.name in (MODEL_FILE, JSON_FILE)]
    if not vocabularies:
        return (), "bos", (f"{folder} holds no tokenizer: the checkpoint takes token ids only",)
    try:
        config = read_json(folder / JSON_CONFIG_FILE) if (folder / JSON_CONFIG_FILE) in files else {}
        tokenizers = [Tokenizer.load(file) for file in vocabularies]
    except DataError as error:
        return (), "bos", (f"the tokenizer is left out: {error}",)
    if vocabularies[-1].name != JSON_FILE:
        return tuple(files), "bos" if config.get("add_bos_token", True) else "none", ()
    return tuple(files), _mark(tokenizers[-1]), ()


def _mark(tokenizer: Tokenizer) -> str:
    """What a tokenizer.json puts before a text: bos, eos or none."""
    known = {(tokenizer.eos_id,): "eos", (tokenizer.bos_id,): "bos"}  # bos, where both are one token
    return known.get(tuple(tokenizer.puts_before), "none")


def write(files: Iterable[str | Path], directory: Path, model: Model, marks: str | None = None) -> dict[str, int]:
    """Write a tokenizer into `directory`; returns its `bos_token_id` and `eos_token_id`, nothing without files.

    files: a SentencePiece model, a tokenizer.json or both of the same vocabulary, perhaps a tokenizer_config.json,
    whose other settings (a chat template, say) are kept, and those of KEPT, which are copied.
    marks: how the documents that the model was trained on were marked.  A text is then begun as they were: with BOS
    (bos, both), with the EOS that ended the one before (eos), or bare.  None: as a given tokenizer.json says, else BOS.
    Raises DataError for files that are no such tokenizer, ConfigError when it has more ids than the model.
    """
    files = [Path(file) for file in files]
    given = {_standard_name(file): file for file in files}
    if not files:
        return {}
    if len(given) < len(files) or not given.keys() & {MODEL_FILE, JSON_FILE}:
        raise DataError(f"{', '.join(map(str, files))}: give one SentencePiece model or tokenizer.json, or one of each")
    tokenizer = Tokenizer.load(given.get(MODEL_FILE) or given[JSON_FILE])
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{tokenizer.files[0]}: {tokenizer.vocab_size} ids are more than model.vocab_size={model.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    for name, file in given.items():
        (directory / name).write_bytes(file.read_bytes())
    if JSON_FILE not in given:
        write_tokenizer_json(given[MODEL_FILE], directory / JSON_FILE)
        marks = marks or "bos"
    fast = read_json(directory / JSON_FILE)
    texts = _texts(fast)
    start = {"bos": tokenizer.bos_id, "both": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(marks or "")
    before = Tokenizer.load(directory / JSON_FILE).puts_before
    if marks and before != ([] if start is None else [start]):  # else the file stays as it is, byte for byte
        before = [] if start is None else [start]
        write_json(directory / JSON_FILE, fast | {"post_processor": _begin_with(start, texts)})
    kept = read_json(directory / JSON_CONFIG_FILE) if JSON_CONFIG_FILE in given else {}
    kept.pop("auto_map", None)  # names code, which does not go along
    settings = {
        "bos_token": texts.get(tokenizer.bos_id),
        "eos_token": texts.get(tokenizer.eos_id),
        "unk_token": "<unk>" if "<unk>" in texts.values() else None,
        "model_max_length": model.context_tokens,
        "add_bos_token": before == [tokenizer.bos_id],
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    forced = {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False}
    write_json(directory / JSON_CONFIG_FILE, settings | kept | forced)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _standard_name(file: Path) -> str:
    if file.name in (JSON_CONFIG_FILE, *KEPT):
        return file.name
    return JSON_FILE if file.suffix == ".json" else MODEL_FILE


def _texts(fast: dict) -> dict[int, str]:
    """Id -> text of a tokenizer.json."""
    texts = {i: text for text, i in fast["model"]["vocab"].items()}
    return texts | {token["id"]: token["content"] for token in fast.get("added_tokens") or ()}


def _begin_with(start: int | None, texts: dict[int, str]) -> dict | None:
    """The post-processor that puts an id before each text of one or a pair."""
    if start is None:
        return None
    mark = texts[start]

    def sequence(name: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": mark, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {mark: {"id": mark, "ids": [start], "tokens": [mark]}},
    }
