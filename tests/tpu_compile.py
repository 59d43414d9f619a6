"""Compiles the TPU attention kernels for TPUs that are not there; prints a line of JSON for each combination.

    python tests/tpu_compile.py v5e:forward:documents:64:bfloat16 v4:backward:causal:128:float32

A program of its own: the compiler can end the whole process, and it must not meet the CPU devices of the other tests.
Each line has the combination, the seconds it took and the bytes of temporaries; or the compiler's refusal.
"""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run; JAX must not look for the devices
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu asks the cloud's metadata server where it is otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling needs no device to itself

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tinyllama_jax.attention import tpu
from tinyllama_jax.attention.documents import Ranges

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
B, T, H, G = 4, 2048, 32, 4


def compile_one(target: str, direction: str, documents: str, head_dim: str, dtype: str) -> dict:
    device = topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    K = int(head_dim)
    q_BTHK, k_BTGK, row_BHT = shaped(B, T, H, K), shaped(B, T, G, K), shaped(B, H, T, dtype=jnp.float32)
    given = Ranges(*(shaped(B, T, dtype=jnp.int32),) * 2) if documents == "documents" else None
    if direction == "forward":
        arguments, function = (q_BTHK, k_BTGK, k_BTGK, given), tpu.forward
    else:
        arguments, function = (q_BTHK, k_BTGK, k_BTGK, q_BTHK, row_BHT, row_BHT, given), tpu.backward
    begun = time.perf_counter()
    compiled = jax.jit(lambda *given: function(*given, kind=device.device_kind)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "kind": device.device_kind,
        "seconds": round(time.perf_counter() - begun, 2),
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def main(combinations: list[str]) -> None:
    for combination in combinations:
        try:
            result = {"ok": True} | compile_one(*combination.split(":"))
        except jax.errors.JaxRuntimeError as refusal:  # more memory than there is, or what the target cannot do
            result = {"ok": False, "refusal": str(refusal)[:2000]}
        print(json.dumps({"combination": combination} | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
