"""The model against `transformers.LlamaForCausalLM`: logits, gradients and exports, in float32 on the CPU.

Weights are drawn wider than is usual, norm scales too, so that an exchanged matrix, a wrong norm or a wrong RoPE
shows in the logits instead of drowning in rounding.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Execution, Model, Rope, replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.interop.hf import hf_tensors, read_hf, write_hf
from tinyllama_jax.loss import cross_entropy
from tinyllama_jax.model import transformer

pytestmark = pytest.mark.parity

torch.set_num_threads(2)

BATCH, LENGTH, ORIGINAL = 2, 48, 16  # rows; tokens per row; the context that a stretched RoPE was trained at
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.08,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32},
    "narrow_heads": {"head_dim": 8, "num_key_value_heads": 4},
    "theta": {"rope_theta": 100_000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}},
    "yarn_all": {
        "rope_theta": 100_000.0,
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "attention_factor": 1.3,
        },
    },
    "yarn_mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        }
    },
    "llama3": {"head_dim": 32, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": ORIGINAL}},
}


def reference(overrides):
    """A random LlamaForCausalLM of this shape."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | overrides), attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.float().eval()


def tokens(vocab_size=SMALL["vocab_size"]):
    return np.random.default_rng(1).integers(0, vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)


def torch_logits(model, token_ids):
    with torch.no_grad():
        return model(torch.from_numpy(token_ids).long()).logits.numpy()


def on_one_device(function):
    """The test runs under a mesh of one device, as every entry point does."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.set_mesh(sharding.make_mesh(config.Mesh(replica=1, data=1), jax.devices()[:1])):
            return function(*args, **kwargs)

    return wrapped


def placed(params, *token_ids):
    mesh = jax.sharding.get_mesh()
    rows = [jax.device_put(t, sharding.batch_sharding(mesh)) for t in token_ids]
    return jax.device_put(params, sharding.param_shardings(params, mesh)), *rows


def our_logits(params, model, token_ids):
    return np.asarray(jax.jit(lambda p, t: transformer.logits(p, t, model, Execution()))(*placed(params, token_ids)))


def our_loss_logits_and_gradients(params, model, token_ids):
    """As in training: the mean over tokens, from the chunked cross-entropy.  One program, for compiling is slow."""
    params, inputs, targets = placed(params, token_ids[:, :-1], token_ids[:, 1:])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(p):
        x_BTD, w_DV = transformer.hidden(p, inputs, model, Execution()), transformer.head_kernel(p, model)
        total, count = cross_entropy(x_BTD, w_DV, targets, jnp.ones_like(targets, bool), chunk_tokens=32)
        return total / count, transformer.logits(p, inputs, model, Execution())

    (value, logits), gradients = loss(params)
    return float(value), np.asarray(logits), gradients


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def imported(request, tmp_path):
    """(reference model, our model, our params) after save_pretrained and read_hf."""
    theirs = reference(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = read_hf(tmp_path / "theirs")
    return theirs, replace(model, compute_dtype="float32"), params


@on_one_device
def test_logits_and_gradients(imported):
    theirs, model, params = imported
    token_ids = tokens()
    expected = theirs(torch.from_numpy(token_ids[:, :-1]).long()).logits
    labels = torch.from_numpy(token_ids[:, 1:]).long().flatten()
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels)
    expected_loss.backward()
    loss, logits, gradients = our_loss_logits_and_gradients(params, model, token_ids)

    expected = expected.detach().numpy()
    assert expected.std() > 0.3  # else 2e-5 would say little
    assert np.abs(logits - expected).max() <= 2e-5
    assert abs(loss - expected_loss.item()) <= 1e-5
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    actual = dict(hf_tensors(gradients, model))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.linalg.norm(actual[name] - gradient) / np.linalg.norm(gradient)
        assert error <= 1e-4, f"{name}: {error:.1e}"


def test_export_loads_with_equal_logits(imported, tmp_path):
    theirs, model, params = imported
    write_hf(params, model, tmp_path / "ours", shard_bytes=100_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    token_ids = tokens()[:, :-1]
    np.testing.assert_array_equal(torch_logits(loaded.eval(), token_ids), torch_logits(theirs, token_ids))


ROPES = {
    "default": Rope(),
    "yarn": Rope(kind="yarn", factor=4.0, original_context_tokens=ORIGINAL),
    "llama3": Rope(kind="llama3", factor=4.0, original_context_tokens=ORIGINAL),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@on_one_device
def test_a_model_made_here_runs_there(rope, tmp_path):
    model = Model(
        vocab_size=64,
        d_model=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        d_ff=48,
        context_tokens=64,
        rope=rope,
        init="torch_default",
        compute_dtype="float32",
    )
    params = transformer.init(model, jax.random.key(0))
    write_hf(params, model, tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    token_ids = tokens(64)[:, :-1]
    expected = torch_logits(loaded.eval(), token_ids)
    assert expected.dtype == np.float32 and expected.std() > 0.3
    assert np.abs(our_logits(params, model, token_ids) - expected).max() <= 2e-5
    loaded.save_pretrained(tmp_path / "again")
    assert replace(read_hf(tmp_path / "again")[0], init=model.init, compute_dtype="float32") == model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_exports_hold_what_torch_rounds_to(dtype, tmp_path):
    theirs = reference({})
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = read_hf(tmp_path / "theirs")
    write_hf(params, model, tmp_path / "ours", dtype=dtype)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    expected = theirs.to(loaded.dtype).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    loaded.save_pretrained(tmp_path / "again")  # and read back from transformers' own 16-bit file
    _, back = read_hf(tmp_path / "again")
    for name, tensor in hf_tensors(back, model):
        np.testing.assert_array_equal(tensor, expected[name].float().numpy(), err_msg=name)


def test_transformers_does_not_apply_partial_rotation():
    """Why `partial` is refused: Llama's code drops the factor without a word."""
    token_ids = tokens()[:, :-1]
    whole, half = (
        torch_logits(reference({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | extra}), token_ids)
        for extra in ({}, {"partial_rotary_factor": 0.5})
    )
    np.testing.assert_array_equal(whole, half)


def test_auto_tokenizer_gives_our_ids(tmp_path):
    source = open(os.__file__, encoding="utf-8").read()
    vocabulary = train_bpe([source], 600, tmp_path / "tokenizer.model")
    ours = Tokenizer.load(vocabulary)
    model = Model(vocab_size=600, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=16)
    params = jax.tree.map(np.asarray, transformer.init(model, jax.random.key(0)))
    texts = ["", " ", "\n", "a", "  two  spaces ", "\tdef f(x):\n        return x\n", "naïve 日本語 🎉", "12345 67"]
    texts += [source[at : at + 300] for at in range(0, 30_000, 1000)]
    write_hf(params, model, tmp_path / "first", tokenizer_files=ours.files)
    # Once from SentencePiece, and once from the tokenizer.json which that made
    json_only = [tmp_path / "first" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    write_hf(params, model, tmp_path / "second", tokenizer_files=json_only)
    for directory in (tmp_path / "first", tmp_path / "second"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
        for text in texts:
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == [ours.bos_id, *ids], (directory.name, text)
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs.decode(ids) == ours.decode(ids) == text
        marked = "a <s> b</s>"  # text to us; special to transformers unless told otherwise
        assert theirs(marked)["input_ids"].count(ours.bos_id) == 2
