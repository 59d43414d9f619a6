"""How long one optimizer step takes on a target, from the run's shapes alone.  No jax here, and no measurement.

    seconds of a micro-batch = matrix products + attention + elementwise + cross-entropy + what is left of the
                               communication when the computing has hidden a share of it
    seconds of a step        = micro-batches * that + optimizer + gaps

A matrix product takes the longer of its FLOPs at the achievable rate and its operands through the memory.  The model
is a roof: real steps reach 0.85 to 0.9 of it, which is what calibration is for (anchors.py).  Not in it: kernels of
small matrices that do not fill a device, imbalance between devices, the loader, evaluation and saves.  Attention
counts as fused unless `xla` or `reference` is asked for; document masking, which skips some of it, counts as none.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from tinyllama_jax import mesh_rules
from tinyllama_jax.config import Run
from tinyllama_jax.flops import forward_terms, trained_parameters
from tinyllama_jax.mesh_rules import AXES, accumulation_steps, rows_per_place
from tinyllama_jax.preflight import traffic
from tinyllama_jax.preflight.assumptions import Assumptions
from tinyllama_jax.preflight.traffic import BYTES, Collective
from tinyllama_jax.schedules import PlannedStage

PARTS = ("matmul", "attention", "elementwise", "cross_entropy", "optimizer", "communication", "gaps")
UNFUSED = ("xla", "reference", "blocks")  # scores go through the memory


def products(run: Run, tensor: int) -> list[tuple[int, int, int]]:
    """(inputs, outputs, times) of each matrix of weights: a layer's, `layers` times, and the head's."""
    cfg = run.model
    d, width, kv_width = cfg.d_model, cfg.heads * cfg.head_dim // tensor, cfg.kv_heads * cfg.head_dim // tensor
    f = cfg.d_ff // tensor
    layer = [(d, width, 1), (d, kv_width, 2), (width, d, 1), (d, f, 2), (f, d, 1)]
    return [(k, n, times * cfg.layers) for k, n, times in layer] + [(d, cfg.vocab_size // tensor, 1)]


def step(run: Run, stage: PlannedStage, sizes: dict[str, int], given: Assumptions) -> dict[str, float]:
    """Seconds of one step of `stage` by part; their sum is the step, before calibration and goodput."""
    cfg, length, remat = run.model, run.data.sequence_tokens, run.execution.remat
    rows, micro_batches = rows_per_place(run, stage, sizes), accumulation_steps(run, stage.batch_sequences)
    tensor = sizes["tensor"]
    tokens = rows * length / sizes["context"]  # of a device, in one micro-batch
    width = BYTES[cfg.compute_dtype]
    slower = given.float32_slowdown if cfg.compute_dtype == "float32" else 1.0
    rate = given.peak_flops * given.matmul_efficiency / slower
    memory = given.hbm_bandwidth * given.hbm_efficiency

    matmul = 0.0
    for i, (k, n, times) in enumerate(matrices := products(run, tensor)):
        through = width * (tokens * k + k * n + tokens * n) / memory
        once = max(2 * tokens * k * n / rate, through)
        # Forward, and both gradients, or beside frozen matrices one; `full` makes the forward of the layers again,
        # never that of the head.
        again = remat == "full" and i < len(matrices) - 1
        matmul += times * once * (3 + again - (run.adapter is not None))

    # The backward pass of attention is five products to the forward's two.
    share = given.attention_efficiency * max(1, min(cfg.head_dim, given.attention_head_dim) / 64)
    if run.execution.attention in UNFUSED:
        share = given.unfused_attention_efficiency
    passes = 3.5 + (1 if remat in ("full", "save_dots") else 0)
    scores = forward_terms(cfg, length, causal=True)["attention"] / tensor * tokens
    attention = passes * scores / (given.peak_flops * share / slower)

    # Half of the passes over the residual stream and the heads are the forward's, and a third of those over the MLP;
    # every policy but `none` makes them again for the backward pass.
    half, third = (0.0, 0.0) if remat == "none" else (1 / 2, 1 / 3)
    touched = given.residual_passes * (1 + half) * cfg.d_model
    touched += given.head_passes * (1 + half) * (cfg.heads + cfg.kv_heads) * cfg.head_dim / tensor
    touched += given.mlp_passes * (1 + third) * cfg.d_ff / tensor
    elementwise = tokens * cfg.layers * touched * width / memory
    cross_entropy = tokens * cfg.vocab_size / tensor * given.logit_bytes / memory

    local = trained_parameters(run) / (sizes["data"] * tensor)
    optimizer = local * given.optimizer_bytes / memory
    if micro_batches > 1:
        optimizer += micro_batches * local * given.accumulation_bytes / memory

    computing = micro_batches * (matmul + attention + elementwise + cross_entropy)
    sent = sum(seconds(c, sizes, given) for c in traffic.per_step(run, sizes, rows, micro_batches))
    return {
        "matmul": micro_batches * matmul,
        "attention": micro_batches * attention,
        "elementwise": micro_batches * elementwise,
        "cross_entropy": micro_batches * cross_entropy,
        "optimizer": optimizer,
        "communication": sent - min(given.overlap * sent, computing),
        "gaps": given.gaps * (computing + optimizer),
    }


def seconds(collective: Collective, sizes: dict[str, int], given: Assumptions) -> float:
    """Of all a step's runs of one collective, on rings: each device passes on the array but for its own share.

    A group within one machine has its links.  Between machines it has the network cards of its members in a machine;
    the other groups of that machine have theirs at the same time.
    """
    group = math.prod(sizes[axis] for axis in collective.axes)
    here = _members_here(collective.axes, sizes, given.devices_per_machine)
    bandwidth = given.link_bandwidth
    if here < group:
        bandwidth = min(bandwidth, given.network_bandwidth * here)
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * collective.per_step * (group - 1) / group / (bandwidth * given.link_efficiency)


def _members_here(axes: tuple[str, ...], sizes: dict[str, int], machine: int) -> int:
    """How many devices of the first group along `axes` are in the first machine; the last axis varies fastest."""
    strides, stride = {}, 1
    for axis in reversed(AXES):
        strides[axis] = stride
        stride *= sizes[axis]
    places = itertools.product(*(range(0, sizes[axis] * strides[axis], strides[axis]) for axis in axes))
    return sum(sum(place) < machine for place in places)


def of_plan(run: Run, stages: list[PlannedStage], devices: int, given: Assumptions) -> list[dict[str, Any]]:
    """One row per stage: name, batch_tokens, micro_batches, rows, parts and step_seconds, before calibration."""
    sizes = mesh_rules.sizes(run.mesh, devices, "of the target")
    mesh_rules.check(run, stages, sizes)
    found = []
    for stage in stages:
        parts = step(run, stage, sizes, given)
        found.append(
            {
                "name": stage.name,
                "batch_tokens": stage.batch_tokens,
                "micro_batches": accumulation_steps(run, stage.batch_sequences),
                "sequences_per_device": rows_per_place(run, stage, sizes),
                "parts": parts,
                "step_seconds": sum(parts.values()),
            }
        )
    return found
