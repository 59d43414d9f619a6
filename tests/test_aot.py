"""Preflight through its command line: the real 1.1B step, compiled for machines that are not here.

The compilers lay out every device's memory, and take or refuse the shardings, as they would there; nothing runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parent.parent
STATE_BYTES = 3 * 4 * 1_100_048_384  # weights and both moments in float32
V1_0 = "experiments.tinyllama:v1_0"


def preflight(target: str, *options: str, experiment: str = V1_0) -> tuple[int, dict, str]:
    """(exit status, answer, the last line on stderr)"""
    command = [sys.executable, "-m", "tinyllama_jax", "preflight", experiment, "--target", target, "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    print(done.stderr, done.stdout)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout), done.stderr.strip().splitlines()[-1]


def check(value: dict, devices: int, shards: int) -> None:
    """What holds wherever the 1.1B fits: its state is sharded and donated, and the parts add up."""
    parts = value["bytes_per_device"]
    assert value["devices"] == devices
    # Norm scales are whole on every device.
    assert parts["state"] == pytest.approx(STATE_BYTES / shards, rel=0.01)
    assert value["donated_bytes"] >= 0.999 * STATE_BYTES / shards, "the new state takes the old one's place"
    assert parts["state"] + parts["activations"] + parts["temporaries"] == parts["total"] <= value["capacity_bytes"]
    assert min(parts.values()) > 0
    assert value["flops_per_step"] == 1024 * 2048 * 7_313_817_600


def test_the_published_run_fits_the_published_machine():
    status, value, _ = preflight("a100-40g:2x8")
    assert status == 0 and value["fits"] and value["as_written"]["fits"]
    check(value, devices=16, shards=8)
    assert value["mesh"] == {"replica": 2, "data": 8, "context": 1, "tensor": 1}
    assert value["micro_batch_tokens_per_device"] == 16_384 and value["largest_micro_batch"] >= 8
    assert value["attention"]["compiled"] != "cudnn" and value["compile_seconds"] > 0
    found = value["collectives"]
    assert found["loops_of_unknown_length"] == 0
    # Each of 8 micro-batches gathers the weights of each of 22 layers for the forward and for the backward pass.
    assert found["all-gather"]["per_step"] >= 8 * 22 * 2
    # ... in bfloat16: 44 M weights a layer, and embedding and head besides.
    assert found["all-gather"]["bytes_per_step"] >= 8 * 2 * 968_976_384 * 2


def test_sixteen_tpu_chips_hold_it_fully_sharded():
    wide = ["--set", "mesh.replica=1", "--set", "mesh.data=16", "--set", "execution.micro_batch_sequences=64"]
    status, value, _ = preflight("v5e:4x4", "--as-written", "--set", "execution.remat=full", *wide)
    assert status == 0 and value["fits"] and value["micro_batch"] == 4
    check(value, devices=16, shards=16)
    assert value["collectives"]["all-gather"]["per_step"] >= 16 * 22 * 2
    assert value["collectives"]["loops_of_unknown_length"] == 0


def test_one_h200_holds_the_whole_state():
    alone = ["--set", "mesh.replica=1", "--set", "mesh.data=1", "--set", "execution.micro_batch_sequences=8"]
    status, value, _ = preflight("h200", "--as-written", *alone)
    assert status == 0 and value["fits"]
    check(value, devices=1, shards=1)
    assert set(value["collectives"]) == {"loops_of_unknown_length"}, "one device talks to nobody"


def test_what_does_not_fit_is_78_with_the_shortfall():
    """An H100 holds the state of 13.2 GB, but not every score of 22 layers of 64 sequences."""
    keep_all = ["--set", "execution.remat=none", "--set", "execution.attention=reference"]
    big = ["--set", "data.sequence_tokens=2048", "--set", "curriculum.pretrain.batch_tokens=131072"]
    alone = ["--set", "mesh.replica=1", "--set", "mesh.data=1", "--set", "execution.micro_batch_sequences=64"]
    status, value, last = preflight("h100", "--as-written", *keep_all, *big, *alone)
    assert status == 78 and not value["fits"]
    assert value["shortfall_bytes"] == value["bytes_per_device"]["total"] - value["capacity_bytes"] > 0
    assert last.startswith(f"tinyllama preflight: {V1_0} does not fit h100: as written, 64 sequences per device take")


def test_one_sequence_too_many_is_found_by_the_search():
    """Scores of one sequence of 2048 in 22 layers and every activation beside the whole state exceed 40 GB."""
    keep_all = ["--set", "execution.remat=none", "--set", "execution.attention=reference"]
    alone = ["--set", "mesh.replica=1", "--set", "mesh.data=1", "--set", "execution.micro_batch_sequences=2"]
    status, value, last = preflight("a100-40g", *keep_all, *alone)
    assert status == 78 and not value["fits"] and value["micro_batch"] == 1 and value["set"] is None
    assert "1 sequence per device" in last and "too much" in last
