"""Flags that we recommend: the installed compilers know them, and what would abort is not among them."""

import json
import os
import subprocess
import sys

import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.errors import UsageError
from tinyllama_jax.launch.flags import PROFILES, STALE, environment, profile
from tinyllama_jax.preflight.targets import GPUS, TPUS


def start(flags: str) -> subprocess.CompletedProcess:
    """A CPU's jaxlib with these XLA_FLAGS; it reads the names of all GPU flags, and aborts on one that it lacks."""
    variables = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"} | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
    }
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flags", sorted({environment(flags).get("XLA_FLAGS", "") for flags in PROFILES.values()}))
def test_every_profile_starts(flags):
    done = start(flags)
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


@pytest.mark.parametrize("name", [name for name, why in STALE.items() if "aborts" in why])
def test_stale_advice_really_aborts(name):
    """When it does no longer, the flag is back, or JAX has become lenient: look again."""
    done = start(f"--{name}=true" if "level" not in name else f"--{name}=0")
    assert done.returncode != 0 and name in done.stderr


def test_every_machine_has_a_profile_and_every_flag_says_why():
    assert set(PROFILES) == {*GPUS, *TPUS, "cpu", "none"}
    for flags in PROFILES.values():
        for flag in flags:
            assert flag.reason and (flag.source.startswith("https://") or "jaxlib" in flag.source)
            assert flag.name not in STALE
            assert not flag.name.startswith("xla_tpu_") or flag.variable == "LIBTPU_INIT_ARGS"
            assert not flag.name.startswith(("xla_gpu_", "xla_cpu_")) or flag.variable == "XLA_FLAGS"


def test_the_memory_fraction_is_the_one_that_preflight_counts_with():
    for kind, gpu in GPUS.items():
        assert environment(profile(kind))["XLA_CLIENT_MEM_FRACTION"] == str(gpu.fraction)


@pytest.mark.aot
def test_libtpu_knows_its_flags():
    """libtpu ends the process on a flag that it lacks, also when it only compiles."""
    code = "from jax.experimental import topologies\nimport jax, jax.numpy as jnp\nimport numpy as np\n"
    code += "from jax.sharding import SingleDeviceSharding\n"
    code += "d = topologies.get_topology_desc('v5e:2x2', 'tpu').devices[0]\n"
    code += "x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(d))\n"
    code += "jax.jit(lambda x: x @ x.T).lower(x).compile(); print('compiled')\n"

    def compiled(flags: str) -> subprocess.CompletedProcess:
        variables = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        variables.pop("XLA_FLAGS", None)
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)

    for flags in sorted({environment(profile(kind)).get("LIBTPU_INIT_ARGS", "") for kind in TPUS}):
        done = compiled(flags)
        assert done.returncode == 0 and "compiled" in done.stdout, (flags, done.stderr[-2000:])
    assert compiled("--xla_tpu_no_such_flag=true").returncode != 0


def test_the_verb(capsys):
    assert main(["launch", "flags", "--profile", "v6e", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in value["profiles"]["v6e"]["environment"]["LIBTPU_INIT_ARGS"]
    assert main(["launch", "flags"]) == 0
    shown = capsys.readouterr().out
    assert "XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true" in shown and "v4: the defaults" in shown
    assert main(["launch", "flags", "--profile", "h1000"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err
    with pytest.raises(UsageError):
        profile("")
