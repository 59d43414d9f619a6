"""Small values, barriers and signs of life between the processes of a run, through jax's coordination service."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import Any

from tinyllama_jax.errors import UserError

CLOSE_SECONDS = 10  # that others get to end by themselves after one has failed
TELL_SECONDS = 24 * 3600  # a missing process is noticed long before


class PeerLost(UserError):
    """Another process of the run is gone; all start again together."""

    exit_status = 1


class Link:
    """The calls to the coordination service, and the watch over the others."""

    def __init__(self, client, index: int, count: int, peer_seconds: float):
        self.client, self.index, self.count, self.peer_seconds = client, index, count, peer_seconds
        self._turns: Counter[str] = Counter()
        self._closed = threading.Event()
        self._lost: tuple[int, str] | None = None
        self._found = threading.Event()

    # -- speaking ------------------------------------------------------------------------------------------

    def _turn(self, name: str) -> str:
        self._turns[name] += 1
        return f"{name}/{self._turns[name]}"

    def tell(self, name: str, value: Any) -> Any:
        key = self._turn(f"tell/{name}")
        if self.index == 0:
            self.client.key_value_set(key, json.dumps(value))
        return json.loads(self._get(key))

    def gather(self, name: str, value: Any) -> list:
        key = self._turn(f"gather/{name}")
        self.client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        return [json.loads(self._get(f"{key}/{i}")) for i in range(self.count)]

    def _get(self, key: str) -> str:
        return self.client.blocking_key_value_get(key, TELL_SECONDS * 1000)

    def barrier(self, name: str, seconds: float, names: tuple[str, ...]) -> None:
        key = self._turn(f"barrier/{name}")
        self.client.key_value_set(f"{key}/{self.index}", "here")
        try:
            self.client.wait_at_barrier(key, int(seconds * 1000))
        except Exception as error:
            here = {int(k.rpartition("/")[2]) for k, _ in self.client.key_value_dir_get(key)}
            late = [names[i] for i in range(self.count) if i not in here]
            who = ", ".join(late) or "another process"
            raise PeerLost(f"{who} did not come to {name!r} within {seconds:.0f} s; start again") from error

    def fail(self, status: int, reason: str) -> None:
        with contextlib.suppress(Exception):  # the others find out by silence
            self.client.key_value_set(f"failed/{self.index}", json.dumps([status, reason]), allow_overwrite=True)

    def said_by_lead(self, reason: str) -> bool:
        """Whether process 0 ends with the same words, so that they need not be said again."""
        with contextlib.suppress(Exception):
            said = json.loads(self.client.blocking_key_value_get("failed/0", 2000))
            return said[1] == " ".join(reason.split())[:500]
        return False

    # -- watching ------------------------------------------------------------------------------------------

    def watch(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._heard = {i: time.monotonic() for i in range(self.count)}
        self._values: dict[int, str] = {}
        self._contact = time.monotonic()
        self._failed: dict[int, tuple[int, str]] = {}
        for task in (self._beat, self._judge):
            threading.Thread(target=task, daemon=True, name=f"peers{task.__name__}").start()

    def close(self) -> None:
        self._closed.set()

    def verdict(self, *, wait: bool) -> tuple[int, str] | None:
        """(exit status, reason) if another process is lost or has failed; waits for as long as that takes to show."""
        if wait:
            self._found.wait(self.peer_seconds + CLOSE_SECONDS)
        return self._lost

    def _beat(self) -> None:
        pause = min(5.0, self.peer_seconds / 5)
        for number in itertools.count():
            if self._closed.wait(pause if number else 0):
                return
            try:
                self.client.key_value_set(f"alive/{self.index}", str(number), allow_overwrite=True)
                values = self.client.key_value_dir_get("alive/")
                failed = self.client.key_value_dir_get("failed/")
            except Exception:  # the judge sees that contact is lost
                continue
            now = self._contact = time.monotonic()
            for key, value in values:
                i = int(key.rpartition("/")[2])
                if self._values.get(i) != value:
                    self._values[i], self._heard[i] = value, now
            for key, value in failed:
                i = int(key.rpartition("/")[2])
                self._failed.setdefault(i, tuple(json.loads(value)))

    def _judge(self) -> None:
        last = time.monotonic()
        since_failure = None
        while not self._closed.wait(0.2):
            now = time.monotonic()
            if now - last > 5:  # this process was asleep, not the others
                self._contact = now
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            found = self._missing(now)
            others = {i: why for i, why in self._failed.items() if i != self.index}
            if others and found is None:
                i, (status, reason) = min(others.items())
                since_failure = since_failure or now
                found = (status, f"{self._names[i]} ended: {reason}")
            if found is None:
                continue
            self._lost = found
            self._found.set()  # the main thread, if it is not stuck, goes on from here
            grace = CLOSE_SECONDS if since_failure else 3.0
            if not self._closed.wait(grace):
                status, text = found
                print(f"tinyllama: {text}; ending with status {status}", file=sys.stderr, flush=True)
                os._exit(status)

    def _missing(self, now: float) -> tuple[int, str] | None:
        limit = self.peer_seconds
        if now - self._contact > limit:
            return 1, f"the meeting point beside {self._names[0]} has not answered for {limit:.0f} s"
        silent = [i for i in range(self.count) if i != self.index and now - self._heard[i] > limit]
        if silent:
            who = ", ".join(self._names[i] for i in silent)
            return 1, f"{who} was not heard of for {limit:.0f} s"
        return None
