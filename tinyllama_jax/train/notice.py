"""Requests to save and stop: signals, a file in the run directory, a cloud that will take the machine away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import urllib.request
from pathlib import Path

STOP_FILE = "stop"
POLL_SECONDS = 5.0
# What Google Cloud answers with TRUE when a preemptible machine is about to be taken (tried where this is set).
METADATA_VARIABLE = "TINYLLAMA_PREEMPTION_URL"


class Notice:
    """`requested` turns true, and `name` says why, after SIGTERM, SIGUSR1 (Slurm's advance notice) or SIGINT, when the
    file `stop` appears in the run directory, or when the address in TINYLLAMA_PREEMPTION_URL answers TRUE.

    A second SIGINT interrupts at once, for a person who will not wait.  Handlers are put back on exit.  Signals can
    only be handled in the main thread; elsewhere they never turn it true.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, workdir: Path | None = None):
        self.name = ""
        self._file = None if workdir is None else workdir / STOP_FILE
        self._interrupted = False
        self._before = {}
        self._closed = threading.Event()

    @property
    def requested(self) -> bool:
        if not self.name and self._file is not None and self._file.exists():
            self.name = f"the file {self._file}"
        return bool(self.name)

    def __enter__(self) -> Notice:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        address = os.environ.get(METADATA_VARIABLE)
        if address:
            threading.Thread(target=self._poll, args=(address,), daemon=True, name="preemption notice").start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None and self.name == f"the file {self._file}":
            self._file.unlink(missing_ok=True)  # heard; it must not stop the next start

    def _handle(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.name = signal.Signals(number).name

    def _poll(self, address: str) -> None:
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        while not self._closed.wait(POLL_SECONDS) and not self.name:
            with contextlib.suppress(OSError, ValueError):  # no answer is no notice
                with urllib.request.urlopen(request, timeout=POLL_SECONDS) as answer:
                    if answer.read(16).strip().upper() == b"TRUE":
                        self.name = "the cloud's preemption notice"
