"""Checkpoints that hold adapters only: their base found, and both as one model.

LoRA: the low-rank products are added to the base *as training computed with it*.  Where the base was frozen in int8,
int4 or nf4, that is the dequantised one, so the merged model gives the logits that were trained and not those of the
float32 base.  A prefix cannot be added to weights: it stays beside them, as params["layers"]["prefix"].
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tinyllama_jax import configio
from tinyllama_jax.config import Adapter, Data, Run, Stage, Start
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.train import bases, saved


def base_identity(path: str | Path) -> dict[str, str]:
    """What a run that starts from the checkpoint directory `path` records as its meta["base"]."""
    return bases.identity(path, saved.read_meta(path))


def run_of(path: Path, meta: dict) -> Run:
    """A run that is based as the adapters at `path` are: theirs, with its base where it was found.

    Imported adapters have no run; theirs says what is needed to load them and nothing about how they were trained.
    Raises CheckpointError when the base is not there or is another one.
    """
    base, _ = bases.find(path, meta)
    start = Start(checkpoint=str(base))
    if "config" in meta:
        run = configio.from_dict(Run, meta["config"])
        return dataclasses.replace(run, start=dataclasses.replace(run.start, checkpoint=str(base)))
    stage = Stage(name="imported", tokens=1, batch_tokens=1, mixture={"unknown": 1.0})
    return Run(
        name=meta.get("name", "imported"),
        model=saved.model_of(meta),
        data=Data(store="unknown", sequence_tokens=1),
        curriculum=(stage,),
        start=start,
        adapter=saved.adapter_of(meta),
    )


def together(path: Path, meta: dict, trained: Any, mesh: Mesh) -> Any:
    """float32 parameters of the base with the adapters `trained` in it, laid out on `mesh`.

    The base is rounded as training had it while it is merged, in place.
    Call under `jax.set_mesh(mesh)`.  Raises CheckpointError as `run_of`.
    """
    import jax

    from tinyllama_jax.finetune import adapters, prefixes, start
    from tinyllama_jax.model import prefix

    run = run_of(path, meta)
    params = start.weights(run, mesh)

    def merged(params: Any, trained: Any) -> Any:
        frozen = adapters.freeze(params, run.model, run.adapter.base_weights)
        both = adapters.merge(frozen, trained, run.model, run.adapter)
        return both | {"layers": prefix.split(both["layers"])[0]}

    laid_out = jax.tree.map(lambda leaf: leaf.sharding, params)
    params = jax.jit(merged, donate_argnums=0, out_shardings=laid_out)(params, trained)
    return prefixes.beside(params, trained) if run.adapter.method == "prefix" else params


def adapter(path: Path, meta: dict) -> Adapter:
    """The adapter of a checkpoint.  Raises ConfigError for one that holds a whole model."""
    found = saved.adapter_of(meta)
    if found is None:
        raise ConfigError(f"{path} holds a whole model and no adapter; `tinyllama export hf` writes it")
    return found
