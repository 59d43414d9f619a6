import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quick_experiment import quick, quick_command

from tinyllama_jax import config, configio, errors, sharding
from tinyllama_jax.cli import main
from tinyllama_jax.loss import cross_entropy, token_nll, training_loss
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step as train_step

ROOT = Path(__file__).parent.parent

B, T, D, V = 8, 13, 16, 50
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(B, T, D)).astype(np.float32), RNG.normal(size=(D, V)).astype(np.float32)
TARGETS, VALID = RNG.integers(0, V, (B, T)), RNG.random((B, T)) > 0.3
MESHES = {
    "1x1": (config.Mesh(), 1),
    "1x8": (config.Mesh(), 8),
    "2x4": (config.Mesh(replica=2), 8),
    "words": (config.Mesh(replica=2, tensor=2), 8),  # half of the vocabulary on each device
}


def dense(x, w, z_loss=0.0, valid=VALID):
    """nll + z_loss log(Z)^2 [B, T] and the gradients of its sum over valid tokens, in float64, by numpy alone."""
    logits = x.astype(np.float64) @ w.astype(np.float64)
    log_z = logits.max(-1) + np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    p = np.exp(logits - log_z[..., None])
    one_hot = np.eye(V)[TARGETS]
    loss = log_z - (logits * one_hot).sum(-1) + z_loss * log_z**2
    dlogits = (p - one_hot + z_loss * 2 * log_z[..., None] * p) * valid[..., None]
    return loss, dlogits @ w.T.astype(np.float64), np.einsum("btd,btv->dv", x.astype(np.float64), dlogits)


NLL, DX, DW = dense(X, W)


def place(mesh, rows, w_spec, dtype=jnp.float32, ignored=-100, valid=VALID):
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    if mesh.shape["tensor"] > 1:
        w_spec = (*w_spec[:-1], "tensor")
    # Invalid targets hold what padding may hold; nobody may look at them.
    targets = np.where(valid, TARGETS, ignored).astype(np.int32)
    x = put(jnp.asarray(X, dtype), rows, None, None)
    return x, put(W, *w_spec), put(targets, rows, None), put(valid, rows, None)


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_loss_and_gradients_against_dense_float64(mesh_name, chunk_tokens):
    cfg, devices = MESHES[mesh_name]
    mesh = sharding.make_mesh(cfg, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        x, w, targets, valid = place(mesh, sharding.BATCH, ("data", None))

        def f(x, w):
            return cross_entropy(x, w, targets, valid, chunk_tokens=chunk_tokens)

        (total, count), (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, w)
        np.testing.assert_allclose(total, NLL[VALID].sum(), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(f)(x, w)[0], NLL[VALID].sum(), rtol=1e-6)
        np.testing.assert_allclose(dx, DX, atol=5e-6)
        np.testing.assert_allclose(dw, DW, atol=5e-6)
        assert (int(count), count.dtype, total.dtype) == (VALID.sum(), jnp.int32, jnp.float32)
        assert dx.sharding == x.sharding and dw.sharding == w.sharding
        assert not np.any(np.asarray(dx)[~VALID])


@pytest.mark.parametrize(
    ("rows", "w_spec"), [(None, ("data", None)), (None, (None, None)), (sharding.BATCH, (None, "data"))]
)
def test_every_layout_of_rows_and_head(rows, w_spec):
    mesh = sharding.make_mesh(config.Mesh(replica=4))
    with jax.set_mesh(mesh):
        x, w, targets, valid = place(mesh, rows, w_spec)
        run = jax.jit(jax.grad(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=7)[0], (0, 1)))
        dx, dw = run(x, w)
        np.testing.assert_allclose(dx, DX, atol=5e-6)
        np.testing.assert_allclose(dw, DW, atol=5e-6)
        assert dw.sharding == w.sharding


@pytest.fixture
def one_device():
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def test_cotangent_scales_both_gradients(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))

    def mean(x, w):
        total, count = cross_entropy(x, w, targets, valid, chunk_tokens=40)
        return total / count

    dx, dw = jax.grad(mean, (0, 1))(x, w)
    np.testing.assert_allclose(dx, DX / VALID.sum(), atol=1e-6)
    np.testing.assert_allclose(dw, DW / VALID.sum(), atol=1e-6)


def test_nothing_valid_is_exactly_zero_even_with_nonsense_in_x(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))
    nothing = jnp.zeros_like(valid)
    run = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, nothing, chunk_tokens=40), (0, 1), has_aux=True)
    (total, count), (dx, dw) = run(x, w)
    assert (float(total), int(count)) == (0, 0) and not jnp.any(dx) and not jnp.any(dw)


