"""Flags of compilers and networks that we recommend per machine: value, reason, source.  `launch flags` prints them.

A flag that the installed XLA does not know aborts the process when it starts, whatever the machine, so each profile is
started with a CPU's jaxlib in the tests.  STALE lists advice that is still found in documents and scripts, and kills.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.preflight.targets import GPU_RESERVE_GIB, GPUS

LEVELS = "https://openxla.org/xla/gpu_optimization_levels"
GUIDANCE = "https://openxla.org/xla/flags_guidance"
MAXTEXT_GPU = "https://github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/gpu/a3/llama_2_7b/16vm.sh"
MAXTEXT_TPU = "https://github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py"
NVIDIA = "https://docs.nvidia.com/jax-toolbox, GPU performance"
MEMORY = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"


@dataclass(frozen=True)
class Flag:
    variable: str  # XLA_FLAGS, LIBTPU_INIT_ARGS, or an environment variable of its own
    name: str  # without dashes; of a variable of its own the same name again
    value: str
    reason: str
    source: str


def _xla(name: str, value: str, reason: str, source: str) -> Flag:
    return Flag("XLA_FLAGS", name, value, reason, source)


def _tpu(name: str, value: str, reason: str, source: str) -> Flag:
    return Flag("LIBTPU_INIT_ARGS", name, value, reason, source)


def _env(name: str, value: str, reason: str, source: str) -> Flag:
    return Flag(name, name, value, reason, source)


PIPELINED = "the collectives of one layer run beside the arithmetic of the next, inside the loop over layers"
COMBINED = "small collectives are sent as one of this many bytes, which fills the network"
GPU = (
    _xla("xla_gpu_enable_latency_hiding_scheduler", "true", "collectives are started early, awaited late", LEVELS),
    _xla("xla_gpu_enable_pipelined_all_gather", "true", PIPELINED, LEVELS),
    _xla("xla_gpu_enable_pipelined_reduce_scatter", "true", PIPELINED, LEVELS),
    _xla("xla_gpu_enable_pipelined_all_reduce", "true", PIPELINED, LEVELS),
    _xla("xla_gpu_enable_while_loop_double_buffering", "true", "two layers per turn, so that fewer copies", LEVELS),
    _xla("xla_gpu_all_reduce_combine_threshold_bytes", str(2**30), COMBINED, MAXTEXT_GPU),
    _xla("xla_gpu_all_gather_combine_threshold_bytes", str(2**27), COMBINED, MAXTEXT_GPU),
    _xla("xla_gpu_reduce_scatter_combine_threshold_bytes", str(2**27), COMBINED, MAXTEXT_GPU),
    _env("CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start in the scheduler's order; not for Blackwell", NVIDIA),
)
ASYNC = "all-gathers run beside the arithmetic"
TPU = (
    _tpu("xla_enable_async_all_gather", "true", ASYNC, GUIDANCE),
    _tpu("xla_tpu_enable_async_collective_fusion", "true", ASYNC, GUIDANCE),
    _tpu("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", ASYNC, GUIDANCE),
)
SCOPED = "more of the chip's fast memory for one fusion, for dense models"
SLOW = "processes that share cores wait long for each other, which is no sign of a hang"
CPU = (
    _xla("xla_cpu_collective_timeout_seconds", "300", SLOW, "jaxlib's own message when it aborts"),
    _xla("xla_cpu_collective_call_terminate_timeout_seconds", "300", SLOW, "jaxlib's own message when it aborts"),
)


def _memory(kind: str) -> Flag:
    reason = f"all of the device less {GPU_RESERVE_GIB} GiB for CUDA and NCCL, instead of three quarters"
    return _env("XLA_CLIENT_MEM_FRACTION", str(GPUS[kind].fraction), reason, MEMORY)


PROFILES: dict[str, tuple[Flag, ...]] = {
    **{kind: (_memory(kind), *GPU) for kind in GPUS},
    "v4": (),
    "v5e": TPU,
    "v5p": TPU,
    "v6e": (*TPU, _tpu("xla_tpu_scoped_vmem_limit_kib", "98304", SCOPED, MAXTEXT_TPU)),
    "cpu": CPU,
    "none": (),
}
STALE = {
    "xla_gpu_enable_async_collectives": "asynchronous collectives are always on; the flag is gone and aborts",
    "xla_gpu_enable_async_all_gather": "asynchronous collectives are always on; the flag is gone",
    "xla_gpu_enable_async_all_reduce": "asynchronous collectives are always on; the flag is gone",
    "xla_gpu_graph_level": "replaced by xla_gpu_enable_command_buffer; the flag is gone and aborts",
    "xla_gpu_enable_triton_softmax_fusion": "always on; the flag is gone and aborts",
    "xla_gpu_enable_highest_priority_async_stream": "the default since 2025; without effect",
}


def profile(name: str) -> tuple[Flag, ...]:
    """The flags of a profile; UsageError, with the nearest, for one that there is not."""
    if name not in PROFILES:
        raise UsageError(f"profile {name!r}: not one of {', '.join(PROFILES)}{nearest(name, PROFILES)}")
    return PROFILES[name]


def environment(flags: tuple[Flag, ...]) -> dict[str, str]:
    """The flags as environment variables."""
    found: dict[str, list[str]] = {}
    for flag in flags:
        word = flag.value if flag.variable == flag.name else f"--{flag.name}={flag.value}"
        found.setdefault(flag.variable, []).append(word)
    return {variable: " ".join(words) for variable, words in found.items()}


def check(variables: dict[str, str]) -> None:
    """Raises ConfigError for flags in a user's environment that would abort every process when it starts."""
    for word in variables.get("XLA_FLAGS", "").split():
        name = word.lstrip("-").partition("=")[0]
        if name in STALE:
            raise ConfigError(f"XLA_FLAGS: --{name}: {STALE[name]}; leave it out")
        if name.startswith("xla_tpu_"):
            raise ConfigError(f"XLA_FLAGS: --{name} aborts there; flags for TPUs go into LIBTPU_INIT_ARGS")
