import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config, presets, sharding, weights
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import transformer


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        (dict(), (1, 8, 1, 1)),
        (dict(replica=2), (2, 4, 1, 1)),
        (dict(replica=-1, data=2), (4, 2, 1, 1)),
        (dict(tensor=2, context=2), (1, 2, 2, 2)),
        (dict(data=1, context=-1, tensor=2), (1, 1, 4, 2)),
    ],
)
def test_mesh_sizes_and_axis_types(asked, got):
    mesh = sharding.make_mesh(config.Mesh(**asked))
    assert tuple(mesh.shape.items()) == tuple(zip(("replica", "data", "context", "tensor"), got, strict=True))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    # Neighbours, between which a network is fastest, differ in the last axis that has a size.
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    "asked", [dict(replica=3), dict(data=4), dict(replica=16), dict(replica=16, data=1), dict(tensor=3)]
)
def test_a_mesh_that_does_not_use_every_device_is_refused_in_one_line(asked):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(config.Mesh(**asked))
    assert "\n" not in str(error.value) and "8 device" in str(error.value) and "mesh.replica" in str(error.value)


def abstract_params(cfg):
    return jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "smollm2-135m", "t79"])
def test_every_matrix_lies_in_equal_parts_and_every_scale_is_whole(name):
    mesh = sharding.make_mesh(config.Mesh())
    params = abstract_params(presets.preset(name))
    shardings = sharding.param_shardings(params, mesh)
    for (path, leaf), placed in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
    ):
        assert len(placed.spec) == leaf.ndim, path  # full rank, so that types compare equal
        used = [axis for axis in placed.spec if axis is not None]
        assert used == ([] if "norm" in jax.tree_util.keystr(path) else ["data"]), path
        if "layers" in jax.tree_util.keystr(path):
            assert placed.spec[0] is None, path  # the scan needs the layers whole


def test_every_parameter_has_a_row_and_every_row_a_parameter():
    paths = set()
    for name in ("tinyllama-1.1b", "smollm2-135m"):
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(presets.preset(name)))[0]:
            assert len(sharding.logical_axes(path)) == leaf.ndim
            paths.add(tuple(entry.key for entry in path))
    assert paths == set(weights.AXES)


SIZES = {"replica": 1, "data": 4, "context": 1, "tensor": 2}


def test_an_axis_that_does_not_divide_gives_way_to_the_next():
    sizes = SIZES | {"data": 8, "tensor": 1}
    assert sharding.partition(("layers", "embed", "mlp"), (2, 16, 24), sizes) == P(None, "data", None)
    assert sharding.partition(("layers", "embed", "mlp"), (2, 12, 24), sizes) == P(None, None, "data")
    assert sharding.partition(("layers", "embed", "mlp"), (2, 12, 20), sizes) == P(None, None, None)


def test_tensor_takes_heads_columns_and_words_and_data_what_is_left():
    assert sharding.partition(("layers", "embed", "mlp"), (2, 16, 24), SIZES) == P(None, "data", "tensor")
    assert sharding.partition(("layers", "mlp", "embed"), (2, 24, 16), SIZES) == P(None, "tensor", "data")
    assert sharding.partition(("embed", "vocab"), (16, 48), SIZES) == P("data", "tensor")
    # No dimension takes two mesh axes: where `data` cannot lie beside `tensor` it goes on.
    heads = ("layers", "embed", "heads", "head_dim")
    assert sharding.partition(heads, (2, 15, 4, 8), SIZES) == P(None, None, "tensor", "data")
    assert sharding.partition(("embed", "mlp"), (15, 24), SIZES) == P(None, "tensor")


def test_a_table_that_contradicts_itself_the_mesh_or_an_array_is_refused():
    with pytest.raises(ValueError, match="repeats a row"):
        sharding.partition(("embed",), (8,), SIZES, (("embed", "data"), ("embed", "data")))
    with pytest.raises(ValueError, match="not in the mesh"):
        sharding.partition(("embed",), (8,), SIZES, (("embed", "expert"),))
    with pytest.raises(ValueError, match="mlp and heads of one array collide: both demand tensor"):
        sharding.partition(("heads", "mlp"), (4, 8), SIZES)
    with pytest.raises(ConfigError, match="mesh.tensor=2 does not divide the 3 kv_heads of the model"):
        sharding.partition(("embed", "kv_heads"), (8, 3), SIZES)
    with pytest.raises(ValueError, match="has no row"):
        sharding.param_shardings({"adapter": jnp.zeros(2)}, sharding.make_mesh(config.Mesh()))


