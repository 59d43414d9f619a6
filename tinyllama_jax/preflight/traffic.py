"""What one optimizer step sends between devices, in closed form.  No jax here.

FSDP (ZeRO-3, arXiv 1910.02054): every layer's weights are gathered in the compute dtype right before use, once for
the forward and once more for the backward pass of each micro-batch, whatever is kept otherwise; its gradients leave in
the same dtype, added up and cut into shares.  The head is gathered once for both passes; the gradients of head and
embedding are summed in float32.  The embedding table is gathered once per step, for it does not change between
micro-batches.  HSDP adds one reduction of the shares of the gradients over the copies of the weights, per micro-batch.
Tensor parallelism (arXiv 1909.08053) adds up the outputs of attention and MLP, forward and backward; context
parallelism gathers keys and values of a layer and returns their gradients.

Bytes are of the whole array on each device, as in collectives.py: what a gather makes, what a reduction takes in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tinyllama_jax.config import Run
from tinyllama_jax.flops import parameter_counts
from tinyllama_jax.mesh_rules import AXES

BYTES = {"bfloat16": 2, "float32": 4}


class Collective(NamedTuple):
    what: str
    kind: str  # all-gather, reduce-scatter or all-reduce
    axes: tuple[str, ...]  # of the mesh, over which it goes
    bytes: int  # of the whole array, each time
    times: int  # per step

    @property
    def per_step(self) -> int:
        return self.bytes * self.times


def per_step(run: Run, sizes: dict[str, int], rows: int, micro_batches: int) -> list[Collective]:
    """Every collective of one step that is not empty.

    rows: sequences per device (per group of context and tensor) and micro-batch.
    """
    cfg, length = run.model, run.data.sequence_tokens
    d, layers = cfg.d_model, cfg.layers
    width = BYTES[cfg.compute_dtype]
    context, tensor = sizes["context"], sizes["tensor"]
    table = cfg.vocab_size * d // tensor
    layer = (parameter_counts(cfg)["matmul"] - cfg.vocab_size * d) // layers // tensor
    norms = (2 * layers + 1) * d
    shared = ("replica", "context")  # hold the same shares of the weights
    found = [
        Collective("layers' weights", "all-gather", ("data",), layer * width, 2 * layers * micro_batches),
        Collective("head", "all-gather", ("data",), table * width, micro_batches),
        Collective("embedding", "all-gather", ("data",), table * 4, 1),
        Collective("layers' gradients", "reduce-scatter", ("data",), layer * width, layers * micro_batches),
        Collective("head's gradient", "reduce-scatter", ("data",), table * 4, micro_batches),
        Collective("embedding's gradient", "reduce-scatter", ("data",), table * 4, micro_batches),
        Collective("norms' gradients and the loss", "all-reduce", AXES[:3], 4 * (norms + 2), micro_batches),
    ]
    share = (layer * layers * width + 2 * table * 4) // sizes["data"]
    found.append(Collective("shares of the gradients", "all-reduce", shared, share, micro_batches))
    tokens = rows * length // context
    again = run.execution.remat in ("full", "save_dots")  # the forward pass of attention runs twice
    sums = 4 + (2 if run.execution.remat == "full" else 0)
    found.append(
        Collective("outputs of layers", "all-reduce", ("tensor",), tokens * d * width, sums * layers * micro_batches)
    )
    ends = tokens * d * width  # rows of the embedding on their way in, the head's gradient on its way back
    found.append(Collective("embedding's and head's sums", "all-reduce", ("tensor",), ends, 2 * micro_batches))
    keys = 2 * rows * length * cfg.kv_heads * cfg.head_dim // tensor * width
    gathers = layers * micro_batches * (3 if again else 2)
    found.append(Collective("keys and values", "all-gather", ("context",), keys, gathers))
    found.append(Collective("their gradients", "reduce-scatter", ("context",), keys, layers * micro_batches))
    if run.adapter:  # gradients of adapters are small
        found = [c for c in found if "gradient" not in c.what or c.what == "their gradients"]
    return [c for c in found if math.prod(sizes[axis] for axis in c.axes) > 1]
