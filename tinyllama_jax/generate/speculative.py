"""Speculative decoding: a small model drafts K tokens, the large one judges them all in one call.

The answers are distributed as the target's own, whatever the draft is (speculative_rule.py); at temperature 0 they are
its greedy ones.  What is computed on the device is in speculative_round.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import engine, sampling
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.generate.speculative_round import functions
from tinyllama_jax.model import prefix


class HasWeights(Protocol):
    """What `load.load` and `load.load_serving` return."""

    model: Model
    params: Any


@dataclass(frozen=True)
class Speculated:
    """answers: the new tokens of each row.

    proposed: drafted tokens that could be used; accepted: those that stayed; judged: those accepted or rejected, for
    what lies behind a rejected token is not judged.  rounds: of all rows together, each until its end; calls: of the
    compiled program, each a round of all rows.  overlap, variance: sums over what was judged, as in rule.Verdict.
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
        """Accepted of proposed, as llama.cpp counts; None when nothing could be proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def acceptance(self) -> float | None:
        """Accepted of judged: the papers' alpha, the chance of a token whose forerunners were accepted."""
        return self.accepted / self.judged if self.judged else None


def speculate(
    target: HasWeights,
    draft: HasWeights,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    how: Sampling,
    stop_ids: Collection[int] = (),
    common: int | None = None,
    execution: Execution | None = None,
    rows: int = 32,
    on_tokens: Callable[[int, list[int]], Any] | None = None,
) -> Speculated:
    """Continuations of `prompts` (ids, of different lengths perhaps) as the target would sample them.

    draft_tokens: drafted in a round, K.  how: of all rows, row b drawing from stream how.stream + b: a row's draws
    depend on the seed, its stream and its own tokens.  stop_ids: each ends a row and is its last token.
    common: ids below it mean the same text to both (vocabularies.common_ids; by default all that both have).
    rows: prompts that are continued at a time; the next begin when all of these have ended.
    on_tokens: called with a row and each token it got, in order; when it answers True, the row ends there.
    Runs under the mesh in context.
    Raises ConfigError for an empty prompt, ids outside the target's vocabulary, more tokens than its context, and for
    draft_tokens < 1.
    """
    model = target.model
    for one in (target, draft):
        prefix.refuse(one.params, "cannot be drafted or judged", "generate without --draft")
    prompts = [tuple(map(int, prompt)) for prompt in prompts]
    engine.check(prompts or [()], max_new_tokens, model)
    if draft_tokens < 1 or rows < 1:
        raise ConfigError(f"draft_tokens is {draft_tokens} and rows {rows}; they must be at least 1")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.context_tokens:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.context_tokens}"
        )
    shared = min(model.vocab_size, draft.model.vocab_size)
    B, T = min(rows, len(prompts)), engine.bucket(longest, model.context_tokens)
    slots = engine.bucket(longest + max_new_tokens, model.context_tokens)
    common, stop_ids = shared if common is None else min(common, shared), frozenset(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    counts, calls = np.zeros(6), 0
    for first in range(0, len(prompts), B):
        part = prompts[first : first + B]
        active_B = np.arange(B) < len(part)
        part = part + part[-1:] * (B - len(part))  # always as many, so that one program does
        arrays, uses = sampling.rows([replace(how, stream=how.stream + first + row) for row in range(B)])
        prefill, one = functions(model, draft.model, execution or Execution(), slots, draft_tokens, common, uses)
        tokens_BT = np.array([prompt + (0,) * (T - len(prompt)) for prompt in part], np.int32)
        known_B = np.array(list(map(len, part)), np.int32)
        arrays, limit_B = jax.tree.map(jnp.asarray, (arrays, known_B + max_new_tokens))
        state = prefill(target.params, draft.params, jnp.asarray(tokens_BT), jnp.asarray(known_B))
        while active_B.any():
            made, state = one(target.params, draft.params, state, arrays, limit_B, jnp.asarray(active_B))
            made = jax.device_get(made)
            by = made.verdict
            # Rows that are not active add nothing.
            counted = (made.usable_B, by.accepted_B, by.judged_B, active_B, by.overlap_B, by.variance_B)
            counts, calls = counts + [x.sum(dtype=np.float64) for x in counted], calls + 1
            for row in np.flatnonzero(active_B).tolist():
                answer = answers[first + row]
                for token in made.new_BT[row, : made.count_B[row]].tolist():
                    answer.append(token)
                    stopped = on_tokens is not None and on_tokens(first + row, [token]) is True
                    if stopped or token in stop_ids or len(answer) == max_new_tokens:
                        active_B[row] = False
                        break
    proposed, accepted, judged, rounds = map(int, counts[:4])
    return Speculated(answers, proposed, accepted, judged, rounds, calls, *map(float, counts[4:]))
