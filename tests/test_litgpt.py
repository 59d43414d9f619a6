"""lit-gpt's two layouts, both ways, as arrays; with the marker `parity` also as files of PyTorch."""

import json

import numpy as np
import pytest
from test_hf import GQA, assert_same_bits, random_params, refusal

from tinyllama_jax.config import Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import litgpt, litgpt_config
from tinyllama_jax.interop.hf import hf_tensors
from tinyllama_jax.presets import preset

MODELS = {
    "gqa": GQA,  # 4 heads, 2 key/value heads
    "mqa_tied": replace(GQA, kv_heads=1, tied_embeddings=True),
    "mha": replace(GQA, kv_heads=4),
    "head_dim": replace(GQA, head_dim=16),
}
WHERE = litgpt.Path("lit_model.pth")


@pytest.mark.parametrize("layout", litgpt.LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_params_come_back_bit_for_bit(model, layout):
    params = random_params(model)
    state = dict(litgpt.to_state(params, model, layout))
    back_model, back = litgpt.from_state(state, model, WHERE)
    assert back_model == model  # tied, although lit-gpt has a head
    assert_same_bits(params, back)


def test_the_fused_rows_are_where_lit_gpt_has_them():
    """Row by row, written down here as section names say: groups of the old layout, blocks of the new."""
    params, K = random_params(GQA), GQA.head_dim
    tensors = dict(hf_tensors(params, GQA))
    q, k, v = (tensors[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "qkv")
    head = lambda matrix, h: matrix[h * K : (h + 1) * K]  # noqa: E731
    old = [head(q, 0), head(q, 1), head(k, 0), head(v, 0), head(q, 2), head(q, 3), head(k, 1), head(v, 1)]
    new = [head(q, 0), head(q, 1), head(q, 2), head(q, 3), head(k, 0), head(k, 1), head(v, 0), head(v, 1)]
    states = {layout: dict(litgpt.to_state(params, GQA, layout)) for layout in litgpt.LAYOUTS}
    for name, expected in (("attn.attn", old), ("attn.qkv", new)):
        state = states["tinyllama" if name == "attn.attn" else "litgpt"]
        np.testing.assert_array_equal(state[f"transformer.h.1.{name}.weight"], np.concatenate(expected))
    for names, kind in (("w1 fc_1", "gate"), ("w2 fc_2", "up"), ("w3 proj", "down")):
        old_name, new_name = names.split()
        expected = tensors[f"model.layers.1.mlp.{kind}_proj.weight"]
        np.testing.assert_array_equal(states["tinyllama"][f"transformer.h.1.mlp.swiglu.{old_name}.weight"], expected)
        np.testing.assert_array_equal(states["litgpt"][f"transformer.h.1.mlp.{new_name}.weight"], expected)
    assert states["litgpt"].keys() & states["tinyllama"].keys() == {
        *(f"transformer.{name}.weight" for name in ("wte", "ln_f")),
        *(f"transformer.h.{i}.{name}.weight" for i in range(3) for name in ("norm_1", "norm_2", "attn.proj")),
        "lm_head.weight",
    }


def test_old_attention_with_the_new_mlp():
    """lit-gpt's names between the two."""
    params = random_params(GQA)
    old, new = (dict(litgpt.to_state(params, GQA, layout)) for layout in litgpt.LAYOUTS)
    mixed = {n: t for n, t in new.items() if "attn.qkv" not in n} | {n: t for n, t in old.items() if "attn.attn" in n}
    assert_same_bits(params, litgpt.from_state(mixed, GQA, WHERE)[1])


def test_what_is_no_whole_model_is_refused():
    state = dict(litgpt.to_state(random_params(GQA), GQA, "litgpt"))
    refused = lambda changed, *words: refusal(  # noqa: E731
        DataError, lambda: litgpt.from_state(changed, GQA, WHERE), "lit_model.pth", *words
    )
    name = "transformer.h.2.attn.qkv.weight"
    refused({n: t for n, t in state.items() if n != name}, name, "lacks", "[64, 32]")
    refused(state | {name: state[name][:-1]}, name, "[63, 32]", "[64, 32]")
    refused(state | {"transformer.h.0.attn.qkv.bias": np.zeros(64)}, "qkv.bias", "no place")
    refused({"model.embed_tokens.weight": state[name]}, "first layer", "attn.attn")
    both = "transformer.h.0.attn.attn.weight"
    refused(state | {both: state["transformer.h.0.attn.qkv.weight"]}, "first layer")
    inv_freq = {"transformer.h.0.attn.rotary_emb.inv_freq": np.zeros(4)}
    assert_same_bits(litgpt.from_state(state | inv_freq, GQA, WHERE)[1], random_params(GQA))


@pytest.mark.parametrize("layout", litgpt.LAYOUTS)
@pytest.mark.parametrize(
    "model",
    [
        preset("tinyllama-1.1b"),
        preset("tinyllama-1.1b-code-8k"),
        replace(GQA, head_dim=16, norm_eps=1e-6, rope=Rope(theta=1e5)),
        replace(GQA, rope=Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=32)),
    ],
    ids=["1.1b", "8k", "head_dim", "llama3"],
)
def test_configurations_come_back(model, layout, tmp_path):
    if layout == "tinyllama" and (model.head_dim == 16 or model.rope.kind == "llama3"):
        refusal(ConfigError, lambda: litgpt_config.config_for(model, layout), "tinyllama")
        return
    config = litgpt_config.config_for(model, layout)
    file = tmp_path / ("lit_config.json" if layout == "tinyllama" else "model_config.yaml")
    file.write_text(json.dumps(config) if layout == "tinyllama" else litgpt_config.config_text(config))
    read, where = litgpt_config.read_config(tmp_path)
    assert where == file
    assert litgpt_config.model_from_config(read, model.vocab_size, where) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("parallel_residual", True), ("rotary_percentage", 0.25), ("_mlp_class", "GptNeoxMLP"), ("bias", True)),
        *(("norm_class_name", "LayerNorm"), ("n_expert", 8), ("rope_adjustments", {"factor": 2, "beta_fast": 1})),
        *(("n_head", 0), ("n_embd", "wide"), ("n_query_groups", 3), ("block_size", None), ("rope_base", True)),
    ],
)
def test_what_is_no_llama_is_refused(key, value, tmp_path):
    config = litgpt_config.config_for(GQA, "tinyllama") | {key: value}
    name = {"_mlp_class": "mlp_class_name", "n_query_groups": "kv_heads"}.get(key, key)
    where = tmp_path / "lit_config.json"
    refusal(ConfigError, lambda: litgpt_config.model_from_config(config, 96, where), "lit_config.json", name)


