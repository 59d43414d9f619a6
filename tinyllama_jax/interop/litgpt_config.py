"""Configurations of lit-gpt's models <-> `config.Model`: lit_config.json of the TinyLlama repository, model_config.yaml
of today's litgpt.  Without one of them the tensors' shapes are looked up among the presets.

Fields and what they mean: lit_gpt/config.py of github.com/jzhang38/TinyLlama, litgpt/config.py and model.py of
github.com/Lightning-AI/litgpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.hf_config import short, value_of
from tinyllama_jax.interop.json_files import read_json
from tinyllama_jax.interop.tensor_files import Shape
from tinyllama_jax.presets import PRESETS

JSON_FILE, YAML_FILE = "lit_config.json", "model_config.yaml"
OLD_NAMES = {"_norm_class": "norm_class_name", "_mlp_class": "mlp_class_name", "condense_ratio": "rope_condense_ratio"}

# What changes the computation, with the values that a Llama has; a field that is absent has one of them.
INERT: dict[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm", "FusedRMSNorm"),
    "mlp_class_name": ("LLaMAMLP",),
    "parallel_residual": (False,),
    "shared_attention_norm": (False,),
    "bias": (False,),
    "attn_bias": (False,),
    "lm_head_bias": (False,),
    "norm_1": (True,),
    "norm_2": (True,),
    "norm_qk": (False,),
    "post_attention_norm": (False,),
    "post_mlp_norm": (False,),
    "scale_embeddings": (False,),
    "rotary_percentage": (1.0,),
    "attention_scores_scalar": (None,),
    "sliding_window_size": (None,),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "n_expert": (0,),
    "latent_attention": (None,),
    "rope_local_base_freq": (None,),
}


def read_config(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The configuration beside a model and its file; None when there is none.  Raises DataError."""
    if (folder / YAML_FILE).is_file():
        path = folder / YAML_FILE
        try:
            config = yaml.safe_load(path.read_bytes())
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}); copy it again") from None
        if not isinstance(config, dict):
            raise DataError(f"{path} holds a {type(config).__name__}, no mapping; copy it again from its source")
        return config, path
    if (folder / JSON_FILE).is_file():
        return read_json(folder / JSON_FILE), folder / JSON_FILE
    return None


