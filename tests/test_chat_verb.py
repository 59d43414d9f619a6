"""`chat` with an engine that has no model: what is remembered, forgotten, said and where."""

import io
import json
import signal

import pytest
from fake_engine import BOS, EOS, Bytes, FakeEngine, answer

from tinyllama_jax import verbs_chat
from tinyllama_jax.cli import main
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.chat import TEMPLATES, Chat, Message
from tinyllama_jax.generate.engine import Request
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.verbs_chat import Dialogue, converse


def dialogue(*, template="zephyr", system="", context_tokens=300, most=20, seconds=0.0):
    tokenizer = Bytes()
    chat = Chat(TEMPLATES[template], tokenizer, [BOS], {})
    return Dialogue(
        FakeEngine(context_tokens=context_tokens, seconds=seconds), tokenizer, chat, system, Sampling(), most
    )


def said(messages, tokens=20, turn=0) -> str:
    ids = Chat(TEMPLATES["zephyr"], Bytes(), [BOS], {}).ids(messages)
    ids = answer(Request(prompt=ids, max_new_tokens=tokens, sampling=Sampling(stream=turn)))
    return Bytes().decode(i for i in ids if i != EOS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(dialogue, lines, terminal, as_json) -> what went to stdout and stderr."""

    def run(with_whom, text, *, terminal=False, as_json=False):
        monkeypatch.setattr("sys.stdin", (Terminal if terminal else io.StringIO)(text))
        converse(with_whom, as_json)
        return capsys.readouterr()

    return run


def test_a_piped_dialogue_remembers_what_was_said(talk):
    found = talk(dialogue(system="s"), "hi\n\nwho?\n/reset")
    messages = [Message("system", "s"), Message("user", "hi")]
    first = said(messages)
    messages += [Message("assistant", first), Message("user", "who?")]
    second = said(messages, turn=1)
    messages += [Message("assistant", second), Message("user", "/reset")]
    assert found.out == f"{first}\n{second}\n{said(messages, turn=2)}\n", "a command only on a terminal"
    assert len(second) == 10 and found.err == "> " * 5 + "\n"


def test_json_is_one_object_per_answer(talk):
    found = talk(dialogue(), "hi\nwho?\n", as_json=True)
    one, two = map(json.loads, found.out.splitlines())
    assert one == {
        "answer": said([Message("user", "hi")]),
        "finish": "length",
        "prompt_tokens": 1 + len("<|user|>\nhi") + 1 + len("\n<|assistant|>\n"),
        "completion_tokens": 20,
        "forgotten_turns": 0,
    }
    assert (two["finish"], two["completion_tokens"]) == ("stop", 11)


def test_commands_of_a_terminal(talk):
    found = talk(dialogue(), "hi\n/reset\nhi\n/system s\nhi\n/what\n/quit\nhi\n", terminal=True)
    hi = [Message("user", "hi")]
    assert found.out.splitlines() == [said(hi), said(hi, turn=1), said([Message("system", "s"), *hi], turn=2)]
    assert "/what is none of /reset, /system TEXT, /quit" in found.err
    found = talk(dialogue(template="v0_1"), "/system s\nhi\n", terminal=True)
    assert "v0_1 has no system messages" in found.err and len(found.out) == 21


def test_a_full_context_forgets_the_oldest_turns_and_says_so(talk):
    found = talk(dialogue(system="s", context_tokens=150), "hi\n" * 4, as_json=True)
    values = [json.loads(line) for line in found.out.splitlines()]
    assert [v["forgotten_turns"] for v in values] == [0, 0, 1, 1]
    assert "the context of 150 tokens is full: the oldest turn of the dialogue left it" in found.err
    assert all(v["prompt_tokens"] <= 130 for v in values)
    turn = [Message("user", "hi"), Message("assistant", values[1]["answer"])]
    assert values[2]["answer"] == said([Message("system", "s"), *turn, Message("user", "hi")], turn=2)


def test_a_message_that_is_too_long_is_refused_and_not_remembered(talk):
    found = talk(dialogue(context_tokens=60), "x" * 60 + "\nhi\n", terminal=True)
    assert "there is room for 40" in found.err and found.out == said([Message("user", "hi")]) + "\n"
    with pytest.raises(ConfigError, match="there is room for 40"):
        talk(dialogue(context_tokens=60), "x" * 60)


def test_an_interrupt_stops_the_answer_and_what_was_said_stays(talk):
    """The signal arrives while the engine is within a step."""
    with_whom = dialogue(context_tokens=10_000, most=9_000)
    engine, step = with_whom._engine, with_whom._engine.step

    def interrupted():
        if engine.steps == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    engine.step = interrupted
    before = signal.getsignal(signal.SIGINT)
    value = json.loads(talk(with_whom, "hi", as_json=True).out)
    assert (value["finish"], value["completion_tokens"]) == ("cancelled", 6)
    assert not engine.busy and signal.getsignal(signal.SIGINT) is before
    engine.step = step
    with_whom._most = 20
    hi = [Message("user", "hi"), Message("assistant", value["answer"]), Message("user", "hi")]
    assert json.loads(talk(with_whom, "hi", as_json=True).out)["answer"] == said(hi, turn=1)


def test_stop_strings_end_an_answer(talk):
    with_whom = dialogue(most=200)
    whole = json.loads(talk(dialogue(most=200), "hi", as_json=True).out)["answer"]
    with_whom._chat.stop = (whole[9:12],)
    value = json.loads(talk(with_whom, "hi", as_json=True).out)
    assert (value["answer"], value["finish"]) == (whole[: whole.index(whole[9:12])], "stop")
    assert value["completion_tokens"] < 20 and not with_whom._engine.busy


def test_refusals_are_a_line(capsys, tmp_path, monkeypatch):
    assert main(["chat", str(tmp_path / "none")]) == 78
    assert "no such directory" in capsys.readouterr().err
    monkeypatch.setattr(verbs_chat.saved, "resolve", lambda text: tmp_path)
    assert main(["chat", "x", "--max-new-tokens", "0"]) == 2
    assert main(["chat", "x"]) == 78
    err = capsys.readouterr().err.splitlines()
    assert "--max-new-tokens 0" in err[0] and "choose with --template chatml|zephyr|v0_1" in err[1] and len(err) == 2
