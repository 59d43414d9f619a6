"""The training step of an experiment, compiled for a target's devices: nothing is allocated, nothing runs.

Runs inside the worker process (worker.py), never in the command's own.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import attention, mesh_rules
from tinyllama_jax.attention import choice
from tinyllama_jax.config import Run, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.preflight import collectives
from tinyllama_jax.preflight.targets import GIB, Target
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import BATCH, computing, device, make_mesh, replicated, token_sharding
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step as train_step

# How libtpu's compiler refuses what does not fit, in its two forms; the numbers count arguments and temporaries.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_REQUIRED = re.compile(
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def refusal(message: str) -> dict[str, int] | None:
    """{"total", "capacity_bytes"} from a compiler's message that the device's main memory is too small; else None."""
    match = _USED.search(message) or _REQUIRED.search(message)
    if match is None:
        return None
    used, used_unit, there, there_unit = match.groups()
    return {
        "total": int(float(used) * _UNIT[used_unit.upper()]),
        "capacity_bytes": int(float(there) * _UNIT[there_unit.upper()]),
    }


def compilable_attention(run: Run) -> tuple[Run, dict[str, str]]:
    """The run with an attention that can be compiled without the device, and {"asked", "compiled", "why"}.

    cuDNN chooses its kernels on the device.  Ours for GPUs stands in: it keeps the same values for the backward pass
    (the output and the log-sum-exp), so that memory and collectives are those of cuDNN but for its own workspace.
    Call under the target's mesh.
    """
    asked, call = run.execution.attention, attention.Call.of(run)
    name, why = attention.choose(asked, call)
    if name == "cudnn":
        obstacle = choice.obstacle("triton", call, *device())
        name = "xla" if obstacle else "triton"
        why = f"cuDNN, which would run ({why}), cannot be compiled for without the device; " + (
            f"not triton: {obstacle}; so scores are counted that cuDNN would not hold"
            if obstacle
            else "triton keeps the same values for the backward pass"
        )
        run = replace(run, execution=replace(run.execution, attention=name))
    return run, {"asked": asked, "compiled": name, "why": why}


class Compiler:
    """Compiles one experiment's step for one target at several micro-batches.

    Raises ConfigError where `train` would: the mesh is not made of the target's devices, a batch cannot be spread
    over them.
    """

    def __init__(self, run: Run, target: Target):
        self.target = target
        self.mesh = make_mesh(run.mesh, target.devices())
        self.plan = Plan(run.curriculum, run.data.sequence_tokens)
        mesh_rules.check(run, self.plan.stages, self.mesh.shape)
        with self._context(run):
            self.run, self.attention = compilable_attention(run)
        self.shards = math.prod(self.mesh.shape[axis] for axis in BATCH)
        # The largest batch decides: its micro-batches are the largest, and it accumulates if any stage does.
        self.stage = max(self.plan.stages, key=lambda stage: stage.batch_sequences)

    @contextlib.contextmanager
    def _context(self, run: Run):
        # The default device is what kernels are lowered for.
        with computing(self.mesh, run.model.compute_dtype), jax.default_device(self.mesh.devices.flat[0]):
            yield

    def describe(self) -> dict[str, Any]:
        """What the search needs to know: the candidates, and which of them the experiment has."""
        sequences = self.stage.batch_sequences
        micro_batches = mesh_rules.accumulation_steps(self.run, sequences)
        return {
            "devices": self.mesh.size,
            "mesh": dict(self.mesh.shape),
            "device_kind": self.mesh.devices.flat[0].device_kind,
            "attention": self.attention,
            "stage": self.stage.name,
            "batch_tokens": self.stage.batch_tokens,
            "as_written": sequences // micro_batches // self.shards,
            "candidates": [rows for rows in divisors(sequences // self.shards) if self._valid(rows)],
            "batch_sequences_per_device": sequences // self.shards,
            "shards": self.shards,
            "jax": jax.__version__,
        }

    def _valid(self, rows: int) -> bool:
        try:
            run = replace(self.run, execution=replace(self.run.execution, micro_batch_sequences=rows * self.shards))
            mesh_rules.check(run, self.plan.stages, self.mesh.shape)
        except ConfigError:
            return False
        return True

    @contextlib.contextmanager
    def lowered(self, rows: int, micro_batches: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        """(step, state, batch) in the target's context: the step lowered for `rows` sequences per device in each of
        `micro_batches`, and its abstract arguments."""
        run, mesh = self.run, self.mesh
        shape = (micro_batches, rows * self.shards, run.data.sequence_tokens)
        spread = token_sharding(mesh, leading=1)
        dtypes = {"tokens": np.int32, "targets": np.int32, "valid": np.bool_}
        if run.data.document_masking:
            dtypes["documents"] = np.int32
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for name, dtype in dtypes.items()}
        lr, step = (jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh)) for dtype in (np.float32, np.int32))
        if run.preference:
            rows = token_sharding(mesh, leading=1).spec[1]
            spread = NamedSharding(mesh, P(None, rows, None))
            batch["reference"] = jax.ShapeDtypeStruct((*shape[:2], 2), np.float32, sharding=spread)
        with self._context(run):
            state = train_state.abstract(run, mesh)
            if run.adapter:
                state["frozen"] = train_state.abstract_frozen(run, mesh)
            yield train_step.make_train_step(run).lower(state, batch, lr, step), state, batch

    def __call__(self, rows: int, micro_batches: int) -> dict[str, Any]:
        """One compilation with `rows` sequences per device in each of `micro_batches`.

        {"total", "seconds", "refused"}, bytes per device; unless the compiler refused also "state", "donated",
        "batch", "collectives".
        """
        started = time.monotonic()
        with self.lowered(rows, micro_batches) as (step, state, batch):
            state_bytes, batch_bytes = local_bytes(state), local_bytes(batch)
            try:
                compiled = step.compile()
            except jax.errors.JaxRuntimeError as error:
                refused = refusal(str(error))
                if refused is None:
                    raise
                seconds = time.monotonic() - started
                return {"refused": True, "seconds": seconds, "state": state_bytes, **refused}
        memory = compiled.memory_analysis()
        return {
            "refused": False,
            "seconds": time.monotonic() - started,
            # As the compiler lays it out, which may pad.
            "state": memory.argument_size_in_bytes - batch_bytes,
            "donated": memory.alias_size_in_bytes,
            "batch": batch_bytes,
            "total": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes,
            "collectives": collectives.count(compiled.as_text()),
        }


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shares of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
