"""A server in this process, with an engine that has no model, on a port of its own; and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
from fake_engine import BOS, Bytes, FakeEngine

from tinyllama_jax.generate.chat import TEMPLATES, Chat
from tinyllama_jax.serve import run
from tinyllama_jax.serve.app import Limits, Served

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def served(engine, *, chat: bool = True) -> Served:
    tokenizer = Bytes()
    return Served(
        name="tiny",
        tokenizer=tokenizer,
        start=(BOS,),
        chat=Chat(TEMPLATES["zephyr"], tokenizer, [BOS], {}) if chat else None,
        context_tokens=engine.context_tokens,
        vocab_size=tokenizer.vocab_size,
    )


def start(
    engine, *, chat=True, key="", waiting=256, grace=60.0, port=0, **limits
) -> tuple[asyncio.Task, asyncio.Future]:
    """The server as a task, and its address to come."""
    address = asyncio.get_running_loop().create_future()
    serving = run.serve(
        engine,
        served(engine, chat=chat),
        host="127.0.0.1",
        port=port,
        waiting=waiting,
        grace=grace,
        limits=Limits(**limits),
        key=key,
        inside=contextlib.nullcontext,
        started=lambda host, port: address.set_result(f"http://{host}:{port}"),
    )
    return asyncio.create_task(serving), address


@contextlib.asynccontextmanager
async def serving(engine=None, *, headers=None, **options):
    """A client of a running server; `client.server` is its task."""
    task, address = start(engine or FakeEngine(), **options)
    try:
        await asyncio.wait({task, address}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(await address, headers=headers, connector=connector) as client:
            yield client, task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await task


async def post(client, path: str, body: dict) -> tuple[int, dict]:
    async with client.post(path, json=body) as response:
        return response.status, await response.json()


async def chunks(response) -> list[dict | str]:
    """The events of a stream: objects, and the last word."""
    assert response.status == 200 and response.content_type == "text/event-stream", await response.text()
    text = (await response.read()).decode()
    assert text.endswith("\n\n")
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


async def stats(client) -> dict:
    async with client.get("/stats") as response:
        return await response.json()


async def until(client, seconds: float = 20.0, **wanted) -> dict:
    """/stats, as soon as it says this."""
    async with asyncio.timeout(seconds):
        while True:
            found = await stats(client)
            if wanted.items() <= found.items():
                return found
            await asyncio.sleep(0.01)
