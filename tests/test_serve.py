"""What a server lives through: crowds, clients that leave or do not read, a stop under load, a broken engine.

The engine has no model here; test_serve_process.py does it with a whole program.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import aiohttp
import pytest
from fake_engine import BOS, Bytes, FakeEngine
from serving import CHAT, chunks, post, serving, start, stats, until
from test_serve_api import CHATS, COMPLETIONS, chat_prompt, expected

from tinyllama_jax.cli import main
from tinyllama_jax.errors import ConfigError

ENDLESS = CHAT | {"stream": True, "seed": 0}


def test_two_hundred_clients_at_once_get_their_own_answers():
    async def scenario():
        engine = FakeEngine(rows=4)
        async with serving(engine) as (client, _):

            async def ask(i):
                asked = CHAT | {"seed": i, "max_tokens": 5 + i % 7}
                text = expected(chat_prompt("hi"), 5 + i % 7, seed=i)
                if i % 2:
                    status, value = await post(client, CHATS, asked)
                    return status == 200 and value["choices"][0]["message"]["content"] == text
                async with client.post(CHATS, json=asked | {"stream": True}) as response:
                    *events, done = await chunks(response)
                said = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
                return done == "[DONE]" and said == text

            assert all(await asyncio.gather(*map(ask, range(200))))
            assert engine.most_running == 4
            found = await until(client, in_engine=0)
            assert (found["answered"], found["running_or_waiting"]) == (202, 0), "two of them to warm up"

    asyncio.run(scenario())


def test_more_than_there_is_room_for_is_asked_to_come_again():
    async def scenario():
        async with serving(FakeEngine(rows=2, seconds=0.01), waiting=3) as (client, _):
            many = {"prompt": "a", "n": 5, "max_tokens": 60}
            first = asyncio.create_task(post(client, COMPLETIONS, many))
            await until(client, running_or_waiting=5)
            async with client.post(COMPLETIONS, json={"prompt": "a"}) as response:
                assert response.status == 429 and int(response.headers["Retry-After"]) > 0
                assert (await response.json())["error"]["code"] == "queue_full"
            async with client.post(COMPLETIONS, json={"prompt": ["a"] * 100_000, "n": 128}) as response:
                assert response.status == 400 and "12800000 answers" in await response.text()
            first.cancel()  # its client hangs up
            found = await until(client, running_or_waiting=0, in_engine=0)
            assert found["cancelled"] == 5
            assert (await post(client, COMPLETIONS, {"prompt": "a", "n": 5, "max_tokens": 1}))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_hangs_up_frees_its_row(streaming):
    async def scenario():
        async with serving(FakeEngine(rows=1, seconds=0.01, context_tokens=10_000)) as (client, _):
            asked = ENDLESS | {"stream": streaming}
            if streaming:
                response = await client.post(CHATS, json=asked)
                await response.content.readuntil(b"\n\n")
                response.close()
            else:
                task = asyncio.create_task(client.post(CHATS, json=asked))
                await until(client, in_engine=1)
                task.cancel()
            await until(client, in_engine=0, running_or_waiting=0, cancelled=1)
            assert (await post(client, CHATS, CHAT | {"max_tokens": 2}))[0] == 200

    asyncio.run(scenario())


async def deaf(client, body: dict):
    """A connection that has sent a request, and reads no more than the first line of the answer."""
    address = client._base_url
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((address.host, address.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    return reader, writer


def test_a_client_that_does_not_read_a_stream_is_cut_off():
    """When a connection's buffers are full, it has some time to read; then its rows are freed."""

    async def scenario():
        engine = FakeEngine(rows=129, context_tokens=10_000, seconds=0.002)
        async with serving(engine, write_seconds=0.4) as (client, _):
            reader, writer = await deaf(client, {"prompt": "a", "n": 128, "max_tokens": 5000, "stream": True})
            assert (await post(client, CHATS, CHAT | {"max_tokens": 2}))[0] == 200, "others are answered"
            await until(client, in_engine=0, running_or_waiting=0, cancelled=128)
            rest = await reader.read()
            assert b"data: " in rest and b"[DONE]" not in rest and not rest.endswith(b"0\r\n\r\n"), (
                "and no whole stream"
            )
            writer.close()

    asyncio.run(scenario())


