"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tinyllama_jax.terminal import LINE_SECONDS, duration, say


class Requests:
    """Called with (kind of request, answered, of how many).  A context manager."""

    def __init__(self):
        self._bar, self._kind = None, ""
        self._begin = self._last = time.monotonic()

    def __call__(self, kind: str, done: int, total: int) -> None:
        now = time.monotonic()
        if kind != self._kind:
            self._kind, self._begin = kind, now
            self.close()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=total, desc=kind, file=sys.stderr)
            self._bar.update(done - self._bar.n)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            left = duration((now - self._begin) * (total - done) / max(done, 1))
            say(f"{kind}: {done:,} of {total:,} requests, {left} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
