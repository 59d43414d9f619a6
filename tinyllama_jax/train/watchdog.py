"""Ends a process that no longer gets anywhere, with a line that says since when and the stacks of all its threads.

Waiting for ever is the worst that a run can do: it costs what training costs.  The launcher starts it again.
"""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque

from tinyllama_jax.distributed import ALONE, Peers

MEDIANS = 20  # a step may take this many times the median before it counts as hung
LAST_RESORT_SECONDS = 30  # after which a process whose interpreter is stuck is ended from below


class Watchdog:
    """`at(what)` says what the main thread does from now on; doing one thing longer than allowed ends the process.

    seconds: allowed for a step (or MEDIANS times the median step where that is longer), and `slow_factor` times as
    much for what is not a step: compiling, saving, restoring, validating.  0 = off.
    """

    def __init__(self, seconds: float, peers: Peers = ALONE, *, slow_factor: float = 6.0, status: int = 1):
        self.seconds, self.peers, self.slow_factor, self.status = seconds, peers, slow_factor, status
        self._steps: deque[float] = deque(maxlen=64)
        self._what, self._since, self._limit = "starting", time.monotonic(), seconds * slow_factor
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def at(self, what: str, *, slow: bool = False) -> None:
        """The main thread begins `what`, such as "step 12"; slow: it may take longer than a step."""
        now = time.monotonic()
        limit = self.seconds * self.slow_factor if slow else self.seconds
        if len(self._steps) >= 8:
            limit = max(limit, MEDIANS * statistics.median(self._steps))
        self._what, self._since, self._limit = what, now, limit
        if self.seconds:  # a thread below the interpreter's: also where the interpreter's lock is never given back
            faulthandler.dump_traceback_later(limit + LAST_RESORT_SECONDS, exit=True, file=2)

    def patient(self, what: str) -> None:
        """The main thread begins `what`, which may take any time: preparing a corpus takes days."""
        self._what, self._since, self._limit = what, time.monotonic(), math.inf
        faulthandler.cancel_dump_traceback_later()

    def took(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            now = time.monotonic()
            if now - last > max(10.0, self.seconds / 2):  # the machine slept; nothing hung
                self._since = now
            last = now
            if now - self._since > self._limit:
                text = f"hung: {self._what} for {now - self._since:.0f} s (health.watchdog_seconds={self.seconds:g})"
                faulthandler.dump_traceback(all_threads=True, file=2)
                self.peers.fail(self.status, text)
                me = f"{self.peers.names[self.peers.index]} " if self.peers.count > 1 else ""
                print(f"tinyllama train: {me}{text}; stacks above, start again", file=sys.stderr, flush=True)
                os._exit(self.status)
