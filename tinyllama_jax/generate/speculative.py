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
    on_tokens: Callable[[int, list[int]], Any] | None = None,
) -> Speculated:
    """Continuations of `prompts` (ids, of different lengths perhaps) as the target would sample them.

    draft_tokens: drafted in a round, K.  how: of all rows, row b drawing from stream how.stream + b: a row's draws
    depend on the seed, its stream and its own tokens.  stop_ids: each ends a row and is its last token.
    common: ids below it mean the same text to both (vocabularies.common_ids; by default all that both have).
    on_tokens: called with a row and what it got, in order; when it answers True, the row ends there.
    Runs under the mesh in context.
    Raises ConfigError for an empty prompt, ids outside the target's vocabulary, more tokens than its context, and for
    draft_tokens < 1.
    """
    model = target.model
    prompts = [tuple(map(int, prompt)) for prompt in prompts]
    engine.check(prompts or [()], max_new_tokens, model)
    if draft_tokens < 1:
        raise ConfigError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    known_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(known_B.max())
    if longest + max_new_tokens > model.context_tokens:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.context_tokens}"
        )
    arrays, uses = sampling.rows([replace(how, stream=how.stream + row) for row in range(len(prompts))])
    shared = min(model.vocab_size, draft.model.vocab_size)
    prefill, one = functions(
        model,
        draft.model,
        execution or Execution(),
        engine.bucket(longest + max_new_tokens, model.context_tokens),
        draft_tokens,
        shared if common is None else min(common, shared),
        uses,
    )
    tokens_BT = np.zeros((len(prompts), engine.bucket(longest, model.context_tokens)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    arrays, limit_B = jax.tree.map(jnp.asarray, (arrays, known_B + max_new_tokens))
    state = prefill(target.params, draft.params, jnp.asarray(tokens_BT), jnp.asarray(known_B))

    active = np.ones(len(prompts), bool)
    stop_ids = frozenset(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    sums, rounds, calls = np.zeros(5), 0, 0  # rows that are not active add nothing
    while active.any():
        made, state = one(target.params, draft.params, state, arrays, limit_B, jnp.asarray(active))
        made = jax.device_get(made)
        by = made.verdict
        counted = (made.usable_B, by.accepted_B, by.judged_B, by.overlap_B, by.variance_B)
        sums, rounds, calls = sums + [x.sum(dtype=np.float64) for x in counted], rounds + int(active.sum()), calls + 1
        for row in np.flatnonzero(active).tolist():
            new = made.new_BT[row, : made.count_B[row]].tolist()
            end = next((i + 1 for i, token in enumerate(new) if token in stop_ids), None)
            answers[row] += new[:end]
            stopped = on_tokens is not None and on_tokens(row, new[:end]) is True
            active[row] = end is None and not stopped and len(answers[row]) < max_new_tokens
    proposed, accepted, judged = map(int, sums[:3])
    return Speculated(answers, proposed, accepted, judged, rounds, calls, *map(float, sums[3:]))
