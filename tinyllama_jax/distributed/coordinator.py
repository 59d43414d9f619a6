"""The meeting point of a run's processes, in a process of its own beside process 0.

    python -m tinyllama_jax.distributed.coordinator ADDRESS PROCESSES HEARTBEAT_SECONDS LINGER_SECONDS

jax starts its coordination service inside process 0, and ends every other process with an abort and a page of C++
stacks the moment that process dies.  Out here the service outlives process 0 for LINGER_SECONDS (it learns of the end
because its standard input closes), long enough for the others to find out who is missing and to say so in one line.
"""

from __future__ import annotations

import signal
import sys
import threading
import time


def main() -> None:
    # A scheduler tells every process of a job to stop, this one too: the others still need it to save together.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    address, processes, heartbeat, linger = sys.argv[1], *map(int, sys.argv[2:5])
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=heartbeat, shutdown_timeout=heartbeat
    )
    print("ready", flush=True)
    goodbye = sys.stdin.readline().strip()  # "done" after an orderly end, nothing when process 0 has died
    if goodbye != "done":
        time.sleep(linger)
    # A service that still has clients would wait for them.
    threading.Timer(5, lambda: sys.exit(0)).start()
    service.shutdown()


if __name__ == "__main__":
    main()
