"""lit-gpt's checkpoints of Llamas <-> a `Model` and its parameters, in the two layouts that are in use.

    tinyllama   the TinyLlama repository and lit-gpt of its time: attn.attn is [for each key/value head: its query
                heads' rows, its key's, its value's]; mlp.swiglu.w1, w2, w3
    litgpt      today's: attn.qkv is [all queries; all keys; all values]; mlp.fc_1, fc_2, proj

Names decide which one a file has, for attention and MLP apart, since lit-gpt in between had old attention and new MLP.
RoPE pairs dimensions by halves on all sides, so rows within a head stay where they are.  Fused matrices are cut in
Hugging Face's layout (hf.py), so that the rest is one list of names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.config import Model, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import hf, litgpt_config, torch_files
from tinyllama_jax.interop.json_files import write_json, write_text
from tinyllama_jax.interop.new_folder import new_folder
from tinyllama_jax.interop.tensor_files import Shape

LAYOUTS = ("tinyllama", "litgpt")
WEIGHTS = "lit_model.pth"
TOP = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
LAYER = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj"}
MLP = {  # gate, up, down
    "tinyllama": ("mlp.swiglu.w1", "mlp.swiglu.w2", "mlp.swiglu.w3"),
    "litgpt": ("mlp.fc_1", "mlp.fc_2", "mlp.proj"),
}
FUSED = {"tinyllama": "attn.attn", "litgpt": "attn.qkv"}


def _names(hf_name: str, attention: str, mlp: str) -> tuple[str, int | None]:
    """lit-gpt's name, and which part of it is meant: 0, 1, 2 for query, key, value of a fused matrix, None for all."""
    stem = hf_name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight", None
    _, _, layer, below = stem.split(".", 3)  # model.layers.N.
    kind = below.split(".")[-1]
    if kind in ("q_proj", "k_proj", "v_proj"):
        return f"transformer.h.{layer}.{FUSED[attention]}.weight", "qkv".index(kind[0])
    names = LAYER | dict(zip(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), MLP[mlp], strict=True))
    return f"transformer.h.{layer}.{names[below]}.weight", None


