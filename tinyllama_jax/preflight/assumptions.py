"""What the estimate of time rests on: one frozen dataclass, every number of it named, printed and replaceable.

None of them was fitted to a training run.  Rates are data-sheet numbers; shares are what kernels and copies alone have
been measured to reach.  What whole training steps reach below that is the calibration's business (anchors.py), which
is one factor.

Sources.  Peaks: flops.PEAK_FLOPS.  HBM: targets.py for GPUs; Google Cloud's page of each TPU generation (v4 1,228,
v5e 819, v5p 2,765, v6e 1,640 GB/s).  Links, one way: NVLink 3 and 4 (300 and 450 GB/s per GPU); inter-chip
interconnect by the same pages (v4 2,400, v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s per chip).  Network: the NICs of DGX
A100 and DGX H100, one of 200 or 400 Gbit/s per GPU; clouds have from a quarter of that, so set it.
Matrix products: 8192^3 in bf16 reaches 769 to 798 of an H200's 989 TFLOP/s; 230 to 255 of an A100's 312.
Attention, forward and backward, causal, heads of 64, 2048 tokens: FlashAttention-2's own figure for A100, 140 TFLOP/s;
cuDNN forward on H100, 402 (tokamax), and 395 in its backward pass without a mask, here 365 for both; tokamax' splash
forward on v5p 91 and v6e 79, the share of v5p taken for v4 and v5e.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tinyllama_jax import flops
from tinyllama_jax.config import replace
from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import UsageError
from tinyllama_jax.preflight import targets
from tinyllama_jax.preflight.targets import Target

GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Bandwidths in bytes per second and device, shares of 1 unless a field says otherwise."""

    peak_flops: float  # dense bf16 FLOP/s
    hbm_bandwidth: float
    link_bandwidth: float  # one way, between devices of one machine or slice
    network_bandwidth: float  # one way, between machines, per device
    devices_per_machine: int  # that the links join; a TPU slice counts as one machine
    matmul_efficiency: float  # of the peak, by large matrix products alone
    attention_efficiency: float  # of the peak, by fused attention, heads of 64, counting the causal half
    attention_head_dim: int  # up to which larger heads raise that share in proportion: a TPU's matrix unit
    unfused_attention_efficiency: float = 0.02  # by attention that writes its scores to memory (`xla`, `reference`)
    float32_slowdown: float = 16.0  # times that matrix products in float32 take
    hbm_efficiency: float = 0.85  # of the bandwidth, by elementwise kernels: 1.35 of 1.555 TB/s, 4.0 of 4.8
    link_efficiency: float = 0.8  # of links and network, by ring collectives of tens of megabytes
    overlap: float = 0.5  # of the communication that runs beside computing; a guess between none and prefetched whole
    # Values that one layer reads or writes in memory per token, forward and backward, when each chain of elementwise
    # operations is one kernel.  With d = 2048 and d_ff = 5632 this is 202 KB in bf16.
    residual_passes: float = 20.0  # of d_model: norms 2+2+4+4, sums 3+3+2
    head_passes: float = 4.0  # of queries and keys: rotary embedding there and back
    mlp_passes: float = 9.0  # of d_ff: silu(gate) * up is 3, its gradients 5, made again for `down` 1
    logit_bytes: float = 10.0  # per logit: written and read in float32, its gradient written in bf16
    optimizer_bytes: float = 42.0  # per parameter and step: AdamW, clipping, casts, in float32
    accumulation_bytes: float = 12.0  # per parameter and micro-batch, when there is more than one
    gaps: float = 0.02  # of the computing time: launches, the loop, the host
    goodput: float = 1.0  # share of wall time that trains: no saves, restarts or evaluations are in the estimate
    efficiency: float = 1.0  # the calibration: tokens/s there are, over those of this model

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            share = field.name.endswith("efficiency") or field.name in ("overlap", "gaps", "goodput")
            if value < 0 or (value == 0 and field.name not in ("overlap", "gaps")):
                raise UsageError(f"--assume {field.name}={value:g}: must be positive")
            if share and field.name != "efficiency" and value > 1:
                raise UsageError(f"--assume {field.name}={value:g}: is a share, at most 1")


# Name of a target -> link and network (TPU: memory and link) bandwidth in GB/s, matmul and attention efficiency.
_GPU = {
    "a100-40g": (300, 25, 250 / 312, 140 / 312),
    "a100-80g": (300, 25, 250 / 312, 140 / 312),
    "h100": (450, 50, 780 / 989, 365 / 989),
    "h200": (450, 50, 780 / 989, 365 / 989),
}
_TPU = {
    "v4": (1228, 300, 0.8, 91 / 459),
    "v5e": (819, 200, 0.8, 91 / 459),
    "v5p": (2765, 600, 0.8, 91 / 459),
    "v6e": (1640, 448, 0.8, 79 / 918),
}


def of(target: Target) -> Assumptions:
    """The assumptions for a target's devices, not calibrated."""
    name = target.name.partition(":")[0]
    peak = flops.peak_flops(target.kind)
    if target.platform == "gpu":
        link, network, matmul, attention = _GPU[name]
        return Assumptions(
            peak_flops=peak,
            hbm_bandwidth=targets.GPUS[name].bandwidth,
            link_bandwidth=link * GIGA,
            network_bandwidth=network * GIGA,
            devices_per_machine=target.shape[1],
            matmul_efficiency=matmul,
            attention_efficiency=attention,
            attention_head_dim=64,
        )
    hbm, link, matmul, attention = _TPU[name]
    return Assumptions(
        peak_flops=peak,
        hbm_bandwidth=hbm * GIGA,
        link_bandwidth=link * GIGA,
        network_bandwidth=link * GIGA,  # not used: a slice is joined by its links
        devices_per_machine=target.count,
        matmul_efficiency=matmul,
        attention_efficiency=attention,
        attention_head_dim=256 if name == "v6e" else 128,
        float32_slowdown=6.0,  # six products of bf16 parts
    )


def assume(assumptions: Assumptions, settings: list[str]) -> Assumptions:
    """With fields replaced, from texts FIELD=NUMBER.  Raises UsageError naming the nearest field."""
    fields = {field.name: field for field in dataclasses.fields(Assumptions)}
    for text in settings:
        name, _, number = text.partition("=")
        if name not in fields:
            raise UsageError(f"--assume {text}: there is no assumption {name!r}{nearest(name, fields)}")
        try:
            value = int(number) if fields[name].type == "int" else float(number)
        except ValueError:
            raise UsageError(f"--assume {text}: {number!r} is not a number") from None
        assumptions = replace(assumptions, **{name: value})
    return assumptions
