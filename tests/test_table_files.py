"""Files of the table of runs, and the order of its columns."""

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab_runs import made

from tinyllama_jax.errors import ConfigError, DataError, UsageError
from tinyllama_jax.lab import table

CELLS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.dictionaries(st.text(min_size=1), CELLS, min_size=1), max_size=5))
def test_jsonl_gives_back_what_it_was_given(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    table.write(found, path)
    back = table.read(path)
    assert back == found and [[type(v) for v in r.values()] for r in back] == [
        [type(made[name]) for name in r] for r, made in zip(back, found, strict=True)
    ]


def test_both_files_keep_a_real_row(finished, tmp_path):
    row = table.row(finished) | {"fingerprint": "12345678e1234567", "git": "00012"}
    for name in ("t.jsonl", "t.csv"):
        table.write([row, table.row(made(tmp_path / "r"))], tmp_path / name)
        back = table.read(tmp_path / name)[0]
        assert {k: v for k, v in back.items() if v not in (None, "")} == {
            k: v for k, v in row.items() if v not in (None, "")
        }
        kinds = [type(back[name]) for name in ("steps", "loss", "config.execution.scan_layers", "fingerprint", "git")]
        assert kinds == [int, float, bool, str, str]
        assert list(back)[:5] == ["name", "directory", "status", "fingerprint", "experiment"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "t.csv", "t.jsonl"], "nothing temporary is left"


def test_columns_come_in_the_order_of_the_table(tmp_path):
    first = {"mine": 1, "measure.x": 1, "config.seed": 3, "jax": "1", "gap.prose": 0.1, "loss": 1.0, "name": "a"}
    second = {"config.name": "b", "loss.code": 2.0, "train_loss": 1.0, "loss.prose": 1.0, "loss_se": 0.1}
    expected = ["name", "loss", "loss_se", "loss.code", "loss.prose", "gap.prose", "train_loss", "jax", "config.seed"]
    expected += ["config.name", "measure.x", "mine"]
    assert table.columns([first, second]) == expected
    table.write([first, second], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == ",".join(expected)
    table.write([first], tmp_path / "t.jsonl")
    assert list(json.loads((tmp_path / "t.jsonl").read_text())) == [n for n in expected if n in first]


def test_files_that_are_no_tables(tmp_path):
    for name, text, match in (
        ("a.jsonl", '{"name": "a"}\n{"na', r"a.jsonl, line 2: is not JSON"),
        ("b.jsonl", "\n[1]\n", r"b.jsonl, line 2: is not a JSON object"),
        ("c.csv", "a,a\n1,2\n", "two columns 'a'"),
        ("d.csv", "a,b\n1,2\n1\n", r"d.csv, line 3: has 1 cells for 2 columns"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=match):
            table.read(tmp_path / name)
    (tmp_path / "e.csv").write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match="UTF-8"):
        table.read(tmp_path / "e.csv")
    with pytest.raises(DataError, match="No such file"):
        table.read(tmp_path / "none.csv")
    for call in (table.read, lambda path: table.write([], path)):
        with pytest.raises(UsageError, match="ends in .jsonl or .csv"):
            call(tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be written: No such file"):
        table.write([], tmp_path / "nowhere" / "t.csv")
    (tmp_path / "f.jsonl").write_text('{"loss": NaN, "a": {"b": [1, Infinity]}}\n')
    assert table.read(tmp_path / "f.jsonl") == [{"loss": None, "a.b.0": 1, "a.b.1": None}]


def test_a_frame_has_the_columns_in_order(monkeypatch):
    frame = table.frame([{"loss": 1.0, "name": "a"}, {"name": "b", "x": 2}])
    assert list(frame.columns) == ["name", "loss", "x"] and list(frame["name"]) == ["a", "b"]
    assert frame["loss"].mean() == 1.0 and frame["loss"].isna().tolist() == [False, True]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        table.frame([])
