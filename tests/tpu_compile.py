"""Compiles the TPU attention kernels for TPUs that are not there; prints a line of JSON for each combination.

    python tests/tpu_compile.py v5e:forward:documents:64:bfloat16 v4:backward:causal:128:float32

What is compiled: forward, backward, `layer` (gradients through projections and both), or `reference`, the formula.  A
program of its own: the compiler can end the whole process, and it must not meet the CPU devices of the other tests.
Each line has the combination, the seconds it took, the bytes of temporaries, the number of kernels and of copies as
large as k; or the compiler's refusal.
"""

import json
import math
import os
import re
import sys
import time
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run; JAX must not look for the devices
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu asks the cloud's metadata server where it is otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling needs no device to itself

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tinyllama_jax.attention import tpu
from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.reference import reference

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
B, T, H, G, D = 4, 2048, 32, 4, 2048


def weights(K: int) -> list[tuple[int, ...]]:
    return [(D, H, K), (D, G, K), (D, G, K), (H, K, D)]


def layer_gradients(kind: str, x_BTD, wq_DHK, wk_DGK, wv_DGK, wo_HKD, given):
    """Projections, rotary embedding, attention and output projection, forward and backward, for a gradient of ones."""

    def rotated(x_BTHK):
        angle_T1K = jnp.arange(T)[:, None, None] * jnp.exp(-jnp.arange(x_BTHK.shape[3] // 2) / 7.0)
        a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angle_T1K), jnp.sin(angle_T1K)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BTHK.dtype)

    def before(x_BTD, *w):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x_BTD, y) for y in w)
        return rotated(q), rotated(k), v

    def after(o_BTHK, wo_HKD):
        return jnp.einsum("bthk,hkd->btd", o_BTHK, wo_HKD)

    (q, k, v), pull_before = jax.vjp(before, x_BTD, wq_DHK, wk_DGK, wv_DGK)
    o, lse = tpu.forward(q, k, v, given, kind=kind)
    y, pull_after = jax.vjp(after, o, wo_HKD)
    do, dwo = pull_after(jnp.ones_like(y))
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    return y, *pull_before(tpu.backward(q, k, v, do, lse, delta, given, kind=kind)), dwo


def compile_one(target: str, direction: str, documents: str, head_dim: str, dtype: str) -> dict:
    device = topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    K = int(head_dim)
    q_BTHK, k_BTGK, row_BHT = shaped(B, T, H, K), shaped(B, T, G, K), shaped(B, H, T, dtype=jnp.float32)
    given = Ranges(*(shaped(B, T, dtype=jnp.int32),) * 2) if documents == "documents" else None
    kind = device.device_kind
    forward = (q_BTHK, k_BTGK, k_BTGK, given)
    function, arguments = {
        "forward": (partial(tpu.forward, kind=kind), forward),
        "backward": (
            partial(tpu.backward, kind=kind),
            (q_BTHK, k_BTGK, k_BTGK, q_BTHK, row_BHT, row_BHT, given),
        ),
        "layer": (partial(layer_gradients, kind), (shaped(B, T, D), *(shaped(*shape) for shape in weights(K)), given)),
        "reference": (lambda q, k, v, _: reference(q, k, v, None, None), forward),
    }[direction]
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return {
        "kind": kind,
        "seconds": round(time.perf_counter() - begun, 2),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": len(re.findall(r"attn_\w+\S* = .* custom-call\(", text)),
        "copies": sum(math.prod(map(int, shape.split(","))) >= B * T * G * K for shape in copied),
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
