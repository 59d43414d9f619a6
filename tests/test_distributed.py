"""Processes that find each other, speak, and notice who is missing: real ones, on this machine."""

import signal
import socket
import time

import pytest
from hosts import Hosts, free_port, meeting, program

from tinyllama_jax.distributed import ALONE, Place, _start_service, place
from tinyllama_jax.errors import ConfigError

JOINED = """
import sys, time
from tinyllama_jax.distributed import joined, place
from tinyllama_jax.errors import DataError
def main(body, peer_seconds=3.0):
    try:
        with joined(place(), peer_seconds=peer_seconds) as peers:
            body(peers)
    except Exception as error:
        print("ERROR", type(error).__name__, error, flush=True)
        sys.exit(getattr(error, "exit_status", 1))
"""
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_nobody():
    assert place() is None and place(processes=1) is None
    ALONE.barrier("a", 1)
    assert ALONE.lead and ALONE.tell("b", 3) == 3 and ALONE.gather("c", "x") == ["x"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("", 2, 0), {}, "coordinator missing"),
        (("host:1", 0, 0), {}, "processes missing"),
        (("host:1", 2, -1), {}, "process missing"),
        (("host", 2, 0), {}, "'host' is not HOST:PORT"),
        (("host:1", 2, 2), {}, "process 2 of 2 does not exist"),
        ((), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "coordinator missing"),
        ((), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
    ],
)
def test_half_a_place_is_one_line(monkeypatch, arguments, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        place(*arguments)
    assert "\n" not in str(caught.value)


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2"}


def test_slurm_is_detected_and_a_process_with_a_machine_to_itself_has_all_its_devices(monkeypatch):
    for name, value in SLURM.items() | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert place() == ("node03:61517", 2, 1, None, "slurm")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert place().local_devices == [5], "one process per device"
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:99")
    assert place().coordinator == "10.0.0.1:99", "for names that do not resolve"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert place() is None


def slurm(i: int, address: str) -> dict[str, str]:
    local = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_TASKS_PER_NODE": "2"}
    return SLURM | local | {"JAX_COORDINATOR_ADDRESS": address, "SLURM_STEP_NODELIST": "localhost"}


def openmpi(i: int, address: str) -> dict[str, str]:
    port = address.rpartition(":")[2]
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "JAX_COORDINATOR_PORT": port,
    }


TALK = (
    JOINED
    + """
def body(peers):
    import jax
    told = [peers.tell("n", {"from": peers.index, "turn": turn}) for turn in range(2)]
    everyone = peers.gather("who", peers.index * 10)
    peers.barrier("here", 30)
    print("TOLD", told, everyone, peers.names[1].startswith("process 1 ("), jax.process_count(), jax.device_count())
main(body)
"""
)


@pytest.mark.faults
@pytest.mark.parametrize("environment", [None, slurm, openmpi], ids=["variables", "slurm", "openmpi"])
def test_two_processes_meet_and_speak(environment):
    with Hosts(2, program(TALK), environment=environment) as hosts:
        assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
        for i in range(2):
            expected = "TOLD [{'from': 0, 'turn': 0}, {'from': 0, 'turn': 1}] [0, 10] True 2 2"
            assert expected in hosts.said(i), hosts.said(i)


WAIT = (
    JOINED
    + """
def body(peers):
    peers.barrier("begin", 60)
    print("BEGUN", flush=True)
    if STUCK:
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental import multihost_utils
        while True:
            multihost_utils.process_allgather(np.ones(1))
            time.sleep(0.05)
    time.sleep(120)
main(body)
"""
)


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stuck", [False, True], ids=["idle", "in a collective operation"])
def test_a_killed_process_ends_the_other_with_one_line_that_names_it(victim, stuck):
    with Hosts(2, program(f"STUCK = {stuck}\n" + WAIT)) as hosts:
        hosts.wait_until(lambda: all("BEGUN" in hosts.said(i) for i in range(2)), "the meeting")
        time.sleep(1)
        hosts.kill(victim)
        before = time.monotonic()
        survivor = hosts.processes[1 - victim]
        assert survivor.wait(timeout=60) == 1, hosts.said(1 - victim)
        assert time.monotonic() - before < 3 + 20, "peer_seconds, and what it takes to end on a busy machine"
        said = [line for line in hosts.said(1 - victim).splitlines() if "tinyllama" in line or "ERROR" in line]
        assert len(said) == 1 and f"process {victim} (" in said[0] and "was not heard of for 3 s" in said[0], said
        assert "Check failure stack trace" not in hosts.said(1 - victim)


FAIL = (
    JOINED
    + """
def body(peers):
    peers.barrier("begin", 60)
    if peers.index == 1:
        raise DataError("shard 3 is short")
    time.sleep(120)
main(body)
"""
)


@pytest.mark.faults
def test_a_process_that_fails_tells_the_other_why_and_both_end_with_its_status():
    with Hosts(2, program(FAIL)) as hosts:
        assert hosts.wait(60) == [78, 78]
        assert "ERROR DataError shard 3 is short" in hosts.said(1)
        assert "process 1 (" in hosts.said(0) and "ended: shard 3 is short" in hosts.said(0)


SAME = (
    JOINED
    + """
def body(peers):
    peers.barrier("begin", 60)
    raise DataError("the store is empty")
main(body)
"""
)


@pytest.mark.faults
def test_what_all_say_is_said_once():
    with Hosts(2, program(SAME)) as hosts:
        assert hosts.wait(60) == [78, 78]
        assert [hosts.said(i).count("the store is empty") for i in range(2)] == [1, 0]


LATE = (
    JOINED
    + """
def body(peers):
    if peers.index == 0:
        peers.barrier("save 120", 2)
    time.sleep(20)
main(body, peer_seconds=60)
"""
)


@pytest.mark.faults
def test_a_barrier_names_who_is_late():
    with Hosts(2, program(LATE)) as hosts:
        assert hosts.wait(60) == [1, 1]
        assert "ERROR PeerLost process 1 (" in hosts.said(0)
        assert "did not come to 'save 120' within 2 s" in hosts.said(0)


@pytest.mark.faults
def test_a_stopped_process_is_noticed_like_a_dead_one():
    with Hosts(2, program("STUCK = False\n" + WAIT)) as hosts:
        hosts.wait_until(lambda: all("BEGUN" in hosts.said(i) for i in range(2)), "the meeting")
        hosts.kill(1, signal.SIGSTOP)
        assert hosts.processes[0].wait(timeout=60) == 1
        assert "process 1 (" in hosts.said(0) and "was not heard of" in hosts.said(0)


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        address = f"[::]:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="somebody listens there already; is the port taken"):
            _start_service(Place(address, 2, 0, None, "test"), peer_seconds=-1000)  # without patience


AGAIN = (
    JOINED
    + """
def body(peers):
    peers.barrier("begin", 60)
    print("BEGUN", peers.gather("who", sys.argv[1]), flush=True)
    raise DataError("once more")
main(body)
"""
)


@pytest.mark.faults
def test_a_run_that_starts_again_at_once_meets_itself_and_not_the_run_before():
    address = f"127.0.0.1:{free_port()}"
    for turn in ("first", "second", "third"):
        with Hosts(2, [*program(AGAIN), turn], environment=lambda i, _: meeting(i, 2, address)) as hosts:
            assert hosts.wait(100) == [78, 78]
            assert all(f"BEGUN ['{turn}', '{turn}']" in hosts.said(i) for i in range(2)), hosts.said(0)
