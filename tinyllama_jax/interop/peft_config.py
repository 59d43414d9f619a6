"""adapter_config.json of PEFT <-> `config.Adapter`; what the other side cannot represent is refused.

Fields: LoraConfig and PrefixTuningConfig of github.com/huggingface/peft.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from tinyllama_jax.config import Adapter, Model
from tinyllama_jax.config_finetune import TARGETS
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.hf_config import short, value_of
from tinyllama_jax.interop.json_files import shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {  # our matrix -> the last part of the module's name in Hugging Face's Llama
    "attention.query": "q_proj",
    "attention.key": "k_proj",
    "attention.value": "v_proj",
    "attention.out": "o_proj",
    "mlp.gate": "gate_proj",
    "mlp.up": "up_proj",
    "mlp.down": "down_proj",
    "head": "lm_head",
}

# Keys that say nothing about what the weights compute, or that the tensors themselves answer.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type"),
}
LORA = HARMLESS | {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
# A projection is computed before PEFT saves: what is saved are keys and values either way.
PREFIX = HARMLESS | {
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
}
PREFIX |= {"encoder_hidden_size", "prefix_projection", "init_weights"}
KINDS = {"LORA": LORA, "PREFIX_TUNING": PREFIX}

# Ways to begin that leave the base as it is.  Others (PiSSA, OLoRA, CorDA, LoftQ) change it, and what is saved is
# relative to the changed one.
INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def targets_of(adapter: Adapter) -> tuple[str, ...]:
    """The matrices that a LoRA adapter's patterns name, in the order of TARGETS."""
    return tuple(name for name in TARGETS if any(fnmatch.fnmatchcase(name, pattern) for pattern in adapter.targets))


def to_peft(adapter: Adapter, model: Model, base: str) -> dict[str, Any]:
    """adapter_config.json.  base: what transformers loads the base by, a folder or a name on the Hub."""
    common = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True, "revision": None}
    if adapter.method == "prefix":
        return common | {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": adapter.prefix_tokens,
            "num_layers": model.layers,
            "num_attention_heads": model.kv_heads,  # PEFT means those of keys and values
            "token_dim": model.kv_heads * model.head_dim,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": model.d_model,
            "prefix_projection": False,
        }
    return common | {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": [MODULES[name] for name in targets_of(adapter)],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def from_peft(config: dict, model: Model, modules: tuple[str, ...], where: Path) -> Adapter:
    """The `Adapter` of an adapter_config.json for `model`.

    modules: our names of the matrices whose tensors the file of weights holds.  where: the file, for messages.
    Raises ConfigError for what `Adapter` cannot represent, naming the key; DataError where config and tensors differ.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}: peft_type is {short(kind)}; only {' and '.join(KINDS)} can be imported")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise ConfigError(f"{where}: task_type is {short(config['task_type'])}; only CAUSAL_LM can be imported")
    for key in sorted(map(str, config.keys() - KINDS[kind])):
        if config[key]:
            raise ConfigError(
                f"{where}: {shown(key)}={short(config[key])} cannot be represented here; merge it in PEFT "
                "(merge_and_unload) and import the whole model with `import hf`"
            )
    try:
        return _prefix(config, model, where) if kind == "PREFIX_TUNING" else _lora(config, modules, where)
    except ConfigError as error:
        raise error if str(where) in str(error) else ConfigError(f"{where}: {error}") from None


def _prefix(config: dict, model: Model, where: Path) -> Adapter:
    width = model.kv_heads * model.head_dim
    expected = {"num_layers": model.layers, "num_attention_heads": model.kv_heads, "token_dim": width}
    for key, size in (expected | {"num_transformer_submodules": 1}).items():
        if (found := value_of(config, key, size, where)) != size:
            raise ConfigError(f"{where}: {key} is {found}; with this base it must be {size}")
    tokens = value_of(config, "num_virtual_tokens", int, where)
    return Adapter(method="prefix", prefix_tokens=tokens, base_weights="float32")


def _lora(config: dict, modules: tuple[str, ...], where: Path) -> Adapter:
    bias, begun = config.get("bias", "none"), config.get("init_lora_weights", True)
    if bias not in ("none", None):
        raise ConfigError(f"{where}: bias={short(bias)} cannot be represented; a Llama here has no biases")
    if begun not in INITS:
        raise ConfigError(
            f"{where}: init_lora_weights={short(begun)} changes the base too; save it with "
            "path_initial_model_for_weight_conversion, or merge it and use `import hf`"
        )
    named = config.get("target_modules")
    if isinstance(named, list):  # else a pattern, or a word such as all-linear
        wanted = {str(name).rpartition(".")[2] for name in named}
        if differing := sorted(wanted ^ {MODULES[name] for name in modules}):
            raise DataError(
                f"{where}: target_modules and the tensors of {WEIGHTS} differ in {short(', '.join(differing))}"
            )
    return Adapter(
        method="lora",
        rank=value_of(config, "r", int, where),
        alpha=value_of(config, "lora_alpha", 8.0, where),
        rank_stabilised=value_of(config, "use_rslora", False, where),
        dropout=value_of(config, "lora_dropout", 0.0, where),
        targets=modules,
        base_weights="float32",
    )
