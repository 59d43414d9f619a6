"""Hugging Face Llama directories <-> a `Model` and its parameters (layout: model/transformer.py).

Both directions hold one tensor beside the model, so 1.1B parameters pass through a machine that just fits them.
Nothing here touches a device: imported parameters are NumPy arrays, and exported ones may be NumPy or JAX arrays,
sharded or not.

RoPE pairs dimensions by halves on both sides, so no matrix is permuted; Hugging Face stores each as [out, in] with
heads flattened, and layers apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import hf_tokenizer, tensor_files
from tinyllama_jax.interop.hf_config import model_from_hf, model_to_hf
from tinyllama_jax.interop.json_files import read_json, shown, write_json, write_text
from tinyllama_jax.interop.new_folder import new_folder, refuse_what_exists
from tinyllama_jax.interop.tensor_files import Shape, Stored

Params = dict[str, Any]
TreePath = tuple[str, ...]

# Path in our tree (below `layers`: stacked), Hugging Face's name, its axes (flattened ones together), our axes.
WEIGHTS: tuple[tuple[TreePath, str, str, str], ...] = (
    (("embed", "embedding"), "model.embed_tokens.weight", "V D", "VD"),
    (("layers", "attention_norm", "scale"), "model.layers.{}.input_layernorm.weight", "D", "D"),
    (("layers", "attention", "query"), "model.layers.{}.self_attn.q_proj.weight", "HK D", "DHK"),
    (("layers", "attention", "key"), "model.layers.{}.self_attn.k_proj.weight", "GK D", "DGK"),
    (("layers", "attention", "value"), "model.layers.{}.self_attn.v_proj.weight", "GK D", "DGK"),
    (("layers", "attention", "out"), "model.layers.{}.self_attn.o_proj.weight", "D HK", "HKD"),
    (("layers", "mlp_norm", "scale"), "model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    (("layers", "mlp", "gate"), "model.layers.{}.mlp.gate_proj.weight", "F D", "DF"),
    (("layers", "mlp", "up"), "model.layers.{}.mlp.up_proj.weight", "F D", "DF"),
    (("layers", "mlp", "down"), "model.layers.{}.mlp.down_proj.weight", "D F", "FD"),
    (("norm", "scale"), "model.norm.weight", "D", "D"),
    (("head", "kernel"), "lm_head.weight", "V D", "DV"),
)


class _Weight:
    """One row of WEIGHTS for one model: its names, shapes and the way between the two layouts."""

    def __init__(self, path: TreePath, name: str, theirs: str, ours: str, model: Model):
        sizes = {"V": model.vocab_size, "D": model.d_model, "F": model.d_ff}
        sizes |= {"H": model.heads, "G": model.kv_heads, "K": model.head_dim}
        flat = theirs.replace(" ", "")
        self.path, self.template = path, name
        self.layers = model.layers if path[0] == "layers" else None
        self.shape: Shape = tuple(sizes[axis] for axis in ours)  # of one layer
        self.hf_shape: Shape = tuple(math.prod(sizes[axis] for axis in group) for group in theirs.split())
        self._split_shape = tuple(sizes[axis] for axis in flat)
        self._to_ours = tuple(flat.index(axis) for axis in ours)
        self._to_theirs = tuple(ours.index(axis) for axis in flat)

    def names(self) -> list[str]:
        """Hugging Face's names, one per layer."""
        return [self.template.format(i) for i in range(self.layers)] if self.layers else [self.template]

    def stacked_shape(self) -> Shape:
        return (self.layers, *self.shape) if self.layers else self.shape

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self._split_shape).transpose(self._to_ours)

    def theirs(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.transpose(self._to_theirs).reshape(self.hf_shape)


def _weights(model: Model) -> list[_Weight]:
    return [_Weight(*row, model) for row in WEIGHTS if not (model.tied_embeddings and row[0][0] == "head")]


# ---- Hugging Face -> here


def read_hf(directory: str | Path) -> tuple[Model, Params]:
    """The model in a Hugging Face directory: its `Model` and its parameters as float32 NumPy arrays.

    Reads config.json and model.safetensors, or its shards; float32, float16 and bfloat16, all exact in float32.
    Peak memory is the float32 model and one tensor.
    Raises DataError for a missing, unexpected, misshapen or cut-off tensor, ConfigError for a model that `Model`
    cannot represent.  Both before any weight is read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; give the folder that holds config.json and the weights")
    model = model_from_hf(read_json(directory / "config.json"), directory / "config.json")
    stored = tensor_files.scan(directory)
    _check(stored, model, directory)
    return model, assemble(model, lambda name: tensor_files.read(stored[name]))


def left_out(directory: Path) -> list[str]:
    """Lines that say what an import does not use: `auto_map` names Python files of the folder, which are never run."""
    auto_map = read_json(directory / "config.json").get("auto_map")
    return [f"{directory / 'config.json'} names code of its own (auto_map), which is not run"] if auto_map else []


def assemble(model: Model, read: Callable[[str], np.ndarray]) -> Params:
    """The parameters, from a function that gives each tensor by Hugging Face's name, in its layout, of any float type.

    One layer's tensor is asked for at a time; the shapes must be those of `hf_shapes`.
    """
    params: Params = {}
    for weight in _weights(model):
        array = np.empty(weight.stacked_shape(), np.float32)
        for layer, name in enumerate(weight.names()):
            # Cast and transposed while it is copied to its place: no float32 copy of a 16-bit tensor in between.
            (array[layer] if weight.layers else array)[...] = weight.ours(read(name))
        node = params
        for key in weight.path[:-1]:
            node = node.setdefault(key, {})
        node[weight.path[-1]] = array
    return params


def hf_shapes(model: Model) -> dict[str, Shape]:
    """Name -> shape of every tensor, in the order in which they are written."""
    return {name: weight.hf_shape for weight in _weights(model) for name in weight.names()}


def require_layers(model: Model, tensors: Collection[str], where: str | Path) -> None:
    """Raises DataError when the configuration claims more layers than there are tensors, before names are made."""
    if model.layers > len(tensors):
        raise DataError(
            f"{where}: its configuration claims {model.layers} layers, its files hold {len(tensors)} tensors"
        )


def _check(stored: dict[str, Stored], model: Model, directory: Path) -> None:
    """Raise DataError unless exactly the model's tensors are there, in the shapes that config.json gives them."""
    require_layers(model, stored, directory)
    expected = hf_shapes(model)
    for name, shape in expected.items():
        if name not in stored:
            raise DataError(f"{directory} lacks tensor {name} {list(shape)}, which its config.json asks for")
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise DataError(f"{stored[name].file}: tensor {name} is {found}; config.json makes it {list(shape)}")
    for name in stored.keys() - expected.keys():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer of old versions, computed from the config
        if name == "lm_head.weight" and model.tied_embeddings:
            pair = [stored[n] for n in (name, "model.embed_tokens.weight")]
            if (
                len({(s.shape, s.dtype) for s in pair}) == 1
                and len({tensor_files.read(s).tobytes() for s in pair}) == 1
            ):
                continue
            raise DataError(f"{stored[name].file}: {name} differs from the embedding, but config.json ties the two")
        raise DataError(
            f"{stored[name].file}: tensor {shown(name)} {list(stored[name].shape)} has no place in this model"
        )


# ---- here -> Hugging Face


def hf_tensors(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in Hugging Face's names and layout, one layer's at a time; also for gradients.

    Raises ConfigError when `params` does not have the shapes of `model`.
    """
    read = hf_reader(params, model)
    for name in hf_shapes(model):
        yield name, read(name)


def hf_reader(params: Params, model: Model) -> Callable[[str], np.ndarray]:
    """The inverse of `assemble`: a function that gives one tensor by name.  Raises ConfigError as `hf_tensors` does."""
    places: dict[str, tuple[_Weight, Any, int]] = {}
    for weight in _weights(model):
        leaf: Any = params
        for key in weight.path:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if leaf is None or tuple(leaf.shape) != weight.stacked_shape():
            found = "missing" if leaf is None else f"{list(leaf.shape)}"
            raise ConfigError(
                f"parameter {'.'.join(weight.path)} is {found}; this model makes it {list(weight.stacked_shape())}"
            )
        places |= {name: (weight, leaf, layer) for layer, name in enumerate(weight.names())}

    def read(name: str) -> np.ndarray:
        weight, leaf, layer = places[name]
        return weight.theirs(np.asarray(leaf[layer] if weight.layers else leaf))

    return read


def write_hf(
    params: Params,
    model: Model,
    directory: str | Path,
    *,
    dtype: str = "float32",
    tokenizer_files: Iterable[str | Path] = (),
    marks: str | None = None,
    shard_bytes: int = 5_000_000_000,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a directory that transformers, and what builds on it, loads as LlamaForCausalLM.

    dtype: float32 (bit for bit), bfloat16 or float16, rounded to nearest even.
    tokenizer_files: tokenizer.model, tokenizer.json or both, copied under these names with what AutoTokenizer needs;
    and what goes with them, such as a chat template.
    marks: how documents were marked, and so what the tokenizer puts before a text (see hf_tokenizer.write).
    shard_bytes: size of a weight file above which the next is begun.
    texts: more files by name, such as README.md.
    The directory appears under its name when it is complete; peak memory is one tensor beside `params`.
    Raises ConfigError when the directory holds something, the model has no equivalent among Hugging Face's Llamas,
    or a value is too large for float16; DataError for an unusable tokenizer.
    """
    directory = Path(directory)
    if dtype not in tensor_files.NAMES:
        raise ConfigError(f"export dtype is {dtype!r}; it must be one of {', '.join(tensor_files.NAMES)}")
    if shard_bytes <= 0:
        raise ConfigError(f"shard_bytes is {shard_bytes}; it must be positive")
    refuse_what_exists(directory)
    config = model_to_hf(model, dtype)
    with new_folder(directory) as unfinished:
        for name, text in texts.items():
            write_text(unfinished / name, text)
        ids = hf_tokenizer.write(tokenizer_files, unfinished, model, marks)
        # Without a tokenizer the ids are null: left out, transformers would assume 1 and 2.
        write_json(unfinished / "config.json", config | (ids or {"bos_token_id": None, "eos_token_id": None}))
        if not (unfinished / "generation_config.json").exists():  # a foreign model's own is among the tokenizer's files
            generation = {"_from_model_config": True, **ids, "max_length": model.context_tokens}
            write_json(unfinished / "generation_config.json", generation)
        specs = list(hf_shapes(model).items())
        tensor_files.write(unfinished, specs, (t for _, t in hf_tensors(params, model)), dtype, shard_bytes)
    return directory
