"""The one thread that drives the engine, and how an event loop gives it requests and takes what they got.

The loop's thread only puts commands into a queue and reads what was delivered; the engine's thread only takes commands,
steps, and delivers into the loop, once per step.  What a client has not read yet is kept as token ids, of which there
are at most as many as it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.serve.api import Refused

if TYPE_CHECKING:
    from tinyllama_jax.generate.engine import Piece, Request

INTERNAL = "the server failed while it answered"
STOPPING = "the server is stopping; ask again later, or another one"


class Engine(Protocol):
    rows: int
    context_tokens: int

    def add(self, request: Request) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[Piece]: ...
    @property
    def busy(self) -> bool: ...


@dataclass(eq=False)
class _Row:
    job: Job
    request: Request
    tokens: list[int] = field(default_factory=list)  # delivered, not taken yet
    finish: str | None = None
    taken: bool = False  # the end of it
    number: int = -1  # the engine's; only its thread knows it
    gone: bool = False  # cancelled; only the engine's thread looks


class Job:
    """The rows of one HTTP request.  Of the loop's thread."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        self._worker, self._news = worker, asyncio.Event()
        self._error: Refused | None = None
        self.rows = [_Row(self, request) for request in requests]

    async def arrived(self) -> list[tuple[int, list[int], str | None]]:
        """Waits for news: (row, new tokens, None or how it ended).  An end comes once.  Raises Refused."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        news = []
        for i, row in enumerate(self.rows):
            if (row.tokens or row.finish) and not row.taken:
                news.append((i, row.tokens, row.finish))
                row.tokens, row.taken = [], row.finish is not None
        return news

    def cancel(self, index: int | None = None) -> None:
        """Ends one row, or all; rows that have ended are none of its business."""
        for row in self.rows if index is None else [self.rows[index]]:
            if row in self._worker.open:
                self._worker.open.discard(row)
                self._worker.cancelled += 1
                self._worker.inbox.put(("cancel", row))

    def fail(self, error: Refused) -> None:
        self._error = error
        self._news.set()

    def deliver(self, row: _Row, tokens: list[int], finish: str | None) -> None:
        row.tokens += tokens
        row.finish = finish
        self._news.set()


class Worker:
    """open: rows that are asked for and have not ended, waiting ones too; at most engine.rows + `waiting` of them."""

    def __init__(
        self,
        engine: Engine,
        *,
        waiting: int,
        inside: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        """inside: a context that the engine's thread runs in."""
        self.engine, self.capacity, self._inside = engine, engine.rows + waiting, inside
        self.inbox: queue.SimpleQueue[tuple[str, _Row | None]] = queue.SimpleQueue()
        self.open: set[_Row] = set()
        self.answered = self.cancelled = self.tokens = 0
        self.running = 0  # in the engine, by its thread's account
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- the loop's thread -------------------------------------------------------------------------------------

    def admit(self, rows: int) -> None:
        """Raises Refused: 400 for more rows than ever fit, 429 when the queue is full, 503 at the end."""
        if self.failure is not None:
            raise Refused(500, INTERNAL)
        if self._stopping:
            raise Refused(503, STOPPING)
        if rows > self.capacity:
            raise Refused(400, f"{rows} answers at once are asked for; this server has {self.capacity} places")
        if len(self.open) + rows > self.capacity:
            raise Refused(429, f"all {self.capacity} places are taken; ask again later", code="queue_full")

    def submit(self, requests: Sequence[Request]) -> Job:
        """Raises Refused as `admit` does."""
        self.admit(len(requests))
        job = Job(self, requests)
        for row in job.rows:
            self.open.add(row)
            self.inbox.put(("add", row))
        return job

    def cancel_all(self) -> None:
        """Whoever waits for an answer is told that it is cancelled."""
        for row in list(self.open):
            row.job.cancel(row.job.rows.index(row))
            row.job.deliver(row, [], "cancelled")

    async def stop(self, seconds: float = 10.0) -> None:
        """Takes no more, and waits until the thread has ended, which a step that takes longer cannot be made to."""
        self._stopping = True
        self.inbox.put(("stop", None))
        await asyncio.to_thread(self._thread.join, seconds)

    def _deliver(self, pieces: list[tuple[_Row, list[int], str | None]], running: int) -> None:
        self.running = running
        for row, tokens, finish in pieces:
            self.tokens += len(tokens)
            if row in self.open:
                row.job.deliver(row, tokens, finish)
                if finish is not None:
                    self.open.discard(row)
                    self.answered += 1

    def _refuse(self, row: _Row, message: str) -> None:
        self.open.discard(row)
        row.job.fail(Refused(400, message))

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for row in self.open:
            row.job.fail(Refused(500, INTERNAL))
        self.open.clear()
        self.failed.set()

    # -- the engine's thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        rows: dict[int, _Row] = {}
        try:
            with self._inside():
                while self._obey(rows):
                    if self.engine.busy:
                        pieces = self.engine.step()
                        known = [(rows[p.number], p.tokens, p.finish) for p in pieces if p.number in rows]
                        for piece in pieces:
                            if piece.finish is not None:
                                rows.pop(piece.number, None)
                        self._loop.call_soon_threadsafe(self._deliver, known, len(rows))
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._fail, error)

    def _obey(self, rows: dict[int, _Row]) -> bool:
        """Does what was asked for; waits for it when there is nothing else to do.  False at the end."""
        wait = not self.engine.busy
        while True:
            try:
                what, row = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if row is None:
                return False
            if what == "cancel":
                row.gone = True
                if row.number in rows:
                    self.engine.cancel(row.number)
                    del rows[row.number]
                    self._loop.call_soon_threadsafe(self._deliver, [], len(rows))
            elif not row.gone:
                try:
                    row.number = self.engine.add(row.request)
                    rows[row.number] = row
                except ConfigError as error:
                    self._loop.call_soon_threadsafe(self._refuse, row, str(error))