def model_from_config(config: dict[str, Any], vocab_size: int, where: Path) -> Model:
    """The `Model` that a configuration describes; vocab_size: rows of the embedding, padding included.

    Raises ConfigError for what `Model` cannot represent, naming the field.
    """
    config = {OLD_NAMES.get(str(key), str(key)): value for key, value in config.items()}
    for key, inert in INERT.items():
        if key in config and config[key] not in inert:
            raise ConfigError(f"{where}: {key}={short(config[key])} cannot be represented; only {inert[0]} can")

    def number(key: str, default: Any) -> Any:
        return value_of(config, key, default, where)

    d_model, heads = number("n_embd", int), number("n_head", int)
    if config.get("head_size") is None and d_model % heads:
        raise ConfigError(f"{where}: n_embd={d_model} is no multiple of n_head={heads}; set head_size")
    try:
        return Model(
            vocab_size=vocab_size,
            d_model=d_model,
            layers=number("n_layer", int),
            heads=heads,
            kv_heads=number("n_query_groups", heads),
            head_dim=number("head_size", d_model // heads),
            d_ff=number("intermediate_size", int),
            context_tokens=number("block_size", int),
            norm_eps=number("norm_eps", 1e-5),
            rope=_rope(config, where),
        )
    except ConfigError as error:
        raise error if str(where) in str(error) else ConfigError(f"{where}: {error}") from None


def _rope(config: dict[str, Any], where: Path) -> Rope:
    theta = value_of(config, "rope_base", 10_000.0, where)
    ratio = value_of(config, "rope_condense_ratio", 1.0, where)
    change = config.get("rope_adjustments") or {}
    if not isinstance(change, dict) or change.keys() & {"beta_fast", "beta_slow"} or (change and ratio != 1):
        raise ConfigError(f"{where}: rope_adjustments={short(change)} cannot be represented; llama3's and a factor can")
    if not change:
        return Rope(kind="linear", theta=theta, factor=ratio) if ratio != 1 else Rope(theta=theta)
    inside = f"{where}: rope_adjustments"
    factor = value_of(change, "factor", float, inside)
    if change.keys() == {"factor"}:
        return Rope(kind="linear", theta=theta, factor=factor)
    low, high = (value_of(change, f"{name}_freq_factor", float, inside) for name in ("low", "high"))
    original = value_of(change, "original_max_seq_len", int, inside)
    return Rope(
        kind="llama3",
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_tokens=original,
    )


def model_from_shapes(shapes: Mapping[str, Shape], mlp_gate: str, where: Path) -> tuple[Model, str]:
    """The preset with these tensors, and its name.  How a width is cut into heads shows in no shape.

    mlp_gate: name of the first layer's gate, [d_ff, d_model].  Raises DataError when no preset has them.
    """
    first = "transformer.h.0.attn."
    try:
        vocab_size, d_model = shapes["transformer.wte.weight"]
        fused = next(shapes[name] for name in (first + "qkv.weight", first + "attn.weight") if name in shapes)
        query, d_ff = shapes[first + "proj.weight"][1], shapes[mlp_gate][0]
    except (KeyError, IndexError, ValueError, StopIteration):
        raise DataError(f"{where} holds no model of lit-gpt's Llama; its names begin otherwise") from None
    layers = sum(name.endswith(".norm_1.weight") for name in shapes)
    for name, model in PRESETS.items():
        width = model.heads * model.head_dim
        kind = (model.layers, model.d_model, model.d_ff, width, width + 2 * model.kv_heads * model.head_dim)
        if kind == (layers, d_model, d_ff, query, fused[0]):
            return replace(model, vocab_size=vocab_size), name
    found = f"{layers} layers of width {d_model}, d_ff {d_ff}, QKV of {fused[0]} rows"
    raise DataError(
        f"{where.parent} has neither {YAML_FILE} nor {JSON_FILE}, and no preset has {found}; write {YAML_FILE} there "
        "with n_layer, n_embd, n_head, n_query_groups, intermediate_size and block_size"
    )


def config_for(model: Model, layout: str) -> dict[str, Any]:
    """What lit_config.json (layout tinyllama) or model_config.yaml (litgpt) says of `model`.

    Raises ConfigError for RoPE that the other side does not compute, or heads that it cannot cut.
    """
    rope, even = model.rope, model.heads * model.head_dim == model.d_model
    kinds = ("default", "linear") if layout == "tinyllama" else ("default", "linear", "llama3")
    if rope.kind not in kinds:
        raise ConfigError(f"model.rope.kind={rope.kind} cannot be exported as {layout}: it has {', '.join(kinds)}")
    theta, ratio = _whole(rope.theta), _whole(rope.factor) if rope.kind == "linear" else 1
    common = {
        "block_size": model.context_tokens,
        "vocab_size": model.vocab_size,
        "padding_multiple": 1,
        "padded_vocab_size": model.vocab_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.d_model,
        "n_query_groups": model.kv_heads,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "shared_attention_norm": False,
        "norm_eps": model.norm_eps,
        "intermediate_size": model.d_ff,
    }
    if layout == "tinyllama":
        if theta != 10_000 or not even:
            raise ConfigError("the layout tinyllama has theta 10000 and heads of n_embd / n_head; use --layout litgpt")
        old = {"_norm_class": "FusedRMSNorm", "_mlp_class": "LLaMAMLP", "condense_ratio": ratio}
        return {"org": "StatNLP-research", "name": "tinyllama_jax"} | common | old
    change = None
    if rope.kind == "llama3":
        change = {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_seq_len": rope.original_context_tokens,
        }
    new = {"head_size": model.head_dim, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}
    new |= {"rope_base": theta, "rope_condense_ratio": ratio} | ({"rope_adjustments": change} if change else {})
    return {"name": "tinyllama_jax", "hf_config": {}} | common | new


def config_text(config: dict[str, Any]) -> str:
    """As model_config.yaml."""
    return yaml.safe_dump(config, sort_keys=False)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
