"""Exported files in llama.cpp itself: the same perplexity, continuations, probabilities and tokens as here.

`make test-llamacpp` installs the extra `llamacpp`; without it these tests fail.  What is measured, and how, is in
benchmarks/proof_llamacpp.py, which does more of the same.
"""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import proof_llamacpp as proof
from gguf_cases import SHAPES, TEXTS, WIDES, byte_level
from llama_cpp_peer import LlamaCpp
from test_hf import random_params

from tinyllama_jax.config import Rope, replace
from tinyllama_jax.interop import gguf_kinds, gguf_model
from tinyllama_jax.interop.gguf import write_gguf

pytestmark = pytest.mark.llamacpp


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, trained by the command line."""
    return proof.train(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_trained_model_is_the_same_in_llama_cpp(run, kind, tmp_path):
    line = proof.trained(run, kind, tmp_path, rows=2)
    print(json.dumps(line))
    assert proof.wrong_of(line) == []
    assert line["perplexity"]["original"] < 400  # it has learnt something: 1024 tokens, and twice as good as chance


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_computed_as_here(shape, tmp_path):
    assert proof.divergence(SHAPES[shape], "F16", tmp_path) < proof.DIVERGENCE["F16"]


@pytest.mark.parametrize("shape, kind", [("smol", "Q8_0"), ("wide", "Q4_0"), ("wide_tied", "Q5_1")])
def test_quantised_shapes_are_computed_as_here(shape, kind, tmp_path):
    """The wide ones keep what the logits are made with at Q6_K."""
    model = {**SHAPES, **WIDES}[shape]
    assert ("Q6_K" in gguf_kinds.kinds(model, kind).values()) is (shape in WIDES)
    assert proof.divergence(model, kind, tmp_path) < proof.DIVERGENCE[kind]


@pytest.mark.parametrize("shape", ["linear", "yarn", "yarn_factor", "llama3", "yarn_ends", "smol"])
def test_another_rope_is_seen(shape, tmp_path):
    """What these tests allow is far below what a wrong export would be."""
    other = replace(SHAPES[shape], rope=Rope())
    assert proof.divergence(SHAPES[shape], "F16", tmp_path, computed_as=other) > 1000 * proof.DIVERGENCE["F16"]


@pytest.mark.parametrize("shape", ["smol", "mqa_tied"])
def test_rows_in_the_wrong_order_are_seen(shape, tmp_path, monkeypatch):
    for name in ("interleave", "halve"):  # so that what is read back here is right all the same
        monkeypatch.setattr(gguf_model, name, lambda name, tensor, model: tensor)
    assert proof.divergence(SHAPES[shape], "F16", tmp_path) > 1000 * proof.DIVERGENCE["F16"]


@pytest.mark.parametrize("marks", ["bos", "eos", "none"])
@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "dbrx"])
def test_byte_level_tokens_are_the_same(rule, marks, tmp_path):
    found = proof.tokens(byte_level(tmp_path, rule), 340, [*TEXTS, *proof.more_texts(60)], marks)
    assert found["different"] == []


@pytest.mark.parametrize("marks", ["bos", "eos", "none"])
def test_sentencepiece_tokens_are_the_same(run, marks, tmp_path):
    (model,) = (run.parent / "store").rglob("tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    found = proof.tokens(tmp_path, 1024, [*TEXTS, *proof.more_texts(60)], marks)
    assert found["different"] == []


def test_a_chat_template_is_found(tmp_path):
    """llama.cpp's server answers /props with the template that it took from the file."""
    import urllib.request

    write_gguf(random_params(SHAPES["gqa"]), SHAPES["gqa"], tmp_path / "none.gguf")  # loads without a vocabulary too
    model = replace(SHAPES["gqa"], vocab_size=340)
    folder = byte_level(tmp_path / "tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    write_gguf(random_params(model), model, tmp_path / "m.gguf", tokenizer_folder=folder)
    peer = LlamaCpp(tmp_path / "m.gguf", 64, 340)
    with urllib.request.urlopen(peer.server.listening_address + "/props") as reply:
        assert json.loads(reply.read())["chat_template"] == template


def test_our_q6_k_is_nearly_as_exact_as_llama_cpps():
    """The block format is the same; llama.cpp's own quantiser searches for the best scales."""
    import xllamacpp.xllamacpp as native

    library = ctypes.CDLL(native.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 1024), np.float32)
    theirs = np.zeros((64, 1024 // 256 * 210), np.uint8)
    pointer = [a.ctypes.data_as(ctypes.c_void_p) for a in (matrix, theirs)]
    number = ctypes.c_int(gguf.GGMLQuantizationType.Q6_K)
    rows = [ctypes.c_int64(n) for n in (0, 64, 1024)]
    assert library.ggml_quantize_chunk(number, *pointer, *rows, None) == theirs.size
    errors = []
    for stored in (gguf_kinds.quantise("x", matrix, "Q6_K"), theirs):
        errors.append(np.sqrt(((gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q6_K) - matrix) ** 2).mean()))
    print("ours, theirs:", errors)
    assert errors[0] < 1.1 * errors[1] < 0.02
