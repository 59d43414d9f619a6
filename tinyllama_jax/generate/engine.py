"""Continuous batching: a fixed number of rows, each taken by the next request as soon as it is free.

Everything on the device is of fixed shape, so that few programs are compiled and each only once:

    prefill   per bucket of prompt lengths and of prompts that begin together
    decode    per bucket of slots that are read: some tokens of all rows in one loop, which ends when all rows have

Buckets are powers of two.  The cache is donated from program to program and never copied.  An engine belongs to one
thread and runs under the mesh in context; heads of the cache lie over `tensor`, rows are whole on every device.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax import sharding
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import sampling
from tinyllama_jax.generate.sampling import Rows, Sampling, Uses
from tinyllama_jax.model import cached, prefix

SMALLEST_BUCKET = 32


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()  # the answer ends with the first of these


@dataclass(frozen=True)
class Piece:
    """What a request got in one step."""

    number: int  # as `add` returned it
    tokens: list[int]  # a stop id included
    finish: str | None  # None: goes on.  stop: a stop id.  length: max_new_tokens, or the context's end.  cancelled


class State(NamedTuple):
    """Rows on the device.  A row without a request has `left` 0."""

    cache: cached.Cache
    token_B: jax.Array  # the newest, not in the cache yet
    position_B: jax.Array  # where it will be written
    count_B: jax.Array  # tokens that the row has drawn
    left_B: jax.Array  # tokens that it may still draw
    stops_BN: jax.Array  # padded with -1
    seen_BV: jax.Array  # bool; [B, 0] while no row penalizes repetition
    how: Rows


@dataclass
class _Running:
    request: Request
    answered: int = 0


class Engine:
    def __init__(
        self,
        params: Any,
        model: Model,
        execution: Execution,
        *,
        rows: int = 8,
        context_tokens: int = 0,
        block: int = 0,
        slide: bool = False,
    ):
        """params: of transformer.py or, better, what `quantized.serving` makes of them.

        rows: requests that run at a time.  context_tokens: slots of each (0 = the model's context).  block: tokens
        that a step computes per row (0 = 16, on CPUs 1, where a loop gains nothing).  slide: a row goes on past the
        context and forgets its oldest tokens, instead of ending there.
        """
        if rows < 1 or context_tokens < 0 or block < 0:
            raise ConfigError(f"engine: rows={rows} must be positive, context_tokens and block not negative")
        if context_tokens > model.context_tokens:
            raise ConfigError(f"engine: {context_tokens} tokens exceed the model's context of {model.context_tokens}")
        self.prefix = prefix.tokens(params)  # slots of every row before its first token
        if slide:
            prefix.refuse(params, "cannot forget its oldest tokens", "leave out --slide")
        self.params, self.model, self.execution = params, model, execution
        self.rows, self.context_tokens, self.slide = rows, context_tokens or model.context_tokens, slide
        self.block = block or (1 if sharding.device()[0] == sharding.CPU else 16)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: dict[int, _Running] = {}  # by row
        self._numbers: dict[int, int] = {}  # row -> number
        self._cancelled: list[int] = []
        self._next = itertools.count()
        self._state: State | None = None
        self._uses = Uses(False, False, False, False)

    def add(self, request: Request) -> int:
        """Puts a request into the queue; -> its number.  Raises ConfigError for one that cannot be served."""
        check([request.prompt], request.max_new_tokens, self.model)
        if len(request.prompt) >= self.context_tokens:
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens leaves no room in the context of {self.context_tokens}"
            )
        number = next(self._next)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """The request ends with the next step; unknown and finished ones are none of its business."""
        self._cancelled.append(number)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def step(self) -> list[Piece]:
        """Begins what waits where rows are free, then computes up to `block` tokens of every row."""
        pieces = self._cancel()
        if self._waiting and len(self._running) < self.rows:
            pieces += self._begin()
        if self._running:
            pieces += self._decode()
        return pieces

    # -- inside ------------------------------------------------------------------------------------------------

    def _cancel(self) -> list[Piece]:
        gone, self._cancelled = set(self._cancelled), []
        pieces = [Piece(number, [], "cancelled") for number, _ in self._waiting if number in gone]
        self._waiting = collections.deque(item for item in self._waiting if item[0] not in gone)
        rows = [row for row, number in self._numbers.items() if number in gone]
        pieces += [Piece(self._numbers[row], [], "cancelled") for row in rows]
        self._free(rows)
        return pieces

    def _free(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        for row in rows:
            del self._running[row], self._numbers[row]
        if rows and self._state is not None:
            keep_B = np.ones(self.rows, np.int32)
            keep_B[rows] = 0
            self._state = self._state._replace(left_B=self._state.left_B * keep_B)

    def _begin(self) -> list[Piece]:
        """Prefills the next requests, as many as there are free rows, those of one bucket of lengths together."""
        free = [row for row in range(self.rows) if row not in self._running]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        for row, (number, request) in zip(free, taken, strict=False):
            self._running[row], self._numbers[row] = _Running(request), number
        self._arrange()
        pieces = []
        by_length = collections.defaultdict(list)
        for row, (_, request) in zip(free, taken, strict=False):
            by_length[bucket(len(request.prompt), self.context_tokens)].append(row)
        for length, rows in by_length.items():
            pieces += self._prefill(rows, length)
        return pieces

    def _prefill(self, rows: list[int], length: int) -> list[Piece]:
        n = bucket(len(rows), self.rows, smallest=1)
        prompts = [self._running[row].request.prompt for row in rows]
        tokens_NT = np.zeros((n, length), np.int32)
        last_N = np.zeros(n, np.int32)
        at_N = np.full(n, self.rows, np.int32)  # past the last row: not written
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens_NT[i, : len(prompt)], last_N[i], at_N[i] = prompt, len(prompt) - 1, row
        run = _prefill(self.model, self.execution, self._uses)
        token_N, self._state = run(self.params, self._state, tokens_NT, last_N, at_N)
        return self._deliver({row: [token] for row, token in zip(rows, np.asarray(token_N).tolist(), strict=False)})

    def _decode(self) -> list[Piece]:
        most = max(len(r.request.prompt) + r.answered for r in self._running.values()) + self.block
        visible = self.prefix + bucket(min(most, self.context_tokens), self.context_tokens)
        run = _decode(self.model, self.block, visible, self.slide, self._uses)
        tokens_BN, self._state = run(self.params, self._state)
        tokens_BN = np.asarray(tokens_BN)
        return self._deliver({row: tokens_BN[row].tolist() for row in self._running})

    def _deliver(self, new: dict[int, list[int]]) -> list[Piece]:
        pieces, ended = [], []
        for row, tokens in new.items():
            running = self._running[row]
            request = running.request
            tokens = tokens[: self._room(request) - running.answered]
            stop = next((i for i, token in enumerate(tokens) if token in request.stop_ids), None)
            tokens = tokens if stop is None else tokens[: stop + 1]
            running.answered += len(tokens)
            ends = running.answered >= self._room(request)
            finish = "stop" if stop is not None else "length" if ends else None
            if finish:
                ended.append(row)
            pieces.append(Piece(self._numbers[row], tokens, finish))
        self._free(ended)
        return pieces

    def _room(self, request: Request) -> int:
        """Tokens that a request may get."""
        room = request.max_new_tokens
        return room if self.slide else min(room, self.context_tokens - len(request.prompt))

    def _arrange(self) -> None:
        """Brings to the device how the rows, old and new, are to be continued."""
        of = [self._running[row].request if row in self._running else None for row in range(self.rows)]
        how, self._uses = sampling.rows([request.sampling if request else Sampling(temperature=0) for request in of])
        width = bucket(max(len(request.stop_ids) if request else 0 for request in of), 1 << 30, smallest=1)
        stops_BN = np.full((self.rows, width), -1, np.int32)
        left_B, seen_BV = np.zeros(self.rows, np.int32), np.zeros((self.rows, 0), bool)
        for row, request in enumerate(of):
            if request:
                stops_BN[row, : len(request.stop_ids)] = request.stop_ids
                left_B[row] = self._room(request) - self._running[row].answered
        if self._state is None:
            zeros = lambda: jnp.zeros(self.rows, jnp.int32)  # noqa: E731
            make = jax.jit(cached.init_cache, static_argnums=(0, 1, 2))
            cache = make(self.model, self.rows, self.prefix + self.context_tokens)
            seen = jnp.asarray(seen_BV)
            self._state = State(cache, zeros(), zeros(), zeros(), zeros(), zeros(), seen, how)
        old = self._state
        if self._uses.penalty:
            seen = old.seen_BV if old.seen_BV.shape[1] else jnp.zeros((self.rows, self.model.vocab_size), bool)
        else:
            seen = jnp.asarray(seen_BV)
        self._state = old._replace(
            left_B=jnp.asarray(left_B), stops_BN=jnp.asarray(stops_BN), seen_BV=seen, how=Rows(*map(jnp.asarray, how))
        )


def check(prompts: Iterable[tuple[int, ...]], max_new_tokens: int, model: Model) -> None:
    """Raises ConfigError for an empty prompt, an id outside of the vocabulary, or nothing to generate."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for prompt in prompts:
        if not len(prompt):
            raise ConfigError("a prompt is empty; generation needs at least one token, such as BOS")
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        if not 0 <= wrong < model.vocab_size:
            raise ConfigError(f"token id {wrong} is outside the model's vocabulary of {model.vocab_size}")


def bucket(n: int, largest: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The power of two that holds n, between `smallest` and `largest`, which need not be one."""
    return min(max(smallest, 1 << max(n - 1, 0).bit_length()), largest)


@functools.lru_cache(maxsize=64)
def _prefill(model: Model, execution: Execution, uses: Uses):
    """(params, state, tokens_NT, last_N, at_N) -> each prompt's first token, and the state with them in rows at_N."""

    def run(params: Any, state: State, tokens_NT: jax.Array, last_N: jax.Array, at_N: jax.Array):
        logits_NV, new = cached.prefill(params, tokens_NT, model, execution, last_N)
        length, ahead = tokens_NT.shape[1], prefix.tokens(params)
        put = lambda old, of_new: old.at[at_N, :, : ahead + length].set(of_new.astype(old.dtype), mode="drop")  # noqa: E731
        cache = jax.tree.map(put, state.cache, new)
        how = Rows(*(x.at[at_N].get(mode="clip") for x in state.how))
        seen_BV = state.seen_BV
        if uses.penalty:
            real_NT = jnp.arange(length) <= last_N[:, None]
            held_NV = jnp.zeros((len(at_N), model.vocab_size), bool)
            held_NV = jax.vmap(lambda row_V, ids_T, real_T: row_V.at[ids_T].max(real_T))(held_NV, tokens_NT, real_NT)
            logits_NV = sampling.penalized(logits_NV, held_NV, how.repetition_penalty)
            seen_BV = seen_BV.at[at_N].set(held_NV, mode="drop")
        token_N = sampling.pick(logits_NV, how, uses, jnp.zeros_like(at_N))
        if uses.penalty:
            seen_BV = seen_BV.at[at_N, token_N].set(True, mode="drop")
        set_ = lambda old, of_new: old.at[at_N].set(of_new, mode="drop")  # noqa: E731
        return token_N, state._replace(
            cache=cache,
            token_B=set_(state.token_B, token_N),
            position_B=set_(state.position_B, ahead + last_N + 1),
            count_B=set_(state.count_B, 1),
            left_B=state.left_B.at[at_N].add(-1, mode="drop"),
            seen_BV=seen_BV,
        )

    return jax.jit(run, donate_argnums=1)


@functools.lru_cache(maxsize=64)
def _decode(model: Model, block: int, visible: int, slide: bool, uses: Uses):
    """(params, state) -> tokens_BN of `block` steps, and the state; what rows that have ended get means nothing."""

    def one(params: Any, state: State) -> State:
        slots = state.cache[0]["k"].shape[2]
        runs_B = state.left_B > 0
        # A row that has ended writes nowhere: its slots may be another's before the next step.
        position_B = state.position_B if slide else jnp.where(runs_B, state.position_B, slots)
        logits_BTV, cache = cached.decode(
            params, state.token_B[:, None], model, state.cache, position_B[:, None], visible=visible, slide=slide
        )
        logits_BV, seen_BV = logits_BTV[:, 0], state.seen_BV
        if uses.penalty:
            logits_BV = sampling.penalized(logits_BV, seen_BV, state.how.repetition_penalty)
        token_B = sampling.pick(logits_BV, state.how, uses, state.count_B)
        if uses.penalty:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        stopped_B = jnp.any(token_B[:, None] == state.stops_BN, axis=1)
        return state._replace(
            cache=cache,
            token_B=token_B,
            position_B=state.position_B + 1,
            count_B=state.count_B + 1,
            left_B=jnp.where(stopped_B, 0, jnp.maximum(state.left_B - 1, 0)),
            seen_BV=seen_BV,
        )

    def run(params: Any, state: State):
        if block == 1:
            state = one(params, state)
            return state.token_B[:, None], state

        def body(carry):
            i, state, tokens_BN = carry
            state = one(params, state)
            return i + 1, state, tokens_BN.at[:, i].set(state.token_B)

        goes_on = lambda carry: (carry[0] < block) & jnp.any(carry[1].left_B > 0)  # noqa: E731
        tokens_BN = jnp.zeros((len(state.token_B), block), jnp.int32)
        _, state, tokens_BN = jax.lax.while_loop(goes_on, body, (0, state, tokens_BN))
        return tokens_BN, state

    return jax.jit(run, donate_argnums=1)
