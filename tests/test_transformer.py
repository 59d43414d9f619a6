import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Execution, Model, Rope, replace
from tinyllama_jax.loss import cross_entropy
from tinyllama_jax.model import transformer

CFG = Model(
    vocab_size=48,
    d_model=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    d_ff=40,
    context_tokens=64,
    compute_dtype="float32",
    init="tinyllama_start",
)
B, T = 8, 12
RNG = np.random.default_rng(0)
TOKENS, TARGETS = (RNG.integers(0, CFG.vocab_size, (B, T)).astype(np.int32) for _ in range(2))
VALID = RNG.random((B, T)) > 0.2
REMAT = ("none", "full", "save_dots", "save_dots_and_attention")
ROPES = {
    "default": Rope(),
    "none": Rope(kind="none"),
    "partial": Rope(kind="partial", fraction=0.5),
    "linear": Rope(kind="linear", factor=4.0),
    "ntk": Rope(kind="ntk", factor=4.0),
    "yarn": Rope(kind="yarn", factor=4.0, original_context_tokens=16),
    "llama3": Rope(kind="llama3", factor=4.0, original_context_tokens=16),
}


def one_device():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


@functools.cache
def weights(cfg):
    """Host copies, so that every mesh starts from the same numbers."""
    return jax.tree.map(np.asarray, jax.jit(lambda: transformer.init(cfg, jax.random.key(0)))())


def loss_and_gradients(cfg, execution, mesh, *, dropout_key=None):
    with jax.set_mesh(mesh):
        params = jax.device_put(weights(cfg), sharding.param_shardings(weights(cfg), mesh))
        tokens, targets, valid = jax.device_put((TOKENS, TARGETS, VALID), sharding.batch_sharding(mesh))

        @jax.jit
        def run(params):
            def mean(params):
                x = transformer.hidden(params, tokens, cfg, execution, dropout_key=dropout_key)
                w = transformer.head_kernel(params, cfg)
                total, count = cross_entropy(x, w, targets, valid, chunk_tokens=execution.loss_chunk_tokens)
                return total / count

            return jax.value_and_grad(mean)(params)

        loss, gradients = run(params)
        assert all(
            g.sharding == p.sharding for g, p in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True)
        )
        return float(loss), jax.tree.map(np.asarray, gradients)


@functools.cache
def on_one_device(cfg, key_of_dropout=None):
    """What every other way to compute it is held against."""
    key = None if key_of_dropout is None else jax.random.key(key_of_dropout)
    return loss_and_gradients(cfg, Execution(), one_device(), dropout_key=key)


def assert_same(got, want, atol=1e-6):
    assert got[0] == pytest.approx(want[0], abs=atol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), got[1], want[1])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("mesh", "chunk"), [(config.Mesh(), 2048), (config.Mesh(replica=2), 5)], ids=["1x8", "2x4"])
def test_every_mesh_has_the_same_loss_and_gradients(mesh, chunk, tied):
    cfg = replace(CFG, tied_embeddings=tied)
    got = loss_and_gradients(cfg, Execution(loss_chunk_tokens=chunk), sharding.make_mesh(mesh))
    assert_same(got, on_one_device(cfg))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropout", "change"),
    [
        (0.0, dict(scan_layers=False)),
        (0.0, dict(attention="xla", loss_chunk_tokens=7)),
        (0.0, dict(remat="full")),
        (0.0, dict(remat="save_dots")),
        (0.0, dict(remat="save_dots_and_attention", scan_layers=False)),
        (0.3, dict(remat="full", scan_layers=False)),
    ],
)
def test_execution_does_not_change_the_numbers(dropout, change):
    cfg, key = replace(CFG, dropout=dropout), jax.random.key(5)
    want = on_one_device(cfg, key_of_dropout=5)
    assert_same(loss_and_gradients(cfg, Execution(**change), one_device(), dropout_key=key), want)


def test_dropout_is_the_same_on_every_mesh_and_differs_by_key():
    cfg = replace(CFG, dropout=0.3)
    plain, one, other = (on_one_device(cfg, key) for key in (None, 5, 6))
    assert len({plain[0], one[0], other[0]}) == 3
    assert plain[0] == on_one_device(CFG)[0]
    mesh = sharding.make_mesh(config.Mesh(replica=2))
    assert_same(loss_and_gradients(cfg, Execution(), mesh, dropout_key=jax.random.key(5)), one)


def kept_for_backward(remat, mesh):
    """Shapes, dtypes and specs of what the backward pass of the layers is handed."""
    with jax.set_mesh(mesh):
        params = jax.device_put(weights(CFG), sharding.param_shardings(weights(CFG), mesh))
        tokens = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
        run = lambda p: jax.vjp(lambda p: transformer.hidden(p, tokens, CFG, Execution(remat=remat)), p)[1]  # noqa: E731
        return [jax.typeof(leaf) for leaf in jax.tree.leaves(jax.jit(run)(params))]


