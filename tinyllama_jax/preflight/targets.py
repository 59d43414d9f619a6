"""Machines that a step can be compiled for without having one: how they are written, and what is known of each.

    a100-40g   a100-40g:8   a100-40g:2x8     one GPU, N of one machine, machines x GPUs
    v5e:4x4    v4:2x2x4                      TPUs by the shape of the slice

Sources.  GPU: NVIDIA's data sheets "A100 Tensor Core GPU" (2022), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU"
for memory and bandwidth; the CUDA C++ programming guide's technical specifications per compute capability (8.0, 9.0)
for registers and shared memory.  `memory_gib` is the smallest `cudaMemGetInfo` total that we found reported for the
device (driver and ECC reserves make it less than the label): 39.39, 79.1 (both 80 GB parts), 139.7.
TPU: chips and topologies from Google Cloud's pages for each generation (16, 32, 32 and 95 GB); `usable_gib` is the
limit that libtpu's own compiler states when it refuses a program ("exceeds available HBM (15.75G)").
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import UsageError

GIB = 2**30

# What a GPU's memory holds besides XLA's pool: the CUDA context and loaded kernels (0.5 to 1 GiB), NCCL's buffers (0.5
# to 1.5 GiB with several communicators), cuBLAS and cuDNN handles.  JAX's default pool, 0.75 of the device, leaves much
# more; XLA_CLIENT_MEM_FRACTION sets it.
GPU_RESERVE_GIB = 2.5


@dataclass(frozen=True)
class Gpu:
    kind: str  # JAX's `device_kind`
    capability: int  # major compute capability; the minor one is 0 for all here
    memory_gib: float  # as CUDA reports it
    bandwidth: int  # bytes per second
    clock_ghz: float
    cores: int
    fpus_per_core: int
    shared_per_block: int  # opt-in maximum, bytes
    shared_per_core: int
    l2_bytes: int

    @property
    def fraction(self) -> float:
        """XLA_CLIENT_MEM_FRACTION that leaves the reserve, two digits, rounded down."""
        return math.floor(100 * (1 - GPU_RESERVE_GIB / self.memory_gib)) / 100

    @property
    def usable_bytes(self) -> int:
        return int(self.fraction * self.memory_gib * GIB)

    def target_config(self) -> str:
        """What XLA's compiler for NVIDIA GPUs wants to know, as the text of its `GpuTargetConfigProto`."""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {self.capability} minor: 0 }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_per_block}
  shared_memory_per_core: {self.shared_per_core}
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_bytes}
  device_memory_size: {int(self.memory_gib * GIB)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{self.kind}"
"""


def _a100(kind: str, memory_gib: float, bandwidth: int) -> Gpu:
    return Gpu(kind, 8, memory_gib, bandwidth, 1.41, 108, 64, 166_912, 167_936, 40 * 2**20)


def _hopper(kind: str, memory_gib: float, bandwidth: int) -> Gpu:
    return Gpu(kind, 9, memory_gib, bandwidth, 1.98, 132, 128, 232_448, 233_472, 50 * 2**20)


GPUS = {
    "a100-40g": _a100("NVIDIA A100-SXM4-40GB", 39.39, 1_555 * 10**9),
    "a100-80g": _a100("NVIDIA A100-SXM4-80GB", 79.1, 2_039 * 10**9),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 79.1, 3_350 * 10**9),
    "h200": _hopper("NVIDIA H200", 139.7, 4_800 * 10**9),
}
GPUS_PER_MACHINE = 8  # DGX and HGX boards


@dataclass(frozen=True)
class Tpu:
    kind: str
    usable_gib: float  # the newest libtpu states a hundredth less than the one before it: the lesser of the two
    shapes: tuple[str, ...]  # slices that are offered; for three dimensions some of them, as examples
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def dimensions(self) -> int:
        return self.shapes[0].count("x") + 1


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TPUS = {
    # Both cores of a v4 chip as one device, as a v4 runs JAX; without it each is compiled for with half the memory.
    "v4": Tpu("TPU v4", 30.75, DEEP, (("chip_config_name", "megacore"),)),
    "v5e": Tpu("TPU v5 lite", 15.75, FLAT),
    "v5p": Tpu("TPU v5", 95.73, DEEP),
    "v6e": Tpu("TPU v6 lite", 31.24, FLAT),
}
HOW = (
    f"GPUs are NAME, NAME:N or NAME:MACHINESxGPUS with NAME of {', '.join(GPUS)}; "
    f"TPUs NAME:SHAPE with NAME of {', '.join(TPUS)}, such as v5e:4x4 or v4:2x2x4"
)


@dataclass(frozen=True)
class Target:
    name: str  # as written on the command line
    platform: str  # gpu or tpu
    kind: str  # JAX's `device_kind`
    count: int  # devices
    capacity_bytes: int  # of a device, for the program
    advice: str  # what the capacity rests on
    shape: tuple[int, ...]  # machines and GPUs, or the slice's dimensions

    def devices(self) -> Sequence[Any]:
        """Devices that can be compiled for and nothing else.  Needs the compilers; raises UsageError for a slice
        that libtpu does not know."""
        from jax.experimental import topologies

        name = self.name.partition(":")[0]
        if self.platform == "gpu":
            layout = "1x" + "x".join(map(str, self.shape))  # partitions x machines x GPUs
            config = GPUS[name].target_config()
            return topologies.get_topology_desc(name, "cuda", target_config=config, topology=layout).devices
        options = dict(TPUS[name].options)
        if self.count == 1:  # a host has four chips unless it is told otherwise
            options["chips_per_host_bounds"] = [1, 1, 1]
        text = f"{name}:{'x'.join(map(str, self.shape))}"
        try:
            return topologies.get_topology_desc(text, "tpu", **options).devices
        except RuntimeError as error:
            shapes = ", ".join(TPUS[name].shapes)
            raise UsageError(
                f"--target {self.name}: libtpu knows no such slice ({str(error).splitlines()[0]}); {name} comes as "
                f"{shapes}"
            ) from error


def parse(text: str) -> Target:
    """The target that `--target` names.  Raises UsageError, in one line that says what there is."""
    name, _, shape = text.partition(":")
    sizes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape) else ()
    if name in GPUS and (sizes or text == name) and len(sizes) <= 2:
        gpu = GPUS[name]
        machines, each = (1, *(sizes or (1,)))[-2:]
        if each > GPUS_PER_MACHINE:
            raise UsageError(
                f"--target {text}: a machine holds at most {GPUS_PER_MACHINE} GPUs; write MACHINESxGPUS, such as "
                f"{name}:{-(-machines * each // GPUS_PER_MACHINE)}x{GPUS_PER_MACHINE}"
            )
        advice = (
            f"{gpu.memory_gib} GiB less {GPU_RESERVE_GIB} GiB for CUDA and NCCL: run with "
            f"XLA_CLIENT_MEM_FRACTION={gpu.fraction}"
        )
        return Target(text, "gpu", gpu.kind, machines * each, gpu.usable_bytes, advice, (machines, each))
    if name in TPUS and (sizes or text == name):
        tpu = TPUS[name]
        known = shape in tpu.shapes or (tpu.dimensions == 3 == len(sizes))
        if not known:
            raise UsageError(f"--target {text}: {name} comes as {', '.join(name + ':' + s for s in tpu.shapes)}")
        advice = f"the limit of {tpu.usable_gib} GiB that libtpu states"
        return Target(text, "tpu", tpu.kind, math.prod(sizes), int(tpu.usable_gib * GIB), advice, sizes)
    longer = [known for known in (*GPUS, *TPUS) if name and known.startswith(name)]  # a100: not the h100
    hint = nearest(name, longer or [*GPUS, *TPUS]) if name not in (*GPUS, *TPUS) else ""
    raise UsageError(f"--target {text}: not a target{hint}; {HOW}")
