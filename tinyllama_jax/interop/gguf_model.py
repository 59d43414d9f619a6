"""A `Model` as metadata and tensors of a GGUF file of architecture `llama`, as llama.cpp reads them, and back.

llama.cpp rotates neighbouring dimensions of a head, where this package and Hugging Face rotate by halves: the rows of
Q and K change places, head by head (K's by key/value heads).  Everything else lies as in Hugging Face's files.

RoPE: `linear` and `yarn` are known to llama.cpp by name (yarn with its usual ends of the ramp, 32 and 1 rotations;
it reads no others for this architecture).  Any other change of frequencies is the tensor rope_freqs.weight, by which
each pair's frequency is divided.  A reader cannot tell from that what made it, so the fields go along under ROPE_KEY.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from tinyllama_jax import configio
from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.gguf_file import Header, read_tensor, short
from tinyllama_jax.interop.hf import hf_shapes

ARCHITECTURE = "llama"
ROPE_FREQS, ROPE_KEY = "rope_freqs.weight", "tinyllama_jax.rope"
YARN_ENDS = (32.0, 1.0)  # beta_fast, beta_slow
BIASES = "only models without biases, experts and other extras can be"

# Hugging Face's names and GGUF's.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

# Field of `Model`, key behind `llama.`, the type in a file; the first are also what a file must have.
FIELDS: tuple[tuple[str, str, type], ...] = (
    ("context_tokens", "context_length", int),
    ("d_model", "embedding_length", int),
    ("layers", "block_count", int),
    ("d_ff", "feed_forward_length", int),
    ("heads", "attention.head_count", int),
    ("norm_eps", "attention.layer_norm_rms_epsilon", float),
)
# Further keys that are read below or say nothing about the computation.  Any other must be zero or false.
KNOWN = {
    *(key for _, key, _ in FIELDS),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that Hugging Face calls `name`."""
    if not name.startswith("model.layers."):
        return NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}"


def interleave(name: str, tensor: np.ndarray, model: Model) -> np.ndarray:
    """A tensor [out, in] of Hugging Face's as it lies in a GGUF file: rotated pairs side by side."""
    heads = _rotated_heads(name, model)
    return tensor if not heads else _swap(tensor, heads, 2, model.head_dim // 2)


def halve(name: str, tensor: np.ndarray, model: Model) -> np.ndarray:
    """The inverse of `interleave`."""
    heads = _rotated_heads(name, model)
    return tensor if not heads else _swap(tensor, heads, model.head_dim // 2, 2)


def _rotated_heads(name: str, model: Model) -> int:
    return model.heads if ".q_proj." in name else model.kv_heads if ".k_proj." in name else 0


def _swap(tensor: np.ndarray, heads: int, first: int, second: int) -> np.ndarray:
    return tensor.reshape(heads, first, second, -1).swapaxes(1, 2).reshape(tensor.shape)


# ---- here -> GGUF


def metadata(model: Model) -> tuple[dict[str, int | float | str], np.ndarray | None]:
    """Metadata by key, and rope_freqs.weight (float32 [head_dim/2]) where RoPE needs it.

    Raises ConfigError for a model that llama.cpp cannot compute.
    """
    values: dict[str, Any] = {key: getattr(model, field) for field, key, _ in FIELDS}
    values |= {
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim,
        "vocab_size": model.vocab_size,
    }
    rope, own, factors = model.rope, {}, None
    theta = rope.theta
    if rope.kind in ("none", "partial"):
        raise ConfigError(f"model.rope.kind={rope.kind} cannot be exported: llama.cpp rotates whole heads of a Llama")
    if rope.kind == "ntk":  # no more than another theta
        theta *= rope.factor ** (model.head_dim / max(model.head_dim - 2, 1))
    elif rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    elif rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow) == YARN_ENDS:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_context_tokens,
        }
        if rope.attention_factor:  # llama.cpp multiplies with the formula's factor as well
            values["rope.scaling.attn_factor"] = rope.attention_factor / _yarn_scale(rope.factor)
    elif rope.kind in ("yarn", "llama3"):
        factors, scale = frequency_factors(model)
        own = {ROPE_KEY: json.dumps(configio.to_dict(rope))}
        if scale != 1:
            values["rope.scaling.attn_factor"] = scale
    values["rope.freq_base"] = theta
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()} | own, factors


