"""An engine and a tokenizer without a model: what a server does can be tested in moments.

The engine has the interface of generate/engine.py.  A row's tokens depend on its prompt, seed and stream alone: the
letters of `answer`.  A prompt that holds "!" breaks it.
"""

from __future__ import annotations

import collections
import time
import zlib
from collections.abc import Iterable

import numpy as np

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.engine import Piece, Request

BOS, EOS, FIRST = 1, 2, 3


class Bytes:
    """A tokenizer whose ids are bytes, behind BOS and EOS."""

    vocab_size, bos_id, eos_id = FIRST + 256, BOS, EOS

    def encode(self, text: str) -> list[int]:
        return [FIRST + byte for byte in text.encode()]

    encode_plain = encode_further = encode

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - FIRST for i in ids if i >= FIRST).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([0] * FIRST + [1] * 256, np.int32)


def answer(request: Request) -> list[int]:
    """All that is said to a request: words made from its prompt, seed and stream, and perhaps EOS."""
    draw = np.random.default_rng(
        [zlib.crc32(repr(request.prompt).encode()), request.sampling.seed, request.sampling.stream]
    )
    letters = draw.choice(list(b"abcdefgh \xc3\xa9"[:9]), request.max_new_tokens).tolist()
    ids = [FIRST + letter for letter in letters]
    if FIRST + ord("?") in request.prompt:  # questions are answered in ten tokens
        ids[10:] = [EOS]
    return ids


class FakeEngine:
    def __init__(self, *, rows: int = 4, context_tokens: int = 64, block: int = 1, seconds: float = 0.0):
        self.rows, self.context_tokens, self.block, self.seconds = rows, context_tokens, block, seconds
        self._waiting: collections.deque[tuple[int, list[int], Request]] = collections.deque()
        self._running: dict[int, tuple[list[int], Request]] = {}
        self._gone: set[int] = set()
        self._next = 0
        self.most_running = self.steps = 0

    def add(self, request: Request) -> int:
        if not request.prompt or len(request.prompt) >= self.context_tokens:
            raise ConfigError("the prompt does not fit")
        self._next += 1
        self._waiting.append((self._next, answer(request), request))
        return self._next

    def cancel(self, number: int) -> None:
        self._gone.add(number)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Piece]:
        time.sleep(self.seconds)
        self.steps += 1
        gone, self._gone = self._gone, set()
        pieces = [Piece(n, [], "cancelled") for n in gone if n in self._running]
        self._waiting = collections.deque(each for each in self._waiting if each[0] not in gone)
        self._running = {n: row for n, row in self._running.items() if n not in gone}
        while self._waiting and len(self._running) < self.rows:
            number, ids, request = self._waiting.popleft()
            self._running[number] = (ids, request)
        self.most_running = max(self.most_running, len(self._running))
        for number, (ids, request) in list(self._running.items()):
            if FIRST + ord("!") in request.prompt:
                raise RuntimeError("the device is gone")
            tokens, ids[: self.block] = ids[: self.block], []
            finish = "stop" if tokens[-1] in request.stop_ids else None if ids else "length"
            pieces.append(Piece(number, tokens, finish))
            if finish:
                del self._running[number]
        return pieces
