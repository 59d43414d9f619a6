"""Proof that 1.1B parameters pass `import hf` and `export hf` within twice their float32 size, unchanged.

    make proof-hf-memory        # 14 GB of disk in the temporary directory, 9 GB of memory, about five minutes

Fills a tinyllama-1.1b with random numbers, as bfloat16 and as float32 files, takes it through the commands that a user
types, measures the peak resident memory of each process, and compares every tensor bit for bit with the first file's.
Prints the result and writes it to benchmarks/results/hf_memory.json.  Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tinyllama_jax import flops
from tinyllama_jax.config import Model
from tinyllama_jax.interop import hf_config
from tinyllama_jax.presets import preset

ROOT = Path(__file__).parent.parent
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def fill(directory: Path, model: Model, dtype: str) -> None:
    """A Hugging Face directory of random weights, written by Hugging Face's own library."""
    D, V, F = model.d_model, model.vocab_size, model.d_ff
    HK, GK = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = {"self_attn.q_proj": (HK, D), "self_attn.k_proj": (GK, D), "self_attn.v_proj": (GK, D)}
    block |= {"self_attn.o_proj": (D, HK), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    block |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    shapes |= {f"model.layers.{i}.{name}.weight": s for i in range(model.layers) for name, s in block.items()}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf_config.model_to_hf(model, dtype)))


def isolated(function: Callable, *arguments) -> Any:
    """What the function returns, in a process of its own.

    A measured process's maximum begins with the memory of the one that started it, so this one must stay small.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def measured(*arguments: str | Path) -> tuple[int, float]:
    """(peak resident bytes, seconds) of one command of the program; raises RuntimeError when it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tinyllama_jax", *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} ended with {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - begin


def same_tensors(first: Path, second: Path) -> int:
    """How many tensors the two directories hold; raises RuntimeError unless names, dtypes and bits are the same."""
    places = {name: file for file in second.glob("*.safetensors") for name in safe_open(file, "np").keys()}
    with safe_open(first / "model.safetensors", "np") as ours:
        if set(ours.keys()) != set(places):
            raise RuntimeError(f"{second} holds other tensors than {first}")
        for name in ours.keys():
            a, b = ours.get_tensor(name), safe_open(places[name], "np").get_tensor(name)
            if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                raise RuntimeError(f"tensor {name} differs after import and export")
    return len(places)


def prove(model: Model, dtype: str, limit: int) -> dict:
    directory = Path(tempfile.mkdtemp(prefix="hf-memory-"))
    try:
        isolated(fill, directory / "hf", model, dtype)
        result = {"dtype": dtype, "file_bytes": (directory / "hf/model.safetensors").stat().st_size}
        commands = {
            "import": ("import", "hf", directory / "hf", "--out", directory / "ckpt"),
            "export": ("export", "hf", directory / "ckpt", "--out", directory / "back", "--dtype", dtype),
        }
        for name, command in commands.items():
            peak, seconds = measured(*command)
            result[name] = {"peak_bytes": peak, "of_limit": round(peak / limit, 3), "seconds": round(seconds, 1)}
        result["tensors_equal_bit_for_bit"] = isolated(same_tensors, directory / "hf", directory / "back")
        return result
    finally:
        shutil.rmtree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tinyllama-1.1b")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hf_memory.json")
    args = parser.parse_args()
    model = preset(args.preset)
    limit = 2 * 4 * flops.parameter_counts(model)["total"]
    record = {
        "benchmark": "hf_memory",
        "claim": "peak resident memory of `import hf` and of `export hf` is below twice the float32 weights",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "model": args.preset,
        "parameters": limit // 8,
        "limit_bytes": limit,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "numpy")}
        | {"python": platform.python_version()},
        "results": [],
    }
    try:
        for dtype in args.dtype or DTYPES:
            record["results"].append(prove(model, dtype, limit))
            print(json.dumps(record["results"][-1]), flush=True)
    except RuntimeError as error:
        print(f"proof_hf_memory: {error}", file=sys.stderr)
        return 1
    over = [r["dtype"] for r in record["results"] if max(r["import"]["of_limit"], r["export"]["of_limit"]) >= 1]
    if over:
        print(f"proof_hf_memory: not below twice the float32 size: {', '.join(over)}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{args.out}: {args.preset} passes below {limit / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
