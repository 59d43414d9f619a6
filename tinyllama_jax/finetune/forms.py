"""One row of a data set as an example: dialogues, instructions, plain text and pairs of answers, as they are published.

What a form cannot read is a `Malformed` with the reason; nothing is guessed or mended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_jax.data import readers
from tinyllama_jax.generate.templates import ROLES, Message

MESSAGES, ALPACA, SHAREGPT, TEXT, PREFERENCE = "messages", "alpaca", "sharegpt", "text", "preference"
# The columns that each form reads; another name for one is given as ?COLUMN=NAME.
COLUMNS = {
    MESSAGES: ("messages",),
    ALPACA: ("instruction", "input", "output"),
    SHAREGPT: ("conversations",),
    TEXT: ("text",),
    PREFERENCE: ("prompt", "chosen", "rejected"),
}
NEEDED = {ALPACA: ("instruction", "output"), PREFERENCE: ("chosen", "rejected")}  # of these, the rest may be missing
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """A dialogue that ends with an answer; or, with `chosen` and `rejected`, the prompt that both answer; or a text."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    chosen: str = ""
    rejected: str = ""

    @property
    def pair(self) -> bool:
        return bool(self.chosen)


class Malformed(Exception):
    """Why a row cannot be used."""


def form_of(record: Mapping) -> str:
    """The form of a data set by the fields of a row.  Raises Malformed when they are those of none."""
    for form in (PREFERENCE, MESSAGES, SHAREGPT, ALPACA, TEXT):  # a data set of pairs has `messages` too
        if all(name in record for name in NEEDED.get(form, COLUMNS[form])):
            return form
    known = "; ".join(f"{form}: {', '.join(NEEDED.get(form, COLUMNS[form]))}" for form in COLUMNS)
    raise Malformed(
        f"its fields {readers.some(record)} are those of no form ({known}); name them, ?form=FORM&COLUMN=NAME"
    )


def example(record: Any, form: str, columns: Mapping[str, str]) -> Example:
    """columns: the names of the form's columns in this data set.  Raises Malformed."""
    if not isinstance(record, Mapping):
        raise Malformed("not a JSON object")
    values = {}
    for column in COLUMNS[form]:
        name = columns.get(column, column)
        values[column] = readers.pick(record, name)
        if values[column] is None and (column in NEEDED.get(form, COLUMNS[form]) or column in columns):
            raise Malformed(f"has no field {name!r}, it has {readers.some(record)}")
    return _FORMS[form](**values)


def _messages(messages: Any) -> Example:
    return Example(_dialogue(_turns(messages, "messages", "role", "content", {role: role for role in ROLES})))


def _sharegpt(conversations: Any) -> Example:
    return Example(_dialogue(_turns(conversations, "conversations", "from", "value", _SPEAKERS)))


def _alpaca(instruction: Any, input: Any, output: Any) -> Example:
    asked = Message("user", _string(instruction, "instruction"), _string(input or "", "input").strip())
    return Example(_dialogue([asked, Message("assistant", _string(output, "output"))]))


def _text(text: Any) -> Example:
    if not _string(text, "text").strip():
        raise Malformed("the text is empty")
    return Example(text=text)


def _preference(prompt: Any, chosen: Any, rejected: Any) -> Example:
    """As in UltraFeedback's binarised form and TRL's: prompt and answers as texts, as messages, or whole dialogues
    that differ in their last message only."""
    names = {role: role for role in ROLES}
    if isinstance(prompt, str):
        asked = [Message("user", _string(prompt, "prompt"))]
    else:
        asked = _turns(prompt, "prompt", "role", "content", names) if prompt is not None else []
    answers = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, str):
            answers.append(([], _string(value, name)))
            continue
        turns = _turns(value, name, "role", "content", names)
        if turns[-1].role != "assistant":
            raise Malformed(f"{name} ends with a message of the {turns[-1].role}'s, not the assistant's")
        answers.append((turns[:-1], turns[-1].content))
    (before, preferred), (others, dispreferred) = answers
    if before != others:
        raise Malformed("chosen and rejected answer different prompts")
    dialogue = before or asked
    if not dialogue:
        raise Malformed("has no prompt")
    if preferred == dispreferred:
        raise Malformed("chosen and rejected are the same answer")
    whole = _dialogue([*dialogue, Message("assistant", preferred)])
    _dialogue([*dialogue, Message("assistant", dispreferred)])
    return Example(whole[:-1], chosen=preferred, rejected=dispreferred)


_FORMS = {MESSAGES: _messages, ALPACA: _alpaca, SHAREGPT: _sharegpt, TEXT: _text, PREFERENCE: _preference}


def _turns(value: Any, name: str, role: str, content: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise Malformed(f"{name} is no list of messages" if value != [] else f"{name} is empty")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or role not in turn or content not in turn:
            raise Malformed(f"{name}[{i}] has no {role} and {content}")
        if not isinstance(turn[role], str) or turn[role] not in roles:
            raise Malformed(f"{name}[{i}]: {role} {str(turn[role])[:40]!r} is none of {', '.join(roles)}")
        turns.append(Message(roles[turn[role]], _string(turn[content], f"{name}[{i}]")))
    return turns


def _dialogue(turns: list[Message]) -> tuple[Message, ...]:
    """The turns, without an empty system message, if they are a dialogue that ends with an answer."""
    if turns[0].role == "system" and not turns[0].content.strip():
        turns = turns[1:]
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    for i, message in enumerate(rest):
        due = ("user", "assistant")[i % 2]
        if message.role != due:
            raise Malformed(f"turn {i} is the {message.role}'s where the {due}'s is due")
        if not message.content.strip():
            raise Malformed(f"turn {i}: the {message.role}'s message is empty")
    if not rest or rest[-1].role != "assistant":
        raise Malformed("no answer of the assistant ends it")
    return tuple(turns)


def _string(value: Any, name: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"{name}: byte {error.start} is not valid UTF-8") from error
    if not isinstance(value, str):
        raise Malformed(f"{name} is {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an escaped lone surrogate is JSON, but no text
            raise Malformed(f"{name} holds a lone surrogate at character {error.start}") from error
    return value


def canonical(example: Example) -> bytes:
    """What makes an example the same as another when train and validation are told apart: all of it, but of a pair the
    prompt alone, so that no prompt is on both sides."""
    parts = [example.text]
    for message in example.messages:
        parts += (message.role, message.content, message.input)
    return "\0".join(f"{len(part)}:{part}" for part in parts).encode()
