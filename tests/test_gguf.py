"""GGUF files written and read; the package `gguf` is the referee of the format and of every quantised value."""

import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf_cases import ROPES, SHAPES, SMOL, WIDE
from test_hf import GQA, assert_same_bits, random_params, refusal

from tinyllama_jax.config import Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import formats, gguf_file, gguf_kinds, gguf_model, hf
from tinyllama_jax.interop.gguf import read_gguf, write_gguf
from tinyllama_jax.interop.hf import hf_tensors
from tinyllama_jax.interop.modelfile import command, kind_of, modelfile, place_for
from tinyllama_jax.presets import preset


def referee(file) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (kind, values or bytes) by the package's own reader."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
def test_params_come_back_bit_for_bit(model, tmp_path):
    params = random_params(model)
    params["norm"]["scale"][:3] = [np.nan, -0.0, 1e-42]  # bits, not values
    write_gguf(params, model, tmp_path / "m.gguf", kind="F32")
    found = read_gguf(tmp_path / "m.gguf", tmp_path)
    assert found.model == model and found.tokenizer_files == ()
    assert_same_bits(params, found.params)


@pytest.mark.parametrize("kind, dtype", [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_sixteen_bits_are_kept_when_they_suffice(kind, dtype, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), random_params(SMOL))
    write_gguf(params, SMOL, tmp_path / "m.gguf", kind=kind)
    assert_same_bits(params, read_gguf(tmp_path / "m.gguf", tmp_path).params)
    kinds = {name: kind for name, (kind, _) in referee(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == kind


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head with dimension i beside i + half, written out."""
    size = len(matrix) // heads
    rows = [h * size + i + part * size // 2 for h in range(heads) for i in range(size // 2) for part in (0, 1)]
    return matrix[rows]


@pytest.mark.parametrize("model", [SMOL, replace(GQA, kv_heads=1)], ids=["tied_gqa", "mqa"])
def test_names_and_layout_are_llama_cpps(model, tmp_path):
    params = random_params(model)
    write_gguf(params, model, tmp_path / "m.gguf", kind="F32")
    written = referee(tmp_path / "m.gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
    theirs = dict(hf_tensors(params, model))
    assert len(written) == len(theirs) and ("output.weight" in written) is not model.tied_embeddings
    for name, tensor in theirs.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, model.heads if "q_proj" in name else model.kv_heads)
        np.testing.assert_array_equal(written[known.get_name(name, (".weight",))][1], tensor, name)


@pytest.mark.parametrize("kind", gguf_kinds.QUANTISED)
@pytest.mark.parametrize("model", [WIDE, SMOL], ids=["wide", "smol"])
def test_quantised_files_are_the_packages_own(kind, model, tmp_path):
    params = random_params(model)
    write_gguf(params, model, tmp_path / "m.gguf", kind=kind)
    written, read = (
        referee(tmp_path / "m.gguf"),
        dict(hf_tensors(read_gguf(tmp_path / "m.gguf", tmp_path).params, model)),
    )
    for name, tensor in hf_tensors(params, model):
        stored, data = written[gguf_model.gguf_name(name)]
        of = gguf.GGMLQuantizationType[stored]
        assert stored == gguf_kinds.kinds(model, kind)[name]
        values = gguf.quants.dequantize(data, of)
        np.testing.assert_array_equal(gguf_model.interleave(name, read[name], model), values, name)
        if stored != "Q6_K":  # which the package cannot write
            np.testing.assert_array_equal(data, gguf.quants.quantize(gguf_model.interleave(name, tensor, model), of))
    assert {"F32", kind} <= {stored for stored, _ in written.values()}


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_as_the_package_reads_them(kind, tmp_path):
    """No program here writes them, so their bytes are random; each is a number all the same."""
    model, rng = replace(WIDE, layers=1, d_ff=256), np.random.default_rng(0)
    of, (values, n_bytes) = gguf.GGMLQuantizationType[kind], gguf_file.block(kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in gguf_model.metadata(model)[0].items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    raw = {}
    for name, shape in hf.hf_shapes(model).items():
        if len(shape) == 1:
            writer.add_tensor(gguf_model.gguf_name(name), np.ones(shape, np.float32))
            continue
        raw[name] = rng.integers(0, 256, (shape[0], shape[1] // values * n_bytes), np.uint8)
        writer.add_tensor(gguf_model.gguf_name(name), raw[name], raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = dict(hf_tensors(read_gguf(tmp_path / "m.gguf", tmp_path).params, model))
    with np.errstate(all="ignore"):
        for name, data in raw.items():
            wanted = gguf.quants.dequantize(data, of)
            np.testing.assert_array_equal(gguf_model.interleave(name, found[name], model), wanted)


def test_q6_k_is_as_exact_as_its_bits():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((300, 512), np.float32) * np.float32(10.0) ** rng.uniform(-3, 3, (300, 1))
    matrix = matrix.astype(np.float32)
    matrix[5], matrix[6, :256] = 0, 0
    stored = gguf_kinds.quantise("x", matrix, "Q6_K")
    values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q6_K)
    largest = np.abs(matrix.reshape(300, 2, 256)).max(-1)
    # A whole step of 1/32, for what lies opposite to the widest value, and half a step of the group's scale, of 1/128.
    bound = largest * (1 / 32 + 0.5 / 128 + 1e-3)
    assert (np.abs(values - matrix).reshape(300, 2, 256).max(-1) <= bound).all()
    assert np.sqrt(((values - matrix) ** 2).mean(-1) / np.maximum((matrix**2).mean(-1), 1e-30)).max() < 0.025
    assert not values[5].any() and not values[6, :256].any()


def test_file_sizes_are_the_published_ones():
    """Of TinyLlama-1.1B as others have published it, with half a percent for the vocabulary and rounding."""
    sizes = {kind: gguf_kinds.data_bytes(preset("tinyllama-1.1b"), kind) for kind in gguf_kinds.FILE_TYPES}
    published = {"Q4_0": 637e6, "Q8_0": 1.17e9, "F16": 2.2e9, "F32": 4.4e9}
    for kind, n_bytes in published.items():
        assert abs(sizes[kind] / n_bytes - 1) < 5e-3, (kind, sizes[kind])
    order = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32"]
    assert [sizes[kind] for kind in order] == sorted(sizes[kind] for kind in order) and sizes["BF16"] == sizes["F16"]
    head = gguf_kinds.kinds(preset("tinyllama-1.1b"), "Q4_0")["lm_head.weight"]
    assert head == "Q6_K" and set(gguf_kinds.kinds(SMOL, "Q8_0").values()) == {"Q8_0", "F32"}


def test_a_file_is_as_large_as_was_said(tmp_path):
    write_gguf(random_params(WIDE), WIDE, tmp_path / "m.gguf", kind="Q4_0")
    header = gguf_file.read_header(tmp_path / "m.gguf")
    begin = min(tensor.start for tensor in header.tensors.values())
    assert header.size - begin == gguf_kinds.data_bytes(WIDE, "Q4_0")


def test_rows_that_no_block_divides_stay_at_sixteen_bits_and_this_is_said(tmp_path):
    model = replace(GQA, d_ff=48)  # 48 is no multiple of 32
    write_gguf(random_params(model), model, tmp_path / "m.gguf", kind="Q4_0")
    kinds = {name: kind for name, (kind, _) in referee(tmp_path / "m.gguf").items()}
    assert kinds["blk.2.ffn_down.weight"] == "F16" and kinds["blk.2.ffn_up.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0"  # 32 is no multiple of 256
    (line,) = gguf_kinds.fallbacks(model, "Q4_0")
    assert "3 tensors stay F16" in line and "rows of 48" in line and "blk.0.ffn_down.weight" in line
    assert gguf_kinds.fallbacks(WIDE, "Q4_0") == gguf_kinds.fallbacks(model, "F16") == []


def test_metadata_is_what_llama_cpp_looks_for(tmp_path):
    model = replace(GQA, head_dim=16, rope=ROPES["linear_theta"])
    write_gguf(random_params(model), model, tmp_path / "m.gguf", kind="Q8_0", name="tale")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    keys = gguf.Keys
    wanted = {
        keys.General.ARCHITECTURE: "llama",
        keys.General.NAME: "tale",
        keys.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_Q8_0),
        keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.LLM.CONTEXT_LENGTH: 64,
        keys.LLM.EMBEDDING_LENGTH: 32,
        keys.LLM.BLOCK_COUNT: 3,
        keys.LLM.FEED_FORWARD_LENGTH: 48,
        keys.LLM.VOCAB_SIZE: 96,
        keys.Attention.HEAD_COUNT: 4,
        keys.Attention.HEAD_COUNT_KV: 2,
        keys.Attention.KEY_LENGTH: 16,
        keys.Attention.VALUE_LENGTH: 16,
        keys.Attention.LAYERNORM_RMS_EPS: np.float32(1e-5),
        keys.Rope.DIMENSION_COUNT: 16,
        keys.Rope.FREQ_BASE: np.float32(123456.7),
        keys.Rope.SCALING_TYPE: "linear",
        keys.Rope.SCALING_FACTOR: 3.0,
        keys.Tokenizer.MODEL: "none",
    }
    found = {key.format(arch="llama"): value for key, value in wanted.items()}
    assert {key: fields[key] for key in found} == found
    types = {
        kind: int(gguf.LlamaFileType[("ALL_" if kind == "F32" else "MOSTLY_") + kind])
        for kind in formats.FORMATS["gguf"].dtypes
    }
    assert types == gguf_kinds.FILE_TYPES


def test_ntk_is_another_theta(tmp_path):
    model = replace(GQA, rope=Rope(kind="ntk", factor=2.0))
    write_gguf(random_params(model), model, tmp_path / "m.gguf", kind="F32")
    rope = read_gguf(tmp_path / "m.gguf", tmp_path).model.rope
    assert rope == Rope(theta=rope.theta) and abs(rope.theta / 25198.42 - 1) < 1e-6  # 10000 * 2 ** (8 / 6)


def test_models_without_a_form_in_llama_cpp_are_refused(tmp_path):
    for rope in (Rope(kind="none"), Rope(kind="partial", fraction=0.5)):
        model = replace(GQA, rope=rope)
        refusal(ConfigError, lambda m=model: write_gguf(random_params(m), m, tmp_path / "m"), f"kind={rope.kind}")
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked_and_leave_nothing_behind(tmp_path):
    params, out = random_params(GQA), tmp_path / "m.gguf"
    refusal(ConfigError, lambda: write_gguf(params, GQA, out, kind="Q4_K"), "Q4_K", "Q4_0", "BF16")
    refusal(ConfigError, lambda: write_gguf(params, replace(GQA, d_ff=64), out), "mlp.gate", "64")
    params["layers"]["mlp"]["down"][2, 0, 0] = 7e4
    for kind in ("F16", "Q8_0"):
        refusal(ConfigError, lambda k=kind: write_gguf(params, GQA, out, kind=k), "blk.2.ffn_down.weight", "7e+04")
    params["layers"]["mlp"]["down"][2, 0, 0] = np.inf
    write_gguf(params, GQA, out, kind="F16")  # an infinity is one in float16 too
    refusal(ConfigError, lambda: write_gguf(params, GQA, out), "exists already")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_quantised_values_must_be_finite(tmp_path):
    params = random_params(WIDE)
    params["layers"]["attention"]["out"][0, 0, 0, 0] = np.nan
    refusal(ConfigError, lambda: write_gguf(params, WIDE, tmp_path / "m", kind="Q8_0"), "attn_output", "not finite")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(mount):
    disk = mount("size=64k")
    refusal(
        DataError,
        lambda: write_gguf(random_params(GQA), GQA, disk / "m.gguf", kind="F32"),
        "cannot be written",
        "free space",
    )
    assert list(disk.iterdir()) == []


# ---- the command line


def test_export_and_import_by_the_command_line(tmp_path, capsys):
    from tinyllama_jax import configio
    from tinyllama_jax.cli import main
    from tinyllama_jax.train.checkpoint import save_params

    params = random_params(GQA)
    save_params(tmp_path / "ckpt", params, {"step": 0, "tokens": 0, "name": "tale", "model": configio.to_dict(GQA)})
    file = tmp_path / "out" / "tale.gguf"
    assert main(["export", "gguf", str(tmp_path / "ckpt"), "--out", str(file), "--dtype", "F32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params)) and said["notes"] == []
    assert said["modelfile"] == (file.parent / "Modelfile").read_text()
    assert said["modelfile"].startswith("FROM ./tale.gguf\n") and f"-m {file}" in said["command"]
    assert main(["import", "gguf", str(file), "--out", str(tmp_path / "again")]) == 0
    assert main(["export", "gguf", str(tmp_path / "again"), "--out", str(tmp_path / "b.gguf"), "--dtype", "Q4_0"]) == 0
    out, err = capsys.readouterr()
    assert "3 tensors stay F16" in err and "llama.cpp:\n  llama-completion" in out
    assert f"{tmp_path / 'Modelfile'}:\n  FROM ./b.gguf\n" in out and "Ollama:\n  ollama create b -f " in out
    assert main(["export", "gguf", str(tmp_path / "again"), "--out", str(tmp_path / "c.gguf")]) == 0  # F16
    found = read_gguf(tmp_path / "c.gguf", tmp_path).params["embed"]["embedding"]
    np.testing.assert_array_equal(found, params["embed"]["embedding"].astype(np.float16).astype(np.float32))
    for wrong in (["gguf", "--dtype", "float16"], ["hf", "--dtype", "Q8_0"]):
        words = [wrong[0], str(tmp_path / "again"), "--out", str(tmp_path / "d"), *wrong[1:]]
        capsys.readouterr()
        assert main(["export", *words]) == 2 and "--dtype" in capsys.readouterr().err
    assert set(formats.FORMATS["gguf"].dtypes) == set(gguf_kinds.FILE_TYPES)


# ---- what is said besides


def test_modelfile_and_command(tmp_path):
    zephyr = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ eos_token }}{% endfor %}"
    )
    chatml = "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'}}"
    assert [kind_of(t) for t in (zephyr, chatml, "", "[INST] {{ x }}")] == ["zephyr", "chatml", "none", "other"]
    file = tmp_path / "m.gguf"
    text = modelfile(file, 2048, zephyr, "</s>")
    assert text.startswith("FROM ./m.gguf\nTEMPLATE") and "<|user|>\n{{ .Prompt }}</s>\n" in text
    assert 'PARAMETER stop "</s>"\n' in text and text.endswith("PARAMETER num_ctx 2048\n")
    text = modelfile(file, 2048, chatml, "<|im_end|>")
    assert text.count('stop "<|im_end|>"') == 1 and "<|im_start|>user\n{{ .Prompt }}<|im_end|>" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(file, 64, "", "</s>")
    assert "TEMPLATE" not in modelfile(file, 64, "[INST]", "</s>")
    assert command(file, 64, chatml) == f"llama-cli -m {file} -c 64 --temp 0.7"
    assert command(file, 64, "").startswith("llama-completion") and "-no-cnv" in command(file, 64, "")
    assert place_for(file).name == "Modelfile"
    (tmp_path / "Modelfile").touch()
    assert place_for(file).name == "m.gguf.Modelfile"
    (tmp_path / "m.gguf.Modelfile").touch()
    refusal(ConfigError, lambda: place_for(file), "m.gguf.Modelfile")
