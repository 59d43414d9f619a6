"""The library's kernels behind our interface: jax's splash attention, interpreted, and the call that goes to cuDNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn  # its checks ask for the library and the device
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_cases import BF16, F32, kernel_calls, packed, problem

from tinyllama_jax import attention, config, sharding
from tinyllama_jax.attention.cudnn import cudnn
from tinyllama_jax.attention.splash import splash
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.model import transformer


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        yield


@pytest.fixture
def cudnn_is_here(monkeypatch):
    """As far as tracing and lowering can tell."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax_cudnn, "is_cuda_compute_capability_equal", lambda *_: False, raising=False)


@pytest.mark.parametrize(("H", "G", "lengths"), [(2, 2, None), (4, 1, [100, 28, 128])])
def test_splash_equals_the_formula(H, G, lengths):
    q, k, v, do = problem(1, 256, H, G, 64, F32)
    seen = None if lengths is None else attention.ranges(packed(lengths, 256))
    o, pull = jax.vjp(lambda *x: splash(*x, seen, interpret=True), q, k, v)
    want, pull_want = jax.vjp(lambda *x: attention.reference(*x, seen), q, k, v)
    np.testing.assert_allclose(o, want, atol=2e-5)
    for a, b in zip(pull(do), pull_want(do), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_splash_keeps_what_its_backward_pass_reads_under_the_policys_name():
    q, k, v, _ = problem(1, 128, 2, 1, 64, F32)
    policy = jax.checkpoint_policies.save_only_these_names(attention.OUTPUT)
    loss = jax.checkpoint(lambda q: splash(q, k, v, None, interpret=True).sum(), policy=policy)
    calls = kernel_calls(jax.grad(loss), q)
    # JAX 0.10 does not see the names inside splash's own jit, and runs its forward kernel again.
    assert sum(n for name, n in calls.items() if "fwd" in name) == (2 if jax.__version_info__ < (0, 11) else 1), calls


def test_cudnn_is_asked_for_causal_attention_with_its_own_heads(cudnn_is_here):
    q, k, v, _ = problem(1, 128, 4, 2, 64, BF16)
    jaxpr = str(jax.make_jaxpr(cudnn)(q, k, v))
    (line,) = [line for line in jaxpr.splitlines() if f"= {attention.CUDNN_FORWARD}" in line]
    assert "bf16[1,128,4,64]" in line
    assert "mask_type=MaskType.CAUSAL" in jaxpr and "bf16[1,128,2,64]" in jaxpr and "repeat" not in jaxpr


def test_cudnn_runs_its_forward_once_where_the_policy_keeps_attention(cudnn_is_here, monkeypatch):
    monkeypatch.setattr(sharding, "device", lambda: ("gpu", "NVIDIA H200"))
    cfg = Model(vocab_size=32, d_model=64, layers=2, heads=2, kv_heads=1, head_dim=64, d_ff=64, context_tokens=128)
    params, tokens = transformer.init(cfg, jax.random.key(0)), jnp.zeros((1, 128), jnp.int32)

    def calls(remat):
        execution = Execution(attention="cudnn", remat=remat)
        loss = lambda params: transformer.hidden(params, tokens, cfg, execution).astype(F32).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(f"= {attention.CUDNN_FORWARD}")

    assert calls("save_dots_and_attention") == 1
    assert calls("full") == 2


def test_cudnn_is_lowered_on_sharded_rows_and_heads(cudnn_is_here):
    q, k, v, _ = problem(4, 128, 4, 2, 64, BF16)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, P("data", None, "tensor", None)) for x in (q, k, v)]
        loss = lambda *x: cudnn(*x).astype(F32).sum()  # noqa: E731
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*spread)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Each device gets two rows and two heads of its own.
    assert "__cudnn$fmhaSoftmax" in text and "tensor<2x128x2x64xbf16>" in text
