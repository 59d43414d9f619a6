"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors) <-> adapter parameters.

LoRA: y = x W + scale (x A) B.  PEFT stores A as [r, in] and B as [out, r], heads flattened and layers apart; here they
are stacked, [L, in..., r] and [L, r, out...] (finetune/adapters.py).
Prefix: keys and values as they lie in a cache, [L, P, G, K] each; PEFT stores one row a token, [P, layers * 2 * G * K],
in which a layer's keys come before its values (PeftModel.get_prompt).

Where a run has added words, the rows of the base's tables and the new ones go along, as PEFT saves resized embeddings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tinyllama_jax.config import Adapter, Model, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import hf, hf_tokenizer, peft_config, tensor_files
from tinyllama_jax.interop.json_files import read_json, shown, write_json, write_text
from tinyllama_jax.interop.new_folder import new_folder, refuse_what_exists
from tinyllama_jax.interop.peft_config import CONFIG, MODULES, WEIGHTS
from tinyllama_jax.interop.tensor_files import Shape, Stored

Params = dict[str, Any]
PROMPT = "prompt_embeddings"
TABLES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
MERGE = "merge it in PEFT (merge_and_unload) and import the whole model with `import hf`"
_PREFIX = "base_model.model."


class _Factor:
    """A or B of one matrix: its names, one per layer, its shape there and its shape here."""

    def __init__(self, target: str, which: str, model: Model, rank: int):
        path = tuple(target.split(".")) if target != "head" else ("head", "kernel")
        self.path = (("layers", *path) if target != "head" else path) + (which,)
        self.layers = model.layers if target != "head" else None
        row = next(row for row in hf.WEIGHTS if row[0] == self.path[:-1])
        sizes = {"V": model.vocab_size, "D": model.d_model, "F": model.d_ff}
        sizes |= {"H": model.heads, "G": model.kv_heads, "K": model.head_dim}
        outputs, inputs = (tuple(sizes[axis] for axis in group) for group in row[2].split())
        self.shape: Shape = (*inputs, rank) if which == "a" else (rank, *outputs)  # of one layer
        flat = (math.prod(inputs), rank) if which == "a" else (rank, math.prod(outputs))
        self._flat, self.theirs_shape = flat, flat[::-1]
        self.template = _PREFIX + row[1].removesuffix("weight") + f"lora_{which.upper()}.weight"

    def names(self) -> list[str]:
        return [self.template.format(i) for i in range(self.layers)] if self.layers else [self.template]

    def stacked_shape(self) -> Shape:
        return (self.layers, *self.shape) if self.layers else self.shape

    def theirs(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self._flat).T

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T.reshape(self.shape)


def _factors(model: Model, adapter: Adapter) -> list[_Factor]:
    return [_Factor(name, which, model, adapter.rank) for name in peft_config.targets_of(adapter) for which in "ab"]


def shapes(model: Model, adapter: Adapter) -> dict[tuple[str, ...], Shape]:
    """Path -> shape of every array of an adapter's parameters."""
    if adapter.method == "prefix":
        size = (model.layers, adapter.prefix_tokens, model.kv_heads, model.head_dim)
        return {("layers", "prefix", name): size for name in ("key", "value")}
    return {factor.path: factor.stacked_shape() for factor in _factors(model, adapter)}


# ---- here -> PEFT


