"""Passkey retrieval: a number is told once, somewhere in much filler, and asked for at the end.

The test of Mohtashami & Jaggi (arXiv 2305.16300, appendix), with its words.  Prompts are exact in tokens: a row of
`length` tokens is the prompt and the right answer together, and it is the filler that is cut, between any two tokens.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import ConfigError, DataError

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
SMALLEST, LARGEST = 10_000, 99_999  # keys have five digits
TRIES = 10_000  # keys that are drawn for one of the right length in tokens

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS, CHOICES = 10, 10


@dataclass(frozen=True)
class Prompt:
    depth: float  # share of the filler that lies before the key
    key: str
    tokens: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]  # of one length each; the first is the right one, the others other prompts'


@dataclass(frozen=True)
class Answer:
    """What a model makes of a prompt."""

    log_likelihoods: np.ndarray  # float64 [choices], nats, in the order of the prompt's answers
    said: str  # what it says by itself, always taking the likeliest token


class Prompts:
    """Makes prompts with a tokenizer, of `keys` keys, which are the same at every length and depth.

    A key stands beside `choices` - 1 of the others, so that each is a right answer once and a wrong one as often as
    there are wrong ones: how likely a model finds it by itself can be taken off.
    Raises DataError for a tokenizer that cannot write digits or joins them with what is before, ConfigError for
    numbers that make no sense.
    """

    def __init__(self, tokenizer: Tokenizer, marks: str, *, keys: int = KEYS, choices: int = CHOICES, seed: int = 0):
        if not 2 <= choices <= keys:
            raise ConfigError(
                f"passkey: {choices} choices among {keys} keys; there must be 2 at least, and as many keys"
            )
        self.tokenizer = tokenizer
        bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
        start = {"bos": bos, "both": bos, "eos": eos, "none": []}[marks]  # as of a document, behind another's EOS
        self.start = [*start, *tokenizer.encode(INTRODUCTION + "\n")]
        self.question = self._behind("green", "\n" + QUESTION)
        ids = self._draw(random.Random(seed), keys)
        self.answer_tokens = len(next(iter(ids.values())))
        around = list(ids.values()) * 2  # in a circle
        self.keys = {key: tuple(around[i : i + choices]) for i, key in enumerate(ids)}

    def at(self, length: int, depths: Sequence[float] = DEPTHS) -> list[Prompt]:
        """Prompts of length - answer_tokens tokens: of each depth, those of every key.

        Raises ConfigError where so few tokens do not hold the prompt, or for a depth outside of [0, 1].
        """
        wrong = [depth for depth in depths if not 0 <= depth <= 1]
        if wrong or not depths:
            raise ConfigError(f"passkey: depths {list(depths)} must lie in [0, 1], and there must be one")
        needles = {key: self._behind("green", f"\n{NEEDLE.format(key=key)}\n") for key in self.keys}
        around = len(self.start) + len(self.question) + self.answer_tokens
        least = around + max(map(len, needles.values())) + len(depths)  # so that no two depths are the same prompt
        if length < least:
            raise ConfigError(
                f"passkey: a window of {length} tokens cannot hold the prompt, which with this tokenizer takes "
                f"{least}; give at least as many"
            )
        again = self._behind(FILLER, f" {FILLER}")
        filler = self._behind("\n", FILLER) + again * (length // len(again))
        prompts = []
        for depth in depths:
            for key, answers in self.keys.items():
                room = length - around - len(needles[key])
                before = round(depth * room)
                parts = (self.start, filler[:before], needles[key], filler[: room - before], self.question)
                prompts.append(Prompt(depth, key, tuple(token for part in parts for token in part), answers))
        return prompts

    def said(self, tokens: Sequence[int]) -> str:
        """The text of tokens that follow the question."""
        return self.tokenizer.decode([*self.question, *tokens])[len(self.tokenizer.decode(self.question)) :]

    def _draw(self, draw: random.Random, count: int) -> dict[str, tuple[int, ...]]:
        """Keys and their ids, of as many tokens as the first has."""
        found: dict[str, tuple[int, ...]] = {}
        tokens = 0
        for _ in range(TRIES):
            key = str(draw.randint(SMALLEST, LARGEST))
            ids = tuple(self._behind(QUESTION, f" {key}"))
            if self.said(ids).strip() != key:
                raise DataError(f"passkey: the tokenizer cannot write digits: {key} becomes {self.said(ids)!r}")
            tokens = tokens or len(ids)
            if len(ids) == tokens:
                found[key] = ids
            if len(found) == count:
                return found
        raise DataError(f"passkey: only {len(found)} of {TRIES} numbers have {tokens} tokens; ask fewer keys")

    def _behind(self, before: str, text: str) -> list[int]:
        """The ids of `text` where it follows `before`: alone it might begin with a space of the tokenizer's."""
        whole, head = self.tokenizer.encode(before + text), self.tokenizer.encode(before)
        if whole[: len(head)] != head:
            raise DataError(f"passkey: the tokenizer joins {before[-5:]!r} and {text[:10]!r} to one token")
        return whole[len(head) :]


def exact(prompt: Prompt, said: str) -> bool:
    """Whether the first thing said is the key: its digits, and no digit more."""
    number = re.match(r"\s*(\d+)", said)
    return number is not None and number[1] == prompt.key


def likeliest(log_likelihoods: np.ndarray) -> float:
    """1 where the first is the highest, 0 where another is; ties are shared, so that a blind model is at chance."""
    best = log_likelihoods == log_likelihoods.max()
    return float(best[0]) / float(best.sum())


def summary(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Any]:
    """{exact, accuracy, margin, each with its _se, and depths: {DEPTH: the same and said}}.

    exact: share of keys that are said.  accuracy: share that are likelier than all wrong ones; chance is 1 / choices.
    margin: nats by which a key is likelier where it was told than, on average, where others were; 0 where nothing is
    retrieved, whatever numbers the model likes.
    _se: standard error over keys.  Each key counts once, as the mean over its depths, because one key at two depths is
    no second draw.
    """
    at_depth: dict[float, list[tuple[Prompt, Answer]]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        at_depth.setdefault(prompt.depth, []).append((prompt, answer))
    measured = {depth: _by_key(pairs) for depth, pairs in at_depth.items()}
    whole = {name: np.mean([at[name] for at in measured.values()], axis=0) for name in ("exact", "accuracy", "margin")}
    said = {depth: [[prompt.key, answer.said] for prompt, answer in pairs] for depth, pairs in at_depth.items()}
    depths = {f"{depth:g}": _means(at) | {"said": said[depth]} for depth, at in measured.items()}
    return _means(whole) | {"depths": depths}


def _by_key(pairs: Sequence[tuple[Prompt, Answer]]) -> dict[str, list[float]]:
    elsewhere: dict[tuple[int, ...], list[float]] = {}  # of a key where others were told
    for prompt, answer in pairs:
        for ids, nats in zip(prompt.answers[1:], answer.log_likelihoods[1:], strict=True):
            elsewhere.setdefault(ids, []).append(float(nats))
    return {
        "exact": [float(exact(prompt, answer.said)) for prompt, answer in pairs],
        "accuracy": [likeliest(answer.log_likelihoods) for _, answer in pairs],
        "margin": [float(a.log_likelihoods[0]) - float(np.mean(elsewhere[p.answers[0]])) for p, a in pairs],
    }


def _means(by_key: dict[str, Sequence[float]]) -> dict[str, float]:
    found = {}
    for name, values in by_key.items():
        found[name] = float(np.mean(values))
        found[f"{name}_se"] = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return found
