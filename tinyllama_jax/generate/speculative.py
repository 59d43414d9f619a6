"""Speculative decoding: a small model drafts K tokens, the large one judges them all in one call.

The answers are distributed as the target's own, whatever the draft is (speculative_rule.py); at temperature 0 they are
its greedy ones.  A round is one program: the draft's K steps, the target's call with K + 1 tokens, the verdict and the
draw behind it.  Rows advance by different numbers of tokens, so positions are per row, and what a rejected token left in
a cache is overwritten before anything sees it.

    known       t0 .. t(n-1)                         slots 0 .. n-3 of the draft's cache and 0 .. n-2 of the target's hold
    draft       reads t(n-2) t(n-1), then its own    these at least.  The draft has not read its last token of a round
    target      reads t(n-1) and the K drafted       that was accepted whole, so it always begins with two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import speculative_rule as rule
from tinyllama_jax.generate.sample import filter_logits
from tinyllama_jax.model import transformer


class HasWeights(Protocol):
    """What `load.load` returns."""

    model: Model
    params: Any


@dataclass(frozen=True)
class Speculated:
    """answers: the new tokens of each row.

    proposed: drafted tokens that could be used; accepted: those that stayed; judged: those accepted or rejected, for
    what lies behind a rejected token is not judged.  rounds: of all rows together, as long as each was not at its end;
    calls: of the compiled program.  overlap, variance: sums over what was judged, as in rule.Verdict.
    Tokens that were accepted and then cut off behind an end token count here and are not in the answers.
    """

    answers: list[list[int]]
    proposed: int
    accepted: int
    judged: int
    rounds: int
    calls: int
    overlap: float
    variance: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds

    @property
    def acceptance_rate(self) -> float | None:
        """Of what was proposed; None when nothing could be."""
        return self.accepted / self.proposed if self.proposed else None


class State(NamedTuple):
    """Of a batch between rounds: the last two known ids of each row, how many are known, both caches."""

    recent_B2: jax.Array
    known_B: jax.Array
    target_cache: transformer.Cache
    draft_cache: transformer.Cache


@lru_cache(maxsize=16)
def functions(
    target: Model,
    draft: Model,
    execution: Execution,
    slots: int,
    draft_tokens: int,
    common: int,
    temperature: float,
    top_k: int,
    top_p: float,
):
    """Compiled prefill and round for two models, a cache length and a way of sampling."""
    K, V = draft_tokens, target.vocab_size

    def readable(ids: jax.Array) -> jax.Array:
        """Ids that the draft does not have are read as 0: a worse guess, the same answer."""
        return jnp.where(ids < common, ids, 0)

    def distribution(logits_NV: jax.Array) -> jax.Array:
        if temperature == 0:
            return jax.nn.one_hot(jnp.argmax(logits_NV, axis=-1), logits_NV.shape[-1], dtype=jnp.float32)
        return jax.nn.softmax(filter_logits(logits_NV / temperature, top_k, top_p), axis=-1)

    def prefill(target_params: Any, draft_params: Any, tokens_BT: jax.Array, known_B: jax.Array) -> State:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

        def cache_of(params: Any, model: Model, tokens_BT: jax.Array) -> transformer.Cache:
            empty = transformer.init_cache(model, tokens_BT.shape[0], slots)
            return transformer.decode(params, tokens_BT, model, execution, empty, positions_BT)[1]

        # A row of one token repeats it, at the same position.
        last_two_B2 = jnp.maximum(known_B[:, None] + jnp.array([-2, -1]), 0)
        recent_B2 = jnp.take_along_axis(tokens_BT, last_two_B2, axis=1)
        draft_cache = cache_of(draft_params, draft, readable(tokens_BT))
        return State(recent_B2, known_B, cache_of(target_params, target, tokens_BT), draft_cache)

    def propose(params: Any, state: State, keys_B: jax.Array):
        """Tokens [B, K], the distributions [B, K, V] they were drawn from, and the draft's cache."""

        def step(ids_BT: jax.Array, positions_BT: jax.Array, cache: transformer.Cache, i: jax.Array | int):
            logits_BTV, cache = transformer.decode(params, readable(ids_BT), draft, execution, cache, positions_BT)
            q_BV = distribution(logits_BTV[:, -1, :common])
            token_B = rule.draw(q_BV, jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B))
            return token_B, jnp.pad(q_BV, ((0, 0), (0, V - common))), cache

        positions_B2 = jnp.maximum(state.known_B[:, None] + jnp.array([-2, -1]), 0)
        first_B, q_first_BV, cache = step(state.recent_B2, positions_B2, state.draft_cache, 0)

        def more(carry, i):
            token_B, cache = carry
            token_B, q_BV, cache = step(token_B[:, None], (state.known_B + i - 1)[:, None], cache, i)
            return (token_B, cache), (token_B, q_BV)

        (_, cache), (more_KB, q_more_KBV) = jax.lax.scan(more, (first_B, cache), jnp.arange(1, K))
        drafted_BK = jnp.concatenate([first_B[:, None], more_KB.T], axis=1)
        return drafted_BK, jnp.concatenate([q_first_BV[:, None], jnp.swapaxes(q_more_KBV, 0, 1)], axis=1), cache

    def round_(
        target_params: Any, draft_params: Any, state: State, limit_B: jax.Array, active_B: jax.Array, key: jax.Array
    ):
        """New tokens [B, K + 1], how many of them each row has, the verdict, and the state behind them.

        limit_B: how many tokens a row may know at its end.  Rows that are not active gain none.
        """
        B = state.known_B.shape[0]
        # A row's keys come from its number and its own length: what other rows do is nothing to it.
        keys_B = jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))(
            jnp.arange(B), state.known_B
        )
        draft_keys, judge_keys = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys_B) for i in range(2))
        drafted_BK, q_BKV, draft_cache = propose(draft_params, state, draft_keys)

        fed_BT = jnp.concatenate([state.recent_B2[:, 1:], drafted_BK], axis=1)
        positions_BT = state.known_B[:, None] - 1 + jnp.arange(K + 1)
        logits_BTV, target_cache = transformer.decode(
            target_params, fed_BT, target, execution, state.target_cache, positions_BT
        )
        p_BTV = distribution(logits_BTV.reshape(B * (K + 1), V)).reshape(B, K + 1, V)
        # One token comes from the target itself.  Behind the draft's context its guesses are not asked for.
        room_B = jnp.minimum(limit_B - state.known_B - 1, draft.context_tokens - state.known_B + 1)
        usable_B = jnp.where(active_B, jnp.clip(room_B, 0, K), 0)
        verdict = rule.judge(p_BTV, q_BKV, drafted_BK, usable_B, judge_keys)

        accepted_B1 = verdict.accepted_B[:, None]
        padded_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
        new_BT = jnp.where(jnp.arange(K + 1) < accepted_B1, padded_BT, verdict.next_B[:, None])
        count_B = jnp.where(active_B, verdict.accepted_B + 1, 0)
        recent_B2 = jnp.take_along_axis(
            jnp.concatenate([state.recent_B2, new_BT], axis=1), count_B[:, None] + jnp.arange(2), axis=1
        )
        after = State(recent_B2, state.known_B + count_B, target_cache, draft_cache)
        return (new_BT, count_B, usable_B, verdict), after

    return jax.jit(prefill), jax.jit(round_, donate_argnums=2)


