"""PEFT's folders to checkpoints of adapters and back: what belongs to them besides the adapter, from their base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllama_jax import configio
from tinyllama_jax.config import Mesh, Model, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.interop import hf_tokenizer, model_card, peft, peft_card
from tinyllama_jax.interop.formats import Found
from tinyllama_jax.train import bases, saved

if TYPE_CHECKING:
    from tinyllama_jax.generate.load import Loaded


def read(source: Path, base: str) -> Found:
    """The adapter in a PEFT folder, for the base in the checkpoint that `base` names.

    Its tokenizer is the folder's, else the base's.  Raises DataError, ConfigError, CheckpointError.
    """
    path = saved.resolve(base)
    meta = saved.read_meta(path)
    if saved.adapter_of(meta) is not None:
        raise ConfigError(f"{path} holds adapters itself; merge them first (`tinyllama finetune merge`)")
    model = saved.model_of(meta)
    adapter, params, words = peft.read_peft(source, model, functools.partial(_tables, path, model))
    files, marks, notes = hf_tokenizer.find(source)
    if not files:
        folder = path / "tokenizer"
        files = tuple(sorted(folder.iterdir())) if folder.is_dir() else ()
        marks, notes = meta.get("document_marks", "bos"), ()
    about = {"adapter": configio.to_dict(adapter), "base": bases.identity(path, meta)}
    return Found(replace(model, vocab_size=words), params, files, marks, notes, about)


def write(loaded: Loaded, out: Path, *, dtype: str, base_model: str, license: str, language: str) -> dict[str, Any]:
    """Write the adapters of `loaded` (generate.load.load_adapter) as PEFT's folder; what the answer says besides.

    The tokenizer goes along, for a run may have extended it; so do the tables of words where it has.
    Raises CheckpointError when the base is missing or another one, ConfigError and DataError as peft.write_peft.
    """
    adapter = saved.adapter_of(loaded.meta)
    base_path, base_meta = bases.find(loaded.path, loaded.meta)
    model, small = loaded.model, saved.model_of(base_meta)
    resized = model.vocab_size != small.vocab_size
    base = base_model or model_card.name_of(base_path)
    folder = loaded.path / "tokenizer"
    text = peft_card.card(
        *(loaded.path, loaded.meta, model, adapter, out.absolute().name, base),
        **{"resized": resized, "license": license, "language": language},
    )
    peft.write_peft(
        loaded.params,
        adapter,
        model,
        out,
        base=base,
        dtype=dtype,
        tokenizer_files=sorted(folder.iterdir()) if folder.is_dir() else [],
        marks=loaded.marks,
        tables=_grown(loaded.path, loaded.meta) if resized else {},
        texts={"README.md": text},
    )
    unnamed = (
        f"the base is called {base!r}: export it under that name, or name what transformers loads with --base-model"
    )
    return {
        "base_model": base,
        "notes": [] if base_model else [unnamed],
        "use": peft_card.uses(str(out), base, model, resized=resized),
    }


def _tables(path: Path, model: Model, words: int) -> dict[str, np.ndarray]:
    """The tables of the whole model in a checkpoint in Hugging Face's layout [words, D], by the names of peft.TABLES;
    more words than it has are the mean of its own."""
    import jax

    from tinyllama_jax.finetune.start import adapt
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        params = jax.tree.map(np.asarray, load(str(path), mesh).params)
    longer = adapt(params, model, replace(model, vocab_size=words), "mean", jax.random.key(0))
    return _theirs(longer)


def _grown(path: Path, meta: dict) -> dict[str, np.ndarray]:
    """The tables that the run of adapters at `path` was trained with, as `_tables`."""
    import jax

    from tinyllama_jax.finetune import start
    from tinyllama_jax.generate.adapted import run_of
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        return _theirs(jax.tree.map(np.asarray, start.weights(run_of(path, meta), mesh)))


def _theirs(params: dict[str, Any]) -> dict[str, np.ndarray]:
    tables = {"embed_tokens": params["embed"]["embedding"]}
    return tables | ({"lm_head": params["head"]["kernel"].T} if "head" in params else {})
