"""Adapters against PEFT beside transformers' Llama, both ways: logits in float32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft_cases import EVERYTHING, base_params, drawn, one_device
from test_hf import GQA, MODELS

from tinyllama_jax.config import Adapter, Execution, replace
from tinyllama_jax.finetune import adapters
from tinyllama_jax.finetune.start import adapt
from tinyllama_jax.interop.hf import write_hf
from tinyllama_jax.interop.peft import read_peft, write_peft
from tinyllama_jax.model import transformer

pytestmark = pytest.mark.parity

torch.set_num_threads(2)
IDS = np.random.default_rng(1).integers(0, GQA.vocab_size, (2, 24)).astype(np.int32)
PREFIX = Adapter(method="prefix", prefix_tokens=5, base_weights="float32")
CASES = {
    "query_value": (GQA, Adapter(rank=4, alpha=10.0, base_weights="float32")),
    "everything": (GQA, EVERYTHING),
    "mqa_tied": (MODELS["mqa_tied"], replace(EVERYTHING, targets=("attention.*", "mlp.*"))),
    "yarn": (MODELS["yarn"], replace(EVERYTHING, rank_stabilised=False)),
    "prefix": (GQA, PREFIX),
    "prefix_yarn": (MODELS["yarn"], PREFIX),
    "prefix_mqa": (MODELS["mqa_tied"], PREFIX),
}
CASES["wide_heads"] = (MODELS["head_dim"], EVERYTHING)


def ours(model, base, adapter, params):
    with jax.set_mesh(one_device()):
        base, params = jax.tree.map(jnp.asarray, (base, params))
        both = adapters.merge(base, params, model, adapter)
        run = jax.jit(lambda p, x: transformer.logits(p, x, model, Execution()))
        return np.asarray(run(both, jnp.asarray(IDS)))


def tables_of(base, model):
    """The base's tables, with so many words."""

    def tables(words):
        longer = adapt(base, model, replace(model, vocab_size=words), "mean", jax.random.key(0))
        return {"embed_tokens": longer["embed"]["embedding"], "lm_head": longer["head"]["kernel"].T}

    return tables


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def assert_close(a, b):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(("model", "adapter"), CASES.values(), ids=CASES)
def test_peft_computes_with_an_exported_adapter_what_we_do(model, adapter, tmp_path):
    model = replace(model, compute_dtype="float32")
    base, params = base_params(model), drawn(model, adapter)
    write_hf(base, model, tmp_path / "hf")
    write_peft(params, adapter, model, tmp_path / "adapter", base=str(tmp_path / "hf"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    without = theirs(plain)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    mine, with_adapter = ours(model, base, adapter, params), theirs(loaded)
    assert np.abs(with_adapter - without).max() > 0.01 * np.abs(without).max()
    assert_close(mine, with_adapter)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    np.testing.assert_array_equal(theirs(auto), with_adapter)
    if adapter.method == "lora":
        assert_close(mine, theirs(loaded.merge_and_unload()))


THEIR_CONFIGS = {
    "list": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "all_linear": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, lora_dropout=0.1
    ),
    "pattern": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=r".*\.(k_proj|o_proj)|lm_head", init_lora_weights="gaussian"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("config", THEIR_CONFIGS.values(), ids=THEIR_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_peft_saved_is_imported(config, dtype, tmp_path):
    model = replace(GQA, compute_dtype="float32")
    base = base_params(model)
    write_hf(base, model, tmp_path / "hf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(plain, config())
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight).mul_(0.3).to(dtype))
    wrapped.save_pretrained(tmp_path / "adapter")
    if dtype == torch.bfloat16:
        from safetensors.torch import load_file, save_file

        file = tmp_path / "adapter/adapter_model.safetensors"
        # Without the tables that PEFT adds for lm_head: in 16 bits it would load them in place of the base's.
        tensors = {n: tensor.to(dtype) for n, tensor in load_file(file).items() if "lora" in n or "prompt" in n}
        save_file(tensors, file, metadata={"format": "pt"})
        wrapped = peft.PeftModel.from_pretrained(wrapped.get_base_model(), tmp_path / "adapter")
    adapter, params, words = read_peft(tmp_path / "adapter", model, tables_of(base, model))
    assert words == model.vocab_size
    assert_close(ours(model, base, adapter, params), theirs(wrapped))


@pytest.mark.parametrize("targets", [("*",), ("attention.*", "mlp.*")], ids=["all", "layers"])
def test_words_that_a_run_added_go_along(targets, tmp_path):
    """PEFT's resized embeddings: the base is lengthened, and the tables come with the adapter."""
    adapter = replace(EVERYTHING, targets=targets)
    small, model = replace(GQA, compute_dtype="float32"), replace(GQA, vocab_size=104, compute_dtype="float32")
    base = base_params(small)
    grown = adapt(base, small, model, "mean", jax.random.key(0))
    params = drawn(model, adapter)
    write_hf(base, small, tmp_path / "hf")
    tables = tables_of(base, small)(model.vocab_size)
    write_peft(params, adapter, model, tmp_path / "adapter", base=str(tmp_path / "hf"), tables=tables)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    plain.resize_token_embeddings(model.vocab_size)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert_close(ours(model, grown, adapter, params), theirs(loaded))
    folder = tmp_path / "adapter"
    if "*" not in targets:  # else PEFT saves the head, and of the embedding nothing
        folder = tmp_path / "saved"
        loaded.save_pretrained(folder)
    _, back, words = read_peft(folder, small, tables_of(base, small))
    assert words == model.vocab_size
    jax.tree.map(np.testing.assert_array_equal, back, params)
