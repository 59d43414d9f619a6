"""Chat templates: a dialogue as the token ids that a chat model was trained to answer, or is trained with.

A template (templates.py) is data: text and control tokens in turn.  Texts between two control tokens are encoded apart
from them and never yield one, so nobody can end his own message with `</s>` or begin another role's with
`<|im_start|>`.  Zephyr's and v0.1's role markers are ordinary text to their models: what separates roles there is the
`</s>`, or nothing.  Answers are encoded apart from what is before and behind them, as a model writes them: then a
prompt has the same ids whether its answer is known or not.

A checkpoint's own Jinja template is looked at, never executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_backends import CONTROL, JSON_CONFIG_FILE, JSON_FILE, MODEL_FILE, read_pieces
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.generate.templates import TEMPLATES as TEMPLATES
from tinyllama_jax.generate.templates import Control, Part, Template, check, written
from tinyllama_jax.generate.templates import Message as Message


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
        if isinstance(text, str) and template.known_by and template.known_by in text:
            return template
    found = "has a chat template of another form" if text else "names no chat template"
    raise ConfigError(f"{folder} {found}; choose with --template {'|'.join(TEMPLATES)}")


def control_ids(folder: Path) -> dict[str, int]:
    """Control tokens of a vocabulary, by their text, as the files in `folder` list them.
    Raises DataError for a file that is not JSON, or lists them in another way."""
    try:
        added = _read(folder / JSON_FILE).get("added_tokens") or ()
        ids = {token["content"]: int(token["id"]) for token in added}
        decoder = _read(folder / JSON_CONFIG_FILE).get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(i) for i, token in decoder.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: its added tokens are not listed as tokenizer files do ({error!r})") from error
    pieces = read_pieces(folder / MODEL_FILE) if (folder / MODEL_FILE).exists() else []
    return {text: i for i, (text, _, kind) in enumerate(pieces) if kind == CONTROL} | ids


def _read(file: Path) -> dict:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fetch the file again") from error
    return value if isinstance(value, dict) else {}


class Chat:
    """A template with a tokenizer: dialogues to ids.

    start: ids at the beginning of every document (load.prompt_tokens of an empty text).
    controls: as control_ids found them.  stop_ids, stop: ids and texts that end an answer.
    system: the system message of dialogues that have none; None = they get none.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        start: Sequence[int],
        controls: Mapping[str, int],
        system: str | None = None,
    ):
        self.template, self._tokenizer, self._start, self._controls = template, tokenizer, tuple(start), dict(controls)
        if system is not None and not template.roles[0]:
            raise ConfigError(f"the template {template.name} has no system messages; leave the system message out")
        self.system = system
        ids = [self._controls[text] for text in template.ends if text in self._controls]
        self.stop_ids = tuple(dict.fromkeys([tokenizer.eos_id, *ids]))
        self._reserved = {self._controls[text]: text for text in template.controls if text in self._controls}
        self._reserved |= {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
        self.stop = tuple(text for text in template.ends if text not in self._controls)

    def ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt of a dialogue, up to where the answer begins.  Raises ConfigError as `check` does."""
        check(messages, self.template)
        return tuple(self._encode(self._written(messages))[0].tolist())

    def render(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """A whole dialogue -> its ids int32 [T], and which of them the assistant writes bool [T]: the words of the
        answers and what ends each.  Up to any answer the ids are those of `ids`.

        Raises ConfigError unless the two alternate and the last message is the assistant's.
        """
        check(messages, self.template, answered=True)
        return self._encode(self._written(messages))

    def plain(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text as a document -> ids int32 [T], bool [T]: all of it is learned, and the EOS that ends it."""
        ids = np.array([*self._start, *self._plain(text, False), self._tokenizer.eos_id], np.int32)
        return ids, np.arange(ids.size) >= len(self._start)

    @property
    def start_tokens(self) -> int:
        return len(self._start)

    def _written(self, messages: Sequence[Message]) -> list[Part]:
        if self.system is not None and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        return written(self.template, messages)

    def _encode(self, parts: Iterable[Part]) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids, which are an answer's).  Neighbouring texts are encoded together unless one is an answer's and the
        other is not."""
        runs: list[tuple[list[int], bool]] = [(list(self._start), False)]
        text, answer, follows = "", False, False  # follows: text stands right before `text`

        def flush() -> None:
            if text:
                runs.append((self._plain(text, follows), answer))

        for what, of_answer in parts:
            if isinstance(what, Control) and (i := self._id(what)) is not None:
                flush()
                runs.append(([i], of_answer))
                text, follows = "", False
                continue
            if of_answer != answer:
                flush()
                text, answer, follows = "", of_answer, bool(text) or follows
            text += what.text if isinstance(what, Control) else what
        flush()
        ids = np.concatenate([np.array(run, np.int32) for run, _ in runs])
        return ids, np.repeat([flag for _, flag in runs], [len(run) for run, _ in runs])

    def _id(self, control: Control) -> int | None:
        return self._controls.get(control.text) if control.text else self._tokenizer.eos_id

    def _plain(self, text: str, follows: bool) -> list[int]:
        ids = self._tokenizer.encode_further(text) if follows else self._tokenizer.encode_plain(text)
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
