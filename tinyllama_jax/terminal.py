"""What a verb says: answers on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time

LINE_SECONDS = 10


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(args: argparse.Namespace, value: dict, lines: list[str]) -> None:
    """Numbers to stdout: one JSON object with --json, otherwise lines for a person."""
    print(json.dumps(value) if args.json else "\n".join(lines))


class Progress:
    """Progress through text: documents, tokens, speed, time left.  A bar on a terminal, a line every ten seconds
    elsewhere.  A context manager."""

    def __init__(self):
        self._bar, self._phase = None, ""
        self._begin = self._last = time.monotonic()

    def __call__(self, phase: str, documents: int, tokens: int, share: float) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._begin = phase, now
        if now - self._last < (0.1 if sys.stderr.isatty() else LINE_SECONDS):
            return
        self._last = now
        text = self._text(documents, tokens, share, now - self._begin)
        if not sys.stderr.isatty():
            say(text)
            return
        from tqdm import tqdm

        self._bar = self._bar or tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", file=sys.stderr)
        self._bar.n = min(100.0, 100 * share)
        self._bar.set_description_str(text)

    def _text(self, documents: int, tokens: int, share: float, seconds: float) -> str:
        parts = [f"{self._phase}: {documents:,} documents"]
        if tokens:
            parts.append(f"{tokens:,} tokens" + (f", {tokens / seconds:,.0f} a second" if seconds else ""))
        if 0 < share < 1 and seconds:  # a phase that has just begun has no speed
            parts.append(f"{100 * share:.1f} %, {duration(seconds * (1 - share) / share)} left")
        return ", ".join(parts)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """As a person says it: 45 s, 12 min, 3 h 20 min, 5 days."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 1440:.1f} days"
