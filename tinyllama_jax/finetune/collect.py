"""From rows to ids: examples rendered, cut to their window, and kept in a file until it is known where each goes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.config import Examples
from tinyllama_jax.data.plan import Progress
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.finetune.forms import Example, canonical
from tinyllama_jax.finetune.packing import flagged
from tinyllama_jax.finetune.rows import Row
from tinyllama_jax.generate.chat import Chat
from tinyllama_jax.generate.templates import Message

NAMED = 10  # malformed rows that are told; a file in the store has all
EXAMPLES = "examples"

Parts = tuple[np.ndarray, ...]  # uint32 [T] (packing.py): one, or both of a pair


class Renderer:
    """Examples to ids, as `Examples` asks: which are learned, and what becomes of those that are too long.

    counts: `cut`, and by reason what was dropped.
    """

    def __init__(self, chat: Chat, examples: Examples, window_tokens: int, pairs: bool):
        self.chat, self.window_tokens, self.pairs = chat, window_tokens, pairs
        self.everything, self.drop = examples.loss_on == "all", examples.too_long == "drop"
        # Both answers have the same room, each behind its own copy of the prompt.
        self.room = window_tokens // 2 if pairs else window_tokens
        self.longest_prompt = examples.longest_prompt_tokens or self.room // 2
        self.counts: Counter[str] = Counter()
        if pairs and self.longest_prompt >= self.room:
            raise ConfigError(
                f"examples.longest_prompt_tokens is {self.longest_prompt}; a window of {window_tokens} tokens holds two"
                f" answers with their prompts, {self.room} tokens each: it must be less than that"
            )
        if self.longest_prompt <= chat.start_tokens:
            raise ConfigError(f"windows of {window_tokens} tokens are too short for examples; set data.sequence_tokens")

    def __call__(self, example: Example) -> Parts | None:
        """None for what is dropped.  Raises ConfigError for what the template cannot write."""
        if self.pairs:
            return self._pair(example)
        ids, learned = self.chat.plain(example.text) if example.text else self.chat.render(example.messages)
        if self.everything:
            learned = np.arange(ids.size) >= self.chat.start_tokens
        if ids.size > self.room:
            if self.drop:
                return self._dropped("too long")
            ids, learned = ids[: self.room], learned[: self.room]
            if not learned.any():
                return self._dropped("no room for an answer")
            self.counts["cut"] += 1
        return (flagged(ids, learned),)

    def _pair(self, example: Example) -> Parts | None:
        prompt = np.array(self.chat.ids(example.messages), np.int32)
        whole = [
            self.chat.render([*example.messages, Message("assistant", answer)])[0]
            for answer in (example.chosen, example.rejected)
        ]
        kept, start = prompt, self.chat.start_tokens
        if prompt.size > self.longest_prompt:
            kept = np.concatenate([prompt[:start], prompt[start - self.longest_prompt :]])
        parts = []
        for ids in whole:
            answer = ids[prompt.size :][: self.room - kept.size]
            parts.append(flagged(np.concatenate([kept, answer]), np.arange(kept.size + answer.size) >= kept.size))
        if any(part.size < ids.size for part, ids in zip(parts, whole, strict=True)):
            if self.drop:
                return self._dropped("too long")
            if np.array_equal(*parts):
                return self._dropped("the same answers where they are cut")
            self.counts["cut"] += 1
        return tuple(parts)

    def _dropped(self, reason: str) -> None:
        self.counts[reason] += 1


class Spool:
    """Rendered examples of one domain in a file, in order, with a hash of what each says."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("xb")
        self._sizes, self._parts, self._hashes = array("L"), array("B"), array("Q")

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, parts: Parts, content: bytes) -> None:
        self._parts.append(len(parts))
        self._hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8], "little"))
        for part in parts:
            self._sizes.append(part.size)
            self._file.write(part.data)

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [N]; the same for the same content."""
        return np.array(self._hashes, np.uint64)

    def read(self, which: np.ndarray) -> Iterator[Parts]:
        """The examples for which bool [N] is true."""
        self._file.flush()
        sizes = iter(self._sizes)
        with self._path.open("rb") as file:
            for count, wanted in zip(self._parts, which.tolist(), strict=True):
                own = [next(sizes) for _ in range(count)]
                if wanted:
                    data = file.read(4 * sum(own))
                    yield tuple(np.split(np.frombuffer(data, np.uint32), np.cumsum(own[:-1])))
                else:
                    file.seek(4 * sum(own), 1)

    def close(self) -> None:
        self._file.close()
        self._path.unlink()


class Reading:
    """What was read so far: counts, and the rows that could not be used."""

    def __init__(self, render: Renderer, progress: Progress, say):
        self.render, self._progress, self._say = render, progress, say
        self.rows, self.tokens = 0, 0
        self.malformed: list[str] = []

    def collect(self, rows: Iterable[Row], spool: Spool) -> None:
        """Raises ConfigError when pairs and others are mixed."""
        for row in rows:
            self.rows += 1
            reason = row.reason
            if row.example is not None:
                if row.example.pair != self.render.pairs:
                    raise ConfigError(
                        f"{row.origin}: examples.sources mixes pairs of answers with other examples; learn from them "
                        "in two runs, one after the other"
                    )
                try:
                    parts = self.render(row.example)
                except ConfigError as error:
                    reason = str(error)
                else:
                    if parts is not None:
                        self.tokens += sum(part.size for part in parts)
                        spool.add(parts, canonical(row.example))
            if reason:
                self.malformed.append(f"{row.origin}: {reason}")
                if len(self.malformed) <= NAMED:
                    self._say(f"left out: {self.malformed[-1]}")
            self._progress(EXAMPLES, self.rows, self.tokens, 0.0)

    def check(self, share: float) -> None:
        """Raises DataError when more than that share of the rows could not be used."""
        bad = len(self.malformed)
        if bad > share * self.rows:
            named = "; ".join(self.malformed[:3]) + ("; ..." if bad > 3 else "")
            raise DataError(
                f"{bad} of {self.rows} rows cannot be used ({100 * bad / self.rows:.2f} %, "
                f"examples.malformed_share={share} allows {100 * share:g} %): {named}"
            )


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Which examples to validate on: bool [N].  Those with the least hashes, so that equal ones are on one side, and at
    least one kind on either.  Raises DataError when there is only one kind."""
    kinds = np.unique(hashes)
    if kinds.size < 2:
        raise DataError(f"{kinds.size} different examples cannot be told apart into those to learn and to validate on")
    count = min(max(round(share * kinds.size), 1), kinds.size - 1)
    return hashes <= kinds[count - 1]
