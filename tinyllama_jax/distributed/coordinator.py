"""The meeting point of a run's processes, in a process of its own beside process 0.

    python -m tinyllama_jax.distributed.coordinator ADDRESS PROCESSES HEARTBEAT_SECONDS LINGER_SECONDS

jax starts its coordination service inside process 0, and ends every other process with an abort and a page of C++
stacks the moment that process dies.  Out here the service outlives process 0 (it learns of the end because its standard
input closes) until the others have hung up, which gives them the time to find out who is missing and to say so in one
line; for LINGER_SECONDS at most.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

ESTABLISHED = "01"  # in /proc/net/tcp


def main() -> None:
    # A scheduler tells every process of a job to stop, this one too: the others still need it to save together.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    address, processes, heartbeat, linger = sys.argv[1], *map(int, sys.argv[2:5])
    host, _, port = address.rpartition(":")
    port = int(port)
    wait_for_port("localhost" if host in ("[::]", "0.0.0.0") else host.strip("[]"), port, linger + 10)
    from jaxlib import _jax

    _service = _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=heartbeat, shutdown_timeout=heartbeat
    )
    print("ready", flush=True)
    sys.stdin.read()  # until process 0 closes it, or ends
    end = time.monotonic() + linger
    while callers(port) and time.monotonic() < end:
        time.sleep(0.2)
    os._exit(0)  # an orderly end of the service would wait for those who are gone


def wait_for_port(host: str, port: int, seconds: float) -> None:
    """Returns when nobody listens there: gRPC would share the port, and half of the callers meet the wrong service."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), 1).close()
        except OSError:
            return
        if time.monotonic() > end:
            sys.exit("somebody listens there already")
        time.sleep(0.2)


def callers(port: int) -> int:
    """Connections that others hold to a port of this machine; 1 where that cannot be known."""
    found, known = 0, False
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
        except OSError:
            continue
        known = True
        found += sum(int(row[1].rpartition(":")[2], 16) == port and row[3] == ESTABLISHED for row in rows)
    return found if known else 1


if __name__ == "__main__":
    main()
