"""Adapters of a tiny model with random weights, and checkpoints of them beside their base."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from test_hf import GQA, random_params

from tinyllama_jax import configio
from tinyllama_jax.config import Adapter, Mesh
from tinyllama_jax.interop import peft
from tinyllama_jax.sharding import make_mesh
from tinyllama_jax.train import bases, saved
from tinyllama_jax.train.checkpoint import save_params

SCALE = 0.3  # of random weights: logits stay small, and every matrix shows in them
EVERYTHING = Adapter(rank=4, alpha=6.0, rank_stabilised=True, targets=("*",), base_weights="float32")
ADAPTERS = {
    "lora": Adapter(rank=4, alpha=10.0, base_weights="float32"),
    "everything": EVERYTHING,
    "prefix": Adapter(method="prefix", prefix_tokens=5, base_weights="float32"),
}


def base_params(model=GQA):
    return jax.tree.map(lambda x: x * np.float32(SCALE), random_params(model))


def drawn(model, adapter, seed=7):
    """Random float32 parameters of an adapter, all of them other than zero."""
    rng, tree = np.random.default_rng(seed), {}
    for (*folders, last), shape in peft.shapes(model, adapter).items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = rng.standard_normal(shape, np.float32) * np.float32(1 if adapter.method == "prefix" else SCALE)
    return tree


def base_checkpoint(folder: Path, model=GQA, tokenizer_files=()) -> Path:
    meta = {"step": 0, "tokens": 0, "name": "base", "model": configio.to_dict(model), "document_marks": "bos"}
    return save_params(folder, base_params(model), meta, tokenizer_files)


def checkpoint(folder: Path, base: Path, adapter: Adapter, model=None, **config) -> Path:
    """Adapters as a run saves them: meta["config"] with start, adapter and model, and meta["base"].

    config: more of it, of which `start` is the start's other fields.
    """
    base_meta = saved.read_meta(base)
    model = model or saved.model_of(base_meta)
    meta = {
        "step": 8,
        "tokens": 64,
        "document_marks": "bos",
        "config": run_config(model, adapter, base) | config,
        "base": bases.identity(base, base_meta),
    }
    return save_params(folder, drawn(model, adapter), meta, sorted((base / "tokenizer").glob("*")))


def run_config(model, adapter, base) -> dict:
    from tinyllama_jax.config import Data, Run, Stage, Start

    run = Run(
        name="tuned",
        model=dataclasses.replace(model, compute_dtype="float32"),
        data=Data(store="nowhere", sequence_tokens=8),
        curriculum=(Stage(name="tune", tokens=64, batch_tokens=8, mixture={"tales": 1.0}),),
        start=Start(checkpoint=str(base)),
        adapter=adapter,
    )
    return configio.to_dict(run)


def one_device():
    return make_mesh(Mesh(), jax.devices()[:1])
