"""Hugging Face directories written, read and refused, without PyTorch; the `safetensors` package is the referee."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.hf import hf_tensors, read_hf, write_hf
from tinyllama_jax.interop.hf_config import model_to_hf
from tinyllama_jax.model import transformer

GQA = Model(vocab_size=96, d_model=32, layers=3, heads=4, kv_heads=2, head_dim=8, d_ff=48, context_tokens=64)
YARN = Rope(kind="yarn", theta=1e5, factor=4.0, original_context_tokens=16, beta_fast=16.0)
MODELS = {
    "gqa": GQA,
    "mqa_tied": replace(GQA, kv_heads=1, tied_embeddings=True),
    "mha_one_layer": replace(GQA, kv_heads=4, layers=1, norm_eps=1e-6),
    "head_dim": replace(GQA, head_dim=16),
    "linear": replace(GQA, rope=Rope(kind="linear", factor=2.0)),
    "yarn": replace(GQA, rope=YARN),
    "yarn_factor": replace(GQA, rope=replace(YARN, attention_factor=1.5)),
    "llama3": replace(GQA, rope=Rope(kind="llama3", theta=5e5, factor=8.0, original_context_tokens=32)),
}


def random_params(model, seed=0):
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in jax.tree_util.tree_leaves_with_path(a):
        other = b
        for entry in path:
            other = other[entry.key]
        assert leaf.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(leaf.view(np.uint32), other.view(np.uint32), err_msg=str(path))


def refusal(kind, call, *words):
    """The message of the error that `call` must raise: one line with these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message, message
    return message


@pytest.fixture
def exported(tmp_path):
    """(directory, tensors by name): an export of GQA that a test may damage."""
    directory = write_hf(random_params(GQA), GQA, tmp_path / "hf")
    return directory, load_file(directory / "model.safetensors")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000], ids=["whole", "sharded"])
def test_params_come_back_bit_for_bit(model, shard_bytes, tmp_path):
    params = random_params(model)
    params["norm"]["scale"][:3] = [np.nan, -0.0, 1e-42]  # bits, not values
    write_hf(params, model, tmp_path / "hf", shard_bytes=shard_bytes)
    back_model, back = read_hf(tmp_path / "hf")
    assert back_model == model
    assert_same_bits(params, back)


def test_layout_is_hugging_faces(exported):
    _, tensors = exported
    params = random_params(GQA)
    layers, K = params["layers"], GQA.head_dim
    assert len(tensors) == 3 + 9 * GQA.layers
    for i in range(GQA.layers):
        name = f"model.layers.{i}."
        query, out = tensors[name + "self_attn.q_proj.weight"], tensors[name + "self_attn.o_proj.weight"]
        for h in range(GQA.heads):  # [out, in] with heads in order
            np.testing.assert_array_equal(query[h * K : (h + 1) * K], layers["attention"]["query"][i, :, h].T)
            np.testing.assert_array_equal(out[:, h * K : (h + 1) * K], layers["attention"]["out"][i, h].T)
        for theirs, ours in (("k_proj", "key"), ("v_proj", "value")):
            heads = tensors[name + f"self_attn.{theirs}.weight"].reshape(GQA.kv_heads, K, GQA.d_model)
            np.testing.assert_array_equal(heads, layers["attention"][ours][i].transpose(1, 2, 0))
        for kind in ("gate", "up", "down"):
            np.testing.assert_array_equal(tensors[name + f"mlp.{kind}_proj.weight"], layers["mlp"][kind][i].T)
        np.testing.assert_array_equal(tensors[name + "input_layernorm.weight"], layers["attention_norm"]["scale"][i])
        np.testing.assert_array_equal(tensors[name + "post_attention_layernorm.weight"], layers["mlp_norm"]["scale"][i])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"]["embedding"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_imported_files_are_exported_bit_for_bit(dtype, tmp_path):
    rng = np.random.default_rng(1)
    target = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    source = {name: rng.standard_normal(t.shape).astype(target) for name, t in hf_tensors(random_params(GQA), GQA)}
    (tmp_path / "in").mkdir()
    save_file(source, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(model_to_hf(GQA, dtype)))
    model, params = read_hf(tmp_path / "in")
    out = write_hf(params, model, tmp_path / "out", dtype=dtype)
    written = load_file(out / "model.safetensors")
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert written[name].dtype == target
        assert written[name].tobytes() == tensor.tobytes(), name
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_sixteen_bit_export_rounds_to_nearest_even(tmp_path):
    params = random_params(GQA)
    scale = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9])
    params["norm"]["scale"][:4] = scale
    write_hf(params, GQA, tmp_path / "hf", dtype="bfloat16")
    _, back = read_hf(tmp_path / "hf")
    np.testing.assert_array_equal(back["norm"]["scale"][:4], np.float32([1, 1 + 2**-6, 1 + 2**-7, -1]))


