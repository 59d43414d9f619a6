import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import optim
from tinyllama_jax.config import Optimizer

SPECS = {
    "embed": {"embedding": P(None, "data")},
    "layers": {"norm": {"scale": P(None, None)}, "up": {"kernel": P(None, "data", None)}},
    "norm": {"scale": P(None)},
}
SHAPES = {
    "embed": {"embedding": (6, 8)},
    "layers": {"norm": {"scale": (3, 8)}, "up": {"kernel": (3, 8, 4)}},
    "norm": {"scale": (8,)},
}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (scale * rng.standard_normal(s)).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def leaves(x):
    return [np.asarray(v) for v in jax.tree.leaves(x)]


def identical(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(one), leaves(other), strict=True))


@functools.cache
def stepper(cfg, mesh_shape=()):  # one compilation for each configuration and mesh
    optimizer = optim.make_optimizer(cfg)

    @jax.jit
    def step(grads, state, params, loss, lr):
        return optim.update(optimizer, cfg, grads, state, params, loss=loss, lr=lr)

    return step


def numpy_rmsprop(cfg, params, gradients, rates):
    """RMSprop in float64, leaf by leaf, by PyTorch's description; weights decay as AdamW's."""
    p = [x.astype(np.float64) for x in leaves(params)]
    v = [np.zeros_like(x) for x in p]
    for grads, lr in zip(gradients, rates, strict=True):
        g = [x.astype(np.float64) for x in leaves(grads)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, cfg.clip_norm / norm) if cfg.clip_norm else x for x in g]
        v = [cfg.beta2 * a + (1 - cfg.beta2) * x**2 for a, x in zip(v, g, strict=True)]
        p = [w - lr * (x / (np.sqrt(a) + cfg.eps) + cfg.weight_decay * w) for w, x, a in zip(p, g, v, strict=True)]
    return p


