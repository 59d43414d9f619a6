"""The processes of one run: how they find each other, speak, and notice that one is missing.

jax.distributed connects them; which of them this is comes from options, else from JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from what jax itself detects (Slurm, Open MPI, GKE, TPU), else there is one.
Everything here goes through the coordination service: small JSON values and barriers with names and time limits, never
a device, so that it works while devices hang.

Each process says every few seconds that it lives, and reads who else does.  Who was not heard of for `peer_seconds`
is named, and the process ends with status 1: a collective operation would wait for the missing one for ever.  One that
fails by itself publishes why, and the others end with its status.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinyllama_jax.distributed.link import CLOSE_SECONDS, Link, PeerLost
from tinyllama_jax.distributed.place import Place, place
from tinyllama_jax.errors import ConfigError, UserError

__all__ = ["ALONE", "PeerLost", "Peers", "Place", "joined", "place"]

JOIN_SECONDS = 300
# What an exception from below says when another process has gone away in the middle of a collective operation.
SIGNS_OF_ABSENCE = ("gloo", "nccl", "unavailable", "deadline", "cancelled", "connection", "socket", "peer")


@dataclass(frozen=True)
class Peers:
    """The processes of this run, seen from one of them.  `Peers()` is a run of one process.

    Every process calls `barrier`, `tell` and `gather` in the same order for each name; a name belongs to one thread.
    """

    index: int = 0
    count: int = 1
    names: tuple[str, ...] = ("process 0",)
    link: Any = None  # Link

    @property
    def lead(self) -> bool:
        """Whether this one decides and writes what there is only one of."""
        return self.index == 0

    def barrier(self, name: str, seconds: float) -> None:
        """Returns when every process has come here; raises PeerLost that names who has not within `seconds`."""
        if self.count > 1:
            self.link.barrier(name, seconds, self.names)

    def tell(self, name: str, value: Any = None) -> Any:
        """Process 0's value (what JSON can say), given to all; what the others pass is ignored."""
        return self.link.tell(name, value) if self.count > 1 else value

    def gather(self, name: str, value: Any) -> list:
        """Every process's value, by index, given to all."""
        return self.link.gather(name, value) if self.count > 1 else [value]

    def fail(self, status: int, reason: str) -> None:
        """Tells the others that this process ends, and why, so that they end as well."""
        if self.count > 1:
            self.link.fail(status, reason)


ALONE = Peers()


@contextlib.contextmanager
def joined(where: Place | None, *, peer_seconds: float) -> Iterator[Peers]:
    """Connects the processes for the time of the block; must come before anything that touches a device.

    Within, a failure of this process is told to the others, and an exception that comes from another's absence becomes
    PeerLost.  After a failure the interpreter ends without jax's own farewell, which would wait for those who are gone.
    """
    if where is None:
        yield ALONE
        return
    import jax
    from jax._src import distributed

    # On CPUs nothing keeps two programs that run at the same time from meeting their peers in another order, each then
    # waiting for the other; one at a time, and threads enough for all that wait.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("PJRT_NPROC", "64")
    service = _start_service(where, peer_seconds) if where.index == 0 else None
    try:
        jax.distributed.initialize(
            where.coordinator,
            where.count,
            where.index,
            where.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            # jax insists on a service inside process 0: it gets an address that nobody calls.
            coordinator_bind_address="127.0.0.1:0",
            heartbeat_timeout_seconds=_patience(peer_seconds),
            shutdown_timeout_seconds=_patience(peer_seconds),
        )
    except Exception as error:
        _leave(1)
        late = " ".join(str(error).split())[:200]
        raise PeerLost(
            f"process {where.index} of {where.count} could not join the others at {where.coordinator} ({where.how}): "
            f"{late}"
        ) from error
    link = Link(distributed.global_state.client, where.index, where.count, peer_seconds)
    hosts = link.gather("hosts", socket.gethostname())
    names = tuple(f"process {i} ({host})" for i, host in enumerate(hosts))
    link.watch(names)
    peers = Peers(where.index, where.count, names, link)
    try:
        yield peers
        peers.barrier("end", peer_seconds + CLOSE_SECONDS)
    except BaseException as error:
        raise _ended(error, peers) from error
    link.close()
    jax.distributed.shutdown()
    if service is not None:
        service.stdin.close()  # it leaves when this process, the last to hold a connection, has ended


def _ended(error: BaseException, peers: Peers) -> BaseException:
    """What this process ends with when the block raised `error`."""
    if not isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
        absent = any(sign in str(error).lower() for sign in SIGNS_OF_ABSENCE)
        verdict = peers.link.verdict(wait=absent)  # the missing peer is the cause, the exception a consequence
        if verdict is not None:
            status, text = verdict
            error = PeerLost(text)
            error.exit_status = status
    status = error.exit_status if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    peers.link.close()
    peers.fail(status, " ".join(str(error).split())[:500] or type(error).__name__)
    _leave(status)
    if isinstance(error, UserError) and not peers.lead and peers.link.said_by_lead(str(error)):
        return SystemExit(status)
    return error


def _leave(status: int) -> None:
    """Ends the interpreter, when its turn comes, at once: jax's farewell would wait for processes that are gone."""

    def at_once() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(at_once)


def _patience(peer_seconds: float) -> int:
    """jax's own time limit: it ends a process with an abort, so ours comes first."""
    return int(3 * peer_seconds) + 60


def _start_service(where: Place, peer_seconds: float) -> subprocess.Popen:
    port = where.coordinator.rpartition(":")[2]
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
    linger = str(int(peer_seconds) + 2 * CLOSE_SECONDS)  # until the others have noticed, and a little more
    command = [
        sys.executable,
        "-m",
        "tinyllama_jax.distributed.coordinator",
        bind,
        str(where.count),
        str(_patience(peer_seconds)),
    ]
    service = subprocess.Popen(
        [*command, linger],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the group of process 0 must not reach it
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if service.stdout.readline().strip() != "ready":
        said = " ".join(service.stderr.read().split())[-200:]
        raise ConfigError(f"the meeting point of the processes cannot listen on {bind}: {said}; is the port taken?")
    # Its log would fill the pipe; nobody reads it.
    threading.Thread(target=collections.deque, args=(service.stderr, 0), daemon=True).start()
    return service
