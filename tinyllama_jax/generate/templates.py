"""Forms of dialogues as data: which texts and control tokens stand around messages, and what of it is an answer.

Zephyr's form (TinyLlama-Chat v1.0), ChatML (v0.2, v0.3), that of v0.1, Alpaca's two prompts (Stanford's, with and
without an input), and none at all: a prompt, and its continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinyllama_jax.errors import ConfigError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str
    input: str = ""  # what the instruction in `content` is about, which Alpaca's form writes apart


@dataclass(frozen=True)
class Control:
    """A control token; spelled as ordinary text by tokenizers that have none of this name.  Empty: the tokenizer's EOS,
    which each has."""

    text: str = ""


@dataclass(frozen=True)
class Template:
    name: str
    known_by: str  # what a Jinja template of this form contains; "" = cannot be known by it
    turn: tuple[str | Control, ...]  # of one message: {role} and {content} are put in
    opening: tuple[str | Control, ...]  # behind the last message: the answer begins here.  An answer's turn begins so
    ends: tuple[str, ...] = ()  # beside EOS, what ends an answer: a control token, or else text
    roles: tuple[str, str, str] = ROLES  # as they are written; "" = there is no such role
    strips: bool = False  # contents lose the blanks around them, as the spaces are the template's
    asked: tuple[str, str] = ("", "")  # of a message of the user instead of `turn`: without and with an input

    @property
    def controls(self) -> tuple[str, ...]:
        """Its control tokens, apart from the EOS."""
        found = [part.text for part in (*self.turn, *self.opening) if isinstance(part, Control) and part.text]
        return tuple(dict.fromkeys(found))


_ALPACA = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request.\n\n### Instruction:\n{content}\n\n"
TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "chatml",
            "<|im_start|>",
            turn=(Control("<|im_start|>"), "{role}\n{content}", Control("<|im_end|>"), "\n"),
            opening=(Control("<|im_start|>"), "assistant\n"),
            ends=("<|im_end|>",),
        ),
        Template(
            "zephyr",
            "<|user|>",
            turn=("<|{role}|>\n{content}", Control(), "\n"),
            opening=("<|assistant|>\n",),
        ),
        Template(
            "v0_1",
            "### Human",
            turn=("### {role}: {content}",),
            opening=("### Assistant:",),
            ends=("### Human:",),
            roles=("", "Human", "Assistant"),
            strips=True,
        ),
        Template(
            "alpaca",
            "### Instruction",
            turn=("### Response:{content}", Control()),
            opening=("### Response:",),
            roles=("", "user", "assistant"),
            asked=(
                f"{_ALPACA}. {_RESPOND}",
                f"{_ALPACA}, paired with an input that provides further context. {_RESPOND}### Input:\n{{input}}\n\n",
            ),
        ),
        Template(
            "none",
            "",
            turn=("{content}", Control()),
            opening=(),
            roles=("", "user", "assistant"),
            asked=("{content}", "{content}\n\n{input}"),
        ),
    )
}


class Part(NamedTuple):
    """Of a dialogue as it is written."""

    what: str | Control
    answer: bool = False  # of the assistant's words, or what ends them


def written(template: Template, messages: Sequence[Message]) -> list[Part]:
    """A dialogue, up to where an answer begins when the last message is the user's, else up to the answer's end.

    So what is written up to an answer is the same whether it is still to come or there already.
    """
    parts: list[Part] = []
    open_end = False  # the message before is an answer that nothing has ended yet
    for message in messages:
        if message.role == "assistant":
            answer, rest = _answer(template, message)
            parts += [*map(Part, template.opening), *(Part(what, True) for what in answer), *map(Part, rest)]
            open_end = not any(isinstance(what, Control) for what in answer)
            continue
        turn = _turn(template, message)
        if open_end:
            end, *others = _cut(turn, template.ends)
            parts.append(Part(end, True))
            turn = others
        parts += map(Part, turn)
    if messages[-1].role != "assistant":
        return [*parts, *map(Part, template.opening)]
    if open_end:
        return [*parts, Part(Control(), True)]
    while not parts[-1].answer:  # what separates it from a next message, which there is not
        parts.pop()
    return parts


def _turn(template: Template, message: Message) -> list[str | Control]:
    content = message.content.strip() if template.strips else message.content
    role = template.roles[ROLES.index(message.role)]
    asked = template.asked[bool(message.input)] if message.role == "user" else ""
    if not asked and message.input:
        content = f"{content}\n\n{message.input}"
    turn = (asked,) if asked else template.turn
    return [
        part.format(role=role, content=content, input=message.input) if isinstance(part, str) else part for part in turn
    ]


def _answer(template: Template, message: Message) -> tuple[list[str | Control], list[str | Control]]:
    """-> (words and what ends them, what comes before a next message)."""
    turn = _turn(template, message)
    for what in template.opening[:-1]:
        assert turn.pop(0) == what
    if template.opening:
        turn[0] = turn[0].removeprefix(template.opening[-1])
    end = next((i for i, what in enumerate(turn) if isinstance(what, Control)), len(turn) - 1)
    return turn[: end + 1], turn[end + 1 :]


def _cut(turn: list[str | Control], ends: tuple[str, ...]) -> Iterator[str | Control]:
    end = next(end for end in ends if turn[0].startswith(end))
    yield from (end, turn[0].removeprefix(end), *turn[1:])


def check(messages: Sequence[Message], template: Template, *, answered: bool = False) -> None:
    """Raise ConfigError unless this is a dialogue that the template can write, and whose next turn is an answer; or,
    `answered`, whose last one is."""
    if not messages:
        raise ConfigError("there are no messages; at least one of the user is needed")
    turns = list(enumerate(messages))
    for i, message in turns:
        if message.role not in ROLES:
            raise ConfigError(f"messages[{i}]: role {message.role!r} is none of {', '.join(ROLES)}")
        if message.role != "assistant" and not message.content.strip():
            raise ConfigError(f"messages[{i}]: the {message.role}'s message is empty")
    if messages[0].role == "system":
        if not template.roles[0]:
            raise ConfigError(f"messages[0]: the template {template.name} has no system messages; leave it out")
        turns = turns[1:]
    for place, (i, message) in enumerate(turns):
        due = ("user", "assistant")[place % 2]
        if message.role != due:
            raise ConfigError(f"messages[{i}]: is the {message.role}'s where the {due}'s is due; the two alternate")
    if turns and len(turns) % 2 != answered:
        return
    if answered:
        raise ConfigError("the last message must be the assistant's: nothing answers the user's")
    raise ConfigError("the last message must be the user's: it is what is answered")
