"""The two programs of speculative decoding: both models' prefill, and a round.

A round is one program: the draft's K steps, the target's call with K + 1 tokens, the verdict and the draw behind it.
Rows advance by different numbers of tokens, so positions are per row, and what a rejected token left in a cache is
written over before anything sees it.

    known    t(0) .. t(n-1); slots 0 .. n-3 of the draft's cache and 0 .. n-2 of the target's hold these at least
    draft    reads t(n-2) and t(n-1), then what it drafted itself but for the last.  Where all of that is accepted, the
             last was never read: therefore it begins with two tokens, always
    target   reads t(n-1) and the K drafted tokens
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.generate import sampling
from tinyllama_jax.generate import speculative_rule as rule
from tinyllama_jax.generate.sampling import Rows, Uses
from tinyllama_jax.model import cached


class State(NamedTuple):
    """Of a batch between rounds: the last two known ids of each row, how many are known, which (bool [B, V]; [B, 0]
    while no row penalizes repetition), and both caches."""

    recent_B2: jax.Array
    known_B: jax.Array
    seen_BV: jax.Array
    target_cache: cached.Cache
    draft_cache: cached.Cache


class Round(NamedTuple):
    """What a round gave each row: the first count_B of new_BT, of usable_B drafted tokens, by that verdict."""

    new_BT: jax.Array
    count_B: jax.Array
    usable_B: jax.Array
    verdict: rule.Verdict


def distribution(logits_BV: jax.Array, how: Rows, uses: Uses) -> jax.Array:
    """What `sampling.pick` draws from, [B, V]; the likeliest token alone where the temperature is 0."""
    greedy_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=jnp.float32)
    if not uses.draws:
        return greedy_BV
    p_BV = jax.nn.softmax(sampling.filtered(logits_BV, how, uses), axis=-1)
    return jnp.where(how.temperature[:, None] > 0, p_BV, greedy_BV)


def _noise(how: Rows, uses: Uses, known_B: jax.Array, K: int, V: int) -> tuple[jax.Array, jax.Array]:
    """Uniform [B, K] and Gumbel [B, K + 1, V], of each row's seed, stream and length: what other rows do is nothing to
    it.  Where nothing is drawn they are of no account."""
    B = known_B.shape[0]
    if not uses.draws:
        return jnp.full((B, K), 0.5), jnp.zeros((B, K + 1, 1))

    def of_row(key):
        one, two = jax.random.split(key)
        return jax.random.uniform(one, (K,)), jax.random.gumbel(two, (K + 1, V))

    return jax.vmap(of_row)(sampling.keys(how, known_B))


def _last_two(known_B: jax.Array) -> jax.Array:
    """Their positions.  A row of one token has it twice, at the same position."""
    return jnp.maximum(known_B[:, None] + jnp.array([-2, -1]), 0)


def _marked(seen_BV: jax.Array, ids_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
    return jax.vmap(lambda row_V, ids_T, real_T: row_V.at[ids_T].max(real_T))(seen_BV, ids_BT, real_BT)


@lru_cache(maxsize=16)
def functions(target: Model, draft: Model, execution: Execution, slots: int, K: int, common: int, uses: Uses):
    """Compiled prefill and round for two models, a cache length, K drafted tokens and what sampling uses.

    common: ids below it mean the same to both.  The draft proposes no others, and reads others as id 0: that is a worse
    guess and the same answer.
    """
    V = target.vocab_size

    def prefill(target_params: Any, draft_params: Any, tokens_BT: jax.Array, known_B: jax.Array) -> State:
        B, T = tokens_BT.shape

        def cache_of(params: Any, model: Model, tokens_BT: jax.Array) -> cached.Cache:
            _, of_prompt = cached.prefill(params, tokens_BT, model, execution, known_B - 1)
            put = lambda slots_BGSK, new: slots_BGSK.at[:, :, :T].set(new.astype(slots_BGSK.dtype))  # noqa: E731
            return jax.tree.map(put, cached.init_cache(model, B, slots), of_prompt)

        seen_BV = jnp.zeros((B, V if uses.penalty else 0), bool)
        if uses.penalty:
            seen_BV = _marked(seen_BV, tokens_BT, jnp.arange(T) < known_B[:, None])
        return State(
            jnp.take_along_axis(tokens_BT, _last_two(known_B), axis=1),
            known_B,
            seen_BV,
            cache_of(target_params, target, tokens_BT),
            cache_of(draft_params, draft, jnp.where(tokens_BT < common, tokens_BT, 0)),
        )

    def propose(params: Any, state: State, how: Rows, gumbel_KBV: jax.Array):
        """Tokens [B, K], the distributions [B, K, V] they were drawn from, and the draft's cache."""

        def step(ids_BT, positions_BT, cache, seen_BV, gumbel_BV):
            ids_BT = jnp.where(ids_BT < common, ids_BT, 0)
            logits_BTV, cache = cached.decode(params, ids_BT, draft, cache, positions_BT)
            logits_BV = logits_BTV[:, -1, :common]
            if uses.penalty:
                logits_BV = sampling.penalized(logits_BV, seen_BV[:, :common], how.repetition_penalty)
            q_BV = distribution(logits_BV, how, uses)
            token_B = rule.draw(q_BV, gumbel_BV[:, :common])
            if uses.penalty:
                seen_BV = _marked(seen_BV, token_B[:, None], jnp.ones_like(token_B[:, None], bool))
            return (token_B, cache, seen_BV), jnp.pad(q_BV, ((0, 0), (0, V - common)))

        def more(carry, i_and_gumbel):
            (token_B, cache, seen_BV), (i, gumbel_BV) = carry, i_and_gumbel
            carry, q_BV = step(token_B[:, None], (state.known_B + i - 1)[:, None], cache, seen_BV, gumbel_BV)
            return carry, (carry[0], q_BV)

        positions_B2 = _last_two(state.known_B)
        carry, q_BV = step(state.recent_B2, positions_B2, state.draft_cache, state.seen_BV, gumbel_KBV[0])
        (_, cache, _), (more_KB, more_KBV) = jax.lax.scan(more, carry, (jnp.arange(1, K), gumbel_KBV[1:]))
        drafted_BK = jnp.concatenate([carry[0][:, None], more_KB.T], axis=1)
        return drafted_BK, jnp.concatenate([q_BV[:, None], jnp.swapaxes(more_KBV, 0, 1)], axis=1), cache

    def one(
        target_params: Any, draft_params: Any, state: State, how: Rows, limit_B: jax.Array, active_B: jax.Array
    ) -> tuple[Round, State]:
        """limit_B: how many tokens a row may know at its end.  Rows that are not active gain none."""
        u_BK, gumbel_BTV = _noise(how, uses, state.known_B, K, V)
        drafted_BK, q_BKV, draft_cache = propose(draft_params, state, how, jnp.swapaxes(gumbel_BTV[:, :K], 0, 1))

        fed_BT = jnp.concatenate([state.recent_B2[:, 1:], drafted_BK], axis=1)
        positions_BT = state.known_B[:, None] - 1 + jnp.arange(K + 1)
        logits_BTV, target_cache = cached.decode(target_params, fed_BT, target, state.target_cache, positions_BT)
        if uses.penalty:
            drafted_BKV = jax.nn.one_hot(drafted_BK, V, dtype=jnp.int32)
            before_BTV = jnp.pad(jnp.cumsum(drafted_BKV, axis=1) > 0, ((0, 0), (1, 0), (0, 0)))
            penalize = jax.vmap(sampling.penalized, in_axes=(1, 1, None), out_axes=1)
            logits_BTV = penalize(logits_BTV, state.seen_BV[:, None] | before_BTV, how.repetition_penalty)
        p_BTV = jax.vmap(lambda logits_BV: distribution(logits_BV, how, uses), in_axes=1, out_axes=1)(logits_BTV)
        # One token comes from the target itself.  Behind the draft's context its guesses are not asked for.
        room_B = jnp.minimum(limit_B - state.known_B - 1, draft.context_tokens - state.known_B + 1)
        usable_B = jnp.where(active_B, jnp.clip(room_B, 0, K), 0)
        verdict = rule.judge(p_BTV, q_BKV, drafted_BK, usable_B, u_BK, gumbel_BTV[:, K])

        padded_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
        new_BT = jnp.where(jnp.arange(K + 1) < verdict.accepted_B[:, None], padded_BT, verdict.next_B[:, None])
        count_B = jnp.where(active_B, verdict.accepted_B + 1, 0)
        known_BT = jnp.concatenate([state.recent_B2, new_BT], axis=1)
        after = State(
            jnp.take_along_axis(known_BT, count_B[:, None] + jnp.arange(2), axis=1),
            state.known_B + count_B,
            _marked(state.seen_BV, new_BT, jnp.arange(K + 1) < count_B[:, None]) if uses.penalty else state.seen_BV,
            target_cache,
            draft_cache,
        )
        return Round(new_BT, count_B, usable_B, verdict), after

    return jax.jit(prefill), jax.jit(one, donate_argnums=2)
