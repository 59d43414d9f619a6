"""A checkpoint of a tiny model with a vocabulary and Zephyr's template, made in seconds; it knows nothing."""

import dataclasses
import json
from pathlib import Path

import jax
from quick_experiment import quick

from tinyllama_jax import configio
from tinyllama_jax.data.tokenizer import train_bpe, write_tokenizer_json
from tinyllama_jax.model import transformer
from tinyllama_jax.train.checkpoint import save_params


def make(folder: Path, *, context_tokens: int = 256) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        "the quick brown fox jumps over the lazy dog <|user|> <|assistant|>\n    def f(x):\n        return x + 1\n" * 20
    )
    file = write_tokenizer_json(train_bpe([text], 300, folder / "tokenizer.model"), folder / "tokenizer.json")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ '<|user|>' }}"}))
    model = dataclasses.replace(quick().model, vocab_size=300, context_tokens=context_tokens)
    params = jax.tree.map(lambda p: p * 3, transformer.init(model, jax.random.key(1)))  # no near ties
    meta = {"step": 0, "tokens": 0, "name": "tiny", "model": configio.to_dict(model), "document_marks": "bos"}
    return save_params(folder / "ckpt", params, meta, tokenizer_files=[file, settings])