def test_sharded_jax_arrays_are_exported(tmp_path):
    params = random_params(GQA)
    mesh = sharding.make_mesh(config.Mesh(replica=2, data=4), jax.devices()[:8])
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    assert len(placed["layers"]["mlp"]["gate"].sharding.device_set) == 8
    write_hf(placed, GQA, tmp_path / "hf")
    assert_same_bits(params, read_hf(tmp_path / "hf")[1])


def test_shards_keep_to_their_size(tmp_path):
    limit = 20_000
    directory = write_hf(random_params(GQA), GQA, tmp_path / "hf", shard_bytes=limit)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("*.safetensors"))
    assert [p.name for p in shards] == sorted(set(index["weight_map"].values())) and len(shards) > 3
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        total += size
    assert total == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    "model, words",
    [
        (replace(GQA, rope=Rope(kind="none")), ["kind=none"]),
        (replace(GQA, rope=Rope(kind="partial", fraction=0.5)), ["kind=partial"]),
        # 10000 * 2 ** (8 / 6): the equivalent plain model
        (replace(GQA, rope=Rope(kind="ntk", factor=2.0)), ["kind=ntk", "kind=default", "theta=25198.4"]),
        (replace(GQA, heads=3, kv_heads=1), ["d_model=32", "heads=3"]),
    ],
)
def test_models_without_a_hugging_face_form_are_refused(model, words, tmp_path):
    refusal(ConfigError, lambda: write_hf(random_params(model), model, tmp_path / "hf"), *words)
    assert list(tmp_path.iterdir()) == []


def test_export_arguments_are_checked_and_leave_nothing_behind(tmp_path):
    params = random_params(GQA)
    refusal(ConfigError, lambda: write_hf(params, GQA, tmp_path / "hf", dtype="int8"), "int8", "bfloat16")
    refusal(ConfigError, lambda: write_hf(params, GQA, tmp_path / "hf", shard_bytes=0), "shard_bytes")
    refusal(ConfigError, lambda: write_hf(params, replace(GQA, d_ff=56), tmp_path / "hf"), "mlp.gate", "56")
    params["layers"]["mlp"]["down"][2, 0, 0] = 7e4
    message = refusal(ConfigError, lambda: write_hf(params, GQA, tmp_path / "hf", dtype="float16"), "float16")
    assert "model.layers.2.mlp.down_proj.weight" in message
    del params["head"]
    refusal(ConfigError, lambda: write_hf(params, GQA, tmp_path / "hf"), "head.kernel", "missing")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_alone(exported):
    directory, tensors = exported
    refusal(ConfigError, lambda: write_hf(random_params(GQA, 1), GQA, directory), str(directory), "not empty")
    assert (load_file(directory / "model.safetensors")["lm_head.weight"] == tensors["lm_head.weight"]).all()
    assert [p.name for p in directory.parent.iterdir()] == ["hf"]


def test_missing_unexpected_and_misshapen_tensors(exported):
    directory, tensors = exported
    file, name = directory / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"

    def damaged(changed):
        save_file(changed, file)
        return lambda: read_hf(directory)

    without = {n: t for n, t in tensors.items() if n != name}
    refusal(DataError, damaged(without), name, "[16, 32]", "lacks")
    refusal(DataError, damaged(tensors | {name: tensors[name][:8]}), name, "[8, 32]", "[16, 32]")
    bias = "model.layers.0.self_attn.q_proj.bias"
    refusal(DataError, damaged(tensors | {bias: np.zeros(32, np.float32)}), bias, "[32]")
    refusal(DataError, damaged(tensors | {name: tensors[name].astype(np.int8)}), name, "I8", "BF16")
    refusal(DataError, damaged(tensors | {"model.layers.3.mlp.up_proj.weight": tensors[name]}), "layers.3")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert damaged(tensors | inv_freq)()[0] == GQA


def test_tied_model_with_a_head_in_its_file(tmp_path):
    model = replace(GQA, tied_embeddings=True)
    directory = write_hf(random_params(model), model, tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, directory / "model.safetensors")
    assert "head" not in read_hf(directory)[1]
    save_file(tensors | {"lm_head.weight": table + 1}, directory / "model.safetensors")
    refusal(DataError, lambda: read_hf(directory), "lm_head.weight", "ties")


