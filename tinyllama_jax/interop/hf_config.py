"""config.json of Hugging Face's Llama <-> `config.Model`; what the other side cannot represent is refused.

RoPE has two spellings: `rope_theta` and `rope_scaling` at the top (transformers 4), with the kind under `type` or
`rope_type`; and `rope_parameters` with everything inside (transformers 5).  Both are read; the first is written,
because every version and the inference engines read it.  What absent fields mean is as in transformers'
configuration_llama.py and modeling_rope_utils.py.
"""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

from tinyllama_jax.config import Model, Rope
from tinyllama_jax.errors import ConfigError

# Field of `Model`, key in config.json, and the value when the key is absent, or a type when it must be there.
FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("vocab_size", "vocab_size", int),
    ("d_model", "hidden_size", int),
    ("layers", "num_hidden_layers", int),
    ("heads", "num_attention_heads", int),
    ("d_ff", "intermediate_size", int),
    ("context_tokens", "max_position_embeddings", 2048),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tied_embeddings", "tie_word_embeddings", False),
)

# Keys that change the computation, with the values under which they do not.
INERT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "quantization_config": (None,),
}


def model_from_hf(config: dict, where: Path | str) -> Model:
    """The `Model` that a config.json describes.  where: the file, for messages.

    Attention dropout is not read: it does not change what the weights mean.
    Raises ConfigError for what `Model` cannot represent, naming the key.
    """
    kind, classes = config.get("model_type", "llama"), config.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or classes != ["LlamaForCausalLM"]:
        what = f"this is a {short(kind)} model {short(classes)}"
        raise ConfigError(f"{where}: {what}; only LlamaForCausalLM can be imported")
    values = {field: value_of(config, key, default, where) for field, key, default in FIELDS}
    d_model, heads = values["d_model"], values["heads"]
    if config.get("head_dim") is None and d_model % heads:
        raise ConfigError(f"{where}: hidden_size={d_model} is no multiple of num_attention_heads={heads}; set head_dim")
    values["kv_heads"] = value_of(config, "num_key_value_heads", heads, where)
    values["head_dim"] = value_of(config, "head_dim", d_model // heads, where)
    for key, inert in INERT.items():
        if config.get(key) not in inert:
            raise ConfigError(f"{where}: {key}={short(config[key])} cannot be represented; only {inert[0]} can")
    try:
        return Model(**values, rope=_rope_from_hf(config, values["context_tokens"], where))
    except ConfigError as error:
        raise error if str(where) in str(error) else ConfigError(f"{where}: {error}") from None


def value_of(config: dict, key: str, default: Any, where: Path | str) -> Any:
    """config[key] of the type of `default`; an absent or null key means `default`, and is an error without one."""
    value = config.get(key)
    if value is None:
        if isinstance(default, type):
            raise ConfigError(f"{where} has no {key}, which it needs; copy it again from its source")
        return default
    wanted = default if isinstance(default, type) else type(default)
    if wanted is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where}: {key} is {short(value)}; it must be of type {wanted.__name__}")
    if wanted is int and not 1 <= value < 2**31:
        raise ConfigError(f"{where}: {key} is {short(value)}; it must be positive, and below 2^31")
    if wanted is float and not 0 <= value < math.inf:
        raise ConfigError(f"{where}: {key} is {value}; it must be positive")
    return value


def _rope_from_hf(config: dict, context_tokens: int, where: Path | str) -> Rope:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_scaling is {short(rope)}; it must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{where}: RoPE differs between layers; only one for all layers can be represented")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is not 1; transformers' Llama does not apply it either")
    theta = value_of({**config, **rope}, "rope_theta", 10_000.0, where)

    def number(key: str, default: float | type = float) -> float:
        return value_of(rope, key, default, f"{where}: RoPE of kind {short(kind)}")

    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    fields: dict[str, Any] = {"kind": kind, "theta": theta}
    if kind in ("yarn", "llama3"):
        key = "original_max_position_embeddings"
        fields["original_context_tokens"] = value_of({key: original or None}, key, context_tokens, where)
    if kind in ("linear", "llama3"):
        fields["factor"] = number("factor")
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            raise ConfigError(f"{where}: yarn with truncate=false cannot be represented; its ramp ends on whole pairs")
        fields["factor"] = number("factor", context_tokens / fields["original_context_tokens"])
        fields |= {"beta_fast": number("beta_fast", 32.0), "beta_slow": number("beta_slow", 1.0)}
        fields["attention_factor"] = _yarn_attention_factor(rope, fields["factor"], where)
    elif kind == "llama3":
        fields |= {key: number(key) for key in ("low_freq_factor", "high_freq_factor")}
    elif kind not in ("default", "linear"):
        known = "default, linear, yarn, llama3"
        raise ConfigError(f"{where}: rope_type {short(kind)} cannot be represented; {known} can")
    return Rope(**fields)


def _yarn_attention_factor(rope: dict, factor: float, where: Path | str) -> float:
    """0 (the formula's default), the stated factor, or the quotient of DeepSeek's two `mscale` fields."""
    if rope.get("attention_factor") is not None:
        stated = value_of(rope, "attention_factor", 1.0, where)
        if stated <= 0:
            raise ConfigError(f"{where}: attention_factor is {stated}; it must be positive")
        return stated
    above, below = (value_of(rope, key, 0.0, where) for key in ("mscale", "mscale_all_dim"))
    if not (above and below):
        return 0.0
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def model_to_hf(model: Model, dtype: str) -> dict:
    """config.json for `model`, without the tokenizer's ids.  Raises ConfigError for what Llama cannot represent."""
    rope = model.rope
    if rope.kind == "ntk":
        theta = rope.theta * rope.factor ** (model.head_dim / max(model.head_dim - 2, 1))
        raise ConfigError(
            f"model.rope.kind=ntk has no name in Hugging Face's Llama; the same model is kind=default, theta={theta!r}"
        )
    if rope.kind in ("none", "partial"):
        raise ConfigError(
            f"model.rope.kind={rope.kind} cannot be exported: Hugging Face's Llama always rotates whole heads"
        )
    if model.d_model % model.heads:
        raise ConfigError(
            f"model.d_model={model.d_model} is no multiple of model.heads={model.heads}; transformers refuses that"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(model, field) for field, key, _ in FIELDS},
        "num_key_value_heads": model.kv_heads,
        "rope_theta": rope.theta,
        "rope_scaling": _scaling_to_hf(rope),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,  # a constant of the format; says nothing about how these weights began
        "pretraining_tp": 1,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model.head_dim * model.heads != model.d_model:
        config["head_dim"] = model.head_dim
    return config


def _scaling_to_hf(rope: Rope) -> dict | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = rope.original_context_tokens
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor:
            scaling["attention_factor"] = rope.attention_factor
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return scaling


def short(value: Any) -> str:
    """A value in a message.  Bounded while it is made, too: YAML may hold lists of the same lists many levels deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40
