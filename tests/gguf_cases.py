"""What the tests and the proof of GGUF files share: models of every kind, vocabularies, and files written anew."""

import json

import gguf
import jax
import numpy as np
import tokenizers
from test_hf import GQA, MODELS, random_params
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.interop import gguf_file
from tinyllama_jax.interop.gguf_tokenizer import RULES

# SmolLM2-135M in small: tied, nine query heads for three key/value heads, theta 100000.
SMOL = Model(
    vocab_size=96,
    d_model=288,
    layers=2,
    heads=9,
    kv_heads=3,
    head_dim=32,
    d_ff=64,
    context_tokens=64,
    tied_embeddings=True,
    rope=Rope(theta=100_000.0),
)
WIDE = replace(GQA, d_model=256, heads=8, head_dim=32, d_ff=64)  # rows that all blocks divide
WIDES = {"wide": WIDE, "wide_tied": replace(WIDE, tied_embeddings=True)}
ROPES = {
    "yarn_ends": Rope(kind="yarn", factor=4.0, original_context_tokens=16, beta_fast=16.0, attention_factor=1.25),
    "llama_3_2": Rope(kind="llama3", theta=5e5, factor=32.0, original_context_tokens=8192),
    "linear_theta": Rope(kind="linear", theta=123456.7, factor=3.0),
}
SHAPES = {**MODELS, "smol": SMOL, **{name: replace(GQA, rope=rope) for name, rope in ROPES.items()}}

TEXT = "the quick brown fox jumps over the lazy dog\n    def f(x):\n        return x + 12345\n  it's 2024, don't\n" * 20
TEXTS = (
    "",
    " ",
    "the fox",
    "  two\n    four é 漢 \t",
    "12 3456 it's DON'T",
    "<s> </s> <|im_end|>\n",
    "a  1\r\n\r\n b ",
)


def peaked(model: Model, seed: int = 0):
    """Random parameters with which every layer counts and some tokens are much likelier than others."""
    fan_in = {"out": model.heads * model.head_dim, "down": model.d_ff}
    gain = {"query": 1.5, "key": 1.5, "kernel": 3.0, "embedding": 3.0}

    def scaled(path, leaf):
        name = path[-1].key
        if name == "scale":
            return (1 + 0.1 * leaf).astype(np.float32)
        if name == "embedding" and not model.tied_embeddings:
            return leaf
        return (gain.get(name, 1.0) * fan_in.get(name, model.d_model) ** -0.5 * leaf).astype(np.float32)

    return jax.tree_util.tree_map_with_path(scaled, random_params(model, seed))


def byte_level(folder, rule="smollm", **changes):
    """A folder with a byte-level tokenizer.json whose text is cut by one of llama.cpp's rules."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=RULES[rule][1]))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = RULES["llama-bpe"][0][0]["pattern"]["Regex"]
    llama3 = [
        pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    steps = {"gpt-2": words, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words])}
    fast.pre_tokenizer = steps.get(rule) or pre_tokenizers.Sequence(llama3)
    fast.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([TEXT], trainer)
    fast.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    for path, value in changes.items():
        *way, last = path.split("__")
        node = spec
        for key in way:
            node = node[key]
        node[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rewritten(source, target, *, drop=(), add=(), tensors=None, architecture="llama"):
    """Write a file anew by the package, with metadata and tensors left out, added or (None) taken away."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture)
    skip = {"general.architecture", gguf_file.CHECKSUM_KEY, *drop, *(key for key, *_ in add)}
    for key, field in reader.fields.items():
        if key not in skip and not key.startswith("GGUF."):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for key, value, kind in add:
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    for tensor in reader.tensors:
        if tensors is None or tensor.name not in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, data in (tensors or {}).items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
