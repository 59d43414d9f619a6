import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tinyllama_jax import configio, flops
from tinyllama_jax.cli import main
from tinyllama_jax.config import Mesh, replace
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.preflight import search, step, targets, verb, worker

ROOT = Path(__file__).parent.parent
GIB = 2**30


# -- targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, platform, count, shape",
    [
        ("a100-40g", "gpu", 1, (1, 1)),
        ("a100-80g:4", "gpu", 4, (1, 4)),
        ("a100-40g:2x8", "gpu", 16, (2, 8)),
        ("h100:8", "gpu", 8, (1, 8)),
        ("h200", "gpu", 1, (1, 1)),
        ("v5e:4x4", "tpu", 16, (4, 4)),
        ("v6e:1x1", "tpu", 1, (1, 1)),
        ("v4:2x2x4", "tpu", 16, (2, 2, 4)),
        ("v5p:2x2x4", "tpu", 16, (2, 2, 4)),
    ],
)
def test_targets_are_names_and_shapes(text, platform, count, shape):
    target = targets.parse(text)
    assert (target.name, target.platform, target.count, target.shape) == (text, platform, count, shape)
    assert flops.peak_flops(target.kind), "a device whose speed the rest of the program knows"


@pytest.mark.parametrize(
    "text, word",
    [
        ("a100", "a100-40g"),
        ("b200:8", "v5p"),
        ("", "h100"),
        ("h100:16", "h100:2x8"),
        ("h100:0", "MACHINESxGPUS"),
        ("h100:1x2x3", "MACHINESxGPUS"),
        ("h100:eight", "MACHINESxGPUS"),
        ("v5e", "v5e:4x4"),
        ("v5e:3x3", "v5e:4x4"),
        ("v4:4x4", "v4:2x2x4"),
    ],
)
def test_anything_else_is_one_line_that_says_what_there_is(text, word, capsys):
    with pytest.raises(UsageError, match=word) as error:
        targets.parse(text)
    assert "\n" not in str(error.value)
    assert main(["preflight", "experiments.smoke:tiny", "--target", text]) == 2
    assert capsys.readouterr().err.startswith("tinyllama preflight: --target")


@pytest.mark.parametrize("name", targets.GPUS)
def test_what_is_counted_on_leaves_room_for_cuda_and_nccl(name):
    gpu, target = targets.GPUS[name], targets.parse(name)
    reserve = gpu.memory_gib * GIB - target.capacity_bytes
    assert targets.GPU_RESERVE_GIB * GIB <= reserve < (targets.GPU_RESERVE_GIB + 1.5) * GIB
    assert target.capacity_bytes == pytest.approx(gpu.fraction * gpu.memory_gib * GIB)
    assert f"XLA_CLIENT_MEM_FRACTION={gpu.fraction}" in target.advice
    assert f'device_description_str: "{target.kind}"' in gpu.target_config()


# -- search ----------------------------------------------------------------------------------------------------

CANDIDATES = [1, 2, 4, 8, 16, 32, 64]


def searched(base, slope, capacity, start=8, candidates=CANDIDATES):
    def total(candidate):
        return base + slope * candidate, base + slope * candidate <= capacity

    return search.largest(candidates, start, capacity, total)


def test_two_compilations_decide_what_is_clear():
    assert searched(10, 2, 30) == (8, [8, 16])  # 26 fits, 42 does not
    assert searched(10, 2, 1000, start=64) == (64, [64])
    assert searched(10, 2, 1000, start=32) == (32 * 2, [32, 64])


def test_the_line_through_two_leads_to_the_largest():
    assert searched(10, 2, 80) == (32, [8, 16, 32])  # 64 would need 138 of 80: not compiled
    assert searched(10, 2, 120) == (32, [8, 16, 32, 64])  # 138 of 120 is too near to be believed
    assert searched(10, 2, 13, start=64)[0] == 1


def test_nothing_fits():
    largest, measured = searched(100, 1, 60)
    assert largest is None and measured[0] == 8
    assert searched(100, 1, 60, candidates=[1], start=1) == (None, [1])


@given(
    st.lists(st.integers(1, 64), min_size=1, unique=True).map(sorted),
    st.integers(0, 100),
    st.integers(1, 10),
    st.integers(1, 500),
    st.data(),
)
def test_the_search_agrees_with_trying_them_all(candidates, base, slope, capacity, data):
    start = data.draw(st.sampled_from(candidates))
    largest, measured = searched(base, slope, capacity, start, candidates)
    assert largest == max((c for c in candidates if base + slope * c <= capacity), default=None)
    assert len(measured) == len(set(measured))


# -- the worker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, total, capacity",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.72G of 15.75G hbm. Exceeded hbm "
            "capacity by 993.28M.",
            16.72,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (182.53G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
            182.53,
            15.75,
        ),
    ],
)
def test_a_refusal_for_want_of_memory_is_understood(message, total, capacity):
    assert step.refusal(message) == {"total": int(total * GIB), "capacity_bytes": int(capacity * GIB)}


