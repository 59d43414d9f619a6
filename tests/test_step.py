import jax
import numpy as np
import pytest
from quick_experiment import quick

from tinyllama_jax import mesh_rules
from tinyllama_jax.config import Execution, Mesh, Optimizer, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import make_mesh, replicated
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step


def batch_of(run, rows=8, seed=0):
    rng = np.random.default_rng(seed)
    window = rng.integers(0, run.model.vocab_size, (rows, run.data.sequence_tokens + 1)).astype(np.int32)
    documents = np.sort(rng.integers(0, 3, (rows, run.data.sequence_tokens)), axis=1).astype(np.int32)
    return {
        "tokens": window[:, :-1],
        "targets": window[:, 1:],
        "documents": documents,
        "valid": np.ones((rows, run.data.sequence_tokens), bool),
    }


ONE = Mesh(replica=1, data=1)


def losses(run, batches, *, accumulation=1, mesh=ONE, lr=1e-3):
    """Loss and gradient norm of one step per batch, and the final parameters."""
    devices = jax.devices()[: max(mesh.replica, 1) * max(mesh.data, 1)]
    mesh = make_mesh(mesh, devices)
    out = []
    with jax.set_mesh(mesh):
        state = train_state.init(run, mesh)
        train_step = step.make_train_step(run)
        for index, batch in enumerate(batches):
            on_device = step.put_batch(batch, accumulation, mesh, documents=run.data.document_masking)
            rate, number = jax.device_put((np.float32(lr), np.int32(index)), replicated(mesh))
            state, metrics = train_step(state, on_device, rate, number)
            out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return np.array(out), jax.device_get(state["params"])


@pytest.mark.parametrize("masking", [False, True])
def test_the_loss_does_not_depend_on_accumulation(masking):
    run = quick()
    run = replace(run, data=replace(run.data, document_masking=masking))
    batch = batch_of(run)
    batch["valid"] = np.random.default_rng(1).random(batch["valid"].shape) < 0.7  # unequal counts per micro-batch
    whole, _ = losses(run, [batch] * 3)
    for accumulation in (2, 4, 8):
        parts, _ = losses(run, [batch] * 3, accumulation=accumulation)
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
        np.testing.assert_allclose(parts, whole, rtol=2e-5)  # after updates rounding has had time to spread


def test_a_kernel_trains_as_the_formula_does():
    """The whole step with a kernel of ours, rows spread over two devices and two micro-batches, rematerialised."""
    run = quick()
    run = replace(
        run,
        model=replace(run.model, heads=2, kv_heads=1, head_dim=16, d_model=32),
        data=replace(run.data, document_masking=True),
    )
    batches = [batch_of(run, seed=seed) for seed in range(3)]
    formula, _ = losses(run, batches)
    execution = Execution(attention="interpret:triton", remat="save_dots_and_attention")
    kernel, _ = losses(replace(run, execution=execution), batches, accumulation=2, mesh=Mesh(replica=1, data=2))
    np.testing.assert_allclose(kernel, formula, rtol=2e-5)


def test_masked_tokens_do_not_count():
    run = quick()
    batch, other = batch_of(run), batch_of(run, seed=9)
    batch["valid"] = np.random.default_rng(1).random(batch["valid"].shape) < 0.5
    changed = batch | {"targets": np.where(batch["valid"], batch["targets"], other["targets"])}
    one, params = losses(run, [batch])
    two, params_changed = losses(run, [changed])
    assert (one == two).all()
    jax.tree.map(np.testing.assert_array_equal, params, params_changed)
    rows = [batch | {"valid": batch["valid"] & (np.arange(8)[:, None] == row)} for row in range(8)]
    counts = [r["valid"].sum() for r in rows]
    per_row = losses(run, rows, lr=0.0)[0][:, 0]
    assert one[0, 0] == pytest.approx(np.average(per_row, weights=counts), rel=1e-6)


