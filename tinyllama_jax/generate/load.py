"""A model from a checkpoint, for everything that only reads weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tinyllama_jax import programs
from tinyllama_jax.config import Model, replace
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import param_shardings
from tinyllama_jax.train import checkpoint, saved


@dataclass(frozen=True)
class Loaded:
    path: Path
    model: Model
    params: Any
    meta: dict

    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept with the checkpoint; raises CheckpointError when there is none."""
        folder = self.path / "tokenizer"
        if not folder.is_dir():
            raise CheckpointError(f"{self.path} holds no tokenizer; give token ids instead of text")
        return Tokenizer.load(folder)

    @property
    def marks(self) -> str:
        """How documents were marked in the text that the model was trained on."""
        return self.meta.get("document_marks", "bos")


def prompt_tokens(tokenizer: Tokenizer, marks: str, text: str) -> list[int]:
    """A prompt as the beginning of a document: behind BOS if documents began with it, else behind the EOS that
    ended the document before, else bare.  A model has never seen a mark that its documents did not carry."""
    start = {"bos": [tokenizer.bos_id], "both": [tokenizer.bos_id], "eos": [tokenizer.eos_id], "none": []}[marks]
    return start + tokenizer.encode(text)


def load(text: str, mesh: Mesh, *, dtype: str = "float32") -> Loaded:
    """The weights of a run (its newest checkpoint), RUN@STEP, or a checkpoint directory, laid out on `mesh`.

    Computation will be in `dtype`.  Raises CheckpointError when there is none or it is damaged.
    """
    path = saved.resolve(text)
    meta = saved.read_meta(path)
    model = replace(saved.model_of(meta), compute_dtype=dtype)
    programs.keep(repr(model))
    shapes = jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0))
    target = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )
    return Loaded(path, model, checkpoint.load(path, {"params": target})["params"], meta)
