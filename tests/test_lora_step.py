"""The step of a run with adapters, at a size at which the compiler chooses as it does for real ones."""

import jax
import numpy as np
import pytest

from tinyllama_jax.config import Adapter, Data, Execution, Mesh, Model, Run, Stage, Start
from tinyllama_jax.finetune import adapters
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import computing, make_mesh
from tinyllama_jax.train import state, step

B, T = 16, 256


def grad_norm(scan_layers: bool) -> float:
    """Of the first step with LoRA everywhere beside a fresh model in int4."""
    run = Run(
        name="int4",
        model=Model(
            vocab_size=512, d_model=128, layers=2, heads=4, kv_heads=2, head_dim=32, d_ff=352, compute_dtype="float32"
        ),
        data=Data(store="none", sequence_tokens=T),
        curriculum=(Stage(name="tune", tokens=B * T, batch_tokens=B * T, mixture={"a": 1.0}),),
        start=Start(checkpoint="none"),
        adapter=Adapter(rank=8, targets=("*",), base_weights="int4"),
        execution=Execution(scan_layers=scan_layers),
    )
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    rows = np.random.default_rng(0).integers(0, 512, (B, T + 1)).astype(np.int32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "valid": np.ones((B, T), bool)}
    with computing(mesh, "float32"):
        made = jax.jit(lambda key: adapters.freeze(transformer.init(run.model, key), run.model, "int4"))
        states = state.init(run, mesh) | {"frozen": made(jax.random.key(1))}
        placed = step.put_batch(batch, 1, mesh, documents=False)
        _, metrics = step.make_train_step(run)(states, placed, np.float32(1e-4), np.int32(0))
        return float(metrics["grad_norm"])


def test_gradients_beside_four_bits_are_the_same_in_a_loop_over_layers():
    """XLA's CPU backend made them many times as large, for 4096 tokens and more, until it was told not to fuse sums of
    products."""
    assert grad_norm(scan_layers=True) == pytest.approx(grad_norm(scan_layers=False), rel=1e-4)
