"""The verbs about data as they are typed: answers, exit status, one line when something is wrong."""

import json

import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.errors import UsageError
from tinyllama_jax.terminal import duration
from tinyllama_jax.verbs_data import count, item_numbers


@pytest.fixture
def words(tales) -> list[str]:
    return [str(tales), "--vocab-size", "300", "--window-tokens", "17", "--item-bytes", "2500", "--json"]


def said(capsys, argv, status: int = 0):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out) if status == 0 else captured.err.strip().splitlines()


def test_steps_give_the_answer_of_the_whole(capsys, words, tmp_path):
    whole = said(capsys, ["prepare", *words, "--out", tmp_path / "a", "--workers", "1"])
    plan = said(capsys, ["prepare", "plan", *words, "--out", tmp_path / "b"])
    assert plan["inputs"] == 30 and plan["items"] > 3
    for share in range(2):
        said(capsys, ["prepare", "run", "--out", tmp_path / "b", "--items", f"{share}/2", "--workers", "1", "--json"])
    steps = said(capsys, ["prepare", "finalize", "--out", tmp_path / "b", "--json"])
    assert steps["domains"] == whole["domains"] and whole["domains"]["tales"]["train"]["windows"] > 50
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_the_plan_says_what_comes_next(capsys, words, tmp_path):
    assert main(["prepare", "plan", *words[:-1], "--out", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    for step in ("launch prepare", "prepare run", "prepare finalize"):
        assert step in shown


def test_views_and_inspection(capsys, words, tmp_path):
    store, view = tmp_path / "store", tmp_path / "view"
    said(capsys, ["prepare", *words, "--out", store, "--filter", "min_chars=60"])
    made = said(capsys, ["prepare", "view", store, "--tokens", "500", "--out", view, "--json"])
    assert made["domains"]["tales"]["train"]["windows"] == 500 // 17
    for what in (store, view):
        found = said(capsys, ["inspect", what, "--verify", "--json"])
        assert found["findings"] == [] and found["samples"]
    shard = next((store / "train" / "tales").glob("*.bin"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    last = said(capsys, ["inspect", store, "--verify"], 78)
    assert last[-1].startswith("tinyllama inspect: ") and "wrong" in last[-1]


@pytest.mark.parametrize(
    ("argv", "status", "words_of_it"),
    [
        (["prepare", "run", "--out", "STORE", "--items", "3:1"], 2, "--items 3:1"),
        (["prepare", "run", "--out", "STORE", "--items", "x"], 2, "--items x"),
        (["prepare", "run", "--out", "STORE", "--workers", "-1"], 2, "--workers"),
        (["prepare", "run", "--out", "nowhere"], 78, "plan.json"),
        (["prepare", "finalize", "--out", "STORE"], 78, "items are not done"),
        (["prepare", "view", "STORE", "--tokens", "5", "--out", "x"], 78, "no manifest.json yet"),
        (["prepare", "plan", "TALES", "--out", "x", "--filter", "min_char=3"], 78, "min_chars"),
        (["prepare", "slimpyjama:TALES", "--out", "x"], 2, "slimpajama"),
        (["prepare", "TALES", "--out", "x", "--item-bytes", "-3"], 2, "-3"),
        (["inspect", "STORE"], 78, "no manifest.json yet"),
    ],
)
def test_wrong_commands_get_one_line(capsys, words, tales, tmp_path, monkeypatch, argv, status, words_of_it):
    monkeypatch.chdir(tmp_path)
    said(capsys, ["prepare", "plan", *words, "--out", "STORE"])
    told = said(capsys, [a.replace("TALES", str(tales)) for a in argv], status)
    assert len(told) == 1 and told[0].startswith("tinyllama prepare" if argv[0] == "prepare" else "tinyllama inspect")
    assert words_of_it in told[0]
    assert not (tmp_path / "x").exists()


def test_numbers_as_people_write_them():
    assert [count(t) for t in ("2049", "100M", "1.5B", "2k", "3T", "1_000")] == [
        2049,
        100_000_000,
        1_500_000_000,
        2000,
        3 * 10**12,
        1000,
    ]
    for wrong in ("", "M", "-1", "0", "1.5", "1e6", "1.00001K", "ten"):
        with pytest.raises(UsageError):
            count(wrong)


def test_items_as_people_write_them():
    assert item_numbers(":", 5) == range(5) and item_numbers("2:", 5) == range(2, 5)
    shares = [list(item_numbers(f"{i}/3", 8)) for i in range(3)]
    assert sorted(sum(shares, [])) == list(range(8))
    for wrong in ("5:6", "1:1", "3/3", "1", "a:b", "-1:2"):
        with pytest.raises(UsageError):
            item_numbers(wrong, 5)


def test_durations():
    seconds = (45, 700, 12_000, 400_000)
    assert [duration(s) for s in seconds] == ["45 s", "12 min", "3 h 20 min", "4.6 days"]
