"""An answer's text while its tokens arrive, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_jax.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no whole character (yet)


class Text:
    """The text behind a prompt, piece by piece.

    Tokens are decoded behind those before them: alone, a continuation loses the space that it may begin with.  Text is
    held back while its last character lacks bytes, and while it may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._ids = tokenizer, list(prompt)
        # Only the last tokens are decoded again: those from `_from`, of which the ones before `_to` have been told.
        self._from, self._to = 0, len(self._ids)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False  # a stop string was met; the text ends before it

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now; empty once a stop string was met.  Token by token, for some decoders take back
        what they said of bytes when more follow: so a text does not depend on how its tokens arrived."""
        return "".join(map(self._add, tokens))

    def _add(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._from : self._to])
        text = self._tokenizer.decode(self._ids[self._from :])
        if text.endswith(INCOMPLETE):
            return ""
        self._from, self._to = self._to if self._to > self._from else self._from, len(self._ids)
        return self._search(text[len(before) :])

    def finish(self) -> str:
        """What was still held back: the answer is at its end."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._from : self._to])
        rest = self._tokenizer.decode(self._ids[self._from :])[len(before) :]
        self._to = len(self._ids)
        text = self._search(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _search(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that begins a stop string.
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        ends = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in ends if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[cut:]
        return text[:cut]
