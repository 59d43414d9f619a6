"""Single flipped bits, and what else can happen to files: each is noticed, and the step before is used."""

import math
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.train import checkpoint_files
from tinyllama_jax.train.checkpoint import Checkpoints

FLIPS = 24


def make_mesh(replica, data):
    return jax.make_mesh((replica, data), ("replica", "data"), devices=jax.devices()[: replica * data])


def state(mesh, seed):
    rng = np.random.default_rng(seed)
    values = {
        "layers": {"q": rng.normal(size=(2, 64, 32)).astype(np.float32)},
        "embed": rng.normal(size=(128, 64)).astype(np.float32),
        "half": rng.normal(size=(64, 8)).astype(jnp.bfloat16),
        "count": np.int32(seed),
    }
    specs = {"layers": {"q": P(None, "data")}, "embed": P("data"), "half": P("data"), "count": P()}
    return {"params": jax.tree.map(lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec)), values, specs)}


def targets(mesh, tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), tree
    )


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    mesh = make_mesh(1, 8)
    with Checkpoints(directory, keep_temporary=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(mesh, step), {"tokens": step}, permanent=False, blocking=True)
    return directory


@pytest.fixture
def directory(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def test_random_single_bits_are_all_noticed_and_by_orbax_alone_none_in_the_data(
    template, tmp_path, capfd, record_property
):
    """Bits drawn from all bytes of the arrays' files; a checkpoint is almost nothing else."""
    mesh = make_mesh(1, 8)
    good, before = state(mesh, 20), state(mesh, 10)
    wanted = targets(mesh, good)["params"]
    flat = {"layers.q": wanted["layers"]["q"], **{name: wanted[name] for name in ("embed", "half", "count")}}
    chance = random.Random(20)
    noticed_by_orbax = loaded_wrong = 0
    for number in range(FLIPS):
        run = shutil.copytree(template, tmp_path / str(number))
        step = run / "00000020"
        files = sorted(p for p in step.rglob("*") if p.is_file() and "c" in p.relative_to(step).parts)
        file = chance.choices(files, [p.stat().st_size for p in files])[0]
        flip(file, chance.randrange(8 * file.stat().st_size))
        try:
            loaded = checkpoint_files.read(step / "params", flat)
            loaded_wrong += not same(
                [loaded[name] for name in flat],
                [good["params"]["layers"]["q"], *(good["params"][name] for name in ("embed", "half", "count"))],
            )
        except Exception:  # in the index of a chunk, of which orbax knows a checksum
            noticed_by_orbax += 1
        with Checkpoints(run, keep_temporary=2) as checkpoints:
            found, items, meta = checkpoints.restore(targets(mesh, good))
        assert (found, meta["tokens"]) == (10, 10) and same(items, before)
        assert sorted(os.listdir(run)) == ["00000010", "00000020.corrupt"]
        said = capfd.readouterr().err
        assert file.relative_to(step).as_posix() in said and said.count("\n") == 1
    record_property("noticed by orbax alone", noticed_by_orbax)
    assert noticed_by_orbax == 0 and loaded_wrong == FLIPS


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("part", ["_METADATA", "zarr.json", "c/0/0"])
@pytest.mark.parametrize("damage", [truncate, empty, os.remove])
def test_truncated_emptied_and_deleted_files(directory, capfd, part, damage):
    file = directory / "00000020/params" / (part if part == "_METADATA" else f"embed/{part}")
    damage(file)
    mesh = make_mesh(1, 8)
    step, items, _ = Checkpoints(directory, keep_temporary=2).restore(targets(mesh, state(mesh, 0)))
    assert step == 10 and same(items, state(mesh, 10))
    assert file.name in capfd.readouterr().err


@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (1, 4, 1, 2), (1, 2, 1, 4), (1, 2, 2, 2), (2, 1, 2, 2)], ids=str)
def test_saved_on_eight_devices_restored_over_tensor_and_context(directory, shape):
    """Other axes cut the arrays elsewhere than they were cut when they were saved."""
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("replica", "data", "context", "tensor"), devices=devices)
    specs = {"layers": {"q": P(None, "data", "tensor")}, "embed": P("tensor", "data"), "half": P("data"), "count": P()}
    saved = state(make_mesh(1, 8), 20)
    wanted = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        saved,
        {"params": specs},
    )
    step, items, _ = Checkpoints(directory, keep_temporary=2).restore(wanted)
    assert step == 20 and same(items, saved)
    jax.tree.map(lambda got, want: np.testing.assert_equal(got.sharding, want.sharding), items, wanted)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 2), (2, 4), (1, 8)])
def test_saved_on_eight_devices_restored_on_fewer(directory, shape):
    mesh = make_mesh(*shape)
    step, items, _ = Checkpoints(directory, keep_temporary=2).restore(targets(mesh, state(make_mesh(1, 8), 0)))
    assert step == 20 and same(items, state(make_mesh(1, 8), 20))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(items))


def test_a_checkpoint_of_the_format_before_is_refused_and_stays_where_it_is(directory):
    import json

    from tinyllama_jax.errors import CheckpointError
    from tinyllama_jax.train import durable

    for step in (10, 20):
        meta = directory / f"{step:08d}/meta.json"
        about = json.loads(meta.read_text())
        about["checkpoint"]["format"] = 1
        meta.write_text(json.dumps(about))
        (meta.parent / "checksums.json").unlink()
        durable.seal(meta.parent)
    mesh = make_mesh(1, 8)
    with pytest.raises(
        CheckpointError, match="00000020: is of checkpoint format 1, and this version reads format 2 only"
    ):
        Checkpoints(directory, keep_temporary=2).restore(targets(mesh, state(mesh, 0)))
    assert sorted(os.listdir(directory)) == ["00000010", "00000020"]
