"""Peak memory of import and export, each measured in a process of its own.

TINYLLAMA_FULL_SIZE=1 python -m pytest -s tests/test_hf_memory.py      # with 1.1B parameters too
"""

import os
import subprocess
import sys
import textwrap

import jax
import pytest

from tinyllama_jax.config import Model
from tinyllama_jax.model import transformer

# Prints the peak resident bytes of a process that does nothing else but the export or the import.
MEMORY = """
    import resource, sys, time
    import numpy as np
    from tinyllama_jax.config import Model
    from tinyllama_jax.interop.hf import WEIGHTS, read_hf, write_hf
    assert "jax" not in sys.modules
    model = Model({fields})
    sizes = dict(V=model.vocab_size, D=model.d_model, F=model.d_ff, H=model.heads, G=model.kv_heads, K=model.head_dim)
    started = time.perf_counter()
    if {export}:
        rng, params = np.random.default_rng(0), {{}}
        for path, _, _, axes in WEIGHTS:  # every layer the same: the model itself takes no memory
            array = rng.standard_normal([sizes[a] for a in axes], np.float32)
            stacked = path[0] == "layers"
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {{}})
            node[path[-1]] = np.broadcast_to(array, (model.layers, *array.shape)) if stacked else array
        write_hf(params, model, {directory!r}, dtype={dtype!r})
    else:
        back, params = read_hf({directory!r})
        assert back == model
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak, time.perf_counter() - started)
"""

M150 = {"vocab_size": 32000, "d_model": 1024, "layers": 8, "heads": 16, "kv_heads": 4, "head_dim": 64, "d_ff": 2816}
FULL = os.environ.get("TINYLLAMA_FULL_SIZE")
full_size = pytest.mark.skipif(not FULL, reason="TINYLLAMA_FULL_SIZE=1 imports 1.1B parameters: 7 GB of disk, 6 GB RAM")
M1100 = {"vocab_size": 32000, "d_model": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "head_dim": 64, "d_ff": 5632}


@pytest.mark.parametrize(
    "fields, dtype",
    [
        pytest.param(M150, "bfloat16", id="157M"),
        pytest.param(M1100, "bfloat16", id="1.1B-bfloat16", marks=full_size),
        pytest.param(M1100, "float32", id="1.1B-float32", marks=full_size),
    ],
)
def test_import_peaks_below_twice_the_model(fields, dtype, tmp_path):
    directory = str(tmp_path / "hf")

    def peak(export):
        arguments = ", ".join(f"{key}={value}" for key, value in fields.items())
        code = textwrap.dedent(MEMORY).format(fields=arguments, export=export, directory=directory, dtype=dtype)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        memory, seconds = map(float, result.stdout.split())
        print(f"{'export' if export else 'import'}: peak {memory / 1e9:.2f} GB in {seconds:.1f} s")
        return memory

    model = Model(**fields)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    model_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tables = 4 * 2 * model.vocab_size * model.d_model  # embedding and head, which the exporting process holds
    layer = (model_bytes - tables) / model.layers
    print(f"model {model_bytes / 1e9:.2f} GB")
    assert peak(export=True) < 0.3e9 + 2 * tables + layer
    assert peak(export=False) < min(2 * model_bytes, 0.3e9 + model_bytes + tables / 2)
