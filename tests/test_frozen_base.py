"""The base of an adapter run from its checkpoint: as `adapters.freeze` makes it, in little memory, damage named."""

import dataclasses

import jax
import numpy as np
import pytest
from quick_experiment import quick
from test_hf import refusal

from tinyllama_jax import config, configio, sharding
from tinyllama_jax.config import Adapter, Model, Start, replace
from tinyllama_jax.errors import CheckpointError, ConfigError
from tinyllama_jax.finetune import adapters, base
from tinyllama_jax.model import transformer
from tinyllama_jax.train.checkpoint import save_params
from tinyllama_jax.train.state import abstract_frozen

MODEL = Model(vocab_size=96, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=64, d_ff=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "ckpt"
    params = jax.jit(lambda: transformer.init(MODEL, jax.random.key(0)))()
    save_params(path, params, {"step": 0, "model": configio.to_dict(MODEL), "document_marks": "bos"})
    return path, jax.device_get(params)


def run_of(path, bits, model=MODEL):
    return replace(quick(), model=model, adapter=Adapter(base_weights=bits), start=Start(checkpoint=str(path)))


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    return sharding.make_mesh(config.Mesh(**sizes), jax.devices()[:count])


@pytest.mark.parametrize("bits", ["bfloat16", "nf4"])
def test_it_is_what_freezing_all_of_it_would_be(checkpoint, bits):
    path, params = checkpoint
    run = run_of(path, bits)
    with jax.set_mesh(mesh_of(data=1)):
        want = jax.device_get(jax.jit(lambda p: adapters.freeze(p, MODEL, bits))(params))
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        got, target = base.frozen(run, mesh), abstract_frozen(run, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)
    same = lambda leaf, s: leaf.sharding == s.sharding and leaf.dtype == s.dtype  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, got, target)))
    assert got["embed"]["embedding"].dtype == "bfloat16" and got["norm"]["scale"].dtype == "float32"


def test_the_vocabulary_may_grow_and_the_form_may_not(checkpoint):
    path, params = checkpoint
    mesh = mesh_of(data=1)
    with jax.set_mesh(mesh):
        got = base.frozen(run_of(path, "bfloat16", replace(MODEL, vocab_size=100)), mesh)
        mean = params["head"]["kernel"].mean(1)
        np.testing.assert_allclose(got["head"]["kernel"][:, 99].astype("float32"), mean, rtol=1e-2, atol=1e-4)
        other = replace(MODEL, layers=3)
        refusal(ConfigError, lambda: base.frozen(run_of(path, "bfloat16", other), mesh), "model.layers is 3")
        narrow = dataclasses.replace(run_of(path, "nf4"), adapter=Adapter(targets=("head.kernel",)))
        refusal(ConfigError, lambda: base.frozen(narrow, mesh), "'head.kernel' matches no matrix")


def test_a_flipped_bit_is_named(checkpoint):
    path, _ = checkpoint
    file = max((path / "params").rglob("c/**/*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
        with jax.set_mesh(mesh_of(data=1)):
            refusal(
                CheckpointError, lambda: base.frozen(run_of(path, "nf4"), mesh_of(data=1)), "differs from its checksum"
            )
    finally:
        file.write_bytes(whole)