def numpy_adamw(cfg, params, gradients, rates):
    """AdamW in float64, leaf by leaf, as in its paper."""
    names = ["embedding", "scale", "kernel", "scale"]  # the order of jax.tree.leaves
    p = [x.astype(np.float64) for x in leaves(params)]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, (grads, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        g = [x.astype(np.float64) for x in leaves(grads)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        if cfg.clip_norm and norm > cfg.clip_norm:
            g = [x * cfg.clip_norm / norm for x in g]
        for i, name in enumerate(names):
            m[i] = cfg.beta1 * m[i] + (1 - cfg.beta1) * g[i]
            v[i] = cfg.beta2 * v[i] + (1 - cfg.beta2) * g[i] ** 2
            direction = m[i] / (1 - cfg.beta1**t) / (np.sqrt(v[i] / (1 - cfg.beta2**t)) + cfg.eps)
            decayed = cfg.decay == "all" or name != "scale"
            p[i] = p[i] - lr * (direction + cfg.weight_decay * decayed * p[i])
    return p


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": "matrices"},
        {"weight_decay": 0.0, "clip_norm": 0.0},
        {"beta1": 0.5, "beta2": 0.7, "eps": 1e-2, "clip_norm": 3.0},
    ],
)
def test_matches_adamw_written_by_hand(settings):
    cfg = Optimizer(**settings)
    start, gradients = tree(0), [tree(i + 1, scale=0.1 if i % 2 else 2.0) for i in range(6)]
    rates = [0.0, 0.1, 0.2, 0.05, 0.01, 0.3]
    step, params, state = stepper(cfg), start, optim.init(cfg, start)
    for grads, lr in zip(gradients, rates, strict=True):
        params, state, metrics = step(grads, state, params, 1.0, lr)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in leaves(grads)))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6) and metrics["skipped"] == 0
    for got, expected in zip(leaves(params), numpy_adamw(cfg, start, gradients, rates), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in leaves(params)))
    assert metrics["param_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("settings", [{"weight_decay": 0.0, "clip_norm": 0.0, "beta2": 0.99}, {"eps": 1e-2}])
def test_matches_rmsprop_written_by_hand(settings):
    cfg = Optimizer(kind="rmsprop", **settings)
    start, gradients = tree(0), [tree(i + 1, scale=0.1 if i % 2 else 2.0) for i in range(6)]
    rates = [0.0, 0.1, 0.2, 0.05, 0.01, 0.3]
    step, params, state = stepper(cfg), start, optim.init(cfg, start)
    for grads, lr in zip(gradients, rates, strict=True):
        params, state, metrics = step(grads, state, params, 1.0, lr)
    for got, expected in zip(leaves(params), numpy_rmsprop(cfg, start, gradients, rates), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert metrics["skipped"] == 0


def test_rmsprop_keeps_one_moment_and_skips_as_adamw_does():
    cfg, mesh = Optimizer(kind="rmsprop"), mesh_of(2, 4)
    assert (cfg.moments, Optimizer().moments) == (1, 2)
    with jax.set_mesh(mesh):
        params, step = put(tree(0), mesh), stepper(cfg, "rmsprop")
        state = optim.init(cfg, params)
        assert state.keys() == {"rmsprop", "guard"}
        moments = [x for x in jax.tree.leaves(state["rmsprop"]) if x.ndim]
        assert sum(x.size for x in moments) == sum(x.size for x in jax.tree.leaves(params))
        assert [x.sharding for x in moments] == [x.sharding for x in jax.tree.leaves(params)]
        params, state, _ = step(put(tree(1), mesh), state, params, 3.0, 0.1)
        bad = tree(2)
        bad["norm"]["scale"][3] = np.nan
        after, after_state, metrics = step(put(bad, mesh), state, params, 3.0, 0.1)
        assert identical(after, params) and identical(after_state["rmsprop"], state["rmsprop"])
        assert metrics["skipped"] == 1 and metrics["consecutive_skips"] == 1
        later, _, _ = step(put(tree(3), mesh), after_state, after, 3.0, 0.1)
        assert not identical(later, params)


def test_decay_reaches_matrices_only():
    cfg = Optimizer(decay="matrices", weight_decay=0.5, clip_norm=0)
    params = jax.tree.map(np.ones_like, tree(0))
    zero = jax.tree.map(np.zeros_like, params)
    params, _, _ = stepper(cfg)(zero, optim.init(cfg, params), params, 1.0, 0.1)
    expected = {"embedding": 0.95, "scale": 1.0, "kernel": 0.95}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_allclose(leaf, expected[path[-1].key], rtol=1e-6)


@pytest.mark.parametrize("bad", ["loss nan", "loss inf", "gradient nan", "gradient inf", "gradient overflow"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    cfg = Optimizer()
    params = tree(0)
    step = stepper(cfg)
    params, state, _ = step(tree(1), optim.init(cfg, params), params, 3.0, 0.1)
    grads, loss = tree(2), 3.0
    if bad.startswith("loss"):
        loss = float(bad.split()[1])
    else:
        value = {"nan": np.nan, "inf": np.inf, "overflow": 1e30}[bad.split()[1]]
        grads["layers"]["up"]["kernel"][1, 2, 3] = value
    after, after_state, metrics = step(grads, state, params, loss, 0.1)
    assert identical(after, params) and identical(after_state["adam"], state["adam"])
    assert metrics["skipped"] == 1 and metrics["consecutive_skips"] == 1
    _, later, metrics = step(grads, after_state, after, loss, 0.1)
    assert metrics["consecutive_skips"] == 2
    same = {k: v for k, v in later["guard"].items() if k != "skips"}
    assert identical(same, {k: v for k, v in state["guard"].items() if k != "skips"})
    # the next good step goes on as if the bad ones had never been
    one, _, metrics = step(tree(3), later, after, 3.0, 0.1)
    other, _, _ = step(tree(3), state, params, 3.0, 0.1)
    assert identical(one, other) and metrics["skipped"] == 0 and metrics["consecutive_skips"] == 0


def guarded(losses, scales=None, **settings):
    """Runs the losses through the guard; -> the `skipped` of every step."""
    cfg = Optimizer(**{"skip_sigma": 4.0, "skip_window_steps": 8} | settings)
    step, params = stepper(cfg), tree(0)
    state, skipped = optim.init(cfg, params), []
    for i, loss in enumerate(losses):
        scale = scales[i] if scales else 1.0
        params, state, metrics = step(jax.tree.map(lambda x, s=scale: x * s, tree(1)), state, params, loss, 1e-3)
        skipped.append(int(metrics["skipped"]))
    return skipped


def test_loss_spikes_are_skipped_once_half_the_window_is_there():
    usual = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95]
    assert guarded([3.0, 3.1, 2.9, 50.0]) == [0, 0, 0, 0]  # three entries: not yet
    assert guarded([*usual, 50.0, 3.0, 50.0, 50.0]) == [0] * 6 + [1, 0, 1, 1]
    assert guarded([*usual, 50.0], skip_sigma=0.0) == [0] * 7


def test_the_threshold_is_mean_plus_sigma_standard_deviations():
    usual = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.2, 2.8]
    limit = np.mean(usual) + 4 * np.std(usual, ddof=1)
    assert guarded([*usual, limit - 1e-3])[-1] == 0 and guarded([*usual, limit + 1e-3])[-1] == 1


def test_gradient_norm_spikes_are_skipped():
    losses = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.0]
    assert guarded(losses, [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 30.0]) == [0] * 6 + [1]


def test_the_window_forgets_and_skipped_steps_never_enter_it():
    # Falling losses: 9 is usual at first, and far out once the ring holds only values near 1.
    falling = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, *[1.0, 1.1] * 4]
    assert guarded([*falling, 9.0, 9.0, 9.0, 1.05]) == [0] * 16 + [1, 1, 1, 0]
    assert guarded([*falling[:8], 9.0])[-1] == 0