def test_truncated_and_broken_files(exported):
    directory, _ = exported
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for size in (0, 7, 8, 100, 8 + header, len(whole) - 1):
        file.write_bytes(whole[:size])
        refusal(DataError, lambda: read_hf(directory), "model.safetensors", "truncated")
    for junk in (b"{" * header, b"[1]".ljust(header), b'{"a": {"dtype": "F32"}}'.ljust(header)):
        file.write_bytes(whole[:8] + junk + whole[8 + header :])
        refusal(DataError, lambda: read_hf(directory), "model.safetensors", "header")
    entry = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'.ljust(header)
    file.write_bytes(whole[:8] + entry + whole[8 + header :])
    refusal(DataError, lambda: read_hf(directory), "tensor a", "4 bytes")


def test_incomplete_directories(exported, tmp_path):
    directory, _ = exported
    refusal(DataError, lambda: read_hf(tmp_path / "nowhere"), "nowhere")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refusal(DataError, lambda: read_hf(directory), "pytorch_model.bin", "safe_serialization")
    (directory / "config.json").write_text("[]")
    refusal(DataError, lambda: read_hf(directory), "config.json")
    (directory / "config.json").write_text("{")
    refusal(DataError, lambda: read_hf(directory), "config.json")
    (directory / "config.json").unlink()
    refusal(DataError, lambda: read_hf(directory), "config.json", "missing")


def test_index_that_does_not_fit_its_shards(tmp_path):
    directory = write_hf(random_params(GQA), GQA, tmp_path / "hf", shard_bytes=20_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.embed_tokens.weight"]

    def with_map(weight_map):
        path.write_text(json.dumps({"weight_map": weight_map}))
        return lambda: read_hf(directory)

    refusal(DataError, with_map(index["weight_map"] | {"lm_head.weight": first}), first, "lm_head.weight")
    refusal(DataError, with_map(index["weight_map"] | {"lm_head.weight": "../x.safetensors"}), "weight_map")
    refusal(DataError, with_map(None), "weight_map")
    with_map(index["weight_map"])
    (directory / first).unlink()
    refusal(DataError, lambda: read_hf(directory), first)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    text = "the quick brown fox jumps over the lazy dog\n    def f(x):\n        return x + 1\n" * 20
    return train_bpe([text], 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_tokenizer_goes_along(tokenizer_model, tmp_path):
    import tokenizers

    model = replace(GQA, vocab_size=320)  # padded: more rows than ids
    directory = write_hf(random_params(model), model, tmp_path / "hf", tokenizer_files=[tokenizer_model])
    ours = Tokenizer.load(tokenizer_model)
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("", "the fox", "  two\n    four é 漢 \t", "12 34 "):
        assert fast.encode(text).ids == [ours.bos_id, *ours.encode(text)], text
        assert fast.decode(ours.encode(text)) == text
    assert Tokenizer.load(directory).sha256 == ours.sha256
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (ours.bos_id, ours.eos_id) == (1, 2)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["add_eos_token"]) == ("<s>", "</s>", False)
    assert settings["model_max_length"] == model.context_tokens


def test_settings_of_a_given_tokenizer_are_kept(tokenizer_model, tmp_path):
    fast = write_tokenizer_json(tokenizer_model, tmp_path / "tokenizer.json")
    before = fast.read_bytes()
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ x }}", "eos_token": "<unk>", "tokenizer_class": "Other"}))
    model = replace(GQA, vocab_size=300)
    files = Tokenizer.load(fast).files
    directory = write_hf(random_params(model), model, tmp_path / "hf", tokenizer_files=files)
    assert (directory / "tokenizer.json").read_bytes() == before
    kept = json.loads((directory / "tokenizer_config.json").read_text())
    assert (kept["chat_template"], kept["eos_token"]) == ("{{ x }}", "<unk>")
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 0


def test_unusable_tokenizers_are_refused(tokenizer_model, tmp_path):
    params = random_params(GQA)

    def export(*files):
        return lambda: write_hf(params, GQA, tmp_path / "hf", tokenizer_files=files)

    refusal(ConfigError, export(tokenizer_model), "300 ids", "vocab_size=96")
    refusal(DataError, export(tmp_path / "tokenizer_config.json"), "tokenizer_config.json")
    refusal(DataError, export(tokenizer_model, tmp_path / "other.model"), "other.model")
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_no_ids_are_claimed(exported):
    directory, _ = exported
    values = json.loads((directory / "config.json").read_text())
    assert values["bos_token_id"] is None and values["eos_token_id"] is None
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
