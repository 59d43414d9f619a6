"""Compiles an experiment's training step for devices that are not there; prints one device's memory as JSON.

    python tests/compile_ahead.py tpu-v5e experiments.tinyllama:v1_0 mesh.replica=1 execution.remat=full

A program of its own: the compilers for TPUs and GPUs can end the whole process, and they must not meet the eight CPU
devices of the other tests.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run; JAX must not look for the devices
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu asks the cloud's metadata server where it is otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling needs no device to itself

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import configio
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import BATCH, make_mesh, replicated
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train import step as train_step

# What XLA's GPU compiler wants to know of an A100-SXM4-40GB: NVIDIA's A100 data sheet, and the CUDA C++ programming
# guide's table of technical specifications for compute capability 8.0.
A100 = """
gpu_device_info {
  cuda_compute_capability { major: 8 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 166912
  shared_memory_per_core: 167936
  core_count: 108
  fpus_per_core: 64
  clock_rate_ghz: 1.41
  memory_bandwidth: 1555000000000
  l2_cache_size: 41943040
  device_memory_size: 42949672960
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-40GB"
"""
TARGETS = {
    "tpu-v5e": lambda: topologies.get_topology_desc("v5e:4x4", "tpu"),
    # partitions x hosts x GPUs per host
    "a100": lambda: topologies.get_topology_desc("a100", "cuda", target_config=A100, topology="1x2x8"),
}


def main(target: str, experiment: str, *settings: str) -> dict:
    run = configio.override(configio.load_experiment(experiment), list(settings))
    mesh = make_mesh(run.mesh, TARGETS[target]().devices)
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    train_step.check_batches(run, plan, mesh)
    sequences = plan.stages[0].batch_sequences
    accumulation = train_step.accumulation_steps(run, sequences)
    shape = (accumulation, sequences // accumulation, run.data.sequence_tokens)
    rows = NamedSharding(mesh, P(None, BATCH, None))
    dtypes = {"tokens": np.int32, "targets": np.int32, "valid": np.bool_}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}
    lr, step = (jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh)) for dtype in (np.float32, np.int32))
    with jax.set_mesh(mesh):
        state = train_state.abstract(run, mesh)
        compiled = train_step.make_train_step(run).lower(state, batch, lr, step).compile()
    memory = compiled.memory_analysis()
    return {
        "devices": mesh.size,
        "micro_batches": accumulation,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