def test_other_refusals_are_not_about_the_devices_memory():
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 29.10M of 16.00M vmem."
    assert step.refusal(vmem) is None


@pytest.mark.parametrize(
    "program, words",
    [
        ("import os; os.abort()", ("SIGABRT", "while starting")),
        ("import os; os.kill(os.getpid(), 9)", ("SIGKILL", "memory")),
        (
            "import sys, json; sys.stdin.readline(); print(json.dumps({}), flush=True); sys.stdin.readline(); "
            "print('LLVM ERROR: Cannot select: intrinsic', file=sys.stderr); sys.exit(3)",
            ("exit status 3", "compiling 4 sequences per device", "LLVM ERROR: Cannot select"),
        ),
    ],
)
def test_a_compiler_that_ends_the_process_is_one_line(program, words, monkeypatch):
    monkeypatch.setattr(worker, "PROGRAM", [sys.executable, "-c", program])
    run = configio.load_experiment("experiments.smoke:tiny")
    with pytest.raises(ConfigError) as error, worker.Worker(run, targets.parse("v5e:4x4")) as compiler:
        compiler.compile(4, 1)
    assert "\n" not in str(error.value)
    for word in ("the compiler for v5e:4x4", *words):
        assert word in str(error.value)


class _CpuTarget(targets.Target):
    def devices(self):
        return jax.devices()


def test_the_real_step_is_compiled_and_accounted_for():
    """For eight CPU devices, which every machine can compile for; other devices differ in the list only."""
    run = configio.load_experiment("experiments.smoke:tiny")
    run = replace(run, mesh=Mesh(replica=1, data=8), data=replace(run.data, document_masking=True, store="nowhere"))
    compiler = step.Compiler(run, _CpuTarget("cpu", "cpu", "cpu", 8, 0, "", (8,)))
    about = compiler.describe()
    assert {axis: n for axis, n in about["mesh"].items() if n > 1} == {"data": 8} and about["stage"] == "cooldown"
    assert about["as_written"] == 2 and about["candidates"] == [1, 2]
    assert about["attention"]["asked"] == "auto"
    account = compiler(1, 2)
    share = 3 * 4 * flops.parameter_counts(run.model)["total"] / 8
    # Norm scales are whole on every device, and so is one count of steps.
    assert share <= account["state"] < 1.1 * share and account["donated"] >= share
    assert account["batch"] == 2 * 1 * 128 * (3 * 4 + 1)
    assert account["total"] > account["state"] and not account["refused"]
    gathers = account["collectives"]["all-gather"]
    assert gathers["per_step"] >= 2 * gathers["static"] - 2, "the micro-batches' loop is counted twice"
    with pytest.raises(ConfigError, match="cannot be spread over 8 devices"):
        narrow = replace(run, execution=replace(run.execution, micro_batch_sequences=4))
        step.Compiler(narrow, _CpuTarget("cpu", "cpu", "cpu", 8, 0, "", (8,)))
    with pytest.raises(ConfigError, match="does not make up the 8 device"):
        step.Compiler(replace(run, mesh=Mesh(replica=3)), _CpuTarget("cpu", "cpu", "cpu", 8, 0, "", (8,)))


# -- the verb --------------------------------------------------------------------------------------------------

CAPACITY = targets.parse("v5e:2x4").capacity_bytes