def _split(fused_RD: np.ndarray, part: int, model: Model, attention: str) -> np.ndarray:
    """Query [H K, D], key or value [G K, D] out of the fused matrix; a view where it can be one."""
    H, G, K = model.heads, model.kv_heads, model.head_dim
    if attention == "litgpt":
        ends = [0, H * K, (H + G) * K, (H + 2 * G) * K]
        return fused_RD[ends[part] : ends[part + 1]]
    groups_GNKD = fused_RD.reshape(G, H // G + 2, K, -1)
    which = (slice(0, H // G), slice(H // G, H // G + 1), slice(H // G + 1, None))[part]
    return groups_GNKD[:, which].reshape(-1, fused_RD.shape[-1])


def _fuse(query: np.ndarray, key: np.ndarray, value: np.ndarray, model: Model, attention: str) -> np.ndarray:
    """The inverse of `_split`."""
    if attention == "litgpt":
        return np.concatenate([query, key, value])
    G, K, D = model.kv_heads, model.head_dim, query.shape[-1]
    parts = [matrix.reshape(G, -1, K, D) for matrix in (query, key, value)]
    return np.concatenate(parts, axis=1).reshape(-1, D)


def layouts(names: Mapping[str, Any], where: Path) -> tuple[str, str]:
    """(attention's, the MLP's) layout, from the names of the first layer.  Raises DataError."""
    found = []
    for parts in (FUSED, {layout: names_[0] for layout, names_ in MLP.items()}):
        here = [layout for layout, name in parts.items() if f"transformer.h.0.{name}.weight" in names]
        if len(here) != 1:
            raise DataError(f"{where} holds no Llama of lit-gpt: the first layer has no {' or '.join(parts.values())}")
        found += here
    return found[0], found[1]


def from_state(state: Mapping[str, np.ndarray], model: Model, where: Path) -> tuple[Model, hf.Params]:
    """The parameters in a state_dict, and the model, tied where there is no head or it equals the embedding.

    Raises DataError for missing, unexpected and misshapen tensors.
    """
    attention, mlp = layouts(state, where)
    hf.require_layers(model, state, where)
    head, table = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    model = replace(model, tied_embeddings=head is None or (table is not None and same(head, table)))
    expected: dict[str, Shape] = {}
    for name, shape in hf.hf_shapes(model).items():
        theirs, part = _names(name, attention, mlp)
        rows = expected.get(theirs, (0,))[0] if part is not None else 0
        expected[theirs] = (rows + shape[0], *shape[1:])
    if model.tied_embeddings and head is not None:
        expected["lm_head.weight"] = (model.vocab_size, model.d_model)
    torch_files.require_exactly({name: t.shape for name, t in state.items()}, expected, where, "rotary_emb.inv_freq")

    def read(name: str) -> np.ndarray:
        theirs, part = _names(name, attention, mlp)
        return state[theirs] if part is None else _split(state[theirs], part, model, attention)

    return model, hf.assemble(model, read)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices have the same bits."""
    return (
        a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))
    )


def to_state(params: hf.Params, model: Model, layout: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in one of LAYOUTS; a tied model has its embedding as head too, for lit-gpt ties nothing."""
    read = hf.hf_reader(params, model)
    for name in hf.hf_shapes(model):
        theirs, part = _names(name, layout, layout)
        if part is None:
            yield theirs, read(name)
        elif part == 0:
            fused = (read(name.replace("q_proj", f"{kind}_proj")) for kind in "qkv")
            yield theirs, _fuse(*fused, model, layout)
        if model.tied_embeddings and theirs == "transformer.wte.weight":
            yield "lm_head.weight", read(name)


def read_litgpt(source: Path) -> tuple[Model, hf.Params, Path, list[str]]:
    """(model, parameters, folder, lines for the user) of a weights file or the folder that holds one.

    Raises DataError for what is no whole Llama of lit-gpt, ConfigError for one that `Model` cannot represent.
    """
    path = _weights_file(source)
    config = litgpt_config.read_config(path.parent)
    state = torch_files.load(path)
    if "transformer.wte.weight" not in state or state["transformer.wte.weight"].ndim != 2:
        raise DataError(f"{path} holds no model of lit-gpt: there is no matrix transformer.wte.weight")
    notes = []
    if config:
        model = litgpt_config.model_from_config(config[0], state["transformer.wte.weight"].shape[0], config[1])
    else:
        gate = f"transformer.h.0.{MLP[layouts(state, path)[1]][0]}.weight"
        model, name = litgpt_config.model_from_shapes({n: t.shape for n, t in state.items()}, gate, path)
        notes = [f"{path.parent} has no model_config.yaml: heads, context and RoPE are those of the preset {name}"]
    return *from_state(state, model, path), path.parent, notes


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"{source} is not there; give a .pth file of lit-gpt or the folder that holds {WEIGHTS}")
    if (source / WEIGHTS).is_file():
        return source / WEIGHTS
    files = sorted(path for ending in ("pth", "ckpt", "bin") for path in source.glob(f"*.{ending}"))
    if len(files) != 1:
        raise DataError(f"{source} holds no {WEIGHTS}, and {len(files)} other files of weights; name the one to import")
    return files[0]


def write_litgpt(
    params: hf.Params, model: Model, directory: Path, *, layout: str, dtype: str, files: list[Path]
) -> None:
    """Write lit_model.pth, the configuration that the layout's own code reads, and the tokenizer's files.

    The folder appears when it is complete.  Raises ConfigError when it holds something or the layout has no such model.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout is {layout!r}; it must be {' or '.join(LAYOUTS)}")
    config = litgpt_config.config_for(model, layout)
    with new_folder(directory) as unfinished:
        torch_files.save(unfinished / WEIGHTS, to_state(params, model, layout), dtype)
        if layout == "tinyllama":
            write_json(unfinished / litgpt_config.JSON_FILE, config)
        else:
            write_text(unfinished / litgpt_config.YAML_FILE, litgpt_config.config_text(config))
        for file in files:
            (unfinished / file.name).write_bytes(file.read_bytes())
