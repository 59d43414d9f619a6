"""Temporary."""

import jax

from tinyllama_jax.distributed import ALONE
from tinyllama_jax.finetune import adapters, start


def frozen(run, mesh, peers=ALONE):
    params = start.weights(run, mesh, peers)
    return jax.jit(lambda p: adapters.freeze(p, run.model, run.adapter.base_weights))(params)