@pytest.mark.parametrize(("remat", "replica"), [*((remat, 2) for remat in REMAT), ("none", 1)])
def test_gathered_weights_are_not_kept(remat, replica):
    whole = {leaf.shape for leaf in jax.tree.leaves(weights(CFG)["layers"]) if leaf.ndim > 2}
    kept = kept_for_backward(remat, sharding.make_mesh(config.Mesh(replica=replica)))
    stacked = [leaf for leaf in kept if leaf.shape in whole]
    assert stacked  # the weights themselves, in parts
    assert all("data" in leaf.sharding.spec for leaf in stacked)


def test_each_policy_keeps_less_than_the_one_before():
    size = {kind: sum(leaf.size for leaf in kept_for_backward(kind, one_device())) for kind in REMAT}
    assert size["full"] < size["save_dots"] < size["save_dots_and_attention"] < size["none"]
    out_and_lse = CFG.layers * B * T * CFG.heads * (CFG.head_dim + 1)
    assert size["save_dots_and_attention"] - size["save_dots"] == out_and_lse


@pytest.fixture
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def test_init_is_the_documented_tree(mesh):
    got = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), weights(CFG))
    L, D, H, G, K, F, V = 2, 32, 4, 2, 8, 40, 48
    norm = {"scale": ((L, D), "float32")}
    attention = {"query": (L, D, H, K), "key": (L, D, G, K), "value": (L, D, G, K), "out": (L, H, K, D)}
    mlp = {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)}
    assert got == {
        "embed": {"embedding": ((V, D), "float32")},
        "layers": {
            "attention_norm": norm,
            "attention": {name: (shape, "float32") for name, shape in attention.items()},
            "mlp_norm": norm,
            "mlp": {name: (shape, "float32") for name, shape in mlp.items()},
        },
        "norm": {"scale": ((D,), "float32")},
        "head": {"kernel": ((D, V), "float32")},
    }
    query = weights(CFG)["layers"]["attention"]["query"]
    assert not np.array_equal(query[0], query[1])
    assert "head" not in weights(replace(CFG, tied_embeddings=True))


def test_init_is_the_same_on_every_mesh():
    mesh = sharding.make_mesh(config.Mesh(replica=2))
    init = functools.partial(transformer.init, CFG)
    shardings = sharding.param_shardings(weights(CFG), mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    assert all(p.sharding == s for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True))
    # The random bits are the same; how their last float is rounded is up to the compiler.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=3e-7), params, weights(CFG))


def logits(tokens, cfg=CFG, params=None, execution=None, **kwargs):
    run = jax.jit(lambda p, t: transformer.logits(p, t, cfg, execution or Execution(), **kwargs))
    return np.asarray(run(params or weights(cfg), tokens))


def test_logits_are_causal(mesh):
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CFG.vocab_size
    before, after = logits(TOKENS), logits(changed)
    assert np.array_equal(before[:, :7], after[:, :7])
    assert np.all(np.abs(before[:, 7:] - after[:, 7:]).max(-1) > 1e-3)


def test_packed_documents_are_as_if_alone(mesh):
    documents = jnp.asarray(np.repeat([[0, 1, 2]], B, 0).repeat([5, 4, 3], axis=1))
    packed = logits(TOKENS, documents_BT=documents)
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        np.testing.assert_allclose(packed[:, start:stop], logits(TOKENS[:, start:stop]), atol=2e-5)
    assert np.abs(packed - logits(TOKENS))[:, 5:].max() > 1e-2


def test_grouped_heads_are_repeated_heads(mesh):
    params = weights(CFG)
    attention = dict(params["layers"]["attention"])
    for name in ("key", "value"):
        attention[name] = np.repeat(attention[name], 2, axis=2)
    full = params | {"layers": params["layers"] | {"attention": attention}}
    np.testing.assert_allclose(logits(TOKENS, replace(CFG, kv_heads=4), full), logits(TOKENS), atol=1e-5)


def test_bf16_compute_on_float32_weights(mesh):
    cfg = replace(CFG, compute_dtype="bfloat16")
    x = transformer.hidden(weights(cfg), TOKENS, cfg, Execution())
    assert x.dtype == jnp.bfloat16 and transformer.head_kernel(weights(cfg), cfg).dtype == np.float32
    got = logits(TOKENS, cfg)
    assert got.dtype == np.float32
    difference = np.abs(got - logits(TOKENS)).max()
    assert 0 < difference < 0.1


def test_tied_head_is_the_transposed_table(mesh):
    cfg = replace(CFG, tied_embeddings=True)
    assert np.array_equal(transformer.head_kernel(weights(cfg), cfg), weights(cfg)["embed"]["embedding"].T)