@pytest.mark.parametrize(("replica", "data"), [(2, 4), (1, 2)])
def test_every_mesh_gives_the_losses_of_one_device(replica, data):
    run = quick()
    batches = [batch_of(run, seed=seed) for seed in range(6)]
    one, params_one = losses(run, batches)
    many, params_many = losses(run, batches, mesh=Mesh(replica=replica, data=data))
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4), params_one, params_many)


def test_weights_and_optimizer_state_are_really_sharded():
    run = quick()
    mesh = make_mesh(Mesh(replica=1, data=8))
    with jax.set_mesh(mesh):
        state = train_state.init(run, mesh)
    gate = state["params"]["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.size == gate.size // 8
    total = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held < total / 7  # all but the norm scales and the guard's rings lie in eighths


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_batch_on_the_devices_is_the_host_batch(devices):
    run = quick()
    batch = batch_of(run)
    mesh = make_mesh(Mesh(), jax.devices()[:devices])
    placed = step.put_batch(batch, 1, mesh, documents=True)
    for name, value in placed.items():
        np.testing.assert_array_equal(np.asarray(value)[0], batch[name])
        assert len(value.addressable_shards) == devices
        assert value.addressable_shards[0].data.shape == (1, 8 // devices, run.data.sequence_tokens)


@pytest.mark.slow
def test_dropout_depends_on_the_step_and_on_nothing_else():
    run = quick()
    run = replace(run, model=replace(run.model, dropout=0.2))
    batch = batch_of(run)
    first, _ = losses(run, [batch, batch], lr=0.0)
    again, _ = losses(run, [batch, batch], lr=0.0)
    sharded, _ = losses(run, [batch, batch], lr=0.0, mesh=Mesh(replica=1, data=8))
    assert (first == again).all()
    assert abs(first[0, 0] - first[1, 0]) > 1e-4
    np.testing.assert_allclose(sharded, first, rtol=1e-5)


@pytest.mark.slow
def test_remat_and_unrolled_layers_change_nothing():
    run = quick()
    batches = [batch_of(run, seed=seed) for seed in range(2)]
    plain, _ = losses(run, batches)
    for execution in (
        Execution(remat="full"),
        Execution(remat="save_dots"),
        Execution(remat="save_dots_and_attention"),
        Execution(scan_layers=False),
        Execution(loss_chunk_tokens=7),
    ):
        np.testing.assert_allclose(losses(replace(run, execution=execution), batches)[0], plain, rtol=1e-5)


def test_a_step_computes_no_cosine():
    """Where positions are known while tracing, tables are constants: a CPU would compute them again at every use."""
    run = replace(quick(), execution=Execution(scan_layers=False))
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        placed = step.put_batch(batch_of(run), 1, mesh, documents=False)
        arguments = train_state.init(run, mesh), placed, np.float32(0), np.int32(0)
        text = step.make_train_step(run).lower(*arguments).as_text()
    assert "cosine" not in text and "dot_general" in text


@pytest.mark.slow
def test_a_model_of_a_million_parameters_memorises_a_batch():
    run = quick()
    model = replace(run.model, d_model=128, layers=4, heads=4, kv_heads=2, head_dim=32, d_ff=352)
    run = replace(run, model=model, optimizer=Optimizer(weight_decay=0.0, beta2=0.98))
    batch = batch_of(run)
    curve, params = losses(run, [batch] * 150, lr=3e-3)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.8e6 < parameters < 1.2e6, parameters
    assert curve[0, 0] > 5 and curve[-1, 0] < 0.01, curve[::30]


def test_batches_that_do_not_fit_the_devices_are_refused():
    run = quick()
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    with pytest.raises(ConfigError, match="stage 'basic': a micro-batch of 4 sequences cannot be spread over 8"):
        mesh_rules.check(run, plan.stages, make_mesh(Mesh()).shape)
    with pytest.raises(ConfigError, match="micro-batches"):
        replace(run, execution=Execution(micro_batch_sequences=3))
