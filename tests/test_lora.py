"""Adapters: what they compute on every mesh and base, what they train, and what they refuse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from test_hf import refusal

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Adapter, Execution, Model, replace
from tinyllama_jax.config_finetune import TARGETS
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.finetune import adapters
from tinyllama_jax.loss import training_loss
from tinyllama_jax.model import cached, quantized, transformer
from tinyllama_jax.model.layers import linear
from tinyllama_jax.model.lowrank import Frozen, LowRank

MODEL = Model(vocab_size=96, d_model=64, layers=2, heads=2, kv_heads=2, head_dim=64, d_ff=128, compute_dtype="float32")
ALL = Adapter(rank=4, targets=("*",), base_weights="float32")
B, T = 8, 16
TOKENS = np.random.default_rng(0).integers(0, 96, (B, T + 1)).astype(np.int32)


QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # most of the time is compiling
jit = functools.partial(jax.jit, compiler_options=QUICK)


def mesh_of(shape=(1, 1, 1, 1)):
    sizes = dict(zip(sharding.AXES, shape, strict=True))
    return sharding.make_mesh(config.Mesh(**sizes), jax.devices()[: math.prod(shape)])


@functools.cache
def weights():
    """Of the base, and of adapters whose B is not zero, on the host."""
    with jax.set_mesh(mesh_of()):
        base = jit(lambda: jax.tree.map(lambda w: w, transformer.init(MODEL, jax.random.key(0))))()
        trained = jit(lambda: adapters.init(MODEL, ALL, jax.random.key(1)))()
    rng = np.random.default_rng(2)
    drawn = lambda path, w: np.asarray(w) if path[-1].key == "a" else 0.2 * rng.standard_normal(w.shape, np.float32)  # noqa: E731
    return jax.device_get(base), jax.tree_util.tree_map_with_path(drawn, jax.device_get(trained))


def trained_on(shape, adapter, execution=None):
    """Loss and gradients by the adapters."""
    mesh, execution = mesh_of(shape), execution or Execution()
    base, trained = weights()
    with sharding.computing(mesh, "float32"):
        base = jax.device_put(base, sharding.param_shardings(base, mesh))
        trained = jax.device_put(trained, adapters.shardings(MODEL, adapter, mesh))
        place = lambda rows: jax.device_put(sharding.striped(rows, shape[2]), sharding.token_sharding(mesh))  # noqa: E731
        x, y, valid = place(TOKENS[:, :-1]), place(TOKENS[:, 1:]), place(TOKENS[:, 1:] % 3 > 0)

        def loss(trained, base, key):
            frozen = adapters.freeze(base, MODEL, adapter.base_weights)
            params = adapters.attach(frozen, trained, MODEL, adapter, key)
            hidden = transformer.hidden(params, x, MODEL, execution)
            kernel = transformer.head_kernel(params, MODEL)
            return training_loss(hidden, kernel, y, valid, chunk_tokens=48)[0] / jnp.sum(valid)

        value, grads = jit(jax.value_and_grad(loss))(trained, base, jax.random.key(5))
        return float(value), jax.device_get(grads)


def apart(one, other):
    """The largest difference of a leaf's elements, as a share of its largest."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), one, other)))


@functools.cache
def on_one_device():
    return trained_on((1, 1, 1, 1), replace(ALL, dropout=0.1))


def test_a_mesh_trains_as_one_device():
    loss, grads = trained_on((1, 2, 2, 2), replace(ALL, dropout=0.1))
    want, want_grads = on_one_device()
    assert abs(loss - want) < 1e-5 and apart(want_grads, grads) < 1e-4


def test_unrolled_layers_are_those_of_the_scan():
    loss, grads = trained_on((1, 1, 1, 1), replace(ALL, dropout=0.1), Execution(scan_layers=False, remat="none"))
    assert abs(loss - on_one_device()[0]) < 1e-6 and apart(on_one_device()[1], grads) < 1e-5


