"""A run that begins with a checkpoint's weights: what may differ, what new words get, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from quick_experiment import quick
from store_cases import flip

from tinyllama_jax import configio
from tinyllama_jax.config import Mesh, Model, Rope, Start, replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.data.tokenizer_extend import extend
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError
from tinyllama_jax.finetune import start
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import make_mesh, param_shardings
from tinyllama_jax.train.checkpoint import save_params
from tinyllama_jax.weights import shapes

OLD = replace(quick().model, vocab_size=300)
TEXT = "the quick brown fox jumps over the lazy dog\n    def f(x):\n        return x + 1\n" * 20


def made_up(model: Model) -> dict:
    """float32 weights from NumPy, which compiles nothing."""
    random, params = np.random.default_rng(5), {}
    for path, shape in shapes(model).items():
        group = params
        for name in path[:-1]:
            group = group.setdefault(name, {})
        group[path[-1]] = random.normal(0.01, 0.02, shape).astype(np.float32)
    return params


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint with a tokenizer of 300 words, and its weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_bpe([TEXT], 300, folder / "tokenizer.model")
    params = made_up(OLD)
    meta = {"step": 3, "tokens": 96, "model": configio.to_dict(OLD), "document_marks": "bos"}
    return save_params(folder / "ckpt", params, meta, tokenizer_files=[tokenizer]), params


def run_of(path: Path, new_words: str = "mean", **changes):
    return replace(quick(), model=replace(OLD, **changes), start=Start(checkpoint=str(path), new_words=new_words))


def weights(run, mesh: Mesh):
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        params = start.weights(run, mesh)
        abstract = jax.eval_shape(lambda: transformer.init(run.model, jax.random.key(0)))
        at = param_shardings(abstract, mesh)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s and x.dtype == np.float32, params, at)))
    return params


def test_a_run_begins_with_the_checkpoints_very_weights(base):
    path, params = base
    changes = dict(rope=Rope(kind="ntk", factor=2), context_tokens=128, dropout=0.1, compute_dtype="bfloat16")
    found = weights(run_of(path, **changes, init="torch_default"), Mesh(replica=2, data=4))
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("new_words", ["mean", "init"])
def test_a_larger_vocabulary_on_any_mesh(base, new_words):
    path, old = base
    run = run_of(path, new_words, vocab_size=304)
    divided = weights(run, Mesh(replica=1, data=4, tensor=2))
    alone = start.adapt(old, OLD, run.model, new_words, start.keys(run.seed)[0])  # NumPy
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(alone))
    assert alone["layers"] is old["layers"] and alone["norm"] is old["norm"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), divided, alone)
    rows, columns = alone["embed"]["embedding"], alone["head"]["kernel"]
    np.testing.assert_array_equal(rows[:300], old["embed"]["embedding"])
    np.testing.assert_array_equal(columns[:, :300], old["head"]["kernel"])
    if new_words == "mean":
        mean = old["embed"]["embedding"].astype(np.float64).mean(0).astype(np.float32)
        np.testing.assert_array_equal(rows[300:], np.broadcast_to(mean, (4, 32)))
        mean = old["head"]["kernel"].astype(np.float64).mean(1).astype(np.float32)
        np.testing.assert_array_equal(columns[:, 300:].T, np.broadcast_to(mean, (4, 32)))
    else:  # as those of a fresh model: sqrt(2 / (5 D))
        fresh = np.concatenate([rows[300:].ravel(), columns[:, 300:].ravel()])
        assert len(np.unique(fresh)) > 250
        assert fresh.std() == pytest.approx(np.sqrt(2 / (5 * 32)), rel=0.2)


def test_words_that_the_mesh_does_not_divide(base, tmp_path):
    """Two devices hold the words of a model in halves; the old ones were of an odd number."""
    odd = replace(OLD, vocab_size=301, tied_embeddings=True)
    params = made_up(odd)
    path = save_params(tmp_path / "odd", params, {"step": 0, "tokens": 0, "model": configio.to_dict(odd)})
    found = weights(run_of(path, tied_embeddings=True, vocab_size=302), Mesh(replica=4, data=1, tensor=2))
    assert "head" not in found
    np.testing.assert_array_equal(np.asarray(found["embed"]["embedding"])[:301], params["embed"]["embedding"])
    start.check(run_of(path, tied_embeddings=True, vocab_size=302), Tokenizer.load(base[0] / "tokenizer"))  # none there


def test_a_model_with_more_words_goes_to_hugging_face(base, tmp_path):
    """Vocabulary extended, weights begun with, exported: rows and tokenizer agree in number."""
    from safetensors.numpy import load_file

    from tinyllama_jax.interop.hf import write_hf

    path, old = base
    longer = extend(path / "tokenizer", ["<|im_start|>", "<|im_end|>"], tmp_path / "longer")
    tokenizer = Tokenizer.load(longer)
    run = run_of(path, vocab_size=tokenizer.vocab_size)
    start.check(run, tokenizer)
    params = jax.device_get(weights(run, Mesh(replica=8, data=1)))
    out = write_hf(params, run.model, tmp_path / "hf", tokenizer_files=list(longer.iterdir()))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 302
    tensors = load_file(out / "model.safetensors")
    rows, columns = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert rows.shape == columns.shape == (302, 32)
    np.testing.assert_allclose(rows[301], old["embed"]["embedding"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(columns[301], old["head"]["kernel"].mean(1), rtol=1e-5)
    added = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added["301"]["content"] == "<|im_end|>" and Tokenizer.load(out).vocab_size == 302


@pytest.mark.parametrize(
    "field, value",
    [("layers", 3), ("d_model", 64), ("heads", 2), ("kv_heads", 4), ("head_dim", 16), ("d_ff", 32), ("norm_eps", 1e-6)]
    + [("tied_embeddings", True)],
)
def test_another_model_is_refused(base, field, value):
    path, _ = base
    with pytest.raises(ConfigError, match=f"^model.{field} is {value}, and {path}, .* has {getattr(OLD, field)};"):
        weights(run_of(path, **{field: value}), Mesh())


def test_every_field_is_held_or_free():
    """A field that is new in Model is held, until somebody says that weights do not depend on it."""
    assert set(start.FREE) < {field.name for field in dataclasses.fields(OLD)}
    with pytest.raises(ConfigError, match="model.vocab_size is 299, .* has 300; the vocabulary may only grow"):
        start.check_model(OLD, replace(OLD, vocab_size=299), "somewhere")


def test_damage_is_found(base, tmp_path):
    import shutil

    path = shutil.copytree(base[0], tmp_path / "ckpt")
    data = max((f for f in (path / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=str(path)):
        weights(run_of(path), Mesh())
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        weights(run_of(Path("nowhere")), Mesh())


def test_the_data_must_speak_the_checkpoints_language(base, tmp_path):
    path, _ = base
    start.check(run_of(path), Tokenizer.load(path / "tokenizer"))
    other = Tokenizer.load(train_bpe(["completely other words, zebras and quaggas\n" * 30], 300, tmp_path / "t.model"))
    with pytest.raises(DataError, match=f"t.model: does not begin with the 300 words of {path}/tokenizer/"):
        start.check(run_of(path), other)


def test_adapters_alone_are_no_start(tmp_path):
    config = configio.to_dict(quick()) | {"adapter": {"method": "lora"}}
    path = save_params(tmp_path / "lora", {"a": np.zeros(2, np.float32)}, {"step": 0, "tokens": 0, "config": config})
    with pytest.raises(CheckpointError, match="holds adapters only; merge them"):
        weights(run_of(path), Mesh())
