"""Compiles an attention kernel for a GPU that is not there; prints what the compiler says of it as JSON.

    python tests/gpu_compile.py triton a100 --documents
    {"forward": {"temp_bytes": 0, "kernels": {"attn_fwd": {"registers": 168, "spill_bytes": 0, ...}}}, "backward": ...}

registers are per thread, of 255; spill_bytes (stores and loads) and stack_bytes per thread; shared_bytes per block,
where the compiler tells.  A program of its own: an instruction that the GPU does not have ends the whole process.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.preflight import targets

TARGETS = {"a100": ("a100-40g", "sm_80"), "h200": ("h200", "sm_90a")}


def prepare(dump: str) -> None:
    """Before JAX starts a backend: no devices, no cached programs, and the compilers write to the folder `dump`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX 0.12 keeps the assembly of a kernel back unless a regular expression asks for it.
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_emitter_re=.*"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # kernels of Pallas' Mosaic backend are assembled outside of XLA


def device_of(target: str):
    return targets.parse(TARGETS[target][0]).devices()[0]


def ptxas() -> str:
    """The assembler of the installed CUDA packages, which is the one XLA calls."""
    for folder in map(Path, sys.path):
        for found in folder.glob("nvidia/*/bin/ptxas"):
            return str(found)
    raise FileNotFoundError("no ptxas; install the extra `preflight`")


def kernels_in(report: str) -> dict:
    """Kernel name -> its resources, from what `ptxas -v` prints."""
    kernels, name = {}, None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            name = found[1] or found[2]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            kernels.setdefault(name, {}).update(stack_bytes=stack, spill_bytes=stores + loads)
        elif found := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            kernels.setdefault(name, {}).update(registers=int(found[1]), shared_bytes=int(smem[1]) if smem else 0)
    return kernels


class Output:
    """What the process prints meanwhile, from C++ too: `text` after the block."""

    def __enter__(self):
        sys.stdout.flush(), sys.stderr.flush()
        self.file = tempfile.TemporaryFile()
        self.saved = [os.dup(1), os.dup(2)]
        os.dup2(self.file.fileno(), 1), os.dup2(self.file.fileno(), 2)
        return self

    def __exit__(self, *exception):
        sys.stdout.flush(), sys.stderr.flush()
        for number, saved in zip((1, 2), self.saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        self.file.seek(0)
        self.text = self.file.read().decode(errors="replace")
        if exception[0]:
            sys.stderr.write(self.text)


def compile_for(target: str, dump: Path, function, *arguments) -> dict:
    """Compiles function(*arguments: ShapeDtypeStruct or None) for the target and reports."""
    device = device_of(target)
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    before = set(dump.iterdir())
    with jax.default_device(device), Output() as output:
        compiled = jax.jit(function).lower(*arguments).compile()
    kernels = kernels_in(output.text)
    for file in sorted(set(dump.iterdir()) - before):
        if file.suffix == ".ptx" and ".version" in file.read_text():  # others hold parts that no assembler takes
            command = [ptxas(), "-v", "--gpu-name", TARGETS[target][1], "-o", "/dev/null", file]
            report = subprocess.run(command, capture_output=True, text=True, check=True)
            kernels |= kernels_in(report.stdout + report.stderr)
    for file in sorted(set(dump.glob("*thunk_sequence.txt")) - before):
        # What a kernel asks for when it is launched; its program text does not say.
        for name, size in re.findall(r"(\w+) +grid: .* shared_memory: (\d+) bytes", file.read_text()):
            kernels.setdefault(name, {})["shared_bytes"] = int(size)
    # The assembler's own word (C7510 to C7513) that it could not leave matrix products running beside other work.
    serialized = re.findall(r".*wgmma.*serializ.*", output.text)
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return {"temp_bytes": temp_bytes, "serialized": serialized, "kernels": kernels}


def main(dump: Path) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation", help="triton or hopper: a module of tinyllama_jax.attention")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--documents", action="store_true")
    for name, default in {"batch": 8, "tokens": 2048, "heads": 32, "groups": 4, "head-dim": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--soft-cap", type=float)
    parser.add_argument("--only", choices=["forward", "backward"])
    parser.add_argument("--keep", type=Path, help="copy what the compiler dumps to this folder")
    args = parser.parse_args()
    module = importlib.import_module(f"tinyllama_jax.attention.{args.implementation}")
    if why := module.refuses(head_dim=args.head_dim, dtype=jnp.dtype(args.dtype), soft_cap=args.soft_cap):
        sys.exit(f"{args.implementation}: {why}")

    B, T, H, G, K = args.batch, args.tokens, args.heads, args.groups, args.head_dim
    q_BTHK = jax.ShapeDtypeStruct((B, T, H, K), args.dtype)
    k_BTGK = jax.ShapeDtypeStruct((B, T, G, K), args.dtype)
    rows_BHT = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    bounds_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    ranges = Ranges(bounds_BT, bounds_BT) if args.documents else None
    fixed = {"kind": device_of(args.target).device_kind, "soft_cap": args.soft_cap}

    def forward(q, k, v, ranges):
        return module.forward(q, k, v, ranges, **fixed)

    def backward(q, k, v, do, lse, delta, ranges):
        return module.backward(q, k, v, do, lse, delta, ranges, **fixed)

    passes = {
        "forward": (forward, q_BTHK, k_BTGK, k_BTGK, ranges),
        "backward": (backward, q_BTHK, k_BTGK, k_BTGK, q_BTHK, rows_BHT, rows_BHT, ranges),
    }
    report = {
        name: compile_for(args.target, dump, *given) for name, given in passes.items() if args.only in (None, name)
    }
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        for file in dump.iterdir():
            (args.keep / file.name).write_bytes(file.read_bytes())
    print(json.dumps(report))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        main(Path(folder))
