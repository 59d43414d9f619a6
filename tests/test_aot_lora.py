"""QLoRA of the 1.1B, compiled for a GPU that is not there: what a device of 4 GiB would have to hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parent.parent
GIB = 2**30


def test_qlora_of_the_published_model_fits_in_four_gib():
    """nf4, rank 32 beside every matrix and the head, rows of 512 tokens one at a time, accumulated."""
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    # 968,884,224 weights of the layers at 4.25 bits, embedding and head in bfloat16, norm scales.
    assert found["frozen"] == pytest.approx(968_884_224 * 4.25 / 8 + 2 * 65_536_000 * 2, rel=2e-3)
    assert found["params"] == 4 * found["adapter_weights"] and found["optimizer"] == pytest.approx(
        2 * found["params"], rel=1e-3
    )
    assert found["total"] < 1.75 * GIB, found
    assert found["donated"] > 0.99 * found["state"]


def main() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    from tinyllama_jax.config import Adapter, Data, Execution, Run, Stage, Start
    from tinyllama_jax.preflight import targets
    from tinyllama_jax.preflight.step import Compiler, local_bytes
    from tinyllama_jax.presets import preset

    run = Run(
        name="qlora",
        model=preset("tinyllama-1.1b"),
        data=Data(store="none", sequence_tokens=512, document_masking=True),
        curriculum=(Stage(name="tune", tokens=512 * 40, batch_tokens=512 * 4, mixture={"examples": 1.0}),),
        execution=Execution(remat="full", micro_batch_sequences=1),
        start=Start(checkpoint="none"),
        adapter=Adapter(rank=32, targets=("*",), base_weights="nf4", dropout=0.05),
    )
    compiler = Compiler(run, targets.parse("a100-40g"))
    with compiler.lowered(1, 4) as (_, state, _):
        parts = {name: local_bytes(part) for name, part in state.items()}
        weights = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(json.dumps(parts | compiler(1, 4) | {"adapter_weights": weights}))


if __name__ == "__main__":
    main()
