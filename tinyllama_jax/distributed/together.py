"""Programs that no process begins before every process has compiled them."""

from __future__ import annotations

from collections.abc import Callable

import jax

from tinyllama_jax.distributed import Peers


def compiled_together(function: Callable, peers: Peers, name: str, seconds: float) -> Callable:
    """`function`, made by `jax.jit`; with several processes they meet after compiling it for new shapes.

    Compiling takes one process longer than another, on a busy machine by minutes, and a collective operation on CPUs
    (gloo) waits half a minute only.  Raises PeerLost when a process does not come within `seconds`.
    """
    if peers.count == 1:
        return function
    programs = {}

    def call(*arguments):
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
        if shapes not in programs:
            program = function.lower(*arguments).compile()
            peers.barrier(f"{name} compiled", seconds)
            programs[shapes] = program
        return programs[shapes](*arguments)

    return call
