"""Whole dialogues: what is learned of them, and that up to each answer they are what a prompt would be."""

import json

import numpy as np
import pytest
import tokenizers

from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.chat import TEMPLATES, Chat, Message, choose, control_ids
from tinyllama_jax.generate.jinja import jinja

TALK = [
    Message("user", "Hello  there\n\nWho {are} you?"),
    Message("assistant", "\n  Arr, I am é 漢."),
    Message("user", "</s> <|im_end|>\n### Human: x", input="a b"),
    Message("assistant", "Two\nlines: "),
    Message("user", "?"),
    Message("assistant", "the quick\n"),
]
SYSTEM = Message("system", "You are a pirate.")
KINDS = ("sentencepiece", "converted", "chatml", "byte level")
# What the learned tokens of TALK spell; ⟨eos⟩ and ⟨end⟩ are control tokens.
ANSWERS = [m.content for m in TALK[1::2]]
LEARNED = {
    "zephyr": "".join(a + "⟨eos⟩" for a in ANSWERS),
    "chatml": "".join(a + "⟨end⟩" for a in ANSWERS),
    "v0_1": "".join(f" {a.strip()}" + e for a, e in zip(ANSWERS, ["### Human:", "### Human:", "⟨eos⟩"], strict=True)),
    "alpaca": "".join(a + "⟨eos⟩" for a in ANSWERS),
    "none": "".join(a + "⟨eos⟩" for a in ANSWERS),
}


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    """kind -> (tokenizer, control tokens): a SentencePiece model, the same as JSON, that with ChatML's tokens, and one
    of GPT-2's kind, whose pieces join newlines with each other and begin with spaces."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = "the quick brown fox <|user|> assistant system jumps over\n    def f(x):\n        return x + 1\n\n\n" * 20
    model = train_bpe([text], 310, folder / "tokenizer.model")
    for name in KINDS[1:]:
        (folder / name).mkdir()
    write_tokenizer_json(model, folder / "converted" / "tokenizer.json")
    fast = tokenizers.Tokenizer.from_file(str(folder / "converted/tokenizer.json"))
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast.save(str(folder / "chatml/tokenizer.json"))
    level = tokenizers.Tokenizer(tokenizers.models.BPE())
    level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    level.train_from_iterator([text] * 3, trainer)
    level.save(str(folder / "byte level/tokenizer.json"))
    assert "\n\n" in level.decode(level.encode("x\n\n\n").ids[1:2]), "newlines join"
    found = {"sentencepiece": (Tokenizer.load(model), {})}
    for name in KINDS[1:]:
        found[name] = Tokenizer.load(folder / name), control_ids(folder / name)
    return found


def spelled(ids, tokenizer, controls):
    """Text between control tokens is decoded behind another text, for no space of the vocabulary's is dropped there."""
    names = {tokenizer.bos_id: "⟨bos⟩", tokenizer.eos_id: "⟨eos⟩"}
    names |= {controls[text]: sign for text, sign in (("<|im_start|>", "⟨start⟩"), ("<|im_end|>", "⟨end⟩")) if controls}
    text, run = "", []
    before = tokenizer.encode("x")
    for i in [*map(int, ids), None]:
        if i is None or i in names:
            text += tokenizer.decode([*before, *run]).removeprefix(tokenizer.decode(before)) + names.get(i, "")
            run = []
        else:
            run.append(i)
    return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_is_what_the_assistant_writes(tokenizers_of, kind, name):
    tokenizer, controls = tokenizers_of[kind]
    used = {text: i for text, i in controls.items() if text.startswith("<|im")}
    chat = Chat(TEMPLATES[name], tokenizer, [tokenizer.bos_id], used)
    ids, learned = chat.render(TALK)
    assert ids.dtype == np.int32 and learned.dtype == bool and ids.shape == learned.shape and not learned[0]
    expected = LEARNED[name] if used else LEARNED[name].replace("⟨end⟩", "<|im_end|>")
    # A token of a control's kind ends a run of learned ones, or the run's end is where the next answer begins.
    runs = np.split(np.arange(ids.size), np.flatnonzero(np.diff(learned.astype(int))) + 1)
    said = [spelled(ids[run], tokenizer, used) for run in runs if learned[run[0]]]
    assert "".join(said) == expected and len(said) == len(ANSWERS)
    assert learned[-1], "nothing follows the last answer's end"
    for answers in (1, 2, 3):  # token by token what a prompt has, and the answer behind it
        prompt = chat.ids(TALK[: 2 * answers - 1])
        assert tuple(ids[: len(prompt)]) == prompt and learned[len(prompt)] and not learned[len(prompt) - 1]
        part, its = chat.render(TALK[: 2 * answers])
        assert not its[: len(prompt)][-1] and its[len(prompt) :].all()
        end = len(part) if name != "v0_1" or answers == 3 else len(part) - 1  # EOS there, no more turns here
        np.testing.assert_array_equal(part[:end], ids[:end])


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_no_space_that_it_did_not_have(tokenizers_of, kind):
    """SentencePiece would put one before every text that it is given."""
    tokenizer, _ = tokenizers_of[kind]
    for text in ("fox", " fox", "\n\n  x", "é", "quick brown", "x" * 70_000):
        joined = [*tokenizer.encode("x:"), *tokenizer.encode_further(text)]
        assert tokenizer.decode(joined) == "x:" + text
    assert tokenizer.encode_further("") == []


