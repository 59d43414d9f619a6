"""What any process asks for, decided for all of them in the same step.

A signal reaches one process, a clock strikes for each at another moment; but all must save, and stop, after the same
step, or they would wait for each other for ever.  So each process hands its wishes in with a step, the step's program
takes the largest over all devices, and everyone reads the same answer with that step's metrics: no message of its own,
and no host ever waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.distributed import Peers
from tinyllama_jax.distributed.together import compiled_together


class Wants(NamedTuple):
    stop: bool = False  # save and end: a signal or notice came
    save: bool = False  # a temporary checkpoint is due
    failed: bool = False  # the last save failed in the background


def with_wants(
    train_step: Callable, mesh: Mesh, peers: Peers, barrier_seconds: float, compiler_options: dict | None = None
) -> Callable:
    """(state, batch, lr, step, wants()) -> (state, metrics, asked), where `read(asked)` is what any process wanted.

    train_step: made by `jax.jit` with these `compiler_options`.  With one process nothing is added to the step, and
    nothing is asked for.
    """
    if peers.count == 1:

        def alone(state, batch, lr, step, wants):
            return *train_step(state, batch, lr, step), None

        return alone

    def together(state: Any, batch: Any, lr: jax.Array, step: jax.Array, wants_DW: jax.Array):
        # Unwrapped, for JAX refuses options of a function inside of another one.
        return *train_step.__wrapped__(state, batch, lr, step), jnp.max(wants_DW, axis=0)

    jitted = jax.jit(together, donate_argnums=0, compiler_options=compiler_options)
    compiled = compiled_together(jitted, peers, "step", barrier_seconds)
    by_device = NamedSharding(mesh, P(tuple(mesh.axis_names), None))
    mine = sum(device.process_index == peers.index for device in mesh.devices.flat)

    def run(state, batch, lr, step, wants):
        mine_DW = np.tile(np.array(wants(), np.int32), (mine, 1))
        return compiled(state, batch, lr, step, jax.make_array_from_process_local_data(by_device, mine_DW))

    return run


def read(asked: jax.Array | None) -> Wants:
    """Waits for the step that carried the wishes."""
    return Wants() if asked is None else Wants(*(bool(x) for x in np.asarray(asked)))
