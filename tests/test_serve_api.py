"""The API as clients see it: answers, streams, and what is refused, with an engine that has no model."""

import asyncio
import gzip
import json

import aiohttp
import pytest
from fake_engine import BOS, EOS, FIRST, Bytes, FakeEngine, answer
from serving import CHAT, chunks, post, serving

from tinyllama_jax.generate.engine import Request
from tinyllama_jax.generate.sampling import Sampling

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
ZEPHYR = "<|user|>\n{}"


def expected(prompt, tokens, *, seed=0, stream=0) -> str:
    """What the engine without a model says to a prompt (ids, or a text behind BOS)."""
    ids = [BOS, *Bytes().encode(prompt)] if isinstance(prompt, str) else prompt
    ids = tuple(ids)
    return Bytes().decode(
        answer(Request(prompt=ids, max_new_tokens=tokens, sampling=Sampling(seed=seed, stream=stream)))
    )


def chat_prompt(text: str) -> list[int]:
    encode = Bytes().encode
    return [BOS, *encode(f"<|user|>\n{text}"), EOS, *encode("\n<|assistant|>\n")]


def test_completions():
    async def scenario():
        async with serving() as (client, _):
            status, value = await post(client, COMPLETIONS, {"model": "tiny", "prompt": "ab", "seed": 3})
            text = expected("ab", 16, seed=3)
            assert (status, value["object"], value["model"]) == (200, "text_completion", "tiny")
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
            assert value["choices"] == [choice]
            assert value["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}

            # Several prompts, several answers to each, token ids as they are, and the prompt said again.
            asked = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 4, "echo": True, "seed": -1}
            _, value = await post(client, COMPLETIONS, asked)
            texts = [p + expected(p, 4, seed=2**32 - 1, stream=i) for i, p in enumerate(["ab", "ab", "c", "c"])]
            assert [c["text"] for c in value["choices"]] == texts and len(set(texts)) == 4
            assert value["usage"] == {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
            ids = [FIRST + ord("x"), 300 - 42]
            _, value = await post(client, COMPLETIONS, {"prompt": ids, "max_tokens": 2, "seed": 0})
            assert value["choices"][0]["text"] == expected(ids, 2) and value["usage"]["prompt_tokens"] == 2

            # EOS ends an answer and says nothing; a stop string does, and is not part of it.
            _, value = await post(client, COMPLETIONS, {"prompt": "a?", "max_tokens": 30, "seed": 0})
            assert value["choices"][0]["text"] == expected("a?", 30) and len(expected("a?", 30)) == 10
            assert (value["choices"][0]["finish_reason"], value["usage"]["completion_tokens"]) == ("stop", 11)
            whole = expected("ab", 30)
            stop = whole[7:10]
            _, value = await post(
                client, COMPLETIONS, {"prompt": "ab", "max_tokens": 30, "seed": 0, "stop": ["z", stop]}
            )
            assert value["choices"][0]["text"] == whole[: whole.index(stop)]
            assert value["choices"][0]["finish_reason"] == "stop" and value["usage"]["completion_tokens"] < 20

    asyncio.run(scenario())


def test_chat_completions():
    async def scenario():
        async with serving() as (client, _):
            asked = CHAT | {"seed": 1, "max_completion_tokens": 9, "user": "someone", "logprobs": False, "stop": None}
            status, value = await post(client, CHATS, asked)
            text = expected(chat_prompt("hi"), 9, seed=1)
            message = {"role": "assistant", "content": text}
            assert (status, value["object"], value["choices"][0]["message"]) == (200, "chat.completion", message)
            assert value["usage"]["prompt_tokens"] == len(chat_prompt("hi"))
            # Up to the end of the context unless said otherwise; parts of text are one text.
            parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
            _, value = await post(client, CHATS, {"messages": [{"role": "user", "content": parts}]})
            assert value["usage"]["total_tokens"] == 64 and value["choices"][0]["finish_reason"] == "length"
            # A different draw each time, unless a seed is given.
            texts = {(await post(client, CHATS, CHAT))[1]["choices"][0]["message"]["content"] for _ in range(3)}
            assert len(texts) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("block", [1, 5])
def test_streams_say_the_same_in_pieces(block):
    async def scenario():
        async with serving(FakeEngine(block=block, seconds=0.002)) as (client, _):
            asked = CHAT | {"n": 3, "seed": 5, "stop": ["zz"], "max_tokens": 20}
            _, whole = await post(client, CHATS, asked)
            streaming = asked | {"stream": True, "stream_options": {"include_usage": True}}
            async with client.post(CHATS, json=streaming) as response:
                *events, last, done = await chunks(response)
            assert done == "[DONE]" and last["choices"] == [] and last["usage"] == whole["usage"]
            assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
            assert all(e["usage"] is None for e in events)
            for i, choice in enumerate(whole["choices"]):
                own = [e["choices"][0] for e in events if e["choices"][0]["index"] == i]
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
                assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
                assert len(own) > 1

            asked = {"prompt": "ab", "max_tokens": 10, "echo": True, "seed": 2}
            async with client.post(COMPLETIONS, json=asked | {"stream": True}) as response:
                *events, done = await chunks(response)
            assert "".join(e["choices"][0]["text"] for e in events) == "ab" + expected("ab", 10, seed=2)
            assert done == "[DONE]" and events[-1]["choices"][0]["finish_reason"] == "length"
            assert {e["object"] for e in events} == {"text_completion"} and "usage" not in events[0]

    asyncio.run(scenario())


USER = {"role": "user", "content": "x"}
WRONG_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [259]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
    ({"prompt": "a", "temperature": 2.1}, "temperature"),
    ({"prompt": "a", "temperature": "0"}, "temperature"),
    ({"prompt": "a", "temperature": True}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": -1}, "top_k"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 129}, "n"),
    ({"prompt": "a", "seed": 2**63}, "seed"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": list("abcde")}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"),
    ({"prompt": "a", "stream": 1}, "stream"),
    ({"prompt": "a", "echo": "yes"}, "echo"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "x"),
    ({"prompt": "a", "logprobs": 0}, "logprobs"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "model": 5}, "model"),
    ({"prompt": "a" * 1000}, None),
    ({"prompt": "a", "max_tokens": 63}, None),
    ({"prompt": "a" * 63}, None),
]
WRONG_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [USER | {"content": 3}]}, "messages[0].content"),
    ({"messages": [USER | {"name": "me"}]}, "name"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [USER, USER]}, None),
    ({"messages": [USER | {"role": "tool"}]}, None),
    ({"messages": [USER | {"content": " "}]}, None),
    ({"messages": [USER], "tools": [{}]}, "tools"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [USER], "logprobs": True}, "logprobs"),
    ({"messages": [USER], "echo": True}, "echo"),
    ({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
]


def test_what_is_wrong_is_said_with_its_field():
    async def scenario():
        async with serving() as (client, _):
            for path, cases in ((COMPLETIONS, WRONG_COMPLETIONS), (CHATS, WRONG_CHATS)):
                for body, param in cases:
                    status, value = await post(client, path, body)
                    error = value["error"]
                    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error"), body
                    assert 0 < len(error["message"]) < 200 and "\n" not in error["message"], body
            # What is null or asks for nothing is no reason.
            assert (await post(client, COMPLETIONS, {"prompt": "a", "logprobs": None, "best_of": 1, "top_k": 0}))[
                0
            ] == 200
            assert (await post(client, CHATS, CHAT | {"tools": [], "frequency_penalty": 0.0}))[0] == 200

    asyncio.run(scenario())


MALFORMED = [b"", b"{", b"[]", b"3", b'{"prompt": NaN}', b"\xff\xfe{}", b'{"prompt": "\\ud800"}', b"[" * 100_000]


def test_http_is_answered_with_the_right_status():
    async def scenario():
        async with serving(body_bytes=200_000, body_seconds=0.3) as (client, _):

            async def status(method, path, **options):
                async with client.request(method, path, **options) as response:
                    value = await response.json()
                    assert set(value["error"]) == {"message", "type", "param", "code"}
                    return response.status, value["error"]["code"]

            plain = {"headers": {"Content-Type": "application/json"}}
            for data in MALFORMED:
                assert await status("POST", CHATS, data=data, **plain) == (400, None), data[:20]
            assert await status("GET", "/v1/nothing") == (404, None)
            assert await status("GET", CHATS) == (405, None)
            assert await status("POST", "/v1/models") == (405, None)
            assert await status("POST", CHATS, data=b"{}") == (415, None)
            packed = {"headers": plain["headers"] | {"Content-Encoding": "gzip"}}
            assert await status("POST", CHATS, data=gzip.compress(b"{}"), **packed) == (415, None)
            assert await status("POST", CHATS, json=CHAT | {"model": "gpt"}) == (404, "model_not_found")
            assert await status("GET", "/v1/models/gpt") == (404, "model_not_found")
            long = {"prompt": "a", "max_tokens": 64}
            assert await status("POST", COMPLETIONS, json=long) == (400, "context_length_exceeded")
            async with client.post(
                COMPLETIONS, json=long | {"n": 128, "max_tokens": 5, "prompt": ["a"] * 3}
            ) as response:
                assert response.status == 400 and "260 places" in (await response.json())["error"]["message"]

            big = json.dumps(CHAT | {"x": "y" * 200_000}).encode()
            assert await status("POST", CHATS, data=big, **plain) == (413, None)

            async def parts(seconds=0.0):  # without Content-Length
                for start in range(0, len(big), 50_000):
                    yield big[start : start + 50_000]
                    await asyncio.sleep(seconds)

            assert await status("POST", CHATS, data=parts(), **plain) == (413, None)
            assert await status("POST", CHATS, data=parts(0.2), **plain) == (408, None)

            async with client.get("/v1/models") as response:
                [model] = (await response.json())["data"]
            assert (model["id"], model["object"]) == ("tiny", "model")
            async with client.get("/v1/models/tiny") as response:
                assert await response.json() == model
            async with client.get("/health") as response:
                assert await response.json() == {"status": "ok"}

    asyncio.run(scenario())


def test_a_key_is_asked_for_everywhere_but_at_health():
    async def scenario():
        async with serving(key="sésame") as (client, _):
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sésame"}):
                async with client.post(CHATS, json=CHAT, headers=headers) as response:
                    assert response.status == 401 and (await response.json())["error"]["code"] == "invalid_api_key"
            async with client.get("/stats") as response:
                assert response.status == 401
            async with client.get("/health") as response:
                assert response.status == 200
            async with client.post(CHATS, json=CHAT, headers={"Authorization": "Bearer sésame"}) as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_without_a_template_there_is_no_chat():
    async def scenario():
        async with serving(chat=False) as (client, _):
            status, value = await post(client, CHATS, CHAT)
            assert status == 400 and "--template" in value["error"]["message"]
            assert (await post(client, COMPLETIONS, {"prompt": "a"}))[0] == 200

    asyncio.run(scenario())


def test_openais_own_client_understands_it():
    import openai

    def talk(base):
        with openai.OpenAI(base_url=base, api_key="k", max_retries=0, timeout=20) as client:
            messages = CHAT["messages"]
            whole = client.chat.completions.create(model="tiny", messages=messages, seed=1, max_tokens=12)
            stream = client.chat.completions.create(
                model="tiny",
                messages=messages,
                seed=1,
                max_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
            *pieces, last = list(stream)
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            assert text == whole.choices[0].message.content == expected(chat_prompt("hi"), 12, seed=1)
            assert last.usage == whole.usage and whole.usage.completion_tokens == 12
            assert client.models.list().data[0].id == "tiny"
            done = client.completions.create(model="tiny", prompt="ab", temperature=0, seed=4, max_tokens=5)
            assert done.choices[0].text == expected("ab", 5, seed=4)
            with pytest.raises(openai.BadRequestError, match="temperature") as caught:
                client.completions.create(model="tiny", prompt="ab", temperature=3)
            assert caught.value.param == "temperature"
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="ab")
        with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()

    async def scenario():
        async with serving(key="k", headers={"Authorization": "Bearer k"}) as (client, _):
            base = str(client._base_url.join(aiohttp.client.URL("/v1")))
            await asyncio.to_thread(talk, base)

    asyncio.run(scenario())
