"""Adapters in PEFT's format and as checkpoints beside their base, without PyTorch; test_parity_peft.py has PEFT."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_cases import ADAPTERS, EVERYTHING, base_checkpoint, base_params, checkpoint, drawn, one_device
from safetensors.numpy import load_file, save_file
from test_formats import ended
from test_hf import GQA, MODELS, assert_same_bits, refusal
from tiny_checkpoint import make

from tinyllama_jax.config import Execution, replace
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError, UserError
from tinyllama_jax.finetune import adapters
from tinyllama_jax.finetune.merged import merge
from tinyllama_jax.finetune.start import of_checkpoint
from tinyllama_jax.generate.load import load, load_adapter
from tinyllama_jax.interop.hf import read_hf
from tinyllama_jax.interop.peft import read_peft, shapes, write_peft
from tinyllama_jax.model import transformer
from tinyllama_jax.train import saved

NO_TABLES = lambda words: {}  # noqa: E731
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint with a vocabulary, two layers."""
    return make(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A checkpoint of adapters of all matrices beside `base`."""
    return checkpoint(tmp_path_factory.mktemp("tuned") / "ckpt", base, EVERYTHING)


@pytest.fixture
def folder(tmp_path):
    return write_peft(drawn(GQA, EVERYTHING), EVERYTHING, GQA, tmp_path / "adapter", base="hf")


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("model", ["gqa", "mqa_tied", "head_dim"])
def test_adapters_come_back_bit_for_bit(name, model, tmp_path):
    model, adapter = MODELS[model], ADAPTERS[name]
    if model.tied_embeddings and name == "everything":
        adapter = replace(adapter, targets=("attention.*", "mlp.*"))
    params = drawn(model, adapter)
    write_peft(params, adapter, model, tmp_path / "adapter", base="somewhere/base")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "somewhere/base" and config["task_type"] == "CAUSAL_LM"
    back_adapter, back, words = read_peft(tmp_path / "adapter", model, NO_TABLES)
    assert_same_bits(params, back)
    assert words == model.vocab_size and shapes(model, back_adapter) == shapes(model, adapter)
    same = ("method", "rank", "alpha", "rank_stabilised") if adapter.method == "lora" else ("method", "prefix_tokens")
    assert all(getattr(back_adapter, field) == getattr(adapter, field) for field in same)


def test_layout_is_pefts(folder):
    tensors, params, K = load_file(folder / WEIGHTS), drawn(GQA, EVERYTHING)["layers"], GQA.head_dim
    assert len(tensors) == 2 * (7 * GQA.layers + 1)
    for i in range(GQA.layers):
        name = f"base_model.model.model.layers.{i}."
        query, out, down = (params["attention"]["query"], params["attention"]["out"], params["mlp"]["down"])
        np.testing.assert_array_equal(tensors[name + "self_attn.q_proj.lora_A.weight"], query["a"][i].T)
        np.testing.assert_array_equal(tensors[name + "mlp.down_proj.lora_B.weight"], down["b"][i].T)
        for h in range(GQA.heads):
            rows = slice(h * K, (h + 1) * K)
            np.testing.assert_array_equal(tensors[name + "self_attn.q_proj.lora_B.weight"][rows], query["b"][i, :, h].T)
            np.testing.assert_array_equal(tensors[name + "self_attn.o_proj.lora_A.weight"][:, rows], out["a"][i, h].T)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (4, 6.0, True, "none")
    assert config["target_modules"] == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()


WRONG = {
    "dora": ({"use_dora": True}, ConfigError, "use_dora=True"),
    "bias": ({"bias": "lora_only"}, ConfigError, "bias='lora_only'"),
    "saved": ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, ConfigError, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 8}}, ConfigError, "alpha_pattern"),
    "other": ({"peft_type": "IA3"}, ConfigError, "peft_type is 'IA3'"),
    "no_type": ({"peft_type": ["LORA"]}, ConfigError, "peft_type is"),
    "task": ({"task_type": "SEQ_CLS"}, ConfigError, "task_type is 'SEQ_CLS'"),
    "pissa": ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights='pissa'"),
    "future": ({"use_quantum": {"a": 1}}, ConfigError, "use_quantum"),
    "rank": ({"r": 5}, DataError, "lora_A.weight is [4,"),
    "no_rank": ({"r": None}, ConfigError, "has no r"),
    "alpha": ({"lora_alpha": 0}, ConfigError, "alpha"),
    "dropout": ({"lora_dropout": 1.5}, ConfigError, "dropout"),
    "modules": ({"target_modules": ["q_proj"]}, DataError, "target_modules and the tensors"),
    "huge": ({"r": 2**31 - 1}, DataError, "lora_A.weight is [4,"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, ConfigError, "cannot be represented"),
}


@pytest.mark.parametrize(("change", "kind", "word"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_represented_is_refused(change, kind, word, folder):
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    refusal(kind, lambda: read_peft(folder, GQA, NO_TABLES), str(folder), word)


def test_tensors_that_do_not_fit_are_refused(folder):
    read = lambda model=GQA: read_peft(folder, model, NO_TABLES)  # noqa: E731
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    refusal(DataError, lambda: read(replace(GQA, layers=4)), "lacks tensor", "layers.3")
    refusal(DataError, lambda: read(replace(GQA, layers=2)), "layers.2", "has no place")
    refusal(DataError, lambda: read(replace(GQA, d_ff=50)), "is [48, 4]", "make it [50, 4]")
    refusal(ConfigError, lambda: read(replace(GQA, tied_embeddings=True)), "lm_head", "import hf")
    for change, words in (
        ({names[0]: np.full_like(tensors[names[0]], np.nan)}, ["not finite", names[0]]),
        ({names[3]: tensors[names[3]][:, :-1].copy()}, [names[3], "make it"]),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(32, "f4")}, ["no place"]),
        ({"base_model.model.model.embed_tokens.weight": np.ones((96, 32), "f4")}, ["embed_tokens", "not the base's"]),
    ):
        save_file(tensors | change, folder / WEIGHTS)
        refusal(DataError, read, *words)
    save_file({"base_model.model.score.weight": np.ones((2, 32), np.float32)}, folder / WEIGHTS)
    refusal(DataError, read, "no LoRA")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refusal(DataError, read, "pickle")
    (folder / CONFIG).unlink()
    refusal(DataError, read, CONFIG, "missing")
    refusal(DataError, lambda: read_peft(folder / "nowhere", GQA, NO_TABLES), "not a directory")


def test_damaged_files_end_in_one_line_or_in_an_adapter(folder):
    """Cut off anywhere, or with other bytes: refused in one line; what is read is finite and of its shapes."""
    rng, refused = np.random.default_rng(0), 0
    for name in (CONFIG, WEIGHTS):
        whole = (folder / name).read_bytes()
        head = whole if name == CONFIG else whole[: 8 + int.from_bytes(whole[:8], "little")]
        damaged = [whole[: int(at)] for at in rng.integers(0, len(whole), 12)]
        for _ in range(24):
            data = bytearray(whole)
            for at in rng.integers(0, len(head), rng.integers(1, 4)):
                data[at] = rng.integers(0, 256)
            damaged.append(bytes(data))
        for data in damaged:
            (folder / name).write_bytes(data)
            try:
                adapter, params, _ = read_peft(folder, GQA, NO_TABLES)
                found = {tuple(e.key for e in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
                assert {path: leaf.shape for path, leaf in found.items()} == shapes(GQA, adapter)
                assert all(np.isfinite(leaf).all() for leaf in found.values())
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600
        (folder / name).write_bytes(whole)
    assert refused > 50


def merged(base_params, adapter, params, model):
    with jax.set_mesh(one_device()):
        arrays = jax.tree.map(jnp.asarray, (base_params, params))
        return jax.tree.map(np.asarray, adapters.merge(arrays[0], arrays[1], model, adapter))


def test_a_checkpoint_of_adapters_is_the_merged_model_to_every_verb(base, tuned, tmp_path, capsys):
    status, said, err = ended(capsys, "export", "hf", tuned, "--out", tmp_path / "hf", "--json")
    assert status == 0, err
    model, params = read_hf(tmp_path / "hf")
    with jax.set_mesh(one_device()):
        of_base = jax.tree.map(np.asarray, load(str(base), one_device()).params)
    expected = merged(of_base, EVERYTHING, drawn(model, EVERYTHING), model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = params
        for entry in path:
            found = found[entry.key]
        np.testing.assert_allclose(found, leaf, rtol=1e-6, atol=1e-6, err_msg=str(path))
    card = (tmp_path / "hf/README.md").read_text()
    assert "Fine-tuned with LoRA (rank 4, alpha 6, base in float32)" in card
    merge(str(tuned), tmp_path / "merged")
    meta = saved.read_meta(tmp_path / "merged")
    assert saved.adapter_of(meta) is None and meta["merged"]["adapter"]["rank"] == 4
    assert (tmp_path / "merged/tokenizer/tokenizer.json").is_file()
    with jax.set_mesh(one_device()):
        assert_same_bits(params, jax.tree.map(np.asarray, load(str(tmp_path / "merged"), one_device()).params))
    refusal(ConfigError, lambda: merge(str(tuned), tmp_path / "merged"), "exists already")
    refusal(ConfigError, lambda: merge(str(base), tmp_path / "again"), "holds a whole model")
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.int32).reshape(2, 20))
    tokens = ["--tokens", tmp_path / "ids.npy", "--dtype", "float32", "--json"]
    scored = [json.loads(ended(capsys, "score", which, *tokens)[1])["nll"] for which in (tuned, tmp_path / "merged")]
    assert scored[0] == scored[1] and np.isfinite(scored[0]).all()


def test_adapters_generate(base, tuned, tmp_path, capsys):
    prefix = checkpoint(tmp_path / "prefix", base, ADAPTERS["prefix"])
    how = ["--prompt", "the quick", "--max-new-tokens", 4, "--temperature", 0, "--dtype", "float32", "--json"]
    answers = []
    for which in (base, tuned, prefix):
        status, said, err = ended(capsys, "generate", which, *how)
        assert status == 0, err
        answers.append(tuple(json.loads(said)["tokens"][0]))
    assert len(set(answers)) == 3
    status, _, err = ended(capsys, "generate", prefix, *how, "--slide")
    assert status == 78 and "--slide" in err


@pytest.mark.parametrize("base_weights", ["bfloat16", "int8"])
def test_a_frozen_base_is_merged_as_it_was_trained_with(base_weights, base, tmp_path):
    """Logits are those that training computes beside the frozen base, and not those beside the float32 one."""
    adapter = replace(EVERYTHING, base_weights=base_weights)
    path = checkpoint(tmp_path / "ckpt", base, adapter)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 12)))
    with jax.set_mesh(one_device()):
        whole, found = (load(str(p), one_device()) for p in (base, path))
        model, trained = found.model, load_adapter(str(path)).params
        run = jax.jit(lambda params: transformer.logits(params, ids, model, Execution()))
        frozen = jax.jit(lambda p: adapters.freeze(p, model, base_weights))(whole.params)
        as_trained = np.asarray(run(adapters.attach(frozen, trained, model, adapter)))
        loaded = np.asarray(run(found.params))
        beside_float32 = np.asarray(run(adapters.merge(whole.params, trained, model, adapter)))
    largest = np.abs(as_trained).max()
    assert np.abs(loaded - as_trained).max() < 1e-4 * largest
    assert np.abs(beside_float32 - as_trained).max() > 1e-3 * largest


def test_export_and_import_as_a_whole(base, tuned, tmp_path, capsys):
    status, said, err = ended(
        *(capsys, "export", "peft", tuned, "--out", tmp_path / "adapter", "--base-model", "hf", "--json"),
    )
    assert status == 0, err
    assert json.loads(said)["base_model"] == "hf" and "PeftModel" in json.loads(said)["use"]["peft"]
    card = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: peft" in card and "base_model: hf" in card and "rank-stabilised LoRA of rank 4" in card
    assert (tmp_path / "adapter/tokenizer.json").is_file()
    status, said, err = ended(
        *(capsys, "import", "peft", tmp_path / "adapter", "--base", base, "--out", tmp_path / "ckpt", "--json"),
    )
    assert status == 0, err
    with jax.set_mesh(one_device()):
        back, before = load_adapter(str(tmp_path / "ckpt")), load_adapter(str(tuned))
        assert_same_bits(*(jax.tree.map(np.asarray, x.params) for x in (before, back)))
        wholes = [jax.tree.map(np.asarray, load(str(p), one_device()).params) for p in (tuned, tmp_path / "ckpt")]
        assert_same_bits(*wholes)
    status, said, err = ended(capsys, "inspect", tmp_path / "ckpt")
    assert status == 0 and f"adapters alone (lora), beside the weights of {base}" in said, err
    refusal(CheckpointError, lambda: of_checkpoint(tmp_path / "ckpt", before.model), "holds adapters only", "merge")
    assert ended(capsys, "export", "peft", tmp_path / "ckpt", "--out", tmp_path / "again")[0] == 0
    for name in (CONFIG, WEIGHTS):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in ("adapter", "again"))
        if name == WEIGHTS:
            assert a == b


def test_refusals_of_the_verbs(base, tuned, tmp_path, capsys):
    prefix = checkpoint(tmp_path / "prefix", base, ADAPTERS["prefix"])
    for words, status, said in (
        (["export", "peft", base], 78, "holds a whole model and no adapter"),
        (["export", "hf", prefix], 78, "holds a prefix"),
        (["export", "gguf", prefix], 78, "export peft"),
        (["export", "peft", tuned, "--shard-size", "1GB"], 2, "--shard-size is an option of the format hf"),
        (["import", "peft", tmp_path], 2, "--base CKPT"),
        (["import", "peft", tmp_path, "--base", tuned], 78, "holds adapters itself"),
        (["import", "peft", tmp_path, "--base", base], 78, CONFIG),
        (["import", "hf", tmp_path, "--base", base], 2, "--base is an option of the format peft"),
    ):
        found, out, err = ended(capsys, *words, "--out", tmp_path / "out")
        assert (found, out) == (status, "") and said in err and len(err.strip().splitlines()) == 1, err
    refusal(ConfigError, lambda: merge(str(prefix), tmp_path / "out"), "holds a prefix")
    assert not (tmp_path / "out").exists()


def test_a_base_is_found_again_and_no_other_one_is_taken(tmp_path, monkeypatch):
    """A project moves as a whole; another base in its place is refused by name, a missing one too."""
    project = tmp_path / "project"
    (project / "runs/base/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(project)
    base_checkpoint(project / "runs/base/checkpoints/00000024")
    there = project.relative_to(project) / "runs/base/checkpoints/00000024"
    (project / "runs/tuned/checkpoints").mkdir(parents=True)
    checkpoint(project / "runs/tuned/checkpoints/00000008", there, ADAPTERS["lora"])
    meta = saved.read_meta(project / "runs/tuned/checkpoints/00000008")
    assert meta["config"]["start"]["checkpoint"] == str(there)
    loads = lambda: load(where, one_device())  # noqa: E731
    where = str(project / "runs/tuned")
    with jax.set_mesh(one_device()):
        before = loads()
        monkeypatch.chdir(tmp_path)
        project.rename(tmp_path / "moved")
        where = str(tmp_path / "moved/runs/tuned")
        assert_same_bits(*(jax.tree.map(np.asarray, x.params) for x in (before, loads())))
        base = tmp_path / "moved/runs/base/checkpoints/00000024"
        shutil.rmtree(base)
        refusal(CheckpointError, loads, str(there), "put it back")
        other = replace(GQA, layers=2)
        base_checkpoint(base, other)
        refusal(CheckpointError, loads, str(base), "other weights")
    assert dataclasses.asdict(saved.adapter_of(meta))["rank"] == 4
    assert base_params()["norm"]["scale"].shape == (GQA.d_model,)