def test_a_client_that_does_not_read_an_answer_is_cut_off():
    async def scenario():
        async with serving(FakeEngine(context_tokens=100_000), write_seconds=0.3) as (client, _):
            before = len(os.listdir("/proc/self/fd"))
            said = {"prompt": "a" * 90_000, "n": 60, "max_tokens": 1, "echo": True}
            _, writer = await deaf(client, said)
            async with asyncio.timeout(10):
                while len(os.listdir("/proc/self/fd")) > before + 1:  # the server's end is closed
                    await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(scenario())


def test_a_connection_without_a_request_is_closed():
    async def scenario():
        async with serving(idle_seconds=0.3) as (client, _):
            address = client._base_url
            for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Sl"):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(sent)
                async with asyncio.timeout(3):
                    assert await reader.read() == b""
                writer.close()

    asyncio.run(scenario())


def test_a_broken_engine_ends_the_server_and_says_so_to_everybody(capsys):
    async def scenario():
        async with serving(FakeEngine(rows=7, seconds=0.01, context_tokens=1000)) as (client, task):
            response = await client.post(CHATS, json=ENDLESS)
            await response.content.readuntil(b"\n\n")
            waiting = [asyncio.create_task(post(client, CHATS, CHAT)) for _ in range(5)]
            await until(client, running_or_waiting=6)
            status, value = await post(client, COMPLETIONS, {"prompt": "!", "stream": True})
            answers = [(status, value), *await asyncio.gather(*waiting)]
            for status, value in answers:
                assert status == 500 and value["error"]["type"] == "server_error"
                assert "device" not in value["error"]["message"]
            *_, last = await chunks(response)
            assert last["error"]["type"] == "server_error"
            with pytest.raises(RuntimeError, match="the device is gone"):
                await task

    asyncio.run(scenario())


def test_sigterm_lets_answers_end_and_takes_no_more():
    async def scenario():
        async with serving(FakeEngine(rows=4, seconds=0.01, context_tokens=200)) as (client, task):
            asked = CHAT | {"seed": 3, "max_tokens": 60}
            streams = [await client.post(CHATS, json=asked | {"stream": True}) for _ in range(4)]
            waiting = [asyncio.create_task(post(client, CHATS, asked)) for _ in range(4)]
            await until(client, running_or_waiting=8)
            os.kill(os.getpid(), signal.SIGTERM)
            status, value = None, None
            while status != 503:
                status, value = await post(client, CHATS, CHAT | {"max_tokens": 1})
            assert "stopping" in value["error"]["message"]
            async with client.get("/health") as response:
                assert response.status == 503
            text = expected(chat_prompt("hi"), 60, seed=3)
            for response in streams:
                *events, done = await chunks(response)
                assert done == "[DONE]"
                assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text
            for status, value in await asyncio.gather(*waiting):
                assert status == 200 and value["choices"][0]["message"]["content"] == text
            await asyncio.wait_for(task, 20)
            with pytest.raises(aiohttp.ClientConnectionError):
                await client.get("/health")

    asyncio.run(scenario())


@pytest.mark.parametrize("twice", [False, True])
def test_after_the_grace_or_a_second_signal_answers_are_cut(twice):
    async def scenario():
        engine = FakeEngine(rows=1, seconds=0.01, context_tokens=100_000)
        async with serving(engine, grace=60 if twice else 0.2) as (client, task):
            stream = await client.post(CHATS, json=ENDLESS)
            await stream.content.readuntil(b"\n\n")
            waiting = asyncio.create_task(post(client, CHATS, CHAT))
            await until(client, running_or_waiting=2)
            os.kill(os.getpid(), signal.SIGTERM)
            if twice:
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)
            status, value = await waiting
            assert status == 503 and value["error"]["type"] == "server_error"
            *_, last = await chunks(stream)
            assert "stopping" in last["error"]["message"], "a whole stream, which says that it was cut"
            await asyncio.wait_for(task, 20)

    asyncio.run(scenario())


