"""How many kernels XLA makes of the model's elementwise operations: why they need no kernels of their own.

    python benchmarks/fusions.py                  JSON lines; needs the extra `preflight` and no device
    python benchmarks/fusions.py --targets v5e:2x2 --operations swiglu

The package's own functions at 16,384 tokens of TinyLlama-1.1B's shape, compiled for one A100 and one TPU v5e chip.
`kernels` is what the device is asked to start: the instructions of the compiled program's entry that compute or move
something; `by_kind` tells them apart.  `temp_bytes` is memory beside arguments and results.  An operation that reads
its inputs once and writes its results once is one fusion with no temporaries.  `adamw` is the whole update, guard and
norms included, of the arrays of a model of two layers.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from lines import RESULTS, emit, origin

from tinyllama_jax.errors import UserError
from tinyllama_jax.preflight.worker import ENVIRONMENT

if __name__ == "__main__":
    os.environ |= ENVIRONMENT  # before JAX and the compilers read it

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config, optim
from tinyllama_jax.model import layers, rope
from tinyllama_jax.preflight import targets
from tinyllama_jax.presets import preset
from tinyllama_jax.sharding import BATCH, make_mesh, replicated
from tinyllama_jax.train import state as train_state

B, T = 8, 2048
MODEL = preset("tinyllama-1.1b")
TARGETS = ("a100-40g", "v5e:2x2")
# Instructions that start nothing: names for what is there already.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}


def kernels(text: str) -> dict[str, int]:
    """Instructions of a compiled program's entry by opcode, without FREE ones; -start counts for its -done."""
    entry = text[text.index("\nENTRY ") :]
    opcodes = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z0-9-]*)\(", entry, flags=re.MULTILINE)
    return dict(collections.Counter(code for code in opcodes if code not in FREE and not code.endswith("-done")))


def rms_norm(x, scale):
    return layers.rms_norm(x, scale, MODEL.norm_eps)


def residual_rms_norm(x, branch, scale):
    """The residual stream and its norm, which the next branch reads."""
    x = x + branch
    return x, rms_norm(x, scale)


def swiglu(gate, up):
    """What Mlp does between its products: the products are replaced by their results."""
    given = {"gate": gate, "up": up, "down": None}
    mlp = types.SimpleNamespace(**{name: types.SimpleNamespace(get_value=lambda v=v: v) for name, v in given.items()})
    with mock.patch.object(layers, "linear", lambda x, weight: x if weight is None else weight):
        return layers.Mlp.__call__(mlp, None)


def operations(mesh) -> dict[str, tuple[Callable, tuple, tuple[int, ...]]]:
    """name -> (function, abstract arguments, donated arguments)."""

    def by_token(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(
            (B, T, *shape), dtype, sharding=NamedSharding(mesh, P(BATCH, None, *[None] * len(shape)))
        )

    def whole(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*[None] * len(shape))))

    x, scale, wide = by_token(MODEL.d_model), whole(MODEL.d_model), by_token(MODEL.d_ff)
    q, angles = by_token(MODEL.heads, MODEL.head_dim), whole(T, MODEL.head_dim // 2)
    run = config.Run(
        name="update",
        model=config.replace(MODEL, layers=2),  # as many arrays as 22 make, and a v5e chip holds them
        data=config.Data(store="-"),
        curriculum=(config.Stage(name="main", tokens=2048, batch_tokens=2048, mixture={"random": 1.0}),),
    )
    optimizer = optim.make_optimizer(run.optimizer)

    def adamw(state, grads, loss, lr):
        """The end of a training step.  Donated arrays are matched with results by their order, so it must be kept."""
        params, opt_state, metrics = optim.update(
            optimizer, run.optimizer, grads, state["optimizer"], state["params"], loss=loss, lr=lr
        )
        return {"params": params, "optimizer": opt_state}, metrics

    def pull(function):
        """Gradients; the last argument is the cotangent."""
        return lambda *arguments: jax.vjp(function, *arguments[:-1])[1](arguments[-1])

    state = train_state.abstract(run, mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return {
        "rms_norm": (rms_norm, (x, scale), ()),
        "rms_norm_backward": (pull(rms_norm), (x, scale, x), ()),
        "residual_rms_norm": (residual_rms_norm, (x, x, scale), ()),
        "residual_rms_norm_backward": (pull(residual_rms_norm), (x, x, scale, (x, x)), ()),
        "swiglu": (swiglu, (wide, wide), ()),
        "swiglu_backward": (pull(swiglu), (wide, wide, wide), ()),
        "rope": (rope.rotate, (q, angles, angles), ()),
        "rope_backward": (
            lambda q, cos, sin, dq: pull(lambda q: rope.rotate(q, cos, sin))(q, dq),
            (q, angles, angles, q),
            (),
        ),
        "adamw": (adamw, (state, state["params"], scalar, scalar), (0,)),
    }


def compile_for(target: str, names: Sequence[str] | None = None) -> list[dict]:
    """A line per operation.  Raises UserError for an unknown target, RuntimeError when its compiler is not there."""
    devices = targets.parse(target).devices()
    mesh, found = make_mesh(config.Mesh(), devices[:1]), []
    with jax.set_mesh(mesh), jax.default_device(devices[0]):
        for name, (function, arguments, donated) in operations(mesh).items():
            if names and name not in names:
                continue
            compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
            memory, by_kind = compiled.memory_analysis(), kernels(compiled.as_text())
            sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments)]
            found.append(
                {
                    "operation": name,
                    "kernels": sum(by_kind.values()),
                    "by_kind": by_kind,
                    "temp_bytes": memory.temp_size_in_bytes,
                    "argument_bytes": sum(sizes),
                    "output_bytes": memory.output_size_in_bytes,
                    "arrays": len(sizes),
                    "target": target,
                    "device": devices[0].device_kind,
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"as preflight's --target ({','.join(TARGETS)})")
    parser.add_argument("--operations", help="comma-separated; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"such as {RESULTS.name}/fusions.jsonl")
    args = parser.parse_args(arguments)
    common = {"benchmark": "fusions", "tokens": B * T, "model": "tinyllama-1.1b"}
    names = args.operations.split(",") if args.operations else None
    with open(args.out or os.devnull, "w") as file:
        try:
            for target in args.targets.split(","):
                for line in compile_for(target, names):
                    emit({**common, **line, **origin()}, file)
        except UserError as error:
            print(f"fusions: {error}", file=sys.stderr)
            return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
