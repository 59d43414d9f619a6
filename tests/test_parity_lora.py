"""Training adapters against PyTorch and PEFT: losses, gradients, weights after a step of AdamW; nf4 against qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import qwix
import torch
import transformers
from peft_cases import EVERYTHING, base_params, drawn, one_device
from test_hf import GQA

from tinyllama_jax import optim
from tinyllama_jax.config import Execution, Optimizer, replace
from tinyllama_jax.finetune import adapters
from tinyllama_jax.interop.hf import write_hf
from tinyllama_jax.interop.peft import write_peft
from tinyllama_jax.loss import training_loss
from tinyllama_jax.model import quantized, transformer
from tinyllama_jax.sharding import computing

pytestmark = pytest.mark.parity

torch.set_num_threads(2)
MODEL = replace(GQA, compute_dtype="float32")
TOKENS = np.random.default_rng(1).integers(0, MODEL.vocab_size, (3, 25)).astype(np.int64)
LR, DECAY, CLIP = 1e-2, 0.1, 0.1
EPS = 1e-3  # with 1e-8 a first step has the sign of each gradient, also of those that are zero but for rounding


def ours(base, params, adapter):
    """Loss, gradients, and the weights after one step."""
    cfg = Optimizer(beta1=0.9, beta2=0.95, eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
    x, y = jnp.asarray(TOKENS[:, :-1], jnp.int32), jnp.asarray(TOKENS[:, 1:], jnp.int32)

    def loss(trained, frozen):
        weights = adapters.attach(frozen, trained, MODEL, adapter)
        hidden = transformer.hidden(weights, x, MODEL, Execution())
        kernel = transformer.head_kernel(weights, MODEL)
        return training_loss(hidden, kernel, y, jnp.ones_like(y, bool), chunk_tokens=16)[0] / y.size

    @jax.jit
    def step(trained, frozen):
        value, grads = jax.value_and_grad(loss)(trained, frozen)
        state = optim.init(cfg, trained)
        after, _, metrics = optim.update(optim.make_optimizer(cfg), cfg, grads, state, trained, loss=value, lr=LR)
        return value, grads, after, metrics["grad_norm"]

    frozen = adapters.freeze(base, MODEL, "float32")
    return jax.device_get(step(params, frozen))


def theirs(base, params, adapter, folder):
    """The same of PEFT's model: by name of the module its A and B, their gradients and what became of them."""
    write_hf(base, MODEL, folder / "hf")
    write_peft(params, adapter, MODEL, folder / "adapter", base=str(folder / "hf"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True).train()
    assert model.peft_config["default"].use_rslora == adapter.rank_stabilised
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (7 * MODEL.layers + 1)
    logits = model(torch.from_numpy(TOKENS[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, MODEL.vocab_size), torch.from_numpy(TOKENS[:, 1:]).reshape(-1)
    )
    loss.backward()
    grads = {name: p.grad.numpy().copy() for name, p in trained.items()}
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
    torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=DECAY).step()
    return loss.item(), grads, {name: p.detach().numpy() for name, p in trained.items()}, norm.item()


def as_peft(tree, folder):
    """A tree of adapters, or of their gradients, under PEFT's names."""
    write_peft(tree, EVERYTHING, MODEL, folder, base="")
    from safetensors.numpy import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in found.items()}


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_step_is_that_of_torch_and_peft(rank_stabilised, tmp_path):
    adapter = replace(EVERYTHING, rank_stabilised=rank_stabilised)
    base, params = base_params(MODEL), drawn(MODEL, adapter)
    with computing(one_device(), "float32"):
        loss, grads, after, norm = ours(base, params, adapter)
    want_loss, want_grads, want_after, want_norm = theirs(base, params, adapter, tmp_path)
    assert loss == pytest.approx(want_loss, rel=1e-5) and norm == pytest.approx(want_norm, rel=1e-5)
    assert want_norm > 2 * CLIP  # clipped
    got_grads, got_after, before = (
        as_peft(tree, tmp_path / name) for name, tree in {"g": grads, "a": after, "b": params}.items()
    )
    assert set(got_grads) == set(want_grads) == set(got_after)
    for name, want in want_grads.items():
        assert np.abs(got_grads[name] - want).max() <= 1e-5 * np.abs(want).max(), name
        assert np.abs(got_after[name] - want_after[name]).max() <= 1e-5, name
        assert np.abs(want_after[name] - before[name]).max() > LR / 20, name


def test_nf4_has_the_codes_and_values_of_qwix():
    w = np.random.default_rng(0).standard_normal((2, 256, 32)).astype(np.float32)
    with jax.set_mesh(one_device()):
        stored = quantized.quantize(jnp.asarray(w), "nf4", (-2,))
        values = np.asarray(quantized.whole(stored, jnp.dtype("float32")))
    by_qwix = qwix.quantize(w, "nf4", channelwise_axes=(0, 2), tiled_axes={1: 64})
    packed = np.asarray(stored.codes)
    codes = np.concatenate([packed & 15, packed >> 4], axis=-2).reshape(w.shape)
    np.testing.assert_array_equal(codes, np.asarray(by_qwix.qvalue).astype(np.uint8))
    np.testing.assert_array_equal(values, np.asarray(qwix.dequantize(by_qwix)))
