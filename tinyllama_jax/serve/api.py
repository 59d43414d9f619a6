"""Requests of OpenAI's completions and chat completions: JSON to dataclasses, or the reason why not.

Nothing that a client asks for is ignored: a field that this server does not know, or a value that would need what it
cannot do, is refused with the field's name.  Fields that ask for nothing (`logprobs: null`, a penalty of 0) are taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllama_jax.generate.chat import Message
from tinyllama_jax.generate.sampling import Sampling

CHOICES = 128  # the most that one request may ask of a prompt, as OpenAI's
STOPS = 4
TYPES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", dict: "an object", list: "a list"}

# What asks for nothing beyond what every answer has; other values need what this server cannot do.
NEUTRAL: dict[str, tuple] = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
NEUTRAL_COMPLETION = NEUTRAL | {"logprobs": (), "best_of": (1,), "suffix": ("",)}
NEUTRAL_CHAT = NEUTRAL | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "store": (False,),
}


class Refused(Exception):
    """A request that gets no answer: HTTP status, and what OpenAI's clients find in `error`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both kinds of requests may ask for."""

    model: str | None
    max_tokens: int | None  # None: not said
    sampling: Sampling
    n: int  # answers to each prompt
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # at the end of a stream


@dataclass(frozen=True)
class Completion:
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: Options


@dataclass(frozen=True)
class ChatCompletion:
    messages: tuple[Message, ...]
    options: Options


class Fields:
    """The fields of a JSON object, each taken once; what is left at the end is unknown.  null is as if left out."""

    def __init__(self, values: dict):
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._values.pop(name, default)
        if value is default:
            return default
        return typed(name, value, kind)

    def number(self, name: str, kind: type, default: Any, good: Callable[[Any], bool], wanted: str) -> Any:
        value = self.take(name, kind, default)
        if value is not default and not good(value):
            raise Refused(400, f"{name} is {value}; it must be {wanted}", param=name)
        return value

    def raw(self, name: str) -> Any:
        return self._values.pop(name, None)

    def end(self, neutral: dict[str, tuple]) -> None:
        """Raise Refused for what nobody took, except where it asks for nothing."""
        for name, value in self._values.items():
            if name not in neutral:
                raise Refused(400, f"unknown field {name!r}", param=name, code="unknown_parameter")
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral[name]):
                raise Refused(
                    400, f"{name}: this server does not support it; leave it out", param=name, code="unsupported_value"
                )


def typed(name: str, value: Any, kind: type) -> Any:
    """The value as `kind` (whole numbers are numbers too), or Refused."""
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise Refused(400, f"{name} must be {TYPES[kind]}", param=name, code="invalid_type")
    return value


def read_object(body: bytes) -> Fields:
    def no_number(text: str):
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(body.decode(), parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters, such as "\ud800", are no text
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except UnicodeError:
        raise Refused(400, "the body is not UTF-8 text") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    return Fields(value)


def completion(body: bytes, seed: int) -> Completion:
    """A request for POST /v1/completions; `seed` is used unless it says one.  Raises Refused."""
    fields = read_object(body)
    prompts = _prompts(fields.raw("prompt"))
    echo = fields.take("echo", bool, False)
    options = _options(fields, ("max_tokens",), seed)
    fields.end(NEUTRAL_COMPLETION)
    return Completion(prompts, echo, options)


def chat_completion(body: bytes, seed: int) -> ChatCompletion:
    """A request for POST /v1/chat/completions; `seed` is used unless it says one.  Raises Refused."""
    fields = read_object(body)
    messages = _messages(fields.take("messages", list))
    options = _options(fields, ("max_tokens", "max_completion_tokens"), seed)
    fields.end(NEUTRAL_CHAT)
    return ChatCompletion(messages, options)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    wanted = "prompt must be a string, a list of strings, token ids or a list of lists of token ids"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise Refused(400, wanted, param="prompt", code="invalid_type")
    if all(isinstance(each, str) for each in value):
        return tuple(value)
    lists = value if all(isinstance(each, list) for each in value) else [value]
    if not all(ids and all(type(i) is int for i in ids) for ids in lists):
        raise Refused(400, wanted, param="prompt", code="invalid_type")
    return tuple(map(tuple, lists))


def _messages(value: list | None) -> tuple[Message, ...]:
    if not value:
        raise Refused(400, "messages must be a list with at least one message", param="messages")
    found = []
    for i, each in enumerate(value):
        where = f"messages[{i}]"
        fields = Fields(typed(where, each, dict))
        role, content = fields.take("role", str), fields.raw("content")
        if isinstance(content, list):  # parts; only text is understood
            content = "".join(_part(f"{where}.content[{k}]", part) for k, part in enumerate(content))
        if role is None or content is None:
            raise Refused(400, f"{where} needs a role and a content", param="messages")
        typed(f"{where}.content", content, str)
        fields.end({"refusal": (), "tool_calls": ([],), "annotations": ([],)})
        found.append(Message(role, content))
    return tuple(found)


def _part(where: str, value: Any) -> str:
    fields = Fields(typed(where, value, dict))
    if fields.take("type", str) != "text":
        raise Refused(400, f"{where}: only parts of type text are supported", param="messages")
    text = fields.take("text", str)
    fields.end({})
    if text is None:
        raise Refused(400, f"{where} needs a text", param="messages")
    return text


def _options(fields: Fields, limits: tuple[str, ...], seed: int) -> Options:
    positive, share = (lambda x: x >= 1), (lambda x: 0 <= x <= 1)
    said = [n for n in (fields.number(name, int, None, positive, "at least 1") for name in limits) if n is not None]
    if len(set(said)) > 1:
        raise Refused(400, f"{' and '.join(limits)} say two different things", param=limits[-1])
    sampling = Sampling(
        temperature=float(fields.number("temperature", float, 1.0, lambda x: 0 <= x <= 2, "between 0 and 2")),
        top_p=float(fields.number("top_p", float, 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1")),
        top_k=fields.number("top_k", int, 0, lambda x: 0 <= x < 2**31, "at least 0"),
        min_p=float(fields.number("min_p", float, 0.0, share, "between 0 and 1")),
        repetition_penalty=float(fields.number("repetition_penalty", float, 1.0, lambda x: 0.01 <= x <= 100, "near 1")),
        seed=fields.number("seed", int, seed, lambda x: -(2**63) <= x < 2**63, "of 64 bits") % 2**32,
    )
    stream = fields.take("stream", bool, False)
    usage = _include_usage(fields.take("stream_options", dict), stream)
    fields.take("user", str)  # who asks changes no answer
    return Options(
        model=fields.take("model", str),
        max_tokens=said[0] if said else None,
        sampling=sampling,
        n=fields.number("n", int, 1, lambda x: 1 <= x <= CHOICES, f"from 1 to {CHOICES}"),
        stop=_stop(fields.raw("stop")),
        stream=stream,
        include_usage=usage,
    )


def _include_usage(value: dict | None, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise Refused(400, "stream_options goes with stream: true", param="stream_options")
    fields = Fields(value)
    wanted = fields.take("include_usage", bool, False)
    fields.end({"include_obfuscation": (False,)})
    return wanted


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list) or len(texts) > STOPS or not all(isinstance(t, str) and t for t in texts):
        raise Refused(400, f"stop must be one to {STOPS} strings that are not empty", param="stop")
    return tuple(texts)
