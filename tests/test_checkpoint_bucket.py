"""Checkpoints in an object store: servers of S3 and Google's kind on this machine, and fsspec's own store in memory."""

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from types import SimpleNamespace

import fsspec
import jax
import numpy as np
import pytest
from checkpoint_process import Group
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.errors import CheckpointError, DataError
from tinyllama_jax.train import checkpoint_files
from tinyllama_jax.train.checkpoint import Checkpoints


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:  # an answer, too
        return True
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


@contextlib.contextmanager
def server(*command: str):
    """The address of a server on the loopback, once it answers; `command` is a module and its options."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", *(word.format(port=port) for word in command)]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answers(f"http://127.0.0.1:{port}/"):
            assert process.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def s3():
    with server("moto.server", "-H", "127.0.0.1", "-p", "{port}") as address:
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@pytest.fixture(scope="module")
def gs():
    kinds = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"  # of buckets, of which only Google itself can tell; read on import
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kinds, "false")
        importlib.import_module("gcsfs")
    options = ("start", "--host", "127.0.0.1", "--port", "{port}", "--in-memory")
    with server("gcp_storage_emulator", *options) as address:
        yield {"STORAGE_EMULATOR_HOST": address, kinds: "false"}


@pytest.fixture(params=["s3", "gs", "memory"])
def bucket(request, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    if request.param == "memory":
        yield f"memory://{name}/run"
        fsspec.filesystem("memory").store.clear()
        return
    for variable, value in request.getfixturevalue(request.param).items():
        monkeypatch.setenv(variable, value)
    fsspec.filesystem(request.param).clear_instance_cache()
    fsspec.filesystem(request.param).mkdir(name)
    yield f"{request.param}://{name}/run"


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("replica", "data"))


def state(mesh, seed):
    rng = np.random.default_rng(seed)
    values = {"w": rng.normal(size=(16, 8)).astype(np.float32), "none": np.zeros((0, 2), np.float32)}
    specs = {"w": P("data"), "none": P()}
    return {"params": {n: jax.device_put(v, NamedSharding(mesh, specs[n])) for n, v in values.items()}}


def targets(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def names(bucket):
    return sorted({path.partition("/run/")[2].partition("/")[0] for path in files(bucket)})


def files(bucket):
    filesystem, root = fsspec.core.url_to_fs(bucket)
    filesystem.invalidate_cache()
    return [path for path in filesystem.find(root)]


def damage(bucket, *parts):
    filesystem, _ = fsspec.core.url_to_fs(bucket)
    path = next(path for path in files(bucket) if all(part in path for part in parts))
    data = bytearray(filesystem.cat_file(path))
    data[len(data) // 2] ^= 1
    filesystem.pipe_file(path, bytes(data))


def test_round_trip_pruning_and_the_same_step_again(bucket, mesh, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with Checkpoints(bucket, keep_temporary=1) as checkpoints:
        assert checkpoints.restore(targets(state(mesh, 0))) is None and checkpoints.peek() is None
        for step, seed in ((1, 1), (2, 2), (3, 3), (3, 4)):
            checkpoints.save(
                step, state(mesh, seed), {"seed": seed}, permanent=step == 1, blocking=True, tokenizer_files=[tokenizer]
            )
        assert checkpoints.steps() == [1, 3] and checkpoints.peek()["seed"] == 4
        assert len([path for path in files(bucket) if "/00000003/" in path and "tokenizer" in path]) == 1
    for step, seed in ((3, 4), (1, 1)):
        found, items, meta = Checkpoints(bucket, keep_temporary=1).restore(targets(state(mesh, 0)), step=step)
        assert (found, meta["seed"]) == (step, seed)
        np.testing.assert_array_equal(items["params"]["w"], state(mesh, seed)["params"]["w"])
    assert os.listdir(tmp_path / "local") == [], "nothing is left behind here"


@pytest.mark.parametrize("part", ["/w/c/", "meta.json", "checksums.json", "_METADATA"])
def test_damage_is_set_aside_and_the_one_before_is_used(bucket, mesh, capfd, part):
    with Checkpoints(bucket, keep_temporary=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(mesh, step), {}, permanent=False, blocking=True)
        damage(bucket, "/00000002/", part)
        step, items, _ = checkpoints.restore(targets(state(mesh, 0)))
    assert step == 1
    np.testing.assert_array_equal(items["params"]["w"], state(mesh, 1)["params"]["w"])
    assert names(bucket) == ["00000001", "00000002.corrupt"]
    assert "set aside" in capfd.readouterr().err


def test_a_missing_object_is_noticed_without_a_download(bucket, mesh, tmp_path):
    with Checkpoints(bucket, keep_temporary=3) as checkpoints:
        checkpoints.save(1, state(mesh, 1), {}, permanent=False, blocking=True)
        assert checkpoints.intact(1)
        filesystem, _ = fsspec.core.url_to_fs(bucket)
        filesystem.rm_file(next(path for path in files(bucket) if "/w/c/" in path))
        assert not checkpoints.intact(1) and names(bucket) == ["00000001"]


def test_what_was_never_complete_is_cleared_away_and_all_damaged_is_no_fresh_start(bucket, mesh):
    with Checkpoints(bucket, keep_temporary=3) as checkpoints:
        checkpoints.save(1, state(mesh, 1), {}, permanent=False, blocking=True)
    filesystem, root = fsspec.core.url_to_fs(bucket)
    filesystem.pipe_file(f"{root}/00000002/123/meta.json", b"{}")  # a kill before the commit
    checkpoints = Checkpoints(bucket, keep_temporary=3)
    assert names(bucket) == ["00000001"]
    damage(bucket, "/w/c/")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint is damaged.*00000001"):
            checkpoints.restore(targets(state(mesh, 0)))


def test_a_process_downloads_only_the_chunks_that_it_needs(tmp_path):
    mesh = jax.make_mesh((2, 4), ("replica", "data"))
    (tmp_path / checkpoint_files.FORM).write_text(
        '{"shape": [16, 8], "chunk_grid": {"configuration": {"chunk_shape": [4, 8]}}}'
    )
    half = jax.sharding.Mesh(mesh.devices[:1, :2], ("replica", "data"))
    for spec, wanted in ((P("data"), 4), (P(), 4)):
        target = jax.ShapeDtypeStruct((16, 8), np.float32, sharding=NamedSharding(half, spec))
        assert len(checkpoint_files.needed(tmp_path, target)) == wanted
    sharding = NamedSharding(mesh, P("data"))
    first = dict(
        [next(iter(sharding.devices_indices_map((16, 8)).items()))]
    )  # as if the others were of other processes
    one = SimpleNamespace(sharding=SimpleNamespace(addressable_devices_indices_map=lambda shape: first))
    assert checkpoint_files.needed(tmp_path, one) == {"c/0/0"}


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_processes_that_share_no_disk(bucket, tmp_path):
    path = os.pathsep.join(sys.path)
    plan = [{"do": "save", "step": 10}, {"do": "save", "step": 20}, {"do": "restore"}]
    for count, actions in ((2, plan), (1, plan[-1:])):
        group = Group(count, bucket, actions, environment={"PYTHONPATH": path}, private=tmp_path / "private")
        for lines in group.end():
            assert "restored 20" in lines
    assert names(bucket) == ["00000010", "00000020"]
    assert [p for p in (tmp_path / "private").rglob("*") if p.is_file()] == []


def test_an_unknown_kind_of_store_is_one_line():
    with pytest.raises(DataError, match="cannot be read here"):
        Checkpoints("nosuch://bucket/run", keep_temporary=1)
