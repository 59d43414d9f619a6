"""`serve` and `chat` as whole programs with a model: what is promised of them under load, abuse and signals."""

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import tiny_checkpoint
from serving import chunks, post, until

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.make(tmp_path_factory.mktemp("tiny"), context_tokens=128)


def program(*words, before=(), **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    words = [*before, sys.executable, "-m", "tinyllama_jax", *map(str, words)]
    return subprocess.Popen(words, env=environment, **options)


class Server:
    def __init__(self, checkpoint, *words):
        words = ("serve", checkpoint, "--port", 0, "--rows", 4, "--json", *words)
        self.process = program(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.about = json.loads(self.process.stdout.readline() or self.process.communicate()[1])
        self.folder = Path(f"/proc/{self.process.pid}")

    def memory(self) -> int:
        """Resident bytes."""
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", (self.folder / "status").read_text())[1])

    def kept(self) -> dict[str, int]:
        return {name: len(os.listdir(self.folder / name)) for name in ("fd", "task")}

    def client(self):
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(self.about["address"], connector=connector, timeout=aiohttp.ClientTimeout(120))


@pytest.fixture(scope="module")
def server(checkpoint):
    made = Server(checkpoint)
    yield made
    made.process.send_signal(signal.SIGINT)
    said = made.process.communicate(timeout=60)[1]
    assert made.process.returncode == 0 and "Traceback" not in said and said.endswith("stopped\n")


def content(value) -> str:
    return value["choices"][0]["message"]["content"]


def ask(words: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": words}], "max_tokens": 24, **more}


def test_an_answer_does_not_depend_on_the_others(server):
    """Greedily, and by a seed; alone, and while other rows come and go."""

    async def scenario():
        async with server.client() as client:
            asked = [
                ask("hi", temperature=0),
                ask("hi", seed=7),
                ask("def f(x)" * 3, seed=7),
                ask("jumps", seed=8),
            ]
            alone = [content((await post(client, CHATS, each))[1]) for each in asked]
            again = [content((await post(client, CHATS, each))[1]) for each in asked]
            assert alone == again and len(set(alone)) == 4

            async def crowd(i):
                await post(client, CHATS, ask("x" * (1 + i % 30), max_tokens=1 + i % 20, temperature=0.5 * (i % 3)))

            others = [asyncio.create_task(crowd(i)) for i in range(60)]
            among = await asyncio.gather(*(post(client, CHATS, each) for each in asked * 5))
            await asyncio.gather(*others)
            assert [content(value) for _, value in among] == alone * 5
            async with client.post(CHATS, json=asked[1] | {"stream": True}) as response:
                *events, done = await chunks(response)
            assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == alone[1]

    asyncio.run(scenario())


def test_a_crowd_is_answered_and_leaves_nothing(server):
    """Two hundred clients at a time, some of which hang up or send nonsense; then as much memory as before."""

    async def one(client, i):
        kind = i % 5
        if kind == 0:
            assert (await post(client, CHATS, ask("hi", n=2, max_tokens=3)))[0] == 200
        elif kind == 1:
            status, value = await post(client, COMPLETIONS, {"prompt": "the", "max_tokens": 5, "temperature": 0})
            assert status == 200 and value["usage"]["completion_tokens"] == 5
        elif kind == 2:
            async with client.post(CHATS, data=b"{", headers={"Content-Type": "application/json"}) as response:
                assert response.status == 400
        elif kind == 3:
            async with client.post(CHATS, json=ask("hi", stream=True)) as response:
                assert (await chunks(response))[-1] == "[DONE]"
        else:
            response = await client.post(CHATS, json=ask("hi", stream=True, max_tokens=100))
            await response.content.readuntil(b"\n\n")
            response.close()

    async def crowd():
        async with server.client() as client:
            await asyncio.gather(*(one(client, i) for i in range(200)))
            return await until(client, 60, in_engine=0, running_or_waiting=0)

    async def scenario():
        before = server.kept()
        await crowd()
        threads, memory = server.kept()["task"], server.memory()
        for _ in range(4):
            found = await crowd()
        async with asyncio.timeout(20):  # the last connections are being closed
            while server.kept()["fd"] > before["fd"] + 2:
                await asyncio.sleep(0.1)
        after, memory_now = server.kept(), server.memory()
        print(f"{found}, {before} then {after}, {memory / 1e6:.0f} then {memory_now / 1e6:.0f} MB")
        assert found["cancelled"] >= 100 and after["task"] <= threads
        assert memory_now < memory + 10e6

    asyncio.run(scenario())


@pytest.mark.parametrize("chunked", [True, False])
def test_a_huge_body_is_refused_early_and_not_kept(server, chunked):
    async def scenario():
        async with server.client() as client:
            await post(client, CHATS, ask("hi", max_tokens=1))
        before, most, size = server.memory(), 0, 100_000_000
        host, port = server.about["host"], server.about["port"]
        reader, writer = await asyncio.open_connection(host, port)
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = f"POST {CHATS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        writer.write(head.encode())
        part = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n" if chunked else b"x" * 1_000_000
        writer.write(part * 2)
        async with asyncio.timeout(30):  # of a hundred million bytes two are enough to know
            assert await reader.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(98):
                writer.write(part)
                await writer.drain()
                most = max(most, server.memory())
        print(f"memory grew by {(most - before) / 1e6:.1f} MB")
        assert most - before < 10e6
        writer.close()

    asyncio.run(scenario())


def test_sigterm_under_load_ends_streams_and_the_program_with_status_0(checkpoint):
    server = Server(checkpoint)

    async def scenario():
        async with server.client() as client:
            whole = content((await post(client, CHATS, ask("hi", seed=3, max_tokens=60)))[1])

            async def stream():
                async with client.post(CHATS, json=ask("hi", seed=3, max_tokens=60, stream=True)) as response:
                    if response.status == 503:
                        return None
                    *events, done = await chunks(response)
                assert done == "[DONE]"
                return "".join(e["choices"][0]["delta"].get("content", "") for e in events)

            running = [asyncio.create_task(stream()) for _ in range(40)]
            await until(client, 30, in_engine=40)
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                with contextlib.suppress(aiohttp.ClientConnectionError):  # it has ended already
                    while (await post(client, CHATS, ask("hi", max_tokens=1)))[0] != 503:
                        pass
            assert await asyncio.gather(*running) == [whole] * 40

    try:
        asyncio.run(scenario())
        said = server.process.communicate(timeout=60)[1]
        assert server.process.returncode == 0 and said.endswith("stopped\n") and "Traceback" not in said
    finally:
        server.process.kill()
        server.process.wait()


def test_chat_on_a_terminal(tmp_path):
    """Ctrl-C stops an answer, and at the prompt drops the line; Ctrl-D ends."""
    checkpoint = tiny_checkpoint.make(tmp_path, context_tokens=4096)
    ours, theirs = pty.openpty()
    words = ("chat", checkpoint, "--max-new-tokens", 1900, "--temperature", 1)
    process = program(*words, before=("setsid", "--ctty"), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""

    def see(wanted: bytes, seconds: float = 60.0) -> bytes:
        """What is shown until this has been; it is taken away."""
        nonlocal shown
        end = time.monotonic() + seconds
        while wanted not in shown:
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"{wanted!r} was not shown: {shown!r}"
            shown += os.read(ours, 4096)
        before, _, shown = shown.partition(wanted)
        return before

    try:
        see(b"> ")
        os.write(ours, b"hi\n")
        see(b"hi\r\n")
        see(b" ")
        os.write(ours, b"\x03")
        assert len(see(b"\n> ")) < 1900, "stopped before its end"
        os.write(ours, b"/reset\n")
        see(b"> ")
        time.sleep(0.5)  # until the line editor is at work
        os.write(ours, b"half a line")
        see(b"half a line")
        time.sleep(0.5)  # until it waits again: Python loses a Ctrl-C that comes while it reads a key
        os.write(ours, b"\x03")
        see(b"\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