def mesh_of(replica, data):
    devices = jax.devices()[: replica * data]
    return jax.make_mesh((replica, data), ("replica", "data"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


def put(values, mesh):
    return jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh, s)), values, SPECS)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("jit_init", [False, True])
def test_shardings_are_kept_and_numbers_do_not_depend_on_the_mesh(shape, jit_init):
    cfg = Optimizer(skip_sigma=6.0, skip_window_steps=4)
    start, gradients = tree(0), [tree(i + 1) for i in range(3)]
    reference, state = start, optim.init(cfg, start)
    for grads in gradients:
        reference, state, expected = stepper(cfg)(grads, state, reference, 2.0, 0.1)

    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        params = put(start, mesh)
        make = functools.partial(optim.init, cfg)
        state = (jax.jit(make) if jit_init else make)(params)
        step = stepper(cfg, shape)
        for grads in gradients:
            before = jax.tree.map(lambda x: (jax.typeof(x), x.dtype), (params, state))
            params, state, metrics = step(put(grads, mesh), state, params, 2.0, np.float32(0.1))
            assert jax.tree.map(lambda x: (jax.typeof(x), x.dtype), (params, state)) == before
            assert all(x.sharding.mesh == mesh for x in jax.tree.leaves((params, state)))
        specs = jax.tree.map(lambda x: x.sharding.spec, state["adam"][1].mu)
        assert specs == jax.tree.map(lambda x: x.sharding.spec, params) == SPECS
        assert state["adam"][1].nu["layers"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 8 // shape[1], 4)
    for got, wanted in zip(leaves(params), leaves(reference), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected.keys() == {"grad_norm", "param_norm", "skipped", "consecutive_skips"}
    for name, value in metrics.items():
        assert value.dtype == jnp.float32 and value.shape == () and value == pytest.approx(float(expected[name]))


def test_the_step_is_compiled_once(caplog):
    cfg, mesh = Optimizer(), mesh_of(2, 4)
    with jax.set_mesh(mesh), jax.log_compiles(True):
        params = put(tree(0), mesh)
        state, step = optim.init(cfg, params), stepper(cfg, "compiled once")
        for lr in (0.1, 0.2, 0.3):
            params, state, _ = step(params, state, params, jnp.float32(1.0), lr)
    compiles = [r for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(compiles) == 1


def test_abstract_state():
    """eval_shape gives shapes, types and shardings of the state: for checkpoints and compile checks."""
    cfg, mesh = Optimizer(), mesh_of(1, 8)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(functools.partial(optim.init, cfg), put(tree(0), mesh))
    kernel = abstract["adam"][1].mu["layers"]["up"]["kernel"]
    assert kernel.shape == (3, 8, 4) and kernel.sharding.spec == P(None, "data", None)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((abstract["adam"][1].mu, abstract["adam"][1].nu)))


def test_state_is_float32_from_the_start():
    state = optim.init(Optimizer(skip_window_steps=5), tree(0))
    kinds = {str(x.dtype) for x in jax.tree.leaves(state)}
    assert kinds == {"float32", "int32"} and state["guard"]["losses"].shape == (5,)
