"""The HTTP side: paths, refusals, streams, and whose key opens what.

A client that hangs up ends its handler (aiohttp cancels it), which frees its rows.  One that does not read is written
to until the buffers of its connection are full and is cut off after `write_seconds`; what it would have got waits as
token ids.  A body is counted while it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace

from aiohttp import hdrs, web

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.chat import Chat
from tinyllama_jax.generate.engine import Request
from tinyllama_jax.generate.text import Text
from tinyllama_jax.serve import api
from tinyllama_jax.serve.api import Options, Refused
from tinyllama_jax.serve.replies import DONE, Reply, event, usage
from tinyllama_jax.serve.worker import INTERNAL, STOPPING, Worker

COMPLETION_TOKENS = 16  # of a completion that says no max_tokens, as OpenAI's
BEHIND = 16  # tokens of a prompt that its answer is decoded behind; as good as all, and soon done


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served under which name."""

    name: str
    tokenizer: Tokenizer
    start: tuple[int, ...]  # ids at the beginning of a prompt
    chat: Chat | None  # None: the model has no chat template
    context_tokens: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    body_bytes: int = 1_000_000
    body_seconds: float = 30.0  # to send a body
    write_seconds: float = 30.0  # that a write may wait for its reader
    idle_seconds: float = 30.0  # of a connection without a whole request


class _Choice:
    """One answer: its text as tokens arrive, and how it ended."""

    def __init__(self, served: Served, request: Request, stop: Sequence[str]):
        self.text = Text(served.tokenizer, request.prompt[-BEHIND:], stop)
        self.tokens, self.reason = 0, None

    def feed(self, tokens: list[int], finish: str | None) -> str:
        self.tokens += len(tokens)
        text = self.text.add(tokens[:-1] if finish == "stop" else tokens)  # a stop id says nothing
        if finish is not None:
            text += self.text.finish()
        self.reason = "stop" if self.text.stopped else finish
        return text