def test_nothing_is_left_behind_by_hundreds_of_requests():
    async def scenario():
        async with serving(FakeEngine(rows=4, context_tokens=200)) as (client, _):

            async def one(i):
                if i % 4 == 0:
                    return await post(client, CHATS, CHAT | {"max_tokens": 3})
                if i % 4 == 1:
                    return await post(client, CHATS, CHAT | {"n": 0})
                response = await client.post(CHATS, json=ENDLESS)
                await response.content.readuntil(b"\n\n")
                response.close() if i % 4 == 2 else await response.read()

            async def kept():
                await asyncio.gather(*map(one, range(20)))
                await until(client, in_engine=0, running_or_waiting=0)
                return {"files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}

            before = await kept()
            tasks = len(asyncio.all_tasks())
            for _ in range(15):
                after = await kept()
            assert after["threads"] <= before["threads"] and after["files"] <= before["files"] + 20  # connections kept
            assert len(asyncio.all_tasks()) <= tasks + 20
            assert (await stats(client))["requests"] > 300

    asyncio.run(scenario())


def test_an_address_that_is_taken_is_said():
    async def scenario():
        async with serving() as (client, _):
            task, _ = start(FakeEngine(), port=client._base_url.port)
            with pytest.raises(ConfigError, match=r"127\.0\.0\.1:\d+ cannot be listened on: .*in use"):
                await task

    asyncio.run(scenario())


def test_a_signal_before_the_first_answer_ends_it():
    async def scenario():
        task, address = start(FakeEngine(seconds=0.2))
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 20)
        assert not address.done()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (("--rows", "0"), 2, "--rows 0"),
        (("--port", "70000"), 2, "--port 70000"),
        (("--grace", "nan"), 2, "--grace nan"),
        (("--max-body", "0"), 2, "--max-body 0"),
        (("--api-key-env", "NO_SUCH_VARIABLE"), 78, "NO_SUCH_VARIABLE: this variable is not set"),
        (("--template", "llama"), 2, "invalid choice: 'llama'"),
    ],
)
def test_wrong_options_are_refused_in_a_line(words, status, line, capsys):
    assert main(["serve", "nowhere", *words]) == status
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_missing_package_is_named_with_the_way_to_get_it(capsys, monkeypatch, tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["serve", str(tmp_path)]) == 78
    assert capsys.readouterr().err == "tinyllama serve: serve needs aiohttp: pip install 'tinyllama_jax[serve]'\n"


def test_the_verb_serves_until_its_engine_breaks(capsys, monkeypatch, tmp_path):
    """From the options to the exit: a model's place is taken by an engine without one."""
    (tmp_path / "meta.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = FakeEngine(rows=3, context_tokens=50)
    loaded = argparse.Namespace(meta={"name": "tiny"}, model=argparse.Namespace(vocab_size=259))
    made = argparse.Namespace(
        engine=engine, tokenizer=Bytes(), start=(BOS,), loaded=loaded, inside=contextlib.nullcontext
    )
    monkeypatch.setattr("tinyllama_jax.generate.ready.ready", lambda *given, **options: made)
    monkeypatch.setenv("A_KEY", "secret")
    answers = []

    def ask(prompt):
        body = json.dumps({"prompt": prompt}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
        try:
            return urllib.request.urlopen(asked, timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code

    def client():
        while True:
            with contextlib.suppress(urllib.error.URLError):  # it is not there yet
                answers.append(ask("a"))
                break
            time.sleep(0.02)
        answers.append(ask("!"))

    thread = threading.Thread(target=client)
    thread.start()
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(["serve", str(tmp_path), "--host", "0.0.0.0", "--port", str(port), "--json", "--api-key-env", "A_KEY"])
    thread.join()
    assert answers == [200, 500]
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert (about["port"], about["model"], about["template"]) == (port, "tiny", None)
    said = err.splitlines()
    assert len(said) == 3 and "warning" not in err
    assert "no chat" in said[0] and f"tiny at http://0.0.0.0:{port}/v1: 8 rows of 50 tokens, no chat" == said[1]
    assert said[2].startswith("the engine failed, and the server ends: RuntimeError")


def test_an_open_door_is_warned_of(capsys, monkeypatch, tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    for words, warned in ((("--host", "0.0.0.0"), True), ((), False), (("--host", "localhost"), False)):
        assert main(["serve", str(tmp_path), *words]) == 78, "there is no model"
        assert ("can be reached from elsewhere, and no key is asked for" in capsys.readouterr().err) is warned
