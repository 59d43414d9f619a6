import jax
import jax.numpy as jnp
import pytest

from tinyllama_jax import config, flops, sharding
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import transformer
from tinyllama_jax.presets import preset

TINYLLAMA = preset("tinyllama-1.1b")


def test_tinyllama_by_every_count():
    assert flops.parameter_counts(TINYLLAMA) == {
        "total": 1_100_048_384,
        "embedding": 131_072_000,
        "non_embedding": 968_976_384,
        "matmul": 1_034_420_224,
    }


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("palm", 7_313_817_600),
        ("causal", 6_760_169_472),
        ("6n_total", 6 * 1_100_048_384),
        ("6n_non_embedding", 6 * 968_976_384),
    ],
)
def test_tinyllama_training_flops_per_token(convention, expected):
    assert flops.flops_per_token(TINYLLAMA, 2048, convention) == expected


def test_terms_against_a_hand_count():
    model = Model(vocab_size=100, d_model=8, layers=3, heads=4, kv_heads=2, head_dim=6, d_ff=10)
    # per layer: q 8x24, k and v 8x12 each, out 24x8; three 8x10 matrices; 24 wide q k^T and weights v against 16 keys
    assert flops.forward_terms(model, 16, causal=False) == {
        "proj": 3 * 2 * (8 * 24 + 2 * 8 * 12 + 24 * 8),
        "mlp": 3 * 2 * 3 * 8 * 10,
        "attention": 3 * 2 * 2 * 24 * 16,
        "head": 2 * 8 * 100,
    }
    terms = flops.forward_terms(model, 16, causal=True)
    assert terms["attention"] == 3 * 2 * 24 * 16
    matmul = flops.parameter_counts(model)["matmul"]
    assert flops.flops_per_token(model, 16, "palm") == 6 * matmul + 12 * 3 * 24 * 16


def test_tied_tables_count_once_but_still_multiply():
    untied, tied = (config.replace(TINYLLAMA, tied_embeddings=t) for t in (False, True))
    assert flops.parameter_counts(untied)["total"] - flops.parameter_counts(tied)["total"] == 32000 * 2048
    assert flops.parameter_counts(untied)["matmul"] == flops.parameter_counts(tied)["matmul"]
    assert flops.flops_per_token(untied, 2048) == flops.flops_per_token(tied, 2048)


def test_unknown_convention_is_refused():
    with pytest.raises(ConfigError, match="choose one of palm, causal"):
        flops.flops_per_token(TINYLLAMA, 2048, "kaplan")


def test_counts_are_the_parameters_that_exist():
    for name in ("tinyllama-1.1b", "tinyllama-120m", "smollm2-135m"):
        params = jax.eval_shape(lambda name=name: transformer.init(preset(name), jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == flops.parameter_counts(preset(name))["total"]


def test_forward_flops_against_xla():
    """XLA also counts norms, softmax, RoPE and SwiGLU's products: a few operations per element, under a tenth here."""
    model = Model(
        vocab_size=256,
        d_model=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        d_ff=192,
        compute_dtype="float32",
    )
    # Unrolled, because XLA counts the body of a loop once.
    execution = Execution(attention="reference", scan_layers=False)
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        run = jax.jit(lambda p, t: transformer.logits(p, t, model, execution))
        counted = run.lower(params, tokens).cost_analysis()["flops"]
    ours = 2 * 64 * sum(flops.forward_terms(model, 64, causal=False).values())
    assert 1.0 <= counted / ours < 1.1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_known_devices_only(kind, peak):
    assert flops.peak_flops(kind) == peak