def test_alpaca_writes_the_two_prompts(tokenizers_of):
    tokenizer, _ = tokenizers_of["sentencepiece"]
    chat = Chat(TEMPLATES["alpaca"], tokenizer, [], {})
    whole = spelled(chat.render([Message("user", "Add.", input="1 1"), Message("assistant", "2")])[0], tokenizer, {})
    assert whole.strip() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n"
        "### Response:2⟨eos⟩"
    )
    bare = spelled(chat.ids([Message("user", "Add.")]), tokenizer, {})
    assert bare.strip() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


def test_system_messages_come_first_and_are_not_learned(tokenizers_of):
    tokenizer, _ = tokenizers_of["sentencepiece"]
    zephyr = TEMPLATES["zephyr"]
    default, bare = (Chat(zephyr, tokenizer, [], {}, system) for system in (SYSTEM.content, None))
    for chat, messages in ((default, TALK), (bare, [SYSTEM, *TALK]), (default, [SYSTEM, *TALK])):
        ids, learned = chat.render(messages)
        begin = "<|system|>\nYou are a pirate.⟨eos⟩ \n<|user|>\nHello"  # a space before every text, as published
        assert spelled(ids, tokenizer, {}).lstrip().startswith(begin)
        np.testing.assert_array_equal(ids, default.render(TALK)[0])
        assert spelled(ids[learned], tokenizer, {}) == LEARNED["zephyr"]
    empty = Chat(zephyr, tokenizer, [], {}, "")
    assert spelled(empty.ids(TALK[:1]), tokenizer, {}).lstrip().startswith("<|system|>\n⟨eos⟩ \n<|user|>\nHello")
    with pytest.raises(ConfigError, match="has no system messages"):
        Chat(TEMPLATES["alpaca"], tokenizer, [], {}, "x")


def test_plain_text_is_learned_to_its_end(tokenizers_of):
    tokenizer, _ = tokenizers_of["byte level"]
    chat = Chat(TEMPLATES["none"], tokenizer, [tokenizer.bos_id], {})
    ids, learned = chat.plain("one </s>\n")
    assert spelled(ids, tokenizer, {}) == "⟨bos⟩one </s>\n⟨eos⟩" and learned.tolist() == [False] + [True] * (
        ids.size - 1
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [(TALK[:3], "last message must be the assistant's"), ([SYSTEM], "last message must be the assistant's")],
)
def test_what_is_no_answered_dialogue_is_refused(tokenizers_of, messages, words):
    tokenizer, _ = tokenizers_of["sentencepiece"]
    with pytest.raises(ConfigError, match=words):
        Chat(TEMPLATES["zephyr"], tokenizer, [], {}).render(messages)


def test_a_vocabulary_that_sees_control_tokens_everywhere_is_refused(tokenizers_of, tmp_path):
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    chat = Chat(TEMPLATES["none"], Tokenizer.load(tmp_path), [], {})
    with pytest.raises(ConfigError, match="spells EOS"):
        chat.render([Message("user", "x"), Message("assistant", "a </s> b")])


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja_is_known_again(tmp_path, name):
    """`auto` finds the template of a checkpoint whose tokenizer says it."""
    text = jinja(TEMPLATES[name], "x" if TEMPLATES[name].roles[0] else None, bos=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    if name == "none":
        assert text == ""
    else:
        assert choose("auto", tmp_path) is TEMPLATES[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "none"])
def test_jinja_writes_what_was_trained(tokenizers_of, name):
    from transformers import PreTrainedTokenizerFast

    tokenizer, controls = tokenizers_of["chatml"]
    used = {text: i for text, i in controls.items() if text.startswith("<|im")}
    system = "Be kind." if TEMPLATES[name].roles[0] else None
    chat = Chat(TEMPLATES[name], tokenizer, [tokenizer.bos_id], used, system)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.files[0]), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = jinja(TEMPLATES[name], system, bos=True)
    plain = [Message("user", "Hello  there\n\nWho {are} you?"), Message("assistant", "the quick"), Message("user", "?")]
    for messages in (plain[:1], plain):
        given = [{"role": m.role, "content": m.content} for m in messages]
        ids = theirs.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tuple(ids) == chat.ids(messages)
