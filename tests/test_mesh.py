"""Meshes of every shape train the same model: same weights, same batches, same losses."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quick_experiment import quick

from tinyllama_jax import config, mesh_rules, sharding
from tinyllama_jax.config import replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model.layers import linear
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step
from tinyllama_jax.train.checkpoint import Checkpoints

SHAPES = [(1, 8, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 4, 2), (1, 1, 8, 1)]
ROWS, ACCUMULATION = 16, 2


def mesh_of(shape):
    """replica, data, context, tensor."""
    return sharding.make_mesh(
        config.Mesh(**dict(zip(sharding.AXES, shape, strict=True))), jax.devices()[: math.prod(shape)]
    )


def run_of(masking=False, **model):
    run = quick()
    return replace(run, data=replace(run.data, document_masking=masking), model=replace(run.model, **model))


def batch(seed):
    rng = np.random.default_rng(seed)
    window = rng.integers(0, 512, (ROWS, 33)).astype(np.int32)
    return {
        "tokens": window[:, :-1],
        "targets": window[:, 1:],
        "documents": np.cumsum(rng.random((ROWS, 32)) < 0.15, axis=1, dtype=np.int32),
        "valid": rng.random((ROWS, 32)) < 0.7,
    }


def steps(run, mesh, state, numbers):
    """Loss and gradient norm of one step per number, and the state after them."""
    train_step, out = step.make_train_step(run), []
    for number in numbers:
        placed = step.put_batch(batch(number), ACCUMULATION, mesh, documents=run.data.document_masking)
        lr, index = jax.device_put((np.float32(1e-2), np.int32(number)), sharding.replicated(mesh))
        state, metrics = train_step(state, placed, lr, index)
        out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(out), state


@functools.cache
def trained(shape, count=3, **settings):
    """The initial weights, loss and gradient norm of each step, and the state after the last one."""
    run, mesh = run_of(**settings), mesh_of(shape)
    with jax.set_mesh(mesh):
        state = train_state.init(run, mesh)
        weights = jax.device_get(state["params"])
        return weights, *steps(run, mesh, state, range(count))


@pytest.mark.parametrize(
    ("shape", "masking"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False), (SHAPES[3], False)], ids=str
)
def test_every_mesh_trains_as_one_device(shape, masking):
    weights, curve, state = trained(shape, masking=masking)
    same_weights, same_curve, same_state = trained((1, 1, 1, 1), masking=masking)
    # The random bits are the same; how their last float is rounded is up to the compiler (of JAX 0.12 on CPUs).
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), weights, same_weights)
    np.testing.assert_allclose(curve, same_curve, rtol=0, atol=1e-5)
    assert abs(curve[0, 0] - curve[2, 0]) > 1e-3  # the steps did something
    after, same_after = jax.device_get((state["params"], same_state["params"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4), after, same_after)


@pytest.mark.slow
def test_dropout_falls_on_the_same_tokens():
    settings = dict(masking=True, dropout=0.2)
    want = trained((1, 1, 1, 1), 1, **settings)[1]
    np.testing.assert_allclose(trained((1, 2, 2, 2), 1, **settings)[1], want, rtol=0, atol=1e-5)
    assert abs(want[0, 0] - trained((1, 1, 1, 1), masking=True)[1][0, 0]) > 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), *SHAPES], ids=str)
def test_the_batch_on_the_devices_is_the_hosts(shape):
    mesh, host = mesh_of(shape), batch(0)
    for name, placed in step.put_batch(host, ACCUMULATION, mesh, documents=True).items():
        back = sharding.in_order(np.asarray(placed), shape[2]).reshape(ROWS, -1)
        np.testing.assert_array_equal(back, host[name])
        assert back.dtype == host[name].dtype
        local = (ACCUMULATION, ROWS // ACCUMULATION // (shape[0] * shape[1]), 32 // shape[2])
        assert {shard.data.shape for shard in placed.addressable_shards} == {local}


def test_optimizer_state_lies_as_the_weights():
    _, _, state = trained((1, 2, 2, 2), masking=False)
    gate = state["params"]["layers"]["mlp"]["gate"]
    moments = [leaf for leaf in jax.tree.leaves(state["optimizer"]["adam"]) if leaf.shape == gate.shape]
    assert len(moments) == 4 and all(m.sharding == gate.sharding for m in moments)  # of gate and up
    assert gate.addressable_shards[0].data.size == gate.size // 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 2, 1, 4), (1, 2, 4, 1), (2, 1, 2, 2)],
    ids=str,
)
def test_a_checkpoint_goes_on_over_another_mesh(tmp_path, shape):
    """Saved by eight devices of FSDP: the same weights bit for bit, and the same next losses."""
    settings = dict(masking=True, kv_heads=4)  # four of everything that `tensor` must divide
    run, (_, _, state) = run_of(**settings), trained((1, 8, 1, 1), 2, **settings)
    mesh = mesh_of((1, 8, 1, 1))
    with jax.set_mesh(mesh), Checkpoints(tmp_path, keep_temporary=2) as checkpoints:
        checkpoints.save(2, state, {"step": 2}, permanent=True, blocking=True, tokenizer_files={})
        saved = jax.device_get(state["params"])
        want, _ = steps(run, mesh, jax.tree.map(lambda leaf: leaf.copy(), state), [2, 3])
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh), Checkpoints(tmp_path, keep_temporary=2) as checkpoints:
        target = train_state.abstract(run, mesh)
        _, state, _ = checkpoints.restore(target)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), saved)
        placed = jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s.sharding, leaf.ndim), state, target)
        assert all(jax.tree.leaves(placed))
        np.testing.assert_allclose(steps(run, mesh, state, [2, 3])[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "change", "words"),
    [
        (dict(tensor=8), {}, "mesh.tensor=8 does not divide model.heads=4"),
        (dict(tensor=4), {}, "mesh.tensor=4 does not divide model.kv_heads=2"),
        (dict(tensor=2), dict(d_ff=63), "mesh.tensor=2 does not divide model.d_ff=63"),
        (dict(tensor=2), dict(vocab_size=511), "mesh.tensor=2 does not divide model.vocab_size=511"),
        (dict(context=8), {}, "mesh.context=8 does not divide data.sequence_tokens=31"),
    ],
)
def test_what_a_mesh_cannot_cut_is_refused_before_anything_is_compiled(mesh, change, words):
    run = run_of(**change)
    if "context" in mesh:
        stage = replace(run.curriculum[0], tokens=310, batch_tokens=31 * 10)
        run = replace(run, data=replace(run.data, sequence_tokens=31), curriculum=(stage,))
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    with pytest.raises(ConfigError, match=words) as error:
        mesh_rules.check(run, plan.stages, sharding.make_mesh(config.Mesh(**mesh)).shape)
    assert "\n" not in str(error.value)


def test_weights_of_the_layers_are_gathered_over_data_only():
    """In the compiled step no gather makes a whole layer's matrix where `tensor` splits it."""
    run, mesh = run_of(), mesh_of((1, 4, 1, 2))
    with jax.set_mesh(mesh):
        state = train_state.abstract(run, mesh)
        placed = step.put_batch(batch(0), ACCUMULATION, mesh, documents=False)
        scalars = (jax.ShapeDtypeStruct((), d, sharding=NamedSharding(mesh, jax.P())) for d in (np.float32, np.int32))
        text = step.make_train_step(run).lower(state, placed, *scalars).compile().as_text()
    gathered = set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text))
    assert any(shape in gathered for shape in ("f32[32,32]", "f32[32,2,8]"))  # half of gate's columns, of the heads
    assert not {"f32[32,64]", "f32[64,32]", "f32[32,4,8]", "f32[4,8,32]"} & gathered, gathered


def test_gradients_cross_replicas_in_parts():
    """Reduce-scattered over `data` first; of the layers' matrices only quarters are summed over `replica`."""
    mesh = mesh_of((2, 4, 1, 1))
    with jax.set_mesh(mesh):
        w = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("data", None)))
        x = jax.device_put(np.ones((8, 3, 8), np.float32), sharding.batch_sharding(mesh, 3))
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(linear(x, w) ** 2)))
        text = gradient.lower(w).compile().as_text()
        np.testing.assert_allclose(gradient(w), np.full((8, 16), 2 * 8.0 * 8 * 3))
    assert re.search(r"f32\[2,16\]\S* reduce-scatter\(", text)
    assert set(re.findall(r"= (\S+?)\{\S* all-reduce\(", text)) == {"f32[2,16]"}, text
