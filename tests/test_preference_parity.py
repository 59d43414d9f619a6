"""Preferences against TRL and PyTorch: the losses, log-probabilities of packed answers, gradients; and RMSprop."""

import functools
import types

import jax
import numpy as np
import pair_store
import pytest
import torch
import transformers
from trl.trainer.dpo_trainer import DPOTrainer

from tinyllama_jax import config, optim, sharding
from tinyllama_jax.config import Execution, Optimizer, Preference, replace
from tinyllama_jax.finetune import preference
from tinyllama_jax.finetune.pairs import AnswerLogps, batches
from tinyllama_jax.interop.hf import hf_tensors, read_hf

pytestmark = pytest.mark.parity

EXECUTION = Execution(loss_chunk_tokens=40)
PAIRS = [pair_store.pair(np.random.default_rng(seed)) for seed in range(6)]
WINDOWS = pair_store.windows_of(PAIRS)
# TRL's `sigmoid` is not smoothed any more; its `aot` of a single pair, which sorts nothing, is the smoothed loss.
CASES = {
    "sigmoid": ("sigmoid", Preference(beta=0.1)),
    "smoothed": ("aot", Preference(beta=0.3, label_smoothing=0.2)),
    "ipo": ("ipo", Preference(loss="ipo", beta=0.5)),
}


class Answers:
    """In the place of a model: gives TRL these log-probabilities of tokens, and zeros for what it logs besides."""

    training = True

    def __init__(self, logps):
        self.logps = logps

    def __call__(self, **_):
        zeros = torch.zeros_like(self.logps.detach())
        return types.SimpleNamespace(
            log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
        )


