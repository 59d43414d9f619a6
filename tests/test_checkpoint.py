import os
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import checkpoint, durable
from tinyllama_jax.train.checkpoint import Checkpoints

SPECS = {"layers": {"q": P(None, "data", None), "scale": P(None)}, "embed": P("data", None)}


def make_mesh(replica, data):
    return jax.make_mesh((replica, data), ("replica", "data"), devices=jax.devices()[: replica * data])


def fresh(mesh, seed=0):
    """A state with everything that is awkward: named tuples, counts, bfloat16, an empty array, NaN."""
    rng = np.random.default_rng(seed)
    with jax.set_mesh(mesh):
        values = {
            "layers": {"q": rng.normal(size=(3, 16, 8)).astype(np.float32), "scale": np.full(5, np.nan, np.float32)},
            "embed": rng.normal(size=(32, 8)).astype(np.float32),
        }
        params = jax.tree.map(lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec)), values, SPECS)
        optimizer = optax.adamw(1e-3).init(params)
        optimizer = jax.tree.map(lambda x: x + jnp.asarray(seed + 1, x.dtype), optimizer)
        half = jax.device_put(values["embed"].astype(jnp.bfloat16), NamedSharding(mesh, P("data", None)))
        none = jax.device_put(np.zeros((0, 4), np.float32), NamedSharding(mesh, P()))
        return {"params": params, "optimizer": {"adam": optimizer, "half": half, "none": none}}


def abstract(state, mesh):
    def target(x):
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(target, state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(scope="module")
def states(mesh):
    return {step: fresh(mesh, step) for step in (10, 20)}


@pytest.fixture(scope="module")
def template(tmp_path_factory, states):
    """A run with complete checkpoints at steps 10 and 20, to be copied before it is damaged."""
    run = tmp_path_factory.mktemp("template")
    tokenizer = run / "tokenizer.json"
    tokenizer.write_text('{"model": "of a tokenizer"}')
    with Checkpoints(run / "checkpoints", keep_temporary=2) as checkpoints:
        for step, state in states.items():
            checkpoints.save(
                step, state, {"tokens": step * 7}, permanent=False, blocking=True, tokenizer_files=[tokenizer]
            )
    return run


@pytest.fixture
def run(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (4, 2), (1, 1)])
def test_round_trip_is_bit_equal_on_any_mesh(run, states, shape):
    other = make_mesh(*shape)
    with jax.set_mesh(other):
        step, items, meta = Checkpoints(run / "checkpoints", keep_temporary=2).restore(abstract(states[20], other))
    assert (step, meta["tokens"]) == (20, 140)
    assert_same_bits(items, states[20])
    assert type(items["optimizer"]["adam"][0]) is optax.ScaleByAdamState
    assert items["optimizer"]["adam"][0].count.dtype == jnp.int32
    for leaf in jax.tree.leaves(items):
        assert leaf.sharding.mesh == other
    assert items["params"]["layers"]["q"].sharding.spec == P(None, "data", None)


def test_targets_from_eval_shape_land_on_the_current_mesh(run, states):
    """Their shardings are on an abstract mesh, scalars have none; orbax would keep the old mesh."""
    other = make_mesh(1, 8)
    with jax.set_mesh(other):
        targets = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, abstract_values(states[20], other)))
        items = checkpoint.load(run / "checkpoints/00000020", targets)
        total = jax.jit(lambda tree: tree["params"]["embed"].sum() + tree["optimizer"]["adam"][0].count)(items)
    assert np.isfinite(total)
    assert all(leaf.sharding.mesh == other for leaf in jax.tree.leaves(items))


def abstract_values(state, mesh):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), abstract(state, mesh))


def test_only_weights_and_without_a_mesh(run, states):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[20]["params"])
    items = checkpoint.load(run / "checkpoints/00000020", {"params": target})
    assert list(items) == ["params"]
    assert_same_bits(items["params"], states[20]["params"])
    assert (run / "checkpoints/00000020/tokenizer/tokenizer.json").is_file()


def test_arrays_may_be_donated_when_save_returns(tmp_path):
    mesh, may_write = make_mesh(1, 1), threading.Event()
    checkpoints = Checkpoints(tmp_path, keep_temporary=1, on_event=lambda kind, step: may_write.wait(30))
    with jax.set_mesh(mesh):
        x = jax.device_put(np.arange(4096.0, dtype=np.float32), NamedSharding(mesh, P()))
        expected = np.array(x)
        checkpoints.save(1, {"params": {"x": x}}, {}, permanent=False, blocking=False)
        y = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x)
        y.block_until_ready()
        assert x.is_deleted()  # else this test proves nothing
        may_write.set()
        checkpoints.close()
        items = checkpoint.load(tmp_path / "00000001", {"params": {"x": jax.ShapeDtypeStruct((4096,), jnp.float32)}})
    np.testing.assert_array_equal(items["params"]["x"], expected)