def products(mesh, bits):
    """The loss of one matrix and a head, both adapted, and its gradients by x, A and B; on one device also as autodiff
    has them of W + scale A B."""
    base, trained = weights()
    gate, head = base["layers"]["mlp"]["gate"][0][:, :64], base["head"]["kernel"]
    a, b = (trained["layers"]["mlp"]["gate"][name][0][..., :64] for name in "ab")
    x = np.random.default_rng(3).standard_normal((B, T, 64), np.float32)
    parts = (x, a, b, *trained["head"]["kernel"].values())
    of = lambda *dims: NamedSharding(mesh, P(*dims))  # noqa: E731
    places = (of(sharding.BATCH, None, None), of("data", None), of(None, "data"), of("data", None), of(None, "data"))
    parts = jax.device_put(parts, places)
    gate, head = jax.device_put((gate, head), of("data", None))
    y = jax.device_put(TOKENS[:, 1:], of(sharding.BATCH, None))

    def loss(parts, gate, head, merged):
        x, a, b, head_a, head_b = parts
        if merged:
            gate, head, a, b, head_a, head_b = (
                reshard(w, P(None, None)) for w in (quantized.whole(gate, x.dtype), head, a, b, head_a, head_b)
            )
            gate, head = gate + 4 * a @ b, head + 4 * head_a @ head_b
        else:
            gate, head = LowRank(gate, a, b, None, 4.0, 0.0), LowRank(head, head_a, head_b, None, 4.0, 0.0)
        return training_loss(jnp.tanh(linear(x, gate)), head, y, y % 3 > 0, chunk_tokens=48, z_loss=1e-3)[0] / 99

    stored = gate if bits is None else jit(lambda w: quantized.quantize(reshard(w, P(None, None)), bits, (-2,)))(gate)
    run = jit(jax.value_and_grad(loss), static_argnums=3)
    return jax.device_get(
        [run(parts, stored, head, merged) for merged in ((False, True) if mesh.size == 1 else (False,))]
    )


@pytest.mark.parametrize("bits", [None, "nf4"])
def test_gradients_are_those_of_the_merged_matrices(bits):
    with sharding.computing(mesh_of(), "float32"):
        (loss, grads), (want, want_grads) = products(mesh_of(), bits)
    assert loss == pytest.approx(want, rel=1e-5) and apart(want_grads, grads) < 1e-5
    mesh = mesh_of((2, 4, 1, 1))
    with sharding.computing(mesh, "float32"):
        ((loss, grads),) = products(mesh, bits)
    assert loss == pytest.approx(want, rel=1e-5) and apart(want_grads, grads) < 1e-5


def test_a_frozen_head_has_no_gradient_in_the_program():
    """Nothing float32 of the head's shape is computed by the loss."""
    with jax.set_mesh(mesh_of()):
        x, w, y = jnp.ones((4, 16, 64), jnp.bfloat16), jnp.ones((64, 640), jnp.bfloat16), jnp.ones((4, 16), jnp.int32)
        loss = lambda x, w: training_loss(x, w, y, y > 0, chunk_tokens=16)[0]  # noqa: E731
        text = {
            kind: str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(x, weight))
            for kind, weight in {"trained": w, "frozen": Frozen(w)}.items()
        }
    assert "f32[64,640]" in text["trained"] and "f32[64,640]" not in text["frozen"]


@functools.cache
def logits_of():
    return jit(lambda p: transformer.logits(p, jnp.asarray(TOKENS[:2, :8]), MODEL, Execution()))


@pytest.mark.parametrize(("bits", "bound"), [("int8", 0.02), ("int4", 0.2), ("nf4", 0.3)])
def test_a_quantised_base_is_near_the_float_one(bits, bound):
    """The root of the mean squared error of the logits, as a share of theirs."""
    base, _ = weights()
    with sharding.computing(mesh_of(), "float32"):
        rounded = jit(lambda p: quantized.whole(adapters.freeze(p, MODEL, bits), jnp.float32))(base)
        want = logits_of()(jax.tree.map(jnp.asarray, base))
        error = jnp.std(logits_of()(rounded) - want) / jnp.std(want)
    assert 0 < error < bound


def test_dropout_is_drawn_for_each_matrix_and_by_its_key_alone():
    dropping = replace(ALL, dropout=0.5)
    base, trained = weights()
    with jax.set_mesh(mesh_of()):
        made = [adapters.attach(base, trained, MODEL, dropping, jax.random.key(k)) for k in (0, 0, 1)]
    keys = [
        np.concatenate(
            [
                np.asarray(jax.random.key_data(leaf.key)).reshape(-1, 2)
                for leaf in jax.tree.leaves(m, is_leaf=lambda x: hasattr(x, "key"))
                if hasattr(leaf, "key")
            ]
        )
        for m in made
    ]
    assert len(keys[0]) == 7 * MODEL.layers + 1 == len(np.unique(keys[0], axis=0))
    np.testing.assert_array_equal(keys[0], keys[1])
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * len(keys[0])


def test_generation_reads_adapters_as_training_computes_them():
    base, trained = weights()
    with sharding.computing(mesh_of(), "float32"):
        frozen = jit(lambda p: adapters.freeze(p, MODEL, "nf4"))(base)
        params = adapters.attach(frozen, jax.tree.map(jnp.asarray, trained), MODEL, ALL)
        whole = jit(lambda f, t: adapters.merge(f, t, MODEL, ALL))(frozen, trained)
        fill = jit(lambda p: cached.prefill(p, jnp.asarray(TOKENS[:2, :8]), MODEL, Execution(), jnp.full(2, 7))[0])
        want = logits_of()(whole)[:, -1]
        np.testing.assert_allclose(fill(params), want, atol=1e-4)
        assert np.abs(want - logits_of()(jax.tree.map(jnp.asarray, base))[:, -1]).max() > 0.1