def test_every_matrix_of_the_model_lies_over_both_axes():
    mesh = sharding.make_mesh(config.Mesh(tensor=2))
    params = abstract_params(presets.preset("tinyllama-1.1b"))
    for (path, leaf), placed in zip(
        jax.tree_util.tree_flatten_with_path(params)[0],
        jax.tree.leaves(sharding.param_shardings(params, mesh)),
        strict=True,
    ):
        used = {axis for axis in placed.spec if axis is not None}
        assert used == (set() if leaf.ndim < 2 or "norm" in str(path) else {"data", "tensor"}), path


class Device:
    """Where a device is; all that the division of rows asks of it."""

    def __init__(self, process):
        self.process_index = process


def shares(sizes, devices_per_process):
    shape = [sizes.get(name, 1) for name in sharding.AXES]
    count = int(np.prod(shape))
    devices = np.array([Device(i // devices_per_process) for i in range(count)]).reshape(shape)
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))
    return [sharding.row_share(mesh, process) for process in range(count // devices_per_process)]


def test_processes_of_the_same_rows_feed_the_same_share():
    assert shares(dict(data=8), 4) == [(0, 2), (1, 2)]
    assert shares(dict(replica=2, data=4), 2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(dict(data=2, context=4), 4) == [(0, 2), (1, 2)]
    assert shares(dict(data=2, context=4), 2) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(dict(data=1, context=4, tensor=2), 2) == [(0, 1)] * 4
    with pytest.raises(ConfigError, match="no equal share") as error:
        shares(dict(data=4, tensor=3), 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_stripes_deal_tokens_out_and_take_them_back(count):
    tokens = np.arange(24).reshape(2, 12)
    dealt = sharding.striped(tokens, count)
    for place in range(count):
        assert (dealt[:, place * 12 // count : (place + 1) * 12 // count] == tokens[:, place::count]).all()
    np.testing.assert_array_equal(sharding.in_order(dealt, count), tokens)
    wide = jnp.asarray(np.arange(48).reshape(2, 12, 2))
    np.testing.assert_array_equal(sharding.in_order(sharding.striped(wide, count, axis=1), count, axis=1), wide)


def test_gather_is_whole_and_its_transpose_is_in_parts():
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.NamedSharding(mesh, P("data", None)))
        whole, back = jax.jit(lambda w: jax.vjp(sharding.gather, w))(w)
        assert whole.sharding.spec == P(None, None)
        (gradient,) = jax.jit(lambda f, y: f(y))(back, 2 * whole)
        assert gradient.sharding.spec == P("data", None)
        assert jnp.array_equal(gradient, 2 * w)


def test_gather_leaves_the_parts_of_tensor_where_they_are():
    mesh = sharding.make_mesh(config.Mesh(tensor=2))
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.arange(64.0).reshape(8, 8), jax.NamedSharding(mesh, P("data", "tensor")))
        whole, back = jax.jit(lambda w: jax.vjp(sharding.gather, w))(w)
        assert whole.sharding.spec == P(None, "tensor")
        assert jax.jit(lambda f, y: f(y))(back, whole)[0].sharding.spec == P("data", "tensor")


def test_batch_rows_lie_over_both_axes():
    mesh = sharding.make_mesh(config.Mesh(replica=2))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.zeros((8, 3), jnp.int32), sharding.batch_sharding(mesh))
        assert sharding.batch_axes(rows) == sharding.BATCH
        assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 3)}
        assert sharding.batch_axes(jnp.zeros((8, 3))) is None
    assert sharding.replicated(mesh, 2).spec == P(None, None)


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_float32_is_asked_of_devices_that_would_round(dtype, exact):
    mesh = sharding.make_mesh(config.Mesh())
    with sharding.computing(mesh, dtype):
        text = str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((8, 8), jnp.float32)))
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    assert ("HIGHEST" in text.upper()) == exact, text
