"""What OpenAI's clients get: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

DONE = b"data: [DONE]\n\n"


def event(value: dict) -> bytes:
    """One event of a stream.  JSON has no raw newline, so it is one line."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


@dataclass(frozen=True)
class Reply:
    """The answer to one request: in the form of chat completions or of completions, under one id."""

    model: str
    chat: bool
    key: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[tuple[str, str]], used: dict) -> dict:
        """answers: text and finish_reason of each choice."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, text, reason, "message") for i, (text, reason) in enumerate(answers)]
        return self._envelope(kind) | {"choices": choices, "usage": used}

    def opening(self, index: int) -> dict | None:
        """Says whose turn it is; in chats only."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index: int, text: str, reason: str | None) -> dict:
        return self._chunk([self._choice(index, text, reason, "delta")])

    def closing(self, used: dict) -> dict:
        return self._chunk([]) | {"usage": used}

    def _choice(self, index: int, text: str, reason: str | None, name: str) -> dict:
        said: dict = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if name == "message" else {}
            said = {name: role | ({"content": text} if text or name == "message" else {})}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind) | {"choices": choices}

    def _envelope(self, kind: str) -> dict:
        name = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{name}-{self.key}", "object": kind, "created": self.created, "model": self.model}