class App:
    """`application()` makes aiohttp's application of it."""

    def __init__(self, served: Served, worker: Worker, limits: Limits, key: str = ""):
        """key: what clients must send as a bearer token; empty: anything."""
        self.served, self.worker, self.limits, self._key = served, worker, limits, key.encode()
        self.stopping = False
        self.active = self.requests = 0
        self._began = time.time()
        # A text of more bytes than this has more ids than the context; it is refused without encoding it.
        self._text_bytes = served.context_tokens * int(served.tokenizer.token_bytes().max())

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard])
        application.router.add_post("/v1/completions", self._completions)
        application.router.add_post("/v1/chat/completions", self._chat)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/v1/models/{name:.+}", self._model)
        application.router.add_get("/health", self._health)
        application.router.add_get("/stats", self._stats)
        return application

    # -- around every request ----------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler) -> web.StreamResponse:
        self.active += 1
        self.requests += 1
        try:
            if request.path != "/health":
                self._authorize(request)
                if self.stopping and request.method == hdrs.METH_POST:
                    raise Refused(503, STOPPING)
            return await handler(request)
        except Refused as refused:
            return _error(refused)
        except ConfigError as error:
            return _error(Refused(400, str(error)))
        except web.HTTPException as error:
            allowed = f"; allowed: {error.headers[hdrs.ALLOW]}" if hdrs.ALLOW in error.headers else ""
            refused = Refused(error.status, f"{request.method} {request.path}: {error.reason}{allowed}")
            return _error(refused, {k: v for k, v in error.headers.items() if k == hdrs.ALLOW})
        except ConnectionError:  # of the client
            raise
        except Exception:
            traceback.print_exc()
            return _error(Refused(500, INTERNAL))
        finally:
            self.active -= 1

    def _authorize(self, request: web.Request) -> None:
        given = request.headers.get(hdrs.AUTHORIZATION, "").encode(errors="replace")
        if self._key and not hmac.compare_digest(given, b"Bearer " + self._key):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: web.Request) -> bytes:
        if request.content_type != "application/json" or hdrs.CONTENT_TYPE not in request.headers:
            raise Refused(415, "the body must be sent as Content-Type: application/json")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            raise Refused(415, "the body must be sent without Content-Encoding")
        limit = self.limits.body_bytes
        too_large = Refused(413, f"the body is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.content.iter_any():
                    if len(body) + len(part) > limit:
                        raise too_large
                    body += part
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        except web.RequestPayloadError as error:
            raise Refused(400, f"the body is not as its headers say: {error}") from None
        return bytes(body)

    # -- small answers -----------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        if self.stopping or self.worker.failure is not None:
            raise Refused(503, STOPPING)
        return web.json_response({"status": "ok"})

    async def _stats(self, request: web.Request) -> web.Response:
        worker = self.worker
        return web.json_response(
            {
                "uptime_s": round(time.time() - self._began, 1),
                "requests": self.requests,
                "rows": worker.engine.rows,
                "running_or_waiting": len(worker.open),
                "in_engine": worker.running,
                "answered": worker.answered,
                "cancelled": worker.cancelled,
                "tokens": worker.tokens,
            }
        )

    def _described(self) -> dict:
        about = {"context_tokens": self.served.context_tokens, "chat": self.served.chat is not None}
        return {"id": self.served.name, "object": "model", "created": int(self._began), "owned_by": "user", **about}

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._known(request.match_info["name"])
        return web.json_response(self._described())

    def _known(self, name: str | None) -> None:
        if name not in (None, self.served.name):
            message = f"there is no model {name!r} here; this server has {self.served.name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    # -- answers of the model ----------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = api.completion(await self._body(request), secrets.randbits(32))
        self._known(asked.options.model)
        self.worker.admit(len(asked.prompts) * asked.options.n)
        prompts = [self._prompt(prompt) for prompt in asked.prompts]
        echoes = [self._text(prompt) if asked.echo else "" for prompt in asked.prompts]
        requests = self._requests(prompts, asked.options, COMPLETION_TOKENS, (self.served.tokenizer.eos_id,))
        return await self._answer(request, requests, asked.options, (), echoes, Reply(self.served.name, chat=False))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = api.chat_completion(await self._body(request), secrets.randbits(32))
        self._known(asked.options.model)
        self.worker.admit(asked.options.n)
        chat = self.served.chat
        if chat is None:
            raise Refused(400, "this model has no chat template; its owner can start the server with --template")
        self._short(sum(len(message.content.encode()) for message in asked.messages))
        requests = self._requests([chat.ids(asked.messages)], asked.options, None, chat.stop_ids)
        return await self._answer(request, requests, asked.options, chat.stop, [""], Reply(self.served.name, chat=True))

    def _prompt(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._short(len(prompt.encode()))
            prompt = (*self.served.start, *self.served.tokenizer.encode(prompt))
        wrong = [i for i in prompt if not 0 <= i < self.served.vocab_size]
        if wrong or not prompt:
            reason = f"token id {wrong[0]} is outside the vocabulary" if wrong else "the prompt has no tokens"
            raise Refused(400, reason, param="prompt")
        return prompt

    def _text(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self.served.tokenizer.decode(prompt)

    def _short(self, size: int) -> None:
        if size > self._text_bytes:
            raise self._too_long(f"a text of {size} bytes")

    def _too_long(self, what: str) -> Refused:
        message = f"{what} exceeds this model's context of {self.served.context_tokens} tokens"
        return Refused(400, message, code="context_length_exceeded")

    def _requests(
        self, prompts: Sequence[tuple[int, ...]], options: Options, default: int | None, stop_ids: tuple[int, ...]
    ) -> list[Request]:
        """The rows of a request: `n` for each prompt, which draw independently."""
        rows = []
        for prompt in prompts:
            room = self.served.context_tokens - len(prompt)
            most = min(default or room, room) if options.max_tokens is None else options.max_tokens
            if room < max(most, 1):
                raise self._too_long(f"a prompt of {len(prompt)} tokens with {most} new ones")
            for _ in range(options.n):
                how = replace(options.sampling, stream=len(rows))
                rows.append(Request(prompt=prompt, max_new_tokens=most, sampling=how, stop_ids=stop_ids))
        return rows

    async def _answer(
        self,
        request: web.Request,
        rows: list[Request],
        options: Options,
        stop: Sequence[str],
        echoes: Sequence[str],
        reply: Reply,
    ) -> web.StreamResponse:
        choices = [_Choice(self.served, row, (*options.stop, *stop)) for row in rows]
        prompt_tokens = sum(len(rows[i].prompt) for i in range(0, len(rows), options.n))
        texts = [echoes[i // options.n] for i in range(len(rows))]
        job = self.worker.submit(rows)
        try:
            pieces = self._pieces(job, choices)
            used = lambda: usage(prompt_tokens, sum(choice.tokens for choice in choices))  # noqa: E731
            if options.stream:
                return await self._stream(request, pieces, texts, options, reply, used)
            async for news in pieces:
                for i, text, _ in news:
                    texts[i] += text
            answers = [(text, choice.reason) for text, choice in zip(texts, choices, strict=True)]
            response = web.json_response(reply.whole(answers, used()))
            await response.prepare(request)
            await self._in_time(request, response.write_eof())
            return response
        finally:
            job.cancel()

    async def _pieces(self, job, choices: list[_Choice]) -> AsyncIterator[list[tuple[int, str, str | None]]]:
        """(choice, new text, finish_reason) of whatever has news, until all have ended.  Raises Refused."""
        while any(choice.reason is None for choice in choices):
            news = []
            for i, tokens, finish in await job.arrived():
                if choices[i].reason is not None:
                    continue  # its stop string was met before the engine heard of it
                if finish == "cancelled":
                    raise Refused(503, STOPPING)
                text = choices[i].feed(tokens, finish)
                if choices[i].reason is not None:
                    job.cancel(i)
                if text or choices[i].reason:
                    news.append((i, text, choices[i].reason))
            yield news

    async def _stream(self, request: web.Request, pieces, echoes, options: Options, reply: Reply, used) -> web.Response:
        response = web.StreamResponse()
        response.content_type, response.charset = "text/event-stream", "utf-8"
        response.headers[hdrs.CACHE_CONTROL] = "no-cache"
        extra = {"usage": None} if options.include_usage else {}
        try:
            news = await anext(pieces)  # until here a failure still has its own status
            await response.prepare(request)
            opening = [reply.opening(i) for i in range(len(echoes))]
            opening += [reply.piece(i, text, None) for i, text in enumerate(echoes) if text]
            if data := b"".join(event(each | extra) for each in opening if each):
                await self._in_time(request, response.write(data))
            while news is not None:
                if data := b"".join(event(reply.piece(*each) | extra) for each in news):
                    await self._in_time(request, response.write(data))
                news = await anext(pieces, None)
            if options.include_usage:
                await self._in_time(request, response.write(event(reply.closing(used()))))
            await self._in_time(request, response.write(DONE))
        except Refused as refused:
            if not response.prepared:
                raise
            await self._in_time(request, response.write(event(refused.body())))
        await self._in_time(request, response.write_eof())
        return response

    async def _in_time(self, request: web.Request, writing: Awaitable[None]) -> None:
        """Waits for what is written, which is at once until the buffers are full; cuts off who does not read."""
        try:
            async with asyncio.timeout(self.limits.write_seconds):
                await writing
        except TimeoutError:
            with contextlib.suppress(AttributeError):  # it has gone by itself
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from None


def _error(refused: Refused, headers: dict[str, str] | None = None) -> web.Response:
    headers = dict(headers or {})
    if refused.status in (429, 503):
        headers[hdrs.RETRY_AFTER] = "1"
    if refused.status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    response = web.json_response(refused.body(), status=refused.status, headers=headers)
    if refused.status in (408, 413, 503):
        response.force_close()  # what is left of the body is thrown away, but no other request read behind it
    return response
