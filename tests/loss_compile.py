"""Compiles the loss and its gradients for one A100 that is not there; prints the compiler's account as JSON.

    python tests/loss_compile.py CHUNK_TOKENS [Z_LOSS]
    python tests/loss_compile.py dense                     as the formula says it, differentiated by JAX

16,384 tokens, width 2048, vocabulary 32,000, hidden states in bfloat16, head in float32: TinyLlama's with 8 sequences a
device.  A program of its own: the compiler may end the process, and must not meet the other tests' eight CPU devices.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run; JAX must not look for the device

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config
from tinyllama_jax.loss import training_loss
from tinyllama_jax.preflight import targets
from tinyllama_jax.sharding import BATCH, make_mesh

B, T, D, V = 8, 2048, 2048, 32_000


def dense(x, w, targets, valid):
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(valid, nll, 0.0)) / jnp.sum(valid)


def main(how: str, z_loss: str = "0") -> dict:
    device = targets.parse("a100-40g").devices()[0]
    mesh = make_mesh(config.Mesh(), [device])

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def chunked(x, w, targets, valid):
        sums = training_loss(x, w, targets, valid, chunk_tokens=int(how), z_loss=float(z_loss))
        return sums[0] / jnp.sum(valid)

    arguments = (
        array((B, T, D), jnp.bfloat16, BATCH, None, None),
        array((D, V), jnp.float32, "data", None),
        array((B, T), jnp.int32, BATCH, None),
        array((B, T), jnp.bool_, BATCH, None),
    )
    loss = dense if how == "dense" else chunked
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {"temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
