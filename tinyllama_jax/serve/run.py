"""From the first request to the last: start, serve, stop.

At SIGTERM or SIGINT new requests get 503, those that run go on for the seconds of grace, and are then ended; a second
signal ends them at once.  A failure of the engine ends the server.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager

from aiohttp import web

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.engine import Request
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.serve.api import Refused
from tinyllama_jax.serve.app import App, Limits, Served
from tinyllama_jax.serve.worker import Engine, Worker

LINGER_SECONDS = 5  # that the rest of a refused body is thrown away, so that its sender can read why
CLOSE_SECONDS = 3  # that connections have to take what is written


async def serve(
    engine: Engine,
    served: Served,
    *,
    host: str,
    port: int,
    waiting: int,
    grace: float,
    limits: Limits,
    key: str,
    inside: Callable[[], AbstractContextManager],
    started: Callable[[str, int], None],
) -> None:
    """Serves until a signal; `started` is told the address.  Call it in the main thread.

    Raises ConfigError when the address cannot be had, and what the engine raised.
    """
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # App says what fails here; clients' faults nobody
    stop, again = asyncio.Event(), asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, lambda: (again if stop.is_set() else stop).set())
    worker = Worker(engine, waiting=waiting, inside=inside)
    app = App(served, worker, limits, key)
    runner = web.AppRunner(
        app.application(),
        handler_cancellation=True,
        handle_signals=False,
        access_log=None,
        keepalive_timeout=limits.idle_seconds,
        lingering_time=LINGER_SECONDS,
        shutdown_timeout=CLOSE_SECONDS,
    )
    try:
        await _first(stop.wait(), worker.failed.wait(), _warm(worker, served))
        if not (stop.is_set() or worker.failed.is_set()):
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error
            started(*runner.addresses[0][:2])
            await _first(stop.wait(), worker.failed.wait())
        app.stopping = True
        await _first(_idle(app), again.wait(), worker.failed.wait(), asyncio.sleep(grace))
        worker.cancel_all()
        await _first(_idle(app), asyncio.sleep(CLOSE_SECONDS))
    finally:
        await runner.cleanup()
        await worker.stop()
    if worker.failure is not None:
        raise worker.failure


async def _warm(worker: Worker, served: Served) -> None:
    """Compiles what every answer needs before anybody waits.  Raises ConfigError when nothing can be answered."""
    for temperature in (0.0, 1.0):
        prompt, sampling = served.start or (served.tokenizer.eos_id,), Sampling(temperature=temperature)
        job = worker.submit([Request(prompt=prompt, max_new_tokens=2, sampling=sampling)])
        try:
            while not any(finish for _, _, finish in await job.arrived()):
                pass
        except Refused as refused:
            if refused.status < 500:  # else the worker's failure says it
                raise ConfigError(f"the engine refuses to begin: {refused.message}") from refused
            return


async def _idle(app: App) -> None:
    while app.active:
        await asyncio.sleep(0.02)


async def _first(*awaited: Coroutine) -> None:
    """Waits for the first of them, and ends the others."""
    tasks = [asyncio.ensure_future(each) for each in awaited]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
