"""Several processes train one run on this machine; one of them dies, is cut off, or is told to stop."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from cannot import cannot
from hosts import Hosts, begun_again, free_port
from many_hosts import PEER_SECONDS, command, kill_once, lines, run_to_the_end, same_run, steps_done

from tinyllama_jax.train import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_store):
    """The same run undisturbed, by one process with two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run_to_the_end(1, command(small_store, workdir), devices=2, environment=lambda i, address: {})
    return workdir


@pytest.mark.parametrize(("count", "kills"), [(2, 3)])  # `make proof-kills`: two and four, twenty times each
@begun_again
def test_killed_at_random_again_and_again(small_store, whole, tmp_path, count, kills):
    workdir, chance = tmp_path / "run", random.Random()
    argv = command(small_store, workdir)
    for _ in range(kills):
        if kill_once(count, argv, workdir, chance) is None:
            break
    run_to_the_end(count, argv)
    same_run(workdir, whole)
    assert not [p for p in (workdir / "checkpoints").iterdir() if ".tmp-" in p.name]
    starts = [e for e in lines(workdir / "events.jsonl") if e["kind"] == "start"]
    assert len(starts) >= 2


@begun_again
def test_a_signal_to_one_stops_all_after_the_same_step_and_another_number_of_processes_goes_on(
    small_store, whole, tmp_path
):
    workdir = tmp_path / "run"
    argv = command(small_store, workdir)
    with Hosts(2, argv) as hosts:
        hosts.wait_until(lambda: steps_done(workdir) >= 20, "step 20")
        hosts.kill(1, signal.SIGTERM)
        assert hosts.wait(100) == [75, 75], hosts.said(0) + hosts.said(1)
        texts = [hosts.said(0), hosts.said(1)]
    assert sum(text.count("stopped by SIGTERM at step") for text in texts) == 1, texts
    steps = steps_done(workdir)
    assert checkpoint.read_meta(workdir / "checkpoints" / f"{steps:08d}")["step"] == steps, "not a step is lost"
    said = run_to_the_end(1, argv, devices=2, environment=lambda i, address: {})
    assert f"resumed at step {steps}" in said[0]
    same_run(workdir, whole)


@begun_again
def test_two_and_four_processes_hand_a_run_to_each_other(small_store, whole, tmp_path):
    workdir = tmp_path / "run"
    argv = command(small_store, workdir)
    for count, step in ((2, 60), (4, 120)):
        with Hosts(count, argv) as hosts:
            hosts.wait_until(lambda step=step: steps_done(workdir) >= step, f"step {step}")
            (workdir / "stop").touch()
            assert hosts.wait(100) == [75] * count, hosts.said(0)
    run_to_the_end(2, argv)
    same_run(workdir, whole)


def test_what_one_process_cannot_do_ends_all_with_its_status(small_store, tmp_path):
    """Damage that only the second half of the rows meets."""
    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    for path in sorted(store.rglob("*.bin")):
        damaged = bytearray(path.read_bytes())
        for at in range(0, len(damaged), 64):
            damaged[at] ^= 1
        path.write_bytes(damaged)
    workdir = tmp_path / "run"
    with Hosts(2, command(store, workdir)) as hosts:
        statuses = hosts.wait(100)
        texts = [hosts.said(0), hosts.said(1)]
    assert statuses == [78, 78], texts
    assert any("store" in line for text in texts for line in text.splitlines() if line.startswith("tinyllama")), texts
    assert "Traceback" not in "".join(texts)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces, each with its own address, and a cable between them."""
    names = [f"tl{os.getpid()}{letter}" for letter in "ab"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        cannot(f"network namespaces are not permitted: {made.stderr.strip()}")
    ip("netns", "add", names[1])
    ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for i, name in enumerate(names):
        # Each host's name leads to its own address, as on a network; `ip netns exec` lays this file over /etc/hosts.
        hosts = Path("/etc/netns") / name / "hosts"
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f"127.0.0.1 localhost\n10.77.0.{i + 1} {socket.gethostname()}\n")
        ip("link", "set", name, "netns", name)
        ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
        ip("-n", name, "link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / name)


@begun_again
def test_two_hosts_whose_network_is_cut_end_in_time_save_nothing_wrong_and_go_on(
    small_store, whole, tmp_path, two_hosts
):
    workdir = tmp_path / "run"
    argv = command(small_store, workdir)

    def environment(i, address):
        return {
            "JAX_COORDINATOR_ADDRESS": f"10.77.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }

    def hosts() -> Hosts:
        return Hosts(2, argv, environment=environment, wrap=lambda i: ["ip", "netns", "exec", two_hosts[i]])

    port = free_port()
    with hosts() as cut:
        cut.wait_until(lambda: steps_done(workdir) >= 30, "step 30")
        ip("-n", two_hosts[0], "link", "set", two_hosts[0], "down")
        before = time.monotonic()
        statuses = cut.wait(120)
        assert time.monotonic() - before < PEER_SECONDS + 60
        texts = [cut.said(0), cut.said(1)]
    assert statuses == [1, 1], texts
    for i, text in enumerate(texts):  # neither can hear what the other says
        told = [line for line in text.splitlines() if line.startswith("tinyllama")]
        assert len(told) == 1 and f"process {1 - i} (" in told[0], text
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    checkpoint.read_meta(workdir / "checkpoints" / f"{newest:08d}")
    ip("-n", two_hosts[0], "link", "set", two_hosts[0], "up")
    port = free_port()
    with hosts() as again:
        assert again.wait(280) == [0, 0], again.said(0) + again.said(1)
        assert "resumed at step" in again.said(0)
    same_run(workdir, whole)
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "start" for event in events) >= 2
