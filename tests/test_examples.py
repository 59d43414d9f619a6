"""Rows of published data sets become examples, and every row that cannot is named with its place and the reason."""

import gzip
import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from store_cases import truncate

from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.finetune import docstrings
from tinyllama_jax.finetune.forms import Example, canonical
from tinyllama_jax.finetune.rows import parse
from tinyllama_jax.generate.templates import Message

USER, ANSWER = {"role": "user", "content": "hé?"}, {"role": "assistant", "content": "yes\n"}
SYSTEM = {"role": "system", "content": "Be kind."}
U, A, S = Message("user", "hé?"), Message("assistant", "yes\n"), Message("system", "Be kind.")
NO = {"role": "assistant", "content": "no"}
# form -> a row, and what it means
ROWS = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, Example((S, U, A))),
    "ultrachat": ({"prompt": "hé?", "prompt_id": "1", "messages": [USER, ANSWER]}, Example((U, A))),
    "alpaca": (
        {"instruction": "Add.", "input": " 1 1\n", "output": "2"},
        Example((Message("user", "Add.", "1 1"), Message("assistant", "2"))),
    ),
    "alpaca, no input": ({"instruction": "hé?", "output": "yes\n"}, Example((U, A))),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "hé?"}, {"from": "gpt", "value": "yes\n"}]},
        Example((U, A)),
    ),
    "text": ({"text": "plain\n", "meta": {"a": 1}}, Example(text="plain\n")),
    "texts": ({"prompt": "hé?", "chosen": "yes\n", "rejected": "no"}, Example((U,), "", "yes\n", "no")),
    "ultrafeedback": (
        {
            "prompt": "hé?",
            "chosen": [USER, ANSWER],
            "rejected": [USER, NO],
            "messages": [USER, ANSWER],
            "score_chosen": 8,
        },
        Example((U,), "", "yes\n", "no"),
    ),
    "trl": ({"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [NO]}, Example((S, U), "", "yes\n", "no")),
    "trl, no prompt": ({"chosen": [USER, ANSWER], "rejected": [USER, NO]}, Example((U,), "", "yes\n", "no")),
}


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ROWS)
def test_every_form_is_known_by_its_first_row(tmp_path, name):
    row, expected = ROWS[name]
    (tmp_path / "x.jsonl").write_bytes(lines([row, row]))
    found = list(parse(f"n={tmp_path}/x.jsonl").rows())
    assert [(r.origin, r.example, r.reason) for r in found] == [
        (f"{tmp_path}/x.jsonl:{i}", expected, "") for i in (1, 2)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "parquet", "lines in json"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
    rows = [ROWS["messages"][0], {"messages": [USER]}, ROWS["messages"][0]]
    file = tmp_path / f"part.{kind if kind != 'lines in json' else 'json'}"
    data = lines(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        pack = {"jsonl.gz": gzip.compress, "json.gz": gzip.compress, "jsonl.zst": zstandard.compress}
        file.write_bytes(pack.get(kind, bytes)(data))
    (tmp_path / "README.md").write_text("no rows")
    mark, first = ("#", 0) if kind in ("json", "parquet") else (":", 1)
    source = parse(f"n={tmp_path}")
    found = list(source.rows())
    assert [r.origin for r in found] == [f"{file}{mark}{first + i}" for i in range(3)]
    assert [r.example for r in found] == [Example((S, U, A)), None, Example((S, U, A))]
    assert found[1].reason == "no answer of the assistant ends it"
    assert [one["bytes"] for one in source.identity()] == [file.stat().st_size]
    if kind not in ("jsonl", "lines in json"):  # which are cut in the middle of a row, if at all
        truncate(file, 9)
        with pytest.raises(DataError, match=f"{file.name}: .*fetch the file again"):
            list(source.rows())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"messages": [', "not JSON"),
        (b'{"messages": "\xff"}', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        ({"message": []}, "has no field 'messages', it has 'message'"),
        ({"messages": None}, "has no field 'messages'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is no list of messages"),
        ({"messages": [USER, "yes"]}, r"messages\[1\] has no role and content"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, r"messages\[1\]: role 'tool' is none of system, user"),
        ({"messages": [USER, {"role": ["a"], "content": "x"}]}, r"messages\[1\]: role .* is none of"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] is NoneType, not a string"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "turn 1: the assistant's message is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "lone surrogate at character 0"),
        ({"messages": [USER]}, "no answer of the assistant ends it"),
        ({"messages": [SYSTEM]}, "no answer of the assistant ends it"),
        ({"messages": [{"role": "system", "content": ""}]}, "no answer of the assistant ends it"),
        ({"messages": [USER, ANSWER, USER]}, "no answer of the assistant ends it"),
        ({"messages": [ANSWER, USER]}, "turn 0 is the assistant's where the user's is due"),
        ({"messages": [USER, USER, ANSWER]}, "turn 1 is the user's where the assistant's is due"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "turn 1 is the system's where the assistant's is due"),
    ],
)
def test_what_is_malformed_is_named_and_the_next_row_is_read(tmp_path, row, reason):
    good = lines([ROWS["messages"][0]])
    file = tmp_path / "x.jsonl"
    file.write_bytes(good + (row + b"\n" if isinstance(row, bytes) else lines([row])) + b"\n" + good)
    found = list(parse(str(file)).rows())
    assert [r.origin for r in found] == [f"{file}:{i}" for i in (1, 2, 4)]
    assert found[1].example is None and found[0].example == found[2].example == Example((S, U, A))
    assert re.search(reason, found[1].reason) and "\n" not in found[1].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "are the same answer"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "the assistant's message is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"chosen": [ANSWER], "rejected": [NO]}, "has no prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [NO]}, "answer different prompts"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected ends with a message of the user's"),
        ({"prompt": [USER, ANSWER], "chosen": [ANSWER], "rejected": [NO]}, "turn 2 is the assistant's"),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "rejected is no list of messages"),
    ],
)
def test_malformed_pairs_are_named(tmp_path, row, reason):
    (tmp_path / "x.jsonl").write_bytes(lines([row]))
    (found,) = parse(f"{tmp_path}/x.jsonl?form=preference").rows()
    assert found.example is None and reason in found.reason


