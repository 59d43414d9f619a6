"""Meta's folders: the permutation of RoPE's pairs computed out, model-parallel shards joined, params.json both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import GQA, assert_same_bits, random_params, refusal

from tinyllama_jax.config import Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import meta
from tinyllama_jax.interop.hf import hf_tensors
from tinyllama_jax.model import rope
from tinyllama_jax.presets import PRESETS

LLAMA3 = Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=8192)
MODELS = {
    "gqa": GQA,
    "mqa_tied": replace(GQA, kv_heads=1, tied_embeddings=True),
    "mha": replace(GQA, kv_heads=4, norm_eps=1e-6),
    "llama3": replace(GQA, rope=LLAMA3),
}
WHERE = meta.Path("llama/params.json")


def to_state(model, seed=0):
    return dict(meta.to_state(random_params(model, seed), model))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_params_come_back_bit_for_bit(model):
    back_model, back = meta.from_state([to_state(model)], meta.params_for(model), 64, WHERE)
    assert back_model == model
    assert_same_bits(random_params(model), back)


def interleaved(x_THK, theta):
    """Meta's rotation, written down from its definition: dimensions 2i and 2i + 1 are a complex number, turned by
    position times theta^(-2i / K)."""
    T, _, K = x_THK.shape
    angle_TK = np.arange(T)[:, None] * theta ** (-np.arange(0, K, 2) / K)[None]
    z_THK = (x_THK[..., 0::2] + 1j * x_THK[..., 1::2]) * np.exp(1j * angle_TK)[:, None]
    out_THK = np.empty_like(x_THK)
    out_THK[..., 0::2], out_THK[..., 1::2] = z_THK.real, z_THK.imag
    return out_THK


@pytest.mark.parametrize("model", [GQA, replace(GQA, kv_heads=1), replace(GQA, kv_heads=4)], ids=["4/2", "4/1", "4/4"])
def test_scores_under_metas_rotation_are_those_under_ours(model):
    """q . k for all positions and heads: with Meta's matrices and its rotation, and with ours and ours."""
    T, H, G, K = 12, model.heads, model.kv_heads, model.head_dim
    params, state = random_params(model), to_state(model)
    x_TD = np.random.default_rng(1).standard_normal((T, model.d_model))
    cos, sin = rope.tables(model, jnp.arange(T))
    for layer in range(model.layers):
        theirs = []
        for kind, heads in (("wq", H), ("wk", G)):
            matrix = state[f"layers.{layer}.attention.{kind}.weight"].astype(np.float64)
            theirs.append(interleaved((x_TD @ matrix.T).reshape(T, heads, K), model.rope.theta))
        ours = []
        for kind in ("query", "key"):
            matrix_DHK = params["layers"]["attention"][kind][layer]
            turned = rope.rotate(jnp.einsum("td,dhk->thk", x_TD.astype(np.float32), matrix_DHK)[None], cos, sin)
            ours.append(np.asarray(turned, np.float64)[0])
        scores = []
        for q_THK, k_TGK in (theirs, ours):
            scores.append(np.einsum("thk,shk->hts", q_THK, np.repeat(k_TGK, H // G, axis=1)))
        assert np.abs(scores[0]).mean() > 5
        np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=2e-3)
        # and no permutation at all would not do
        unturned = np.repeat(interleaved(ours[1], model.rope.theta), H // G, axis=1)
        assert np.abs(np.einsum("thk,shk->hts", theirs[0], unturned) - scores[0]).mean() > 1


def test_everything_without_rope_only_changes_its_name():
    state, tensors = to_state(GQA), dict(hf_tensors(random_params(GQA), GQA))
    assert len(state) == len(tensors)
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    for theirs, ours in names.items():
        expected = tensors[f"model.layers.1.mlp.{ours}_proj.weight"]
        np.testing.assert_array_equal(state[f"layers.1.feed_forward.{theirs}.weight"], expected)
    for theirs, ours in (("wv", "v"), ("wo", "o")):
        expected = tensors[f"model.layers.1.self_attn.{ours}_proj.weight"]
        np.testing.assert_array_equal(state[f"layers.1.attention.{theirs}.weight"], expected)
    # one head of the key, row by row: pairs of neighbours come from the two halves
    key = tensors["model.layers.2.self_attn.k_proj.weight"][8:16]
    np.testing.assert_array_equal(state["layers.2.attention.wk.weight"][8:16], key[[0, 4, 1, 5, 2, 6, 3, 7]])


def cut(state, count, embedding_axis):
    """As model-parallel training keeps it."""
    shards = [{} for _ in range(count)]
    for name, tensor in state.items():
        columns = name.endswith(("wo.weight", "w2.weight"))
        axis = embedding_axis if name == "tok_embeddings.weight" else int(columns)
        parts = np.split(tensor, count, axis) if tensor.ndim == 2 else [tensor] * count
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


@pytest.mark.parametrize(("count", "embedding_axis"), [(2, 1), (2, 0), (4, 1)], ids=["llama2", "llama3", "four"])
def test_model_parallel_files_are_joined(count, embedding_axis):
    model = replace(GQA, kv_heads=4)
    shards = cut(to_state(model), count, embedding_axis)
    for shard in shards:
        shard["rope.freqs"] = np.zeros(4, np.float32)
    back_model, back = meta.from_state(shards, meta.params_for(model), 64, WHERE)
    assert back_model == model
    assert_same_bits(random_params(model), back)
    del shards[1]["norm.weight"]
    refusal(DataError, lambda: meta.from_state(shards, meta.params_for(model), 64, WHERE), "norm.weight", "every file")


def test_what_is_no_whole_model_is_refused():
    state, config = to_state(GQA), meta.params_for(GQA)

    def refused(kind, words, changed=state, **fields):
        given = {key: value for key, value in (config | fields).items() if value is not ...}
        refusal(kind, lambda: meta.from_state([changed], given, 64, WHERE), *words)

    name = "layers.1.attention.wk.weight"
    refused(DataError, [name, "lacks", "[16, 32]"], {n: t for n, t in state.items() if n != name})
    refused(DataError, [name, "[8, 32]", "[16, 32]"], state | {name: state[name][:8]})
    refused(DataError, ["layers.9.x", "no place"], state | {"layers.9.x": state[name]})
    refused(DataError, ["tok_embeddings"], {name: state[name]})
    refused(DataError, ["params.json", "multiple_of", "48"], ffn_dim_multiplier=...)
    refused(DataError, ["2147483647 layers"], n_layers=2**31 - 1)
    refused(ConfigError, ["dim"], dim=...)
    refused(ConfigError, ["n_heads", "True"], n_heads=True)
    refused(ConfigError, ["dim=32", "n_heads=5"], n_heads=5)
    refused(ConfigError, ["moe_args"], moe_args={"num_experts": 16})
    refused(DataError, ["tok_embeddings", "[96, 32]", "[97, 32]"], vocab_size=97)
    assert meta.from_state([state], config | {"vocab_size": -1, "max_batch_size": 32}, 64, WHERE)[0] == GQA


def test_rope_that_metas_code_has_not_is_refused():
    for model, words in (
        (replace(GQA, rope=Rope(kind="linear", factor=2.0)), "linear"),
        (replace(GQA, rope=replace(LLAMA3, factor=4.0)), "llama3"),
        (replace(GQA, head_dim=16), "head_dim"),
    ):
        refusal(ConfigError, lambda model=model: meta.params_for(model), words)


def test_the_width_of_the_mlp_can_be_said_in_metas_way():
    # params.json of Llama 2 7B and 70B, Llama 3 8B
    assert meta.hidden(4096, 256, None) == 11008
    assert meta.hidden(8192, 4096, 1.3) == 28672
    assert meta.hidden(4096, 1024, 1.3) == 14336
    widths = [(m.d_model, m.d_ff) for m in PRESETS.values()] + [
        (d, f) for d in range(8, 99, 8) for f in range(1, 300, 7)
    ]
    for dim, d_ff in widths:
        assert meta.hidden(dim, *meta.multiple_and_multiplier(dim, d_ff)) == d_ff


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_of_torch_files_both_ways(dtype, tmp_path):
    import torch

    params = random_params(GQA)
    (tmp_path / "tokenizer.model").write_bytes(b"a vocabulary")
    meta.write_meta(params, GQA, tmp_path / "out", dtype=dtype, files=[tmp_path / "tokenizer.model"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("consolidated.00.pth", "params.json", "tokenizer.model")
    ]
    model, back, notes = meta.read_meta(tmp_path / "out", 64)
    assert model == GQA and notes == []
    rounded = params if dtype == "float32" else jax.tree.map(lambda p: np.float32(p.astype(jnp.bfloat16)), params)
    assert_same_bits(rounded, back)
    model, _, notes = meta.read_meta(tmp_path / "out")
    assert model.context_tokens == 2048 and "--context-tokens" in notes[0]
    # in two files
    state = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    numpy = {n: np.arange(t.numel()).reshape(t.shape) for n, t in state.items()}
    for number, shard in enumerate(cut(numpy, 2, 1)):
        part = {n: state[n].flatten()[torch.from_numpy(at.flatten())].reshape(at.shape) for n, at in shard.items()}
        torch.save(part, tmp_path / f"out/consolidated.{number:02d}.pth")
    assert_same_bits(back, meta.read_meta(tmp_path / "out", 64)[1])
    (tmp_path / "out/consolidated.00.pth").unlink()
    refusal(DataError, lambda: meta.read_meta(tmp_path / "out"), "consolidated.00.pth", "consolidated.01.pth")
    (tmp_path / "out/params.json").write_text(json.dumps([]))
    refusal(DataError, lambda: meta.read_meta(tmp_path / "out"), "params.json")
    refusal(DataError, lambda: meta.read_meta(tmp_path / "nowhere"), "nowhere", "params.json")


def meta_logits(state, config, tokens):
    """What Meta's model computes of one row of tokens, written down anew in PyTorch with complex numbers for RoPE."""
    import torch
    from torch.nn import functional as F

    T, H, G = len(tokens), config["n_heads"], config["n_kv_heads"]
    K = config["dim"] // H
    angle = torch.outer(torch.arange(T).double(), config["rope_theta"] ** (-torch.arange(0, K, 2).double() / K))
    turn_TK = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["norm_eps"]) * state[f"{name}.weight"]

    def rotated(x_THK):
        pairs = torch.view_as_complex(x_THK.reshape(*x_THK.shape[:-1], K // 2, 2))
        return torch.view_as_real(pairs * turn_TK).flatten(-2)

    x_TD = state["tok_embeddings.weight"][tokens]
    for layer in range(config["n_layers"]):
        at = f"layers.{layer}."
        w = lambda name, at=at: state[f"{at}{name}.weight"]  # noqa: E731
        h = norm(x_TD, at + "attention_norm")
        q, k, v = ((h @ w(f"attention.w{kind}").T).view(T, heads, K) for kind, heads in (("q", H), ("k", G), ("v", G)))
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (rotated(k), v))
        scores = torch.einsum("thk,shk->hts", rotated(q), k) / K**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        out = torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1)
        x_TD = x_TD + out @ w("attention.wo").T
        h = norm(x_TD, at + "ffn_norm")
        x_TD = x_TD + (F.silu(h @ w("feed_forward.w1").T) * (h @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
    return norm(x_TD, "norm") @ state["output.weight"].T


@pytest.mark.parity
def test_metas_model_with_the_exported_file_has_the_logits_of_transformers(tmp_path):
    import torch
    import transformers

    from tinyllama_jax.interop.hf import write_hf

    params = random_params(GQA)
    meta.write_meta(params, GQA, tmp_path / "meta", dtype="float32", files=[])
    write_hf(params, GQA, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").double()
    state = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    state = {name: tensor.double() for name, tensor in state.items()}
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, GQA.vocab_size, 40))
    config = json.loads((tmp_path / "meta/params.json").read_text())
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        logits = meta_logits(state, config, tokens)
    assert expected.std() > 1
    assert (logits - expected).abs().max() <= 1e-3  # its tables of cos and sin are float32
