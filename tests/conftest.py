"""Eight CPU devices for every test, so that meshes are real; float32 matmuls are exact on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Eight devices share two cores with other test processes: waiting long for a peer is no sign of a hang.
        + " --xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_cpu_collective_timeout_seconds=300"
    )

# Programs are compiled once for all test processes, also those that tests start, and once for all test runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))  # experiments/ is part of the repository, not of the installed package
sys.path.insert(0, str(TESTS))

from cannot import cannot  # noqa: E402


def pytest_ignore_collect(collection_path, config):
    """Parity needs PyTorch to be imported at all, and llama.cpp is another program's: left alone unless asked for, and
    then their absence is an error."""
    marker = next((marker for marker in ("parity", "llamacpp") if marker in collection_path.name), None)
    asked = marker and marker in config.getoption("markexpr").replace(f"not {marker}", "")
    return True if marker and not asked else None


# Files that take a minute or more: begun first, so that no test process is left alone with one at the end.
LONG = "versus_torch step mesh transformer h200 fit_repetition context kernels engine cached aot".split()


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # stable


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from the code as it is")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> Path:
    """A token store of two domains, prose and code, a vocabulary of 512, made once per test process."""
    from small_store import make

    return make(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_store) -> Path:
    """The run directory of a finished quick run; tests leave it as it is."""
    from quick_experiment import quick_command

    from tinyllama_jax.cli import main

    workdir = tmp_path_factory.mktemp("run") / "finished"
    assert main(quick_command(small_store, workdir)) == 0
    return workdir


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm cluster of two nodes on this machine, as in slurm_cluster.py; its tests carry the marker `slurm`."""
    from slurm_cluster import Cluster, missing

    if absent := missing():
        say = f"{', '.join(absent)} not installed: tests/install_slurm.sh installs what Debian and Ubuntu have"
        cannot(say)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def tales(tmp_path) -> Path:
    """Thirty texts in a folder."""
    folder = tmp_path / "tales"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"Tale {i}. " + "Once upon a time there was a fox. " * (i + 1))
    return folder


@pytest.fixture
def recipe(tales):
    """Makes a store of them in several items, in about a second."""
    from tinyllama_jax.config import Recipe

    return Recipe(sources=(str(tales),), vocab_size=300, validation_share=0.2, window_tokens=17, item_bytes=2500)


@pytest.fixture
def mount(tmp_path):
    """mount(options): a disk of its own in memory, such as `size=64k`, taken away at the end."""
    mounted = []

    def make(options: str) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            cannot("mounting a tmpfs is not permitted")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", "-l", disk], check=True)
