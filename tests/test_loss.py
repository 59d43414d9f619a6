import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config, sharding
from tinyllama_jax.loss import cross_entropy, token_nll

B, T, D, V = 8, 13, 16, 50
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(B, T, D)).astype(np.float32), RNG.normal(size=(D, V)).astype(np.float32)
TARGETS, VALID = RNG.integers(0, V, (B, T)), RNG.random((B, T)) > 0.3
MESHES = {"1x1": (config.Mesh(), 1), "1x8": (config.Mesh(), 8), "2x4": (config.Mesh(replica=2), 8)}


def dense(x, w):
    """nll [B, T] and the gradients of its sum over valid tokens, in float64 with no library's help."""
    logits = x.astype(np.float64) @ w.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(V)[TARGETS]
    nll = -np.log((p * one_hot).sum(-1))
    dlogits = (p - one_hot) * VALID[..., None]
    return nll, dlogits @ w.T.astype(np.float64), np.einsum("btd,btv->dv", x.astype(np.float64), dlogits)


NLL, DX, DW = dense(X, W)


def place(mesh, rows, w_spec, dtype=jnp.float32):
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    # Invalid targets hold what padding may hold; nobody may look at them.
    targets = np.where(VALID, TARGETS, -100).astype(np.int32)
    x = put(jnp.asarray(X, dtype), rows, None, None)
    return x, put(W, *w_spec), put(targets, rows, None), put(VALID, rows, None)


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


def test_bf16_hidden_states(one_device):
    x, w, targets, valid = place(one_device, sharding.BATCH, ("data", None), jnp.bfloat16)
    run = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, valid, chunk_tokens=40)[0], (0, 1))
    total, (dx, dw) = run(x, w)
    rounded = np.asarray(x, np.float32), np.asarray(w.astype(jnp.bfloat16), np.float32)
    nll, want_dx, want_dw = dense(*rounded)
    np.testing.assert_allclose(total, nll[VALID].sum(), rtol=1e-5)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)  # the head's gradient is never rounded
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)


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
@pytest.mark.parametrize("mesh_name", ["1x1", "2x4"])
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
