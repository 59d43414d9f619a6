"""Which implementation runs: by name, or `auto` by the mesh's kind of device, always with a reason for the log.

The decision is made while tracing, from the device of the mesh in use and not from `jax.devices()`: a program
compiled ahead for other devices gets theirs, and a kernel for one architecture is never traced for another.  (cuDNN
rules out the later `lax.platform_dependent`: its wrapper cannot even be traced on a machine without it.)
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from tinyllama_jax import sharding
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.sharding import GPU, TPU

# name -> the platform it is for; None: any.
NAMES = {
    "reference": None,
    "blocks": None,
    "xla": None,
    "cudnn": GPU,
    "splash": TPU,
    "triton": GPU,
    "hopper": GPU,
    "tpu": TPU,
}
KERNELS = ("triton", "hopper", "tpu")  # ours: modules of this package, run by fused.py
MERGED = (*KERNELS, "blocks", "reference")  # whose results over parts of the keys can be merged by their log-sum-exp
INTERPRET = "interpret:"  # before a kernel's name: JAX interprets it, on any platform; slow, for tests and debugging

# A word of the device kind -> our kernel that `auto` takes there.  A row may stand here only with the parity that was
# measured on such a device, committed as benchmarks/results/attention-KIND.json (`benchmarks/attention.py --parity`).
PROVEN: dict[str, str] = {}


class Call(NamedTuple):
    """What decides whether an implementation can serve a call."""

    head_dim: int
    dtype: Any
    queries: int
    ranges: bool = False  # documents or a window
    window: bool = False
    cache: bool = False  # query positions into a key/value cache
    soft_cap: float | None = None
    lse: bool = False  # the log-sum-exp is asked for
    context: int = 1  # places of the mesh that split a row's tokens

    @classmethod
    def of(cls, run: Run) -> Call:
        """A training step's, on the mesh in use."""
        model, data, context = run.model, run.data, sharding.parts(sharding.CONTEXT)
        masked = data.document_masking
        return cls(model.head_dim, model.compute_dtype, data.sequence_tokens, ranges=masked, context=context)


def kernel(name: str) -> ModuleType:
    """The module of one of KERNELS, or of `blocks` or the reference, which can stand in for one.

    Imported when it is first needed, for Pallas takes a second.
    """
    return importlib.import_module(f"tinyllama_jax.attention.{name}")


def obstacle(name: str, call: Call, platform: str, kind: str) -> str | None:
    """Why implementation `name` cannot serve this call on this device, in one clause; None if it can."""
    interpreted, name = name.startswith(INTERPRET), name.removeprefix(INTERPRET)
    needs = NAMES[name]
    if needs and platform != needs and not interpreted:
        return f"it runs on {needs.upper()}s and this is a {platform}"
    if name == "hopper" and not interpreted and not any(word in kind for word in ("H100", "H200", "H800", "H20")):
        return f"it runs on Hopper GPUs and this is {kind}"
    if call.context > 1 and (name not in MERGED or call.cache):
        return "it returns no log-sum-exp to merge the parts of a row by, which mesh.context splits"
    if call.cache and name not in ("reference", "xla"):
        return "it does not read a key/value cache"
    if name in KERNELS:
        return kernel(name).refuses(head_dim=call.head_dim, dtype=jnp.dtype(call.dtype), soft_cap=call.soft_cap)
    if name not in MERGED and call.soft_cap is not None:
        return "it has no soft cap"
    if name not in MERGED and call.lse:
        return "it does not return a float32 log-sum-exp"
    if name == "cudnn":
        if call.ranges:
            return "it would need documents or a window as a T x T bias"
        if call.head_dim > 128 or call.head_dim % 8:
            return f"head_dim {call.head_dim} is not a multiple of 8 up to 128"
        if jnp.dtype(call.dtype).itemsize != 2:
            return f"it computes in bfloat16 or float16, not {jnp.dtype(call.dtype).name}"
    if name == "splash" and call.window:
        return "its windows are fixed masks, not offered here"
    if name == "splash" and call.queries % 128:
        return f"{call.queries} tokens are not a multiple of 128"
    return None


def choose(
    implementation: str,
    call: Call,
    platform: str | None = None,
    kind: str | None = None,
) -> tuple[str, str]:
    """(name, reason): the implementation that serves `call` on a device, by default that of the mesh in use.

    Raises ConfigError for an unknown name and for one that cannot serve the call.
    """
    if platform is None or kind is None:
        platform, kind = sharding.device()
    if implementation != "auto":
        names = [*NAMES, *(INTERPRET + name for name in KERNELS)]
        if implementation not in names:
            raise ConfigError(
                f"execution.attention={implementation!r} is unknown; choose one of auto, {', '.join(names)}"
            )
        why_not = obstacle(implementation, call, platform, kind)
        if why_not:
            raise ConfigError(f"execution.attention={implementation!r} cannot be used: {why_not}; try auto")
        return implementation, "named in execution.attention"

    ours = [name for word, name in PROVEN.items() if word in kind]
    library = {GPU: ["cudnn", "xla"], TPU: ["splash", "xla"]}.get(platform, ["blocks"])
    passed_over = []
    for name in [*ours, *library, "reference"]:
        why_not = obstacle(name, call, platform, kind)
        if why_not is None:
            first = f"proven on {kind}" if name in ours else f"no kernel of ours is proven on {kind}"
            return name, "; ".join([first, *passed_over])
        passed_over.append(f"not {name}: {why_not}")
    raise AssertionError("the reference serves every call")