def test_the_start_changes_nothing_and_is_drawn_as_peft_does():
    with jax.set_mesh(mesh_of()):
        fresh = jax.device_get(adapters.init(MODEL, ALL, jax.random.key(3)))
        few = jax.device_get(adapters.init(MODEL, replace(ALL, targets=("mlp.down",)), jax.random.key(3)))
    assert list(few) == ["layers"] and list(few["layers"]) == ["mlp"]
    np.testing.assert_array_equal(few["layers"]["mlp"]["down"]["a"], fresh["layers"]["mlp"]["down"]["a"])
    for path, inputs in {("attention", "out"): 128, ("mlp", "down"): 128, ("mlp", "gate"): 64}.items():
        a, b = fresh["layers"][path[0]][path[1]].values()
        assert not b.any() and 0.95 / math.sqrt(inputs) < np.abs(a).max() <= 1 / math.sqrt(inputs)
        assert a.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)
        assert (a[0] != a[1]).all()
    assert adapters.scale(ALL) == 16 / 4 and adapters.scale(replace(ALL, rank_stabilised=True)) == 16 / 2


def test_where_adapters_lie():
    """Inputs and outputs as the base's; the rank whole."""
    mesh = mesh_of((1, 2, 1, 2))
    specs = jax.tree.map(
        lambda s: tuple(s.spec), adapters.shardings(MODEL, ALL, mesh), is_leaf=lambda x: hasattr(x, "spec")
    )
    assert specs["layers"]["mlp"]["gate"] == {"a": (None, "data", None), "b": (None, None, "tensor")}
    assert specs["layers"]["attention"]["out"]["a"] == (None, "tensor", "data", None)
    assert specs["head"]["kernel"] == {"a": ("data", None), "b": (None, "tensor")}


def test_nf4_is_made_for_normal_weights():
    """Its constants are those of the paper's rule, and its error on normal weights is below int4's."""
    norm = scipy.stats.norm
    high, low = (norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    rule = np.sort(np.concatenate([high, [0], -low])) / norm.ppf(0.9677083)
    np.testing.assert_allclose(quantized.NF4, rule, atol=1e-6)
    w = np.random.default_rng(0).standard_normal((2, 512, 64)).astype(np.float32)
    error = {}
    with jax.set_mesh(mesh_of()):
        for bits in ("int4", "nf4"):
            stored = quantized.quantize(jnp.asarray(w), bits, (-2,), scale_dtype=jnp.bfloat16)
            one = quantized.quantize(jnp.asarray(w[1]), bits, (-2,), scale_dtype=jnp.bfloat16)
            np.testing.assert_array_equal(stored.codes[1], one.codes)
            values = np.asarray(quantized.whole(stored, jnp.dtype("float32")))
            np.testing.assert_array_equal(values[1], np.asarray(quantized.whole(one, jnp.dtype("float32"))))
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
            error[bits] = (np.sqrt(np.mean((values - w) ** 2)), 8 * size / w.size)
    # nf4 has the smaller groups' worth of scales as well: 4.25 bits, not 4.5.
    assert error["nf4"][1] == 4.25 and error["int4"][1] == 4.5
    by_64 = quantized_error_of_int4(w, 64)
    assert error["nf4"][0] < by_64


def quantized_error_of_int4(w, size):
    groups = w.reshape(2, -1, size, w.shape[-1])
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), 2) / -8
    return np.sqrt(np.mean((np.clip(np.round(groups / largest), -8, 7) * largest - groups) ** 2))


def test_patterns_name_matrices():
    of = lambda *targets: adapters.matches(replace(ALL, targets=targets))  # noqa: E731
    assert of("*") == TARGETS and of("mlp.*") == ("mlp.gate", "mlp.up", "mlp.down")
    assert of("head", "attention.query") == ("attention.query", "head")
    refusal(ConfigError, lambda: of("attention.query", "mlp.gates"), "'mlp.gates' matches no matrix", "'mlp.gate'")
    tied = replace(MODEL, tied_embeddings=True)
    refusal(ConfigError, lambda: adapters.axes(tied, ALL), "tied_embeddings", "leave `head` out")


def test_groups_that_a_mesh_would_cut():
    with jax.set_mesh(mesh_of((1, 1, 1, 4))):
        big = jax.ShapeDtypeStruct(
            (128, 64), jnp.float32, sharding=jax.NamedSharding(mesh_of((1, 1, 1, 4)), jax.P("tensor", None))
        )
        freeze = functools.partial(adapters.freeze_leaf, ("layers", "mlp", "down"), model=MODEL, base_weights="nf4")
        refusal(ConfigError, lambda: jax.eval_shape(freeze, big), "mesh.tensor=4", "128 inputs", "int8")