def speculate(
    target: HasWeights,
    draft: HasWeights,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    common: int | None = None,
    execution: Execution | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> Speculated:
    """Continuations of `prompts` (ids, of different lengths perhaps) as the target would sample them.

    draft_tokens: drafted in a round, K.  stop_ids: each ends a row and is its last token.  common: ids below it mean
    the same text to both (vocabularies.common_ids; by default all that both have); the draft proposes no others.
    on_tokens: called with one token per row, or None for a row that has none to give: it has ended, or its part of the
    round was shorter.  A row's tokens come in order.  A row's draws depend on the seed, its place in the batch and
    its own tokens.  Runs under the mesh in context.
    Raises ConfigError for what `sample.generate` refuses, and for draft_tokens < 1.
    """
    lengths = _checked(target.model, prompts, max_new_tokens)
    if draft_tokens < 1:
        raise ConfigError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError("sampling takes temperature >= 0, top_k >= 0 and top_p in (0, 1]")
    shared = min(target.model.vocab_size, draft.model.vocab_size)
    prefill, round_ = functions(
        target.model,
        draft.model,
        execution or Execution(),
        max(lengths) + max_new_tokens,
        int(draft_tokens),
        shared if common is None else min(common, shared),
        float(temperature),
        int(top_k),
        float(top_p),
    )
    tokens_BT = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    known_B = np.array(lengths, np.int32)
    limit_B, active_B = jnp.asarray(known_B + max_new_tokens), np.ones(len(prompts), bool)
    state = prefill(target.params, draft.params, jnp.asarray(tokens_BT), jnp.asarray(known_B))

    key, stop_ids = jax.random.key(seed), frozenset(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    proposed = accepted = judged = rounds = calls = 0
    overlap = variance = 0.0
    while active_B.any():
        result, state = round_(target.params, draft.params, state, limit_B, jnp.asarray(active_B), key)
        new_BT, count_B, usable_B, verdict = jax.device_get(result)
        calls, rounds = calls + 1, rounds + int(active_B.sum())
        proposed, accepted = proposed + int(usable_B.sum()), accepted + int(verdict.accepted_B.sum())
        judged, overlap = judged + int(verdict.judged_B.sum()), overlap + float(verdict.overlap_B.sum())
        variance += float(verdict.variance_B.sum())
        emitted: list[list[int]] = []
        for row, answer in enumerate(answers):
            new = new_BT[row, : count_B[row]].tolist()
            end = next((i + 1 for i, token in enumerate(new) if token in stop_ids), None)
            emitted.append(new[:end])
            answer += new[:end]
            active_B[row] &= end is None and len(answer) < max_new_tokens
        if on_tokens is not None:
            for i in range(max(map(len, emitted))):
                on_tokens([new[i] if i < len(new) else None for new in emitted])
    return Speculated(answers, proposed, accepted, judged, rounds, calls, overlap, variance)


def _checked(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """The prompts' lengths; raises ConfigError for what `sample.generate` refuses."""
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise ConfigError("a prompt is empty; generation needs at least one token, such as BOS")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    top_id = max(max(p) for p in prompts)
    if top_id >= model.vocab_size or min(min(p) for p in prompts) < 0:
        raise ConfigError(f"token id {top_id} is outside the model's vocabulary of {model.vocab_size}")
    if max(lengths) + max_new_tokens > model.context_tokens:
        raise ConfigError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.context_tokens}"
        )
    return lengths
