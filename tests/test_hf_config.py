"""config.json in both of its spellings, and what it may say that cannot be represented."""

import numpy as np
import pytest

from tinyllama_jax.config import Model, Rope
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.interop.hf_config import model_from_hf, model_to_hf

GQA = Model(vocab_size=96, d_model=32, layers=3, heads=4, kv_heads=2, head_dim=8, d_ff=48, context_tokens=64)


@pytest.mark.parametrize(
    "fields, rope",
    [
        ({}, Rope()),
        ({"rope_theta": 1e5, "rope_scaling": None}, Rope(theta=1e5)),
        ({"rope_theta": 500000}, Rope(theta=500_000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, Rope(theta=1e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(kind="linear", factor=2.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}},
            Rope(kind="linear", factor=2.0, theta=9.0),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None}},
            Rope(kind="yarn", factor=4.0, original_context_tokens=2048),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 4096},
            Rope(kind="yarn", factor=4.0, original_context_tokens=4096),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1024},
            Rope(kind="yarn", factor=4.0, original_context_tokens=1024),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512, "attention_factor": 1.25}},
            Rope(kind="yarn", factor=4.0, original_context_tokens=512, attention_factor=1.25),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": np.e, "mscale": 2.0, "mscale_all_dim": 1.0}},
            Rope(kind="yarn", factor=np.e, attention_factor=1.2 / 1.1, original_context_tokens=2048),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=8192),
        ),
    ],
)
def test_rope_spellings(fields, rope):
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = model_from_hf(sizes | {"intermediate_size": 8} | fields, "config.json")
    assert model.rope == rope
    assert (model.kv_heads, model.head_dim, model.norm_eps, model.tied_embeddings) == (4, 8, 1e-6, False)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, ["mixtral", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"sliding_window": 4096}, ["sliding_window=4096"]),
        ({"num_local_experts": 8}, ["num_local_experts=8"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "x": "y" * 99}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope"]),
        ({"rope_scaling": {"type": ["linear"]}}, ["linear"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope.factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "float"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["layers"]),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "32"}, ["hidden_size", "int"]),
        ({"hidden_size": 33}, ["hidden_size=33", "head_dim"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_key_value_heads": 3}, ["kv_heads=3"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_represented_are_refused(change, words):
    config_json = model_to_hf(GQA, "float32") | change
    with pytest.raises(ConfigError) as caught:
        model_from_hf(config_json, "dir/config.json")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in ("dir/config.json", *words)), message