class _FakeWorker:
    """Needs `fixed` + rows * `per_row` GiB on a device, and knows batches of 8 sequences per device."""

    fixed, per_row, as_written = 3.0, 1.0, 4

    def __init__(self, run, target):
        attention = {"asked": "auto", "compiled": "splash", "why": "no kernel of ours is proven on TPU v5 lite"}
        self.description = {
            "devices": 8,
            "mesh": {"replica": 1, "data": 8},
            "device_kind": target.kind,
            "attention": attention,
            "stage": "basic",
            "batch_tokens": 8 * 8 * 128,
            "as_written": self.as_written,
            "candidates": [1, 2, 4, 8],
            "batch_sequences_per_device": 8,
            "shards": 8,
            "jax": jax.__version__,
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compile(self, rows, micro_batches):
        total = int((self.fixed + rows * self.per_row) * GIB)
        if total > CAPACITY:
            return {"refused": True, "seconds": 1.0, "state": GIB, "total": total, "capacity_bytes": CAPACITY}
        found = {"all-gather": {"static": 2, "per_step": 88, "bytes_per_step": GIB}, "loops_of_unknown_length": 0}
        account = {"refused": False, "seconds": 2.0, "state": GIB, "donated": GIB, "batch": 100, "total": total}
        return account | {"collectives": found}


@pytest.fixture
def asked(monkeypatch, capsys):
    """asked(fixed, per_row, *options) -> (exit status, answer, stderr)."""
    monkeypatch.setattr(verb, "Worker", _FakeWorker)
    monkeypatch.setattr(verb, "check_installed", lambda target: None)

    def ask(fixed, per_row, *options):
        monkeypatch.setattr(_FakeWorker, "fixed", fixed)
        monkeypatch.setattr(_FakeWorker, "per_row", per_row)
        command = ["preflight", "experiments.smoke:tiny", "--target", "v5e:2x4", *options]
        status = main([*command, "--json"])
        captured = capsys.readouterr()
        assert main(command) == status
        assert "experiments.smoke:tiny on v5e:2x4" in capsys.readouterr().out
        return status, json.loads(captured.out), captured.err

    return ask


def test_what_fits_as_written_is_reported_as_written(asked):
    status, value, _ = asked(3.0, 1.0)
    assert status == 0 and value["fits"] and value["set"] is None
    assert value["micro_batch"] == 4 and value["micro_batch_tokens_per_device"] == 4 * 128
    parts = value["bytes_per_device"]
    assert parts == {"state": GIB, "activations": 4 * GIB, "temporaries": 2 * GIB, "total": 7 * GIB}
    assert value["headroom_bytes"] == CAPACITY - 7 * GIB and value["shortfall_bytes"] == 0
    assert value["as_written"] == {"micro_batch": 4, "fits": True, "total": 7 * GIB, "shortfall_bytes": 0}
    assert value["largest_micro_batch"] == 8
    assert value["largest_micro_batch_set"] == "--set execution.micro_batch_sequences=64"
    assert value["flops_per_step"] == 8 * value["flops_per_step_per_device"]
    assert value["collectives"]["all-gather"]["per_step"] == 88
    assert value["attention"]["compiled"] == "splash" and value["jax"] == jax.__version__


def test_what_does_not_fit_as_written_comes_with_what_to_set(asked):
    status, value, _ = asked(3.0, 4.0)  # 4 sequences would need 19 GiB
    assert status == 0 and value["fits"] and not value["as_written"]["fits"]
    assert value["as_written"]["shortfall_bytes"] == 19 * GIB - CAPACITY
    assert value["micro_batch"] == 2 and value["set"] == "--set execution.micro_batch_sequences=16"
    assert value["bytes_per_device"]["total"] == 11 * GIB and value["bytes_per_device"]["activations"] == 8 * GIB
    run = configio.load_experiment("experiments.smoke:tiny")
    assert verb.fitting(run, value).execution.micro_batch_sequences == 16
    assert verb.fitting(run, value | {"set": None}) is run
    assert value["estimate"]["tokens_per_s"] > 0 and value["estimate"]["cost_usd"]["total"] > 0


def test_as_written_does_not_search(asked):
    status, value, said = asked(3.0, 4.0, "--as-written")
    assert status == 78 and not value["fits"] and value["micro_batch"] == 4
    assert value["shortfall_bytes"] == 19 * GIB - CAPACITY and "largest_micro_batch" not in value
    last = said.splitlines()[-1]
    assert last.startswith("tinyllama preflight: experiments.smoke:tiny does not fit v5e:2x4: as written, 4 sequences")
    assert "3.25 GiB too much" in last
    status, value, _ = asked(3.0, 1.0, "--as-written")
    assert status == 0 and value["fits"] and [c["micro_batch"] for c in value["compilations"]] == [4, 2]


def test_nothing_fits_is_78_with_the_shortfall(asked):
    status, value, said = asked(16.0, 1.0)
    assert status == 78 and not value["fits"] and value["micro_batch"] == 1
    assert value["shortfall_bytes"] == 17 * GIB - CAPACITY and value["set"] is None
    assert "1 sequence per device take 17.00 GiB of 15.75 GiB, 1.25 GiB too much" in said.splitlines()[-1]


@pytest.mark.parametrize("target, package", [("v5e:2x4", "libtpu"), ("a100-40g:8", "jax-cuda13-plugin")])
def test_without_the_compilers_one_line_says_how_to_get_them(target, package):
    program = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith(('libtpu', 'jax_plugins')) else real(name, *a)\n"
        "from tinyllama_jax.cli import main\n"
        f"sys.exit(main(['preflight', 'experiments.smoke:tiny', '--target', {target!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr == (
        f"tinyllama preflight: compiling for {target} needs {package}; install with: "
        "pip install 'tinyllama_jax[preflight]'\n"
    )


def test_bytes_of_a_device_are_those_of_its_shards():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("data", None))
    tree = {"a": jax.ShapeDtypeStruct((16, 3), np.float32, sharding=sharding)}
    assert step.local_bytes(tree) == 2 * 3 * 4


def test_half_a_name_suggests_the_whole_one():
    with pytest.raises(UsageError, match=r"did you mean 'a100-\d0g'"):
        targets.parse("a100:2x8")
