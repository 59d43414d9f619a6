"""What `chat` does: one dialogue, on a terminal or through pipes."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tinyllama_jax.errors import ConfigError, DataError, UsageError
from tinyllama_jax.terminal import say
from tinyllama_jax.train import saved

if TYPE_CHECKING:  # they import jax, which no refusal waits for
    from tinyllama_jax.generate.chat import Chat
    from tinyllama_jax.generate.engine import Engine
    from tinyllama_jax.generate.sampling import Sampling

PROMPT = "> "


def chat(args: argparse.Namespace) -> None:
    path = saved.resolve(args.checkpoint)  # before jax is imported
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    from tinyllama_jax.generate.chat import choose

    template = choose(args.template, path / "tokenizer")
    from tinyllama_jax.generate.ready import ready
    from tinyllama_jax.generate.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    made = ready(args.checkpoint, dtype=args.dtype, weights=args.weights, rows=1)
    dialogue = Dialogue(made.engine, made.tokenizer, made.chat(template), args.system, sampling, args.max_new_tokens)
    with made.inside():
        converse(dialogue, args.json)


class Dialogue:
    """A dialogue that remembers what was said, as far as the model's context reaches."""

    def __init__(self, engine: Engine, tokenizer, chat: Chat, system: str, sampling: Sampling, max_new_tokens: int):
        self._engine, self._tokenizer, self._chat = engine, tokenizer, chat
        self._sampling, self._most = sampling, max_new_tokens
        self._answers = 0
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Forgets all, and takes another system message unless it is None.  Raises ConfigError when the template has
        no place for one."""
        from tinyllama_jax.generate.chat import Message, check

        system = self._system if system is None else system
        first = [Message("system", system)] if system.strip() else []
        check([*first, Message("user", "?")], self._chat.template)
        self._system, self._messages = system, first

    def answer(self, text: str, write: Callable[[str], None], stopped: Callable[[], bool]) -> dict:
        """Answers a message; `write` gets the text as it comes, and `stopped` is asked between two steps.

        Raises ConfigError for a message that is empty or too long; nothing is remembered of it then.
        """
        from tinyllama_jax.generate.chat import Message
        from tinyllama_jax.generate.engine import Request
        from tinyllama_jax.generate.sampling import Sampling
        from tinyllama_jax.generate.text import Text

        context = self._engine.context_tokens
        asked = [*self._messages, Message("user", text)]
        kept, prompt = self._chat.fit(asked, context - min(self._most, context // 2))
        if forgotten := (len(asked) - len(kept)) // 2:
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            say(f"the context of {context} tokens is full: the oldest {turns} of the dialogue left it")
        how = Sampling(**vars(self._sampling) | {"stream": self._answers})  # another answer, other draws
        number = self._engine.add(
            Request(prompt=prompt, max_new_tokens=self._most, sampling=how, stop_ids=self._chat.stop_ids)
        )
        self._answers += 1
        said, count, finish = Text(self._tokenizer, prompt, self._chat.stop), 0, None
        whole = ""

        def tell(new: str) -> None:
            nonlocal whole
            whole += new
            if new:
                write(new)

        while finish is None:
            for piece in self._engine.step():
                count += len(piece.tokens)
                finish = piece.finish
                tell(said.add(piece.tokens[:-1] if finish == "stop" else piece.tokens))
            if finish is None and (stopped() or said.stopped):
                self._engine.cancel(number)
        tell(said.finish())
        finish = "stop" if said.stopped else finish
        self._messages = [*kept, Message("assistant", whole)]
        return {
            "answer": whole,
            "finish": finish,
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "forgotten_turns": forgotten,
        }


def converse(dialogue: Dialogue, as_json: bool) -> None:
    """Answers what standard input says, until its end."""
    terminal = sys.stdin.isatty()
    for line in _lines():
        if terminal and line.strip() == "/quit":
            return
        try:
            if terminal and line.strip() == "/reset":
                dialogue.begin()
            elif terminal and line.startswith("/system"):
                dialogue.begin(line.removeprefix("/system").strip())
            elif terminal and line.startswith("/"):
                say(f"{line.split()[0]} is none of /reset, /system TEXT, /quit; Ctrl-D ends")
            elif line.strip():
                with _interrupts() as stopped:
                    value = dialogue.answer(line, _nothing if as_json else _out, stopped)
                _out((json.dumps(value, ensure_ascii=False) if as_json else "") + "\n")
        except ConfigError as error:
            if not terminal:
                raise
            say(str(error))


def _lines() -> Iterator[str]:
    """What the user says: a message per line, prompted for."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and the ones before come back)
    while True:
        try:
            if terminal and sys.stdout.isatty():
                yield input(PROMPT)
                continue
            print(PROMPT, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("")  # drops the line
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not {error.encoding} text: {error.reason}") from error
        if not line:
            say("")
            return
        yield line.rstrip("\r\n")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C while an answer is written: it stops between two steps, as the engine must not be left within one.  The
    second ends the program."""
    count = 0

    def note(signal_number, frame) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _out(text: str) -> None:
    print(text, end="", flush=True)


def _nothing(text: str) -> None:
    pass
