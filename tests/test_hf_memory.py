"""Peak memory of import and export, each measured in a process of its own.

`make proof-hf-memory` does the same with 1.1B parameters.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from tinyllama_jax import flops
from tinyllama_jax.config import Model
from tinyllama_jax.model import transformer

ROOT = Path(__file__).parent.parent
M157 = Model(vocab_size=32000, d_model=1024, layers=8, heads=16, kv_heads=4, head_dim=64, d_ff=2816)
MODEL = 4 * flops.parameter_counts(M157)["total"]
TABLE = 4 * M157.vocab_size * M157.d_model  # the embedding, or the head: the largest arrays
LAYER = (MODEL - 2 * TABLE) / M157.layers
PYTHON, JAX = 0.3e9, 0.45e9  # an interpreter with NumPy, and one with JAX and Orbax

WRITE = """
    import sys
    import numpy as np
    from tinyllama_jax.config import Model, Rope
    from tinyllama_jax.interop.hf import WEIGHTS, write_hf
    model = {model}
    sizes = dict(V=model.vocab_size, D=model.d_model, F=model.d_ff, H=model.heads, G=model.kv_heads, K=model.head_dim)
    rng, params = np.random.default_rng(0), {{}}
    for path, _, _, axes in WEIGHTS:  # every layer the same: the model itself takes no memory
        array = rng.standard_normal([sizes[a] for a in axes], np.float32)
        stacked = path[0] == "layers"
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {{}})
        node[path[-1]] = np.broadcast_to(array, (model.layers, *array.shape)) if stacked else array
    write_hf(params, model, "hf", dtype="bfloat16")
    assert "jax" not in sys.modules
"""
READ = """
    import sys
    from tinyllama_jax.config import Model, Rope
    from tinyllama_jax.interop.hf import read_hf
    model, params = read_hf("hf")
    assert model == {model}
    assert "jax" not in sys.modules
"""
COMMAND = """
    from tinyllama_jax.cli import main
    assert main({arguments}) == 0
"""
# Not getrusage: its maximum begins with that of the process which started this one.
PEAK = """
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def peak(code: str, directory: Path) -> int:
    """Peak resident bytes of a process that runs `code` and nothing else."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # one device
    command = [sys.executable, "-c", textwrap.dedent(code) + textwrap.dedent(PEAK)]
    result = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]) * 1024


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where `hf` is a model of 157M parameters; writing it held its two tables, and a tensor beside them."""
    shapes = jax.eval_shape(lambda: transformer.init(M157, jax.random.key(0)))
    assert MODEL == 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    path = tmp_path_factory.mktemp("memory")
    assert peak(WRITE.format(model=M157), path) < PYTHON + 4 * TABLE + LAYER
    return path


def test_reading_holds_the_model_and_a_tensor(directory):
    assert peak(READ.format(model=M157), directory) < PYTHON + MODEL + TABLE


@pytest.mark.slow
def test_the_commands_hold_the_model_and_a_few_arrays(directory):
    importing = COMMAND.format(arguments=["import", "hf", "hf", "--out", "checkpoint"])
    assert peak(importing, directory) < JAX + 1.5 * MODEL
    exporting = COMMAND.format(arguments=["export", "hf", "checkpoint", "--out", "back", "--dtype", "bfloat16"])
    # Reading is concurrent: how many arrays are in flight depends on what else the machine does.
    assert peak(exporting, directory) < JAX + 2 * MODEL
    there, back = (directory / name / "model.safetensors" for name in ("hf", "back"))
    assert there.read_bytes() == back.read_bytes()