def write_peft(
    params: Params,
    adapter: Adapter,
    model: Model,
    directory: str | Path,
    *,
    base: str,
    dtype: str = "float32",
    tokenizer_files: Iterable[str | Path] = (),
    marks: str | None = None,
    tables: Mapping[str, np.ndarray] = MappingProxyType({}),
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an adapter's folder, which `PeftModel.from_pretrained` loads beside its base.

    base: base_model_name_or_path.  dtype: float32 (bit for bit), bfloat16 or float16, rounded to nearest even.
    tables: {"embed_tokens" or "lm_head": [V, D]} where the run has added words.  texts: more files, by name.
    tokenizer_files, marks: as of hf.write_hf.
    The folder appears under its name when it is complete.  Raises ConfigError when it holds something, or for
    parameters of other shapes; DataError for an unusable tokenizer.
    """
    directory = Path(directory)
    refuse_what_exists(directory)
    tensors = _tensors(params, adapter, model)
    for name, table in tables.items():
        stem = TABLES[name]
        if name == "lm_head" and "head" in peft_config.targets_of(adapter) and adapter.method == "lora":
            stem = "lm_head.base_layer.weight"
        tensors[_PREFIX + stem] = table
    with new_folder(directory) as unfinished:
        for name, text in texts.items():
            write_text(unfinished / name, text)
        hf_tokenizer.write(tokenizer_files, unfinished, model, marks)
        write_json(unfinished / CONFIG, peft_config.to_peft(adapter, model, base))
        specs = [(name, tensor.shape) for name, tensor in tensors.items()]
        total = sum(tensor.nbytes for tensor in tensors.values())
        tensor_files.write(unfinished, specs, iter(tensors.values()), dtype, total + 1, single=WEIGHTS)
    return directory


def _tensors(params: Params, adapter: Adapter, model: Model) -> dict[str, np.ndarray]:
    """PEFT's tensors by name.  Raises ConfigError when `params` does not have the adapter's shapes."""
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for path, shape in shapes(model, adapter).items():
        leaf: Any = params
        for key in path:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if leaf is None or tuple(leaf.shape) != shape:
            found = "missing" if leaf is None else f"{list(leaf.shape)}"
            raise ConfigError(f"adapter parameter {'.'.join(path)} is {found}; this adapter makes it {list(shape)}")
        leaves[path] = np.asarray(leaf)
    if adapter.method == "prefix":
        both_L2PGK = np.stack([leaves["layers", "prefix", name] for name in ("key", "value")], axis=1)
        return {PROMPT: both_L2PGK.transpose(2, 0, 1, 3, 4).reshape(adapter.prefix_tokens, -1)}
    found = {}
    for factor in _factors(model, adapter):
        leaf = leaves[factor.path]
        parts = leaf if factor.layers else leaf[None]
        found |= {name: factor.theirs(part) for name, part in zip(factor.names(), parts, strict=True)}
    return found


# ---- PEFT -> here


def read_peft(
    directory: str | Path, model: Model, tables: Callable[[int], Mapping[str, np.ndarray]]
) -> tuple[Adapter, Params, int]:
    """The adapter in a folder for a base of `model`, its parameters as float32 NumPy arrays, and its number of words.

    tables: the base's embedding and head with so many words, [words, D], by the names of TABLES; asked for only where
    the folder holds such tables too, which must then be the same.
    Raises DataError for files that are missing, cut short or contradict each other, ConfigError for what cannot be
    represented here.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; give the folder that holds {CONFIG} and {WEIGHTS}")
    where = directory / CONFIG
    if not where.is_file():
        raise DataError(f"{where} is missing; a folder that PEFT saved holds one")
    config = read_json(where)
    if not (directory / WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise DataError(f"{directory} has no {WEIGHTS}; adapter_model.bin is a pickle: save it again with PEFT")
    stored = tensor_files.read_header(directory / WEIGHTS)
    words = _words(stored, model)
    grown = replace(model, vocab_size=words)
    modules = tuple(ours for ours, theirs in MODULES.items() if any(f".{theirs}.lora_" in name for name in stored))
    if config.get("peft_type") == "LORA" and not modules:
        raise DataError(f"{directory / WEIGHTS} holds no LoRA of a Llama's matrices ({', '.join(MODULES.values())})")
    adapter = peft_config.from_peft(config, grown, modules, where)
    if "head" in modules and model.tied_embeddings:
        raise ConfigError(f"{directory}: it adapts lm_head, which this base ties to its embedding; {MERGE}")
    _check(stored, _expected(grown, adapter), functools.partial(tables, words), model.vocab_size, directory)

    def read(name: str) -> np.ndarray:
        tensor = tensor_files.read(stored[name]).astype(np.float32)
        if not np.all(np.isfinite(tensor)):
            raise DataError(f"{directory / WEIGHTS}: tensor {name} holds values that are not finite; save it again")
        return tensor

    if adapter.method == "prefix":
        rows = read(PROMPT).reshape(adapter.prefix_tokens, model.layers, 2, model.kv_heads, model.head_dim)
        key, value = (np.ascontiguousarray(rows[:, :, i].swapaxes(0, 1)) for i in range(2))
        return adapter, {"layers": {"prefix": {"key": key, "value": value}}}, words
    params: Params = {}
    for factor in _factors(grown, adapter):
        parts = [factor.ours(read(name)) for name in factor.names()]
        node = params
        for key in factor.path[:-1]:
            node = node.setdefault(key, {})
        node[factor.path[-1]] = np.stack(parts) if factor.layers else np.ascontiguousarray(parts[0])
    return adapter, params, words


def _words(stored: Mapping[str, Stored], model: Model) -> int:
    """Rows of the embedding that goes along, or the base's number of words."""
    table = stored.get(_PREFIX + TABLES["embed_tokens"])
    longer = table is not None and len(table.shape) == 2 and model.vocab_size < table.shape[0] < 2**31
    return table.shape[0] if longer else model.vocab_size


def _expected(model: Model, adapter: Adapter) -> dict[str, Shape]:
    if adapter.method == "prefix":
        return {PROMPT: (adapter.prefix_tokens, model.layers * 2 * model.kv_heads * model.head_dim)}
    return {name: factor.theirs_shape for factor in _factors(model, adapter) for name in factor.names()}


def _check(
    stored: dict[str, Stored],
    expected: dict[str, Shape],
    tables: Callable[[], Mapping[str, np.ndarray]],
    words: int,
    where: Path,
) -> None:
    """Raise DataError unless exactly these tensors are there, and tables, if any, that are the base's with `words`."""
    for name, shape in expected.items():
        if name not in stored:
            raise DataError(f"{where / WEIGHTS} lacks tensor {name} {list(shape)}, which {CONFIG} and the base ask for")
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise DataError(
                f"{stored[name].file}: tensor {name} is {found}; {CONFIG} and the base make it {list(shape)}"
            )
    places = {_PREFIX + name: ours for ours, name in TABLES.items()}
    places |= {name.replace(".weight", ".base_layer.weight"): ours for name, ours in places.items()}
    extra = sorted(stored.keys() - expected.keys())
    for name in extra:
        if name not in places:
            raise DataError(
                f"{where / WEIGHTS}: tensor {shown(name)} {list(stored[name].shape)} has no place in this adapter; "
                "only LoRA matrices and prefixes can be imported"
            )
    of_base = tables() if extra else {}
    for name in extra:
        table = of_base.get(places[name], np.zeros(()))
        given = tensor_files.read(stored[name])
        if given.shape != table.shape or not _same(given, table.astype(given.dtype), words):
            raise DataError(
                f"{where / WEIGHTS}: {name} {list(given.shape)} is not the base's with the mean for new words: it was "
                f"trained too, or belongs to another base; {MERGE}"
            )


def _same(given: np.ndarray, table: np.ndarray, words: int) -> bool:
    """Whether the rows of the base's words are bit for bit the same, and those of new ones to rounding: a mean depends
    on the order of its sum."""
    near = np.abs(given[words:].astype(np.float32) - table[words:].astype(np.float32))
    rounding = 1e-5 if given.dtype == np.float32 else 1e-2
    largest = np.abs(table[words:].astype(np.float32)).max(initial=0)
    return np.array_equal(given[:words], table[:words]) and bool(np.all(near <= rounding * largest))