def _yarn_scale(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0


def frequency_factors(model: Model) -> tuple[np.ndarray, float]:
    """By what each pair's frequency is divided, float32 [head_dim/2], and the factor on cos and sin."""
    from tinyllama_jax.model.rope import inverse_frequencies  # it imports jax

    scaled, scale = inverse_frequencies(model)
    plain, _ = inverse_frequencies(replace(model, rope=Rope(theta=model.rope.theta)))
    return (plain.astype(np.float64) / scaled).astype(np.float32), scale


# ---- GGUF -> here


def model_from(header: Header) -> Model:
    """The `Model` that a file describes, its tensors' names and shapes checked against it.

    Raises ConfigError for what `Model` cannot represent, by name, and DataError for what contradicts itself.
    """
    found, where = header.metadata, header.path
    architecture = header.get("general.architecture", str, "")
    if architecture != ARCHITECTURE:
        raise ConfigError(f"{where}: this is a model of architecture {short(architecture)}; only llama can be imported")
    if header.get("split.count", int, 0) > 1:
        raise ConfigError(f"{where} is one of several files; join them with llama-gguf-split --merge first")
    for key, value in found.items():
        name = key.removeprefix(ARCHITECTURE + ".")
        if name != key and name not in KNOWN and not (np.isscalar(value) and not value):
            raise ConfigError(f"{where}: {short(key)}={short(value)} cannot be represented; {BIASES} imported")
    values = {field: _value(header, key, kind) for field, key, kind in FIELDS}
    values["kv_heads"] = _value(header, "attention.head_count_kv", int, values["heads"])
    values["head_dim"] = _value(header, "attention.key_length", int, max(values["d_model"] // values["heads"], 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := _value(header, key, int, values["head_dim"])) != values["head_dim"]:
            raise ConfigError(f"{where}: llama.{key}={size} cannot be represented; the heads' {values['head_dim']} can")
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise DataError(f"{where} has no matrix token_embd.weight; it is no whole model: copy it again")
    values["vocab_size"] = _value(header, "vocab_size", int, table.shape[0])
    values["tied_embeddings"] = "output.weight" not in header.tensors
    if values["layers"] > len(header.tensors):
        raise DataError(f"{where}: llama.block_count={values['layers']}, but there are {len(header.tensors)} tensors")
    try:
        model = Model(**values)
        model = replace(model, rope=_rope(header, model))
    except ConfigError as error:
        raise error if str(where) in str(error) else ConfigError(f"{where}: {error}") from None
    _check_tensors(header, model)
    return model


def _check_tensors(header: Header, model: Model) -> None:
    expected = {gguf_name(name): shape for name, shape in hf_shapes(model).items()}
    for name, shape in expected.items():
        if name not in header.tensors:
            raise DataError(f"{header.path} lacks tensor {name} {list(shape)}, which its metadata asks for")
        if header.tensors[name].shape != shape:
            found = list(header.tensors[name].shape)
            raise DataError(f"{header.path}: tensor {name} is {found}; the metadata makes it {list(shape)}")
    for name in header.tensors.keys() - expected.keys() - {ROPE_FREQS}:
        raise ConfigError(f"{header.path}: tensor {short(name)} has no place in this model; {BIASES} imported")


def _value(header: Header, key: str, kind: type, default: Any = None) -> Any:
    """A positive number, or a text; one of the same value for every layer may be an array."""
    name = f"{ARCHITECTURE}.{key}"
    value = header.metadata.get(name, default)
    if value is None:
        raise DataError(f"{header.path} has no {name}, which a model needs; copy it again or convert it anew")
    if isinstance(value, np.ndarray) and value.size:
        if np.any(value != value[0]):
            raise ConfigError(f"{header.path}: {name} differs between layers; only one for all can be represented")
        value = value[0].item()
    if kind is str:
        good = isinstance(value, str)
    elif kind is int:
        good = type(value) is int and 0 < value < 1 << 31
    else:
        good = type(value) in (int, float) and math.isfinite(value) and value > 0
    if not good:
        raise DataError(f"{header.path}: {name} is {short(value)}; it must be a positive {kind.__name__}")
    # Stored as float32: the shortest number that rounds to it is the one that was meant.
    return float(str(np.float32(value))) if kind is float else value


def _rope(header: Header, model: Model) -> Rope:
    theta = _value(header, "rope.freq_base", float, 10_000.0)
    factor = _value(header, "rope.scaling.factor", float, _value(header, "rope.scale_linear", float, 1.0))
    kind = _value(header, "rope.scaling.type", str, "linear")
    scale = _value(header, "rope.scaling.attn_factor", float, 1.0)
    original = _value(header, "rope.scaling.original_context_length", int, model.context_tokens)
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"{header.path}: rope.scaling.type={short(kind)} cannot be represented; linear and yarn can")
    if kind == "none" or kind == "linear" and factor == 1:
        rope = Rope(theta=theta)
    elif kind == "linear":
        rope = Rope(kind="linear", theta=theta, factor=factor)
    else:
        rope = Rope(kind="yarn", theta=theta, factor=factor, original_context_tokens=original)
        if scale != 1:
            rope = replace(rope, attention_factor=float(str(np.float32(scale * _yarn_scale(factor)))))
    if ROPE_FREQS in header.tensors:
        if rope.kind != "default":
            raise ConfigError(f"{header.path}: {ROPE_FREQS} together with rope.scaling.type={kind} is not known here")
        return _rope_of_factors(header, model, theta, scale)
    if scale != 1 and rope.kind != "yarn":
        raise ConfigError(f"{header.path}: rope.scaling.attn_factor={scale} cannot be represented without yarn")
    return rope


def _rope_of_factors(header: Header, model: Model, theta: float, scale: float) -> Rope:
    """What made rope_freqs.weight: the fields in the file itself, or one of the known Llamas; else ConfigError."""
    tensor = header.tensors[ROPE_FREQS]
    if tensor.kind != "F32" or tensor.shape != (model.head_dim // 2,):
        wanted = f"F32 [{model.head_dim // 2}]"
        raise DataError(f"{header.path}: {ROPE_FREQS} is {tensor.kind} {list(tensor.shape)}; it must be {wanted}")
    factors = read_tensor(header.path, tensor)
    llama3 = Rope(kind="llama3", theta=theta, factor=8.0, original_context_tokens=8192)  # Llama 3.1
    candidates = [Rope(theta=theta), llama3, replace(llama3, factor=32.0)]  # Llama 3.2
    try:
        own = configio.from_dict(Rope, json.loads(header.metadata.get(ROPE_KEY, "{}")))
        candidates.insert(0, replace(own, theta=theta))
        for rope in candidates:
            with np.errstate(all="ignore"):
                made, made_scale = frequency_factors(replace(model, rope=rope))
            if np.allclose(made, factors, rtol=1e-5, atol=0) and math.isclose(made_scale, scale, rel_tol=1e-6):
                return rope
    except (ValueError, TypeError, ArithmeticError, RecursionError, ConfigError):
        raise DataError(f"{header.path}: {ROPE_KEY} is not readable; copy the file again") from None
    raise ConfigError(
        f"{header.path}: {ROPE_FREQS} scales RoPE as neither {ROPE_KEY} says nor Llama 3.1 and 3.2 do; "
        "what made it cannot be told"
    )
