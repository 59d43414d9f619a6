import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config, presets, sharding
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import transformer


@pytest.mark.parametrize(
    ("asked", "got"), [(dict(), (1, 8)), (dict(replica=2), (2, 4)), (dict(replica=-1, data=2), (4, 2))]
)
def test_mesh_sizes_and_axis_types(asked, got):
    mesh = sharding.make_mesh(config.Mesh(**asked))
    assert tuple(mesh.shape.items()) == tuple(zip(("replica", "data"), got, strict=True))
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("asked", [dict(replica=3), dict(data=4), dict(replica=16), dict(replica=16, data=1)])
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
    assert paths == set(sharding.PARAMETERS)


def test_an_axis_that_does_not_divide_gives_way_to_the_next():
    sizes = {"replica": 1, "data": 8}
    assert sharding.partition(("layers", "embed", "mlp"), (2, 16, 24), sizes) == P(None, "data", None)
    assert sharding.partition(("layers", "embed", "mlp"), (2, 12, 24), sizes) == P(None, None, "data")
    assert sharding.partition(("layers", "embed", "mlp"), (2, 12, 20), sizes) == P(None, None, None)


def test_a_new_mesh_axis_is_rows_in_the_table():
    sizes = {"replica": 1, "data": 4, "tensor": 2}
    table = (("heads", "tensor"), ("mlp", "tensor"), *sharding.TABLE)
    assert sharding.partition(("layers", "embed", "mlp"), (2, 16, 24), sizes, table) == P(None, "data", "tensor")
    # No dimension takes two mesh axes, and no mesh axis two dimensions.
    assert sharding.partition(("embed", "heads", "mlp"), (3, 4, 8), sizes, table) == P(None, "tensor", "data")


def test_a_table_that_contradicts_itself_or_the_mesh_is_refused():
    sizes = {"replica": 1, "data": 4}
    with pytest.raises(ValueError, match="repeats a row"):
        sharding.partition(("embed",), (8,), sizes, (("embed", "data"), ("embed", "data")))
    with pytest.raises(ValueError, match="not in the mesh"):
        sharding.partition(("embed",), (8,), sizes, (("embed", "tensor"),))
    with pytest.raises(ValueError, match="has no row"):
        sharding.param_shardings({"adapter": jnp.zeros(2)}, sharding.make_mesh(config.Mesh()))


def test_gather_is_whole_and_its_transpose_is_in_parts():
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.NamedSharding(mesh, P("data", None)))
        whole, back = jax.jit(lambda w: jax.vjp(sharding.gather, w))(w)
        assert whole.sharding.spec == P(None, None)
        (gradient,) = jax.jit(lambda f, y: f(y))(back, 2 * whole)
        assert gradient.sharding.spec == P("data", None)
        assert jnp.array_equal(gradient, 2 * w)


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