def test_a_yaml_file_of_strangers_is_bounded(tmp_path):
    """Ten lists of ten lists of ..., 10^20 in all, written in a few lines."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))
    file = tmp_path / "model_config.yaml"
    for key in ("n_head", "bias", "rope_adjustments"):
        sizes = "".join(f"{name}: 4\n" for name in ("n_embd", "n_head", "n_layer", "intermediate_size", "block_size"))
        file.write_text(f"{bomb}{sizes}{key}: *a19\n")  # the last one counts
        config, _ = litgpt_config.read_config(tmp_path)
        refusal(ConfigError, lambda config=config: litgpt_config.model_from_config(config, 96, file), key)
    for text in ("[1]", "a: &a [*b]", "!!python/object/apply:os.system [echo]", "\x00", "{" * 5000):
        file.write_text(text)
        refusal(DataError, lambda: litgpt_config.read_config(tmp_path), "model_config.yaml")


def test_rope_that_lit_gpt_has_not_is_refused():
    for kind, words in (("yarn", "yarn"), ("ntk", "ntk"), ("none", "none")):
        model = replace(GQA, rope=Rope(kind=kind))
        refusal(ConfigError, lambda model=model: litgpt_config.config_for(model, "litgpt"), words)


def test_without_a_configuration_a_preset_of_these_shapes_is_taken(tmp_path):
    """Only shapes are made: 1.1B parameters are not."""
    model = preset("tinyllama-1.1b")
    where = tmp_path / "iter-001.pth"
    shapes = {"transformer.wte.weight": (32003, 2048)}
    for i in range(22):
        shapes[f"transformer.h.{i}.norm_1.weight"] = (2048,)
    shapes["transformer.h.0.attn.attn.weight"] = (2560, 2048)
    shapes["transformer.h.0.attn.proj.weight"] = (2048, 2048)
    shapes["gate"] = (5632, 2048)
    expected = replace(model, vocab_size=32003), "tinyllama-1.1b"
    assert litgpt_config.model_from_shapes(shapes, "gate", where) == expected
    shapes["gate"] = (5633, 2048)
    message = refusal(DataError, lambda: litgpt_config.model_from_shapes(shapes, "gate", where), "model_config.yaml")
    assert "22 layers" in message and "n_head" in message
    del shapes["transformer.h.0.attn.proj.weight"]
    refusal(DataError, lambda: litgpt_config.model_from_shapes(shapes, "gate", where), "no model")


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", litgpt.LAYOUTS)
def test_files_of_torch_both_ways(layout, dtype, tmp_path):
    import torch

    params = random_params(GQA)
    litgpt.write_litgpt(params, GQA, tmp_path / "out", layout=layout, dtype=dtype, files=[])
    state = torch.load(tmp_path / "out/lit_model.pth", weights_only=True)
    assert {str(tensor.dtype) for tensor in state.values()} == {f"torch.{dtype}"}
    model, back, folder, notes = litgpt.read_litgpt(tmp_path / "out")
    assert (model, folder, notes) == (GQA, tmp_path / "out", [])
    if dtype == "float32":
        assert_same_bits(params, back)
    # A training checkpoint wraps the weights, and its own name says nothing.
    training = tmp_path / "training"
    training.mkdir()
    torch.save({"model": state, "optimizer": {"state": {}}, "iter_num": 7}, training / "iter-7.ckpt")
    for file in (tmp_path / "out").glob("*config*"):
        (training / file.name).write_bytes(file.read_bytes())
    for source in (training, training / "iter-7.ckpt"):
        assert_same_bits(back, litgpt.read_litgpt(source)[1])
    (training / "other.pth").write_bytes(b"")
    refusal(DataError, lambda: litgpt.read_litgpt(training), "2 other files")
    refusal(DataError, lambda: litgpt.read_litgpt(training / "other.pth"), "weights alone")


class Touch:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parity
def test_nothing_in_a_torch_file_is_run(tmp_path):
    import torch

    wide = torch.zeros(1).expand(2**30, 2**10)  # four bytes in the file
    cases = {
        "code": ({"model": {"a": torch.zeros(2), "b": Touch(tmp_path / "made")}}, "weights alone"),
        "list": ([torch.zeros(2)], "a list"),
        "empty": ({}, "dictionary"),
        "integers": ({"a": torch.zeros(2, dtype=torch.int64)}, "int64"),
        "stretched": ({"a": wide}, "claims"),
        "number": ({"a": 3}, "no tensor"),
    }
    for name, (value, words) in cases.items():
        torch.save(value, tmp_path / f"{name}.pth")
        refusal(DataError, lambda name=name: litgpt.torch_files.load(tmp_path / f"{name}.pth"), f"{name}.pth", words)
    assert not (tmp_path / "made").exists()
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    data = whole.read_bytes()
    rng = np.random.default_rng(0)
    for case in range(60):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        whole.write_bytes(damaged if case % 2 else data[: int(rng.integers(len(data)))])
        try:
            litgpt.torch_files.load(whole)
        except DataError as error:
            assert "\n" not in str(error)


def test_without_torch_one_line_names_the_command(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "lit_model.pth").write_bytes(b"x")
    refusal(ConfigError, lambda: litgpt.read_litgpt(tmp_path), "pip install 'tinyllama_jax[torch]'")
    write = lambda: litgpt.write_litgpt(  # noqa: E731
        random_params(GQA), GQA, tmp_path / "out", layout="litgpt", dtype="float32", files=[]
    )
    refusal(ConfigError, write, "pip install 'tinyllama_jax[torch]'")
    assert not (tmp_path / "out").exists()