@pytest.mark.parametrize("ignored", [0, V, -1, 2**31 - 1, -(2**31)])
def test_ignored_labels_may_have_any_value(one_device, ignored):
    def run(ignored):
        x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None), ignored=ignored)
        f = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=40)[0], (0, 1))
        return f(x, w)

    jax.tree.map(np.testing.assert_array_equal, run(ignored), run(-100))


@pytest.mark.parametrize("chunk_tokens", [1, 51, 52, 53, B * T + 1])
def test_tokens_need_not_be_a_multiple_of_the_chunk(one_device, chunk_tokens):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))
    run = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=chunk_tokens)[0], (0, 1))
    total, (dx, dw) = jax.jit(run)(x, w)
    np.testing.assert_allclose(total, NLL[VALID].sum(), rtol=1e-6)
    np.testing.assert_allclose(dx, DX, atol=5e-6)
    np.testing.assert_allclose(dw, DW, atol=5e-6)


def test_the_mean_is_over_the_tokens_of_all_devices():
    """Eight devices with 1 to 13 valid tokens each: the mean of their means is another number."""
    valid = np.arange(T) < np.array([1, 13, 2, 13, 3, 13, 1, 5])[:, None]
    nll, dx_sum, dw_sum = dense(X, W, valid=valid)
    of_means = np.mean([row[there].mean() for row, there in zip(nll, valid, strict=True)])
    mean = nll[valid].mean()
    assert abs(of_means - mean) > 0.01 * mean
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        x, w, targets, on_device = place(mesh, sharding.BATCH, ("data", None), valid=valid)

        def f(x, w):
            total, count = cross_entropy(x, w, targets, on_device, chunk_tokens=5)
            return total / count

        loss, (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
    assert len(x.addressable_shards) == 8 and x.addressable_shards[0].data.shape[0] == 1
    np.testing.assert_allclose(loss, mean, rtol=1e-6)
    np.testing.assert_allclose(dx, dx_sum / valid.sum(), atol=1e-6)
    np.testing.assert_allclose(dw, dw_sum / valid.sum(), atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_bf16_hidden_states(one_device, chunk_tokens):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None), jnp.bfloat16)
    run = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=chunk_tokens)[0], (0, 1))
    total, (dx, dw) = run(x, w)
    rounded = np.asarray(x, np.float32), np.asarray(w.astype(jnp.bfloat16), np.float32)
    nll, want_dx, want_dw = dense(*rounded)
    np.testing.assert_allclose(total, nll[VALID].sum(), rtol=1e-5)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)  # the head's gradient is never rounded
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
@pytest.mark.parametrize("mesh_name", ["1x1", "2x4", "words"])
def test_z_loss_against_dense_float64(mesh_name, chunk_tokens):
    cfg, devices = MESHES[mesh_name]
    mesh = sharding.make_mesh(cfg, jax.devices()[:devices])
    z_loss = 0.01  # large enough that a wrong factor shows
    want, want_dx, want_dw = dense(X, W, z_loss)
    with jax.set_mesh(mesh):
        x, w, targets, valid = place(mesh, sharding.BATCH, ("data", None))

        def f(x, w):
            objective, nll, z = training_loss(x, w, targets, valid, chunk_tokens=chunk_tokens, z_loss=z_loss)
            return objective, (nll, z)

        (objective, (nll, z)), (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, w)
        np.testing.assert_allclose(objective, want[VALID].sum(), rtol=1e-6)
        np.testing.assert_allclose(z, (want - NLL)[VALID].sum(), rtol=1e-6)
        np.testing.assert_allclose(dx, want_dx, atol=5e-6)
        np.testing.assert_allclose(dw, want_dw, atol=5e-6)
        assert float(z) > 0.05 * float(nll)
        # What is reported is the loss without it, to the last bit.
        plain, _ = jax.jit(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=chunk_tokens))(x, w)
        np.testing.assert_array_equal(jax.jit(f)(x, w)[1][0], plain)
        np.testing.assert_allclose(nll, plain, rtol=1e-7)


