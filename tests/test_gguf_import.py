"""GGUF files that other programs wrote, or that were changed: represented exactly, or refused by name."""

import json

import numpy as np
import pytest
from gguf_cases import rewritten
from test_hf import GQA, random_params, refusal

from tinyllama_jax import configio
from tinyllama_jax.config import Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import gguf_model
from tinyllama_jax.interop.gguf import read_gguf, write_gguf


@pytest.fixture
def written(tmp_path):
    write_gguf(random_params(GQA), GQA, tmp_path / "m.gguf", kind="F32")
    return tmp_path / "m.gguf"


def test_what_a_model_cannot_be_is_refused_by_name(written, tmp_path):
    def changed(**how):
        return lambda: read_gguf(rewritten(written, tmp_path / "other.gguf", **how), tmp_path)

    refusal(ConfigError, changed(architecture="gemma3"), "gemma3", "only llama")
    for key, value, kind in (
        ("llama.expert_count", 8, "UINT32"),
        ("llama.attention.sliding_window", 4096, "UINT32"),
        ("llama.attn_logit_softcapping", 50.0, "FLOAT32"),
        ("llama.attention.causal_mask_kind", "none", "STRING"),
        ("llama.rope.scaling.yarn_beta_fast", 16.0, "FLOAT32"),
    ):
        refusal(ConfigError, changed(add=[(key, value, kind)]), key)
    refusal(ConfigError, changed(add=[("llama.rope.dimension_count", 4, "UINT32")]), "rope.dimension_count=4")
    refusal(ConfigError, changed(add=[("llama.attention.head_count_kv", [2, 2, 1], "ARRAY")]), "differs between layers")
    refusal(ConfigError, changed(add=[("split.count", 3, "UINT16")]), "llama-gguf-split")
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    refusal(ConfigError, changed(tensors=bias), "blk.0.attn_q.bias", "without biases")
    refusal(ConfigError, changed(add=[("tokenizer.ggml.model", "bert", "STRING")]), "bert")
    factors = {"rope_freqs.weight": np.linspace(1, 3, 4, dtype=np.float32)}
    refusal(ConfigError, changed(tensors=factors), "rope_freqs.weight", "Llama 3.1")
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert changed(tensors=ones, add=[("llama.expert_count", 0, "UINT32")])().model == GQA
    assert changed(add=[("llama.attention.head_count_kv", [2, 2, 2], "ARRAY")])().model == GQA


def test_what_contradicts_itself_is_refused(written, tmp_path):
    def changed(**how):
        return lambda: read_gguf(rewritten(written, tmp_path / "other.gguf", **how), tmp_path)

    refusal(DataError, changed(drop=["llama.block_count"]), "llama.block_count")
    refusal(DataError, changed(add=[("llama.block_count", 1 << 31, "UINT32")]), "block_count")
    refusal(DataError, changed(add=[("llama.block_count", 20, "UINT32")]), "blk.3.attn_norm.weight")
    refusal(DataError, changed(add=[("llama.context_length", "64", "STRING")]), "context_length", "int")
    refusal(DataError, changed(add=[("llama.rope.freq_base", float("nan"), "FLOAT32")]), "freq_base")
    refusal(ConfigError, changed(add=[("llama.attention.head_count_kv", 3, "UINT32")]), "kv_heads=3")
    refusal(DataError, changed(add=[("llama.feed_forward_length", 47, "UINT32")]), "[47, 32]", "[48, 32]")
    refusal(DataError, changed(tensors={"token_embd.weight": None}), "token_embd.weight")
    refusal(
        ConfigError, changed(add=[("llama.embedding_length", 31, "UINT32")], drop=["llama.attention.key_length"]), "7"
    )


def test_llama_3_models_of_others_are_known_by_their_factors(tmp_path):
    """A file by llama.cpp's converter has the factors alone."""
    rope = Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=8192)
    model = replace(GQA, rope=rope)
    write_gguf(random_params(model), model, tmp_path / "m.gguf", kind="F16")
    other = rewritten(tmp_path / "m.gguf", tmp_path / "other.gguf", drop=[gguf_model.ROPE_KEY])
    assert read_gguf(other, tmp_path).model == model
    for wrong in ("[]", "{", '{"kind": 3}', '{"x": 1}', "[" * 10_000):
        other = rewritten(tmp_path / "m.gguf", tmp_path / "other.gguf", add=[(gguf_model.ROPE_KEY, wrong, "STRING")])
        refusal(DataError, lambda f=other: read_gguf(f, tmp_path), gguf_model.ROPE_KEY)
    own = json.dumps(configio.to_dict(replace(rope, factor=4.0)))
    other = rewritten(tmp_path / "m.gguf", tmp_path / "other.gguf", add=[(gguf_model.ROPE_KEY, own, "STRING")])
    assert read_gguf(other, tmp_path).model == model  # what the tensor says goes before


def test_other_programs_may_write_a_file_anew(written, tmp_path):
    """A changed file of the same size is damage; one of another size, with the old checksum, is another's work."""
    data = bytearray(written.read_bytes())
    data[-5] ^= 1
    (tmp_path / "flipped.gguf").write_bytes(data)
    refusal(DataError, lambda: read_gguf(tmp_path / "flipped.gguf", tmp_path), "differs from its checksum")
    (tmp_path / "longer.gguf").write_bytes(bytes(data) + b"\0" * 32)
    assert read_gguf(tmp_path / "longer.gguf", tmp_path).model == GQA
