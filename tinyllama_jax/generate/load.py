"""A model from a checkpoint, for everything that only reads weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tinyllama_jax import config, programs
from tinyllama_jax.config import Model, replace
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.generate import adapted
from tinyllama_jax.model import quantized, transformer
from tinyllama_jax.sharding import make_mesh, param_shardings
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
    """A prompt as the beginning of a document: behind the mark that documents had before them (Tokenizer.start)."""
    return tokenizer.start(marks) + tokenizer.encode(text)


def load(text: str, mesh: Mesh, *, dtype: str = "float32") -> Loaded:
    """The weights of a run (its newest checkpoint), RUN@STEP, RUN@best or a checkpoint directory, laid out on `mesh`.

    Of a checkpoint that holds adapters: its base with them in it (adapted.py).
    Computation will be in `dtype`.  Raises CheckpointError when there is none or it is damaged.
    """
    path = saved.resolve(text)
    meta = saved.read_meta(path)
    model = replace(saved.model_of(meta), compute_dtype=dtype)
    programs.keep(repr(model))
    if saved.adapter_of(meta) is not None:
        return Loaded(path, model, adapted.together(path, meta, load_adapter(text).params, mesh), meta)
    shapes = jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0))
    target = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )
    return Loaded(path, model, checkpoint.load(path, {"params": target})["params"], meta)


def load_adapter(text: str) -> Loaded:
    """A checkpoint of adapters as it is, without its base: float32 arrays, whole on every device of the mesh in use.

    Raises ConfigError for a whole model, CheckpointError as `load`.
    """
    path = saved.resolve(text)
    meta = saved.read_meta(path)
    adapted.adapter(path, meta)
    target: dict[str, Any] = {}
    for name, leaf in meta["checkpoint"]["leaves"]["params"].items():
        *folders, last = name.split(".")
        node = target
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
    return Loaded(path, saved.model_of(meta), checkpoint.load(path, {"params": target})["params"], meta)


def serving_mesh(*texts: str) -> Mesh:
    """All devices as a mesh to generate on with these checkpoints: heads, MLP and vocabulary over as many of them as
    divide them all, weights copied to the rest; a weight that must be gathered for every token would be most of its
    time."""
    models, devices = [saved.model_of(saved.read_meta(saved.resolve(text))) for text in texts], jax.device_count()
    parts = [x for m in models for x in (m.heads, m.kv_heads, m.d_ff, m.vocab_size)]
    tensor = max(n for n in range(1, devices + 1) if devices % n == 0 and not any(x % n for x in parts))
    return make_mesh(config.Mesh(replica=-1, data=1, tensor=tensor))


def load_serving(text: str, mesh: Mesh, *, dtype: str, weights: str = "dtype") -> Loaded:
    """As `load`, with parameters as generation reads them: in `dtype`, or layers and head in int8 or int4."""
    loaded = load(text, mesh, dtype=dtype)
    params = jax.jit(quantized.serving, static_argnums=(1, 2))(loaded.params, loaded.model, weights)
    return replace(loaded, params=params)
