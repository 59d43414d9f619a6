"""Chat templates: a dialogue as the token ids that a chat model was trained to answer.

The three forms that TinyLlama's chat models were trained with: Zephyr's (Chat-v1.0), ChatML (v0.2, v0.3) and that of
v0.1.  Each is data: text and control tokens in turn.  Texts between two control tokens are encoded apart from them and
never yield one, so nobody can end his own message with `</s>` or begin another role's with `<|im_start|>`.  Zephyr's
and v0.1's role markers are ordinary text to their models: what separates roles there is the `</s>`, or nothing.

A checkpoint's own Jinja template is looked at, never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_backends import JSON_CONFIG_FILE, JSON_FILE
from tinyllama_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Control:
    """A control token; spelled as ordinary text by tokenizers that have none of this name.  Empty: the tokenizer's EOS,
    which each has."""

    text: str = ""


@dataclass(frozen=True)
class Template:
    name: str
    known_by: str  # what a Jinja template of this form contains
    turn: tuple[str | Control, ...]  # of one message: {role} and {content} are put in
    opening: tuple[str | Control, ...]  # behind the last message: the answer begins here
    ends: tuple[str, ...] = ()  # beside EOS, what ends an answer: a control token, or else text
    roles: tuple[str, str, str] = ("system", "user", "assistant")  # as they are written; "" = there is no such role
    strips: bool = False  # contents lose the blanks around them, as the spaces are the template's


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
    )
}
ROLES = ("system", "user", "assistant")


def choose(name: str, folder: Path) -> Template:
    """The template of that name; `auto`: the one that the tokenizer in `folder` says its model was trained with.

    Raises ConfigError when it says nothing or something unknown, DataError for a file that is not JSON.
    """
    if name != "auto":
        return TEMPLATES[name]
    beside = folder / "chat_template.jinja"  # where newer versions of transformers put it
    text = _read(folder / JSON_CONFIG_FILE).get("chat_template") or ""
    text = text or (beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else "")
    if isinstance(text, list):  # several under names
        named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
        text = named.get("default") or ""
    for template in TEMPLATES.values():
        if isinstance(text, str) and template.known_by in text:
            return template
    found = "has a chat template of another form" if text else "names no chat template"
    raise ConfigError(f"{folder} {found}; choose with --template {'|'.join(TEMPLATES)}")


def control_ids(folder: Path) -> dict[str, int]:
    """Control tokens beside a vocabulary, by their text, as tokenizer.json and tokenizer_config.json list them.
    Raises DataError for a file that is not JSON, or lists them in another way."""
    try:
        added = _read(folder / JSON_FILE).get("added_tokens") or ()
        ids = {token["content"]: int(token["id"]) for token in added}
        decoder = _read(folder / JSON_CONFIG_FILE).get("added_tokens_decoder") or {}
        return ids | {token["content"]: int(i) for i, token in decoder.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: its added tokens are not listed as tokenizer files do ({error!r})") from error


def _read(file: Path) -> dict:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fetch the file again") from error
    return value if isinstance(value, dict) else {}


def check(messages: Sequence[Message], template: Template) -> None:
    """Raise ConfigError unless this is a dialogue that the template can write, and whose next turn is an answer."""
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
    if len(turns) % 2 == 0:
        raise ConfigError("the last message must be the user's: it is what is answered")


class Chat:
    """A template with a tokenizer: dialogues to ids.

    start: ids at the beginning of every document (load.prompt_tokens of an empty text).
    controls: as control_ids found them.  stop_ids, stop: ids and texts that end an answer.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, start: Sequence[int], controls: Mapping[str, int]):
        self.template, self._tokenizer, self._start, self._controls = template, tokenizer, tuple(start), dict(controls)
        ids = [self._controls[text] for text in template.ends if text in self._controls]
        self.stop_ids = tuple(dict.fromkeys([tokenizer.eos_id, *ids]))
        used = [part.text for part in (*template.turn, *template.opening) if isinstance(part, Control)]
        self._reserved = {self._controls[text]: text for text in used if text in self._controls}
        self._reserved |= {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
        self.stop = tuple(text for text in template.ends if text not in self._controls)

    def ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt of a dialogue, up to where the answer begins.  Raises ConfigError as `check` does."""
        check(messages, self.template)
        names = dict(zip(ROLES, self.template.roles, strict=True))
        parts: list[str | Control] = []
        for message in messages:
            content = message.content.strip() if self.template.strips else message.content
            for part in self.template.turn:
                text = isinstance(part, str)
                parts.append(part.format(role=names[message.role], content=content) if text else part)
        return self._start + tuple(self._encode([*parts, *self.template.opening]))

    def _encode(self, parts: Sequence[str | Control]) -> list[int]:
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str) or (part.text and part.text not in self._controls):
                text += part if isinstance(part, str) else part.text
                continue
            ids += self._plain(text)
            ids.append(self._controls[part.text] if part.text else self._tokenizer.eos_id)
            text = ""
        return ids + self._plain(text)

    def _plain(self, text: str) -> list[int]:
        ids = self._tokenizer.encode_plain(text) if text else []
        for i in self._reserved.keys() & set(ids):
            raise ConfigError(
                f"a message spells {self._reserved[i]}, which this tokenizer takes for a control token wherever it "
                "stands; write it otherwise"
            )
        return ids

    def fit(self, messages: Sequence[Message], room: int) -> tuple[list[Message], tuple[int, ...]]:
        """The dialogue without the oldest turns that do not fit into `room` tokens, and its ids.  The system's message
        and the last one stay.  Raises ConfigError when these alone are too long."""
        kept = list(messages)
        first = int(kept[0].role == "system") if kept else 0
        while len(ids := self.ids(kept)) > room:
            if len(kept) == first + 1:
                raise ConfigError(
                    f"the message takes {len(ids)} tokens with what belongs to it; there is room for {room}"
                )
            del kept[first : first + 2]
        return kept, ids