def test_without_z_loss_the_objective_is_the_loss(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))
    objective, nll, z = training_loss(x * 1e30, w, targets, valid, chunk_tokens=40)  # log(Z)^2 overflows
    assert jnp.isfinite(nll) and objective == nll


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_reports_the_loss_and_the_z_loss_apart(one_device, accumulation):
    base = quick()
    on = config.replace(base, optimizer=config.replace(base.optimizer, z_loss=0.1))
    window = np.random.default_rng(0).integers(0, base.model.vocab_size, (8, 33)).astype(np.int32)
    batch = {"tokens": window[:, :-1], "targets": window[:, 1:], "valid": window[:, 1:] % 5 > 0}

    def one_step(run):
        state = train_state.init(run, one_device)
        placed = train_step.put_batch(batch, accumulation, one_device, documents=False)
        lr, number = jax.device_put((np.float32(1e-3), np.int32(0)), sharding.replicated(one_device))
        return train_step.make_train_step(run)(state, placed, lr, number)[1]

    plain, with_z = one_step(base), one_step(on)
    assert "z_loss" not in plain
    np.testing.assert_allclose(with_z["loss"], plain["loss"], rtol=1e-6)
    # Fresh logits are normal with variance 2/(5D) * D = 0.4, so that log Z is near ln V + 0.2.
    np.testing.assert_allclose(with_z["z_loss"], 0.1 * (np.log(512) + 0.2) ** 2, rtol=0.02)
    assert abs(with_z["grad_norm"] - plain["grad_norm"]) > 0.01 * plain["grad_norm"]


@pytest.mark.slow
def test_a_runs_metrics_hold_the_z_loss(small_store, tmp_path):
    assert main(quick_command(small_store, tmp_path / "run", "optimizer.z_loss=1e-4")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # log Z is near ln 512, and stays there or moves towards 0.
    assert all(0 < line["z_loss"] < 2 * 1e-4 * np.log(512) ** 2 for line in lines)
    assert lines[0]["z_loss"] == pytest.approx(1e-4 * (np.log(512) + 0.2) ** 2, rel=0.05)


def test_z_loss_is_part_of_what_a_run_is():
    base = quick()
    on = configio.override(base, ["optimizer.z_loss=1e-4"])
    assert configio.fingerprint(on) != configio.fingerprint(base)
    with pytest.raises(errors.ConfigError, match="optimizer.z_loss is negative"):
        configio.override(base, ["optimizer.z_loss=-1e-4"])


def test_large_logits_stay_finite(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))
    total, dx = jax.value_and_grad(lambda x: cross_entropy(x, w, targets, valid, chunk_tokens=40)[0])(x * 1e4)
    assert jnp.isfinite(total) and jnp.all(jnp.isfinite(dx))


def test_all_logits_never_exist_at_once(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None))
    for f in (
        lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=13)[0],
        lambda x, w: token_nll(x, w, targets, chunk_tokens=13).sum(),
    ):
        jaxpr = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w))
        assert f"[13,{V}]" in jaxpr and f"[{B * T},{V}]" not in jaxpr and f"[{B},13,{V}]" not in jaxpr


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
@pytest.mark.parametrize("mesh_name", ["1x1", "2x4", "words"])
def test_token_nll_and_its_gradients(mesh_name, chunk_tokens):
    cfg, devices = MESHES[mesh_name]
    mesh = sharding.make_mesh(cfg, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        x, w, _, valid = place(mesh, sharding.BATCH, ("data", None))
        targets = jax.device_put(TARGETS.astype(np.int32), sharding.batch_sharding(mesh))

        def f(x, w):
            nll = token_nll(x, w, targets, chunk_tokens=chunk_tokens)
            return jnp.sum(jnp.where(valid, nll, 0)), nll

        (_, nll), (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, w)
        np.testing.assert_allclose(nll, NLL, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx, DX, atol=5e-6)
        np.testing.assert_allclose(dw, DW, atol=5e-6)


@pytest.mark.aot
def test_logits_of_16384_tokens_and_32000_words_take_half_a_gigabyte_instead_of_four():
    """Temporary memory beside arguments and results, by XLA's account for an A100.

    The results hold the head's gradient in float32, 262 MB, and the hidden states' in bfloat16, 67 MB, either way.
    """

    def temporary_bytes(*arguments):
        # A cached program would not have been compiled.
        env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, ROOT / "tests/loss_compile.py", *arguments]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)["temporary_bytes"]

    default = config.Execution().loss_chunk_tokens
    assert temporary_bytes(str(default)) <= 0.6e9
    assert temporary_bytes(str(default), "1e-4") <= 0.6e9
    assert 3.5e9 <= temporary_bytes("dense") <= 4.5e9