def test_columns_may_have_other_names(tmp_path):
    rows = [{"q": "hé?", "meta": {"a": "yes\n"}}]
    (tmp_path / "x.jsonl").write_bytes(lines(rows))
    expected = [Example((U, A))]
    spec = f"{tmp_path}/x.jsonl?form=alpaca&instruction=q&output=meta.a"
    assert [r.example for r in parse(spec).rows()] == expected
    (row,) = parse(f"{tmp_path}/x.jsonl?form=alpaca&instruction=q&output=b").rows()
    assert row.reason == "has no field 'b', it has 'q', 'meta'"
    (tmp_path / "y.jsonl").write_bytes(lines([{"talk": [USER, ANSWER]}]))
    assert [r.example for r in parse(f"{tmp_path}/y.jsonl?messages=talk").rows()] == expected
    with pytest.raises(DataError, match=r"y.jsonl:1: its fields 'talk' are those of no form .*\?form=FORM"):
        list(parse(f"{tmp_path}/y.jsonl").rows())


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("x.jsonl?form=alpca", UsageError, "form 'alpca' is unknown.*alpaca"),
        ("x.jsonl?form=alpaca&messages=a", UsageError, "option 'messages' is unknown"),
        ("x.jsonl?form", UsageError, "has no value"),
        ("x.jsonl?text=a&text=b", UsageError, "given twice"),
        ("é.jsonl", DataError, "write NAME=é.jsonl"),
        ("docstrings:", UsageError, "names no package"),
    ],
)
def test_wrong_specs_are_refused_in_a_line(spec, kind, words):
    with pytest.raises(kind, match=words) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing.jsonl: no such file or folder"):
        list(parse(f"{tmp_path}/nothing.jsonl").rows())
    with pytest.raises(DataError, match=r"no file that ends in .jsonl"):
        list(parse(f"a={tmp_path}").rows())
    odd = tmp_path / "a=b?c.jsonl"
    odd.write_bytes(lines([ROWS["text"][0]]))
    assert len(list(parse(f"n={odd}").rows())) == 1, "a path may have signs of the spec in it"
    assert parse(f"{tmp_path}/data.v1.jsonl.gz?form=text").name == "data.v1"


def test_documentation_is_questions_and_answers():
    found = list(docstrings.examples(["optax"]))
    assert found == list(docstrings.examples(["optax"])) and len(found) > 500
    by_name = {(origin, e.messages[0].content): e.messages[1].content for origin, e in found}
    assert all(len(e.messages) == 2 and e.messages[1].content.strip() for _, e in found)
    adam = [answer for (origin, _), answer in by_name.items() if origin == "optax:optax.adam"]
    assert "The Adam optimizer." in adam and any(a.startswith("optax.adam(learning_rate, b1=0.9") for a in adam)
    assert any(a.startswith(">>> ") for a in adam)
    assert docstrings.versions(["optax", "python"])["python"] == sys.version.split()[0]
    with pytest.raises(DataError, match="no installed package 'nowhere'"):
        docstrings.versions(["nowhere"])
    with pytest.raises(DataError, match="no installed package 'json.tool'"):
        list(docstrings.examples(["json.tool"]))


def test_what_is_the_same_example():
    a, b = Example((U, A)), Example((Message("user", "hé?assistant"), A))
    assert len({canonical(a), canonical(b), canonical(Example(text="hé?"))}) == 3
    pair = Example((U,), chosen="a", rejected="b")
    assert canonical(pair) == canonical(Example((U,), chosen="b", rejected="c")), "a prompt is on one side"