def trl_loss(kind, options, policy, ref, tokens):
    """TRL's own `_compute_loss` of one pair, whose answers have so many tokens, all of equal log-probability.

    policy [2] torch float64, the log-probabilities of whole answers, chosen first; ref and tokens likewise.
    """
    length = int(tokens.max())
    mask = (torch.arange(length + 1)[None] <= torch.tensor(tokens)[:, None]) & (torch.arange(length + 1)[None] > 0)
    per_token = mask[:, 1:] * (policy / torch.tensor(tokens))[:, None]
    names = "entropy num_tokens logits/chosen logits/rejected mean_token_accuracy rewards/chosen rewards/rejected"
    names += " rewards/accuracies rewards/margins logps/chosen logps/rejected"
    same = types.SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda model: model
    )
    trainer = types.SimpleNamespace(
        **dict(model=Answers(None), accelerator=same, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True),
        **dict(f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], use_weighting=False),
        **dict(beta=options.beta, label_smoothing=options.label_smoothing, _total_train_tokens=0, _tp_size=1),
        _metrics={"train": {name: [] for name in names.split()}},
    )
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "ref_chosen_logps": torch.tensor(ref[:1]),
        "ref_rejected_logps": torch.tensor(ref[1:]),
    }
    loss = DPOTrainer._compute_loss(trainer, Answers(per_token), inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_rewards_are_trls(case):
    kind, options = CASES[case]
    rng = np.random.default_rng(0)
    policy, ref = rng.normal(-12, 2, (2, 7, 2))
    tokens = rng.integers(1, 9, (7, 2))
    with jax.enable_x64(True):

        def total(policy):
            loss_B, metrics = preference.losses(policy, ref, tokens.astype(float), options)
            return loss_B.sum(), (loss_B, metrics)

        gradients, (loss_B, metrics) = jax.grad(total, has_aux=True)(policy)
        gradients, loss_B, metrics = jax.device_get((gradients, loss_B, metrics))
    for n in range(7):
        theirs = torch.tensor(policy[n], requires_grad=True)
        loss, told = trl_loss(kind, options, theirs, ref[n], tokens[n])
        loss.backward()
        assert loss.dtype == torch.float64
        assert loss_B[n] == pytest.approx(loss.item(), rel=1e-6)
        np.testing.assert_allclose(gradients[n], theirs.grad.numpy(), rtol=1e-6, atol=1e-12)
        assert np.abs(gradients[n]).min() > 1e-4
        for name, key in [("margin", "margins"), ("chosen_reward", "chosen"), ("rejected_reward", "rejected")]:
            assert metrics[name][n] == pytest.approx(told[f"rewards/{key}"], rel=1e-6)
        assert metrics["accuracy"][n] == told["rewards/accuracies"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random Llama of transformers, and our model and parameters read from what it saved."""
    torch.manual_seed(0)
    m = pair_store.MODEL
    shape = transformers.LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.d_model,
        intermediate_size=m.d_ff,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        max_position_embeddings=m.context_tokens,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(shape).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    model, params = read_hf(folder)
    return theirs, replace(model, compute_dtype="float32"), params


def their_logps(model):
    """[pairs, 2], each answer behind its prompt in a row of its own, differentiable."""

    def alone(prompt, answer):
        ids = torch.tensor([prompt + answer])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    return torch.stack([torch.stack([alone(prompt, answer) for answer in answers]) for prompt, *answers in PAIRS])


def placed(params, mesh):
    return jax.tree.map(jax.device_put, params, sharding.param_shardings(params, mesh))


def one_device():
    return sharding.make_mesh(config.Mesh(replica=1, data=1), jax.devices()[:1])


def test_answers_of_packed_rows_are_those_of_single_sequences(models):
    theirs, model, params = models
    with torch.no_grad():
        expected = their_logps(theirs).numpy()
    mesh = one_device()
    with jax.set_mesh(mesh):
        found = AnswerLogps(model, EXECUTION, mesh, batch_sequences=4)(placed(params, mesh), WINDOWS)
    assert np.ptp(expected) > 10
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_all_weights_are_those_of_autograd(models, case):
    theirs, model, params = models
    options = CASES[case][1]
    logps = their_logps(theirs)
    reference = np.random.default_rng(3).normal(logps.detach().numpy(), 2).astype(np.float32)
    ratio = logps - torch.from_numpy(reference)
    margin = options.beta * (ratio[:, 0] - ratio[:, 1])  # the losses as TRL's code has them, see above
    sides = torch.nn.functional.logsigmoid(torch.stack([margin, -margin]))
    s = options.label_smoothing
    loss = -((1 - s) * sides[0] + s * sides[1])
    if options.loss == "ipo":
        tokens = torch.tensor([[len(c), len(r)] for _, c, r in PAIRS])
        loss = ((ratio / tokens)[:, 0] - (ratio / tokens)[:, 1] - 1 / (2 * options.beta)) ** 2
    theirs.zero_grad()
    loss.sum().backward()
    mesh = one_device()
    with jax.set_mesh(mesh):
        [(_, batch)] = batches(WINDOWS._replace(reference_N2=reference), len(PAIRS), mesh)
        step = jax.value_and_grad(preference.micro_loss, has_aux=True)
        step = jax.jit(functools.partial(step, model=model, execution=EXECUTION, preference=options))
        (found, _), gradients = jax.device_get(step(placed(params, mesh), batch))
    assert found == pytest.approx(loss.sum().item(), rel=1e-5)
    for name, gradient in hf_tensors(gradients, model):
        expected = dict(theirs.named_parameters())[name].grad.numpy()
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, f"{name}: {error:.1e}"


def test_rmsprop_is_pytorchs():
    """With the defaults of PyTorch, and no weight decay: PyTorch's would go through the mean of squares."""
    cfg = Optimizer(kind="rmsprop", beta2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=0.0)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(8, 5, 7)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.RMSprop([theirs], lr=0.01)
    params, state = {"kernel": start}, optim.init(cfg, {"kernel": start})
    step = jax.jit(functools.partial(optim.update, optim.make_optimizer(cfg), cfg))
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        params, state, _ = step({"kernel": gradient}, state, params, loss=1.0, lr=0.01)
    np.testing.assert_allclose(params["kernel"], theirs.detach().numpy(), rtol=0, atol=1e-6)
    assert np.abs(params["kernel"] - start).max() > 0.05