def test_a_time_of_day_that_jumps_fails_no_save(tmp_path, states, monkeypatch):
    hours, real = iter(range(10**6)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * next(hours))
    with Checkpoints(tmp_path, keep_temporary=1) as checkpoints:
        checkpoints.save(1, states[10], {}, permanent=True, blocking=True)
    assert next(hours) > 10, "orbax looks at this clock"
    assert checkpoints.steps() == [1]


def test_a_save_waits_for_the_one_before(tmp_path, states):
    events = []

    def slow(kind, step):
        if (kind, step) == ("writing", 1):
            time.sleep(0.3)
        events.append((kind, step))

    with Checkpoints(tmp_path, keep_temporary=5, on_event=slow) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, states[10], {}, permanent=False, blocking=False)
    assert events == [(kind, step) for step in (1, 2) for kind in ("writing", "written", "committed")]
    assert checkpoints.steps() == [1, 2]


def test_old_temporary_checkpoints_go_and_permanent_ones_stay(tmp_path, states):
    with Checkpoints(tmp_path, keep_temporary=2) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, states[10], {}, permanent=step in (2, 5), blocking=False)
    assert checkpoints.steps() == [2, 5, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000005", "00000006", "00000007"]


def test_the_same_step_again_replaces_it_and_stays_permanent(tmp_path, states):
    with Checkpoints(tmp_path, keep_temporary=1) as checkpoints:
        checkpoints.save(3, states[10], {"which": "first"}, permanent=True, blocking=True)
        checkpoints.save(3, states[20], {"which": "second"}, permanent=False, blocking=True)
        checkpoints.save(4, states[20], {}, permanent=False, blocking=True)
    assert sorted(os.listdir(tmp_path)) == ["00000003", "00000004"]
    meta = checkpoint.read_meta(tmp_path / "00000003")
    assert meta["which"] == "second" and meta["checkpoint"]["permanent"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(run, states, mesh):
    (run / "checkpoints/00000020").rename(run / "checkpoints/00000020.replaced")
    checkpoints = Checkpoints(run / "checkpoints", keep_temporary=2)
    step, items, _ = checkpoints.restore(abstract(states[20], mesh))
    assert step == 20
    assert_same_bits(items, states[20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, os.remove], ids=["bit", "truncated", "deleted"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(template, tmp_path, states, mesh, capfd, damage):
    files = [p.relative_to(template) for p in (template / "checkpoints/00000020").rglob("*") if p.is_file()]
    if damage is not os.remove:
        files = [f for f in files if (template / f).stat().st_size]
    assert {"meta.json", "checksums.json", "tokenizer.json"} < {f.name for f in files}
    assert any("params" in f.parts for f in files) and any("optimizer" in f.parts for f in files)
    targets = abstract(states[10], mesh)
    for number, file in enumerate(files):
        run = shutil.copytree(template, tmp_path / str(number))
        damage(run / file)
        with pytest.raises(CheckpointError):
            checkpoint.load(run / "checkpoints/00000020", targets)
        step, items, meta = Checkpoints(run / "checkpoints", keep_temporary=2).restore(targets)
        assert (step, meta["tokens"]) == (10, 70), file
        assert_same_bits(items, states[10])
        assert sorted(os.listdir(run / "checkpoints")) == ["00000010", "00000020.corrupt"], file
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "00000020" in said and "set aside" in said, said


def test_an_array_that_is_not_what_was_saved_is_noticed_even_when_its_file_is_intact(run, states, mesh, capfd):
    """The checksums of files cannot see what went wrong before they were taken."""
    meta = run / "checkpoints/00000020/meta.json"
    print_ = checkpoint.read_meta(meta.parent)["checkpoint"]["leaves"]["params"]["embed"]["fingerprint"]
    meta.write_text(meta.read_text().replace(print_, f"{int(print_, 16) ^ 1:016x}"))
    (meta.parent / "checksums.json").unlink()
    durable.seal(meta.parent)
    step, _, _ = Checkpoints(run / "checkpoints", keep_temporary=2).restore(abstract(states[10], mesh))
    assert step == 10
    assert "params.embed differs from its fingerprint" in capfd.readouterr().err


def test_corrupt_names_are_numbered(run, states, mesh):
    (run / "checkpoints/00000020.corrupt").mkdir()
    flip(run / "checkpoints/00000020/meta.json")
    Checkpoints(run / "checkpoints", keep_temporary=2).restore(abstract(states[10], mesh))
    assert (run / "checkpoints/00000020.corrupt2/meta.json").is_file()


def test_if_every_checkpoint_is_damaged_a_run_never_starts_afresh(run, states, mesh):
    for step in (10, 20):
        flip(run / f"checkpoints/{step:08d}/meta.json")
    for _ in range(2):  # and not on the next attempt either
        with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*00000010.*") as caught:
            Checkpoints(run / "checkpoints", keep_temporary=2).restore(abstract(states[10], mesh))
        assert "00000020" in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_at_all_is_none(tmp_path, states, mesh):
    assert Checkpoints(tmp_path / "new", keep_temporary=2).restore(abstract(states[10], mesh)) is None


def test_arrays_of_another_model_are_refused_by_name_and_nothing_is_renamed(run, states, mesh):
    checkpoints = Checkpoints(run / "checkpoints", keep_temporary=2)
    targets = abstract(states[20], mesh)
    targets["params"]["embed"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    with pytest.raises(
        CheckpointError, match=r"params\.embed: expected float32\[64, 8\], found float32\[32, 8\]"
    ) as caught:
        checkpoints.restore(targets)
    assert "\n" not in str(caught.value)
    targets["params"]["embed"] = jax.ShapeDtypeStruct((32, 8), jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"params\.embed: expected bfloat16\[32, 8\], found float32\[32, 8\]"):
        checkpoints.restore(targets)
    del targets["params"]["embed"]
    with pytest.raises(CheckpointError, match=r"params\.embed: only the checkpoint has it"):
        checkpoints.restore(targets)
    targets["params"]["head"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    with pytest.raises(CheckpointError, match=r"params\.(embed|head): "):
        checkpoints.restore(targets)
    with pytest.raises(CheckpointError, match="holds no 'ema', only optimizer, params"):
        checkpoint.load(run / "checkpoints/00000020", {"ema": targets["params"]})
    assert checkpoints.steps() == [10, 20]


def test_accept_may_refuse_before_arrays_are_read(run, states, mesh):
    def refuse(meta):
        raise CheckpointError(f"tokens {meta['tokens']}")

    checkpoints = Checkpoints(run / "checkpoints", keep_temporary=2)
    with pytest.raises(CheckpointError, match="tokens 140"):
        checkpoints.restore(abstract(states[20], mesh), accept=refuse)
    flip(run / "checkpoints/00000020/meta.json")  # a damaged one is never asked about
    with pytest.raises(CheckpointError, match="tokens 70"):
        checkpoints.restore(abstract(states[20], mesh), accept=refuse)


def test_peek_passes_over_damaged_metadata_and_touches_nothing(run, tmp_path):
    checkpoints = Checkpoints(run / "checkpoints", keep_temporary=2)
    assert checkpoints.peek()["tokens"] == 140
    flip(run / "checkpoints/00000020/meta.json")
    assert checkpoints.peek()["tokens"] == 70
    assert checkpoints.steps() == [10, 20]
    assert Checkpoints(tmp_path / "new", keep_temporary=2).peek() is None


def test_permanent_blocking_saves_are_read_back(tmp_path, states):
    def sabotage(kind, step):
        if kind == "committed":
            flip(next((tmp_path / "00000005/params").rglob("_METADATA")))

    checkpoints = Checkpoints(tmp_path, keep_temporary=2, on_event=sabotage)
    with pytest.raises(CheckpointError, match="read back right after writing, now 00000005.corrupt"):
        checkpoints.save(5, states[10], {}, permanent=True, blocking=True)
    assert checkpoints.steps() == []


def test_failures_surface_at_the_next_call_once(tmp_path, states):
    checkpoints = Checkpoints(tmp_path, keep_temporary=2)
    missing = tmp_path / "no such tokenizer.json"
    checkpoints.save(1, states[10], {}, permanent=False, blocking=False, tokenizer_files=[missing])
    with pytest.raises(CheckpointError, match="no such tokenizer"):
        checkpoints.save(2, states[10], {}, permanent=False, blocking=False)
    checkpoints.save(3, states[10], {}, permanent=False, blocking=False)
    checkpoints.close()
    assert os.listdir(tmp_path) == ["00000003"]


def test_resolve(run, tmp_path):
    newest, first = run / "checkpoints/00000020", run / "checkpoints/00000010"
    assert checkpoint.resolve(run) == newest
    assert checkpoint.resolve(f"{run}@10") == checkpoint.resolve(f"{run}@00000010") == first
    assert checkpoint.resolve(first) == first
    assert checkpoint.resolve(run / "checkpoints") == newest
    odd = tmp_path / "run@5"
    shutil.copytree(run, odd)
    assert checkpoint.resolve(odd) == odd / "checkpoints/00000020"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15; steps there: 10, 20"):
        checkpoint.resolve(f"{run}@15")
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.resolve(tmp_path / "nowhere")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.resolve(tmp_path / "empty")


def test_save_params_makes_a_checkpoint_that_load_reads(tmp_path, states):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"\x00pieces")
    path = checkpoint.save_params(tmp_path / "deep/imported", states[10]["params"], {"model": {"d": 1}}, [tokenizer])
    assert checkpoint.resolve(path) == path
    assert checkpoint.read_meta(path)["model"] == {"d": 1}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[10]["params"])
    assert_same_bits(checkpoint.load(path, {"params": target})["params"], states[10]["params"])
    assert (path / "tokenizer/tokenizer.model").read_bytes() == b"\x00pieces"
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save_params(path, states[20]["params"], {})
    assert_same_bits(checkpoint.load(path, {"params": target})["params"], states[10]["params"])


def test_a_file_in_the_way_of_the_directory_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "checkpoints", keep_temporary=1)
