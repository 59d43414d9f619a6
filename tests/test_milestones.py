"""Suites by name, and the published numbers: what was printed must be what the rows add up to."""

import math

import pytest

from tinyllama_jax.errors import UsageError
from tinyllama_jax.evaluate import milestones, suites
from tinyllama_jax.evaluate.milestones import BASELINES, CHAT, COMMON_SENSE, SOLVED, TINYLLAMA, V1_1
from tinyllama_jax.evaluate.suites import Task, chosen, expand


@pytest.mark.parametrize("row", [*TINYLLAMA, *V1_1, *CHAT, *BASELINES], ids=lambda row: row.name)
def test_published_averages_recompute(row):
    assert len(row.scores) == len(COMMON_SENSE)
    if "recomputes" in row.note:  # an erratum
        assert row.note.endswith(f"{row.mean:.2f}") and 0.0051 < abs(row.mean - row.average) < 0.02
    else:
        assert abs(row.mean - row.average) <= 0.0051


def test_problem_solving_has_one_published_average_and_it_recomputes():
    averaged = [row for row in SOLVED if not math.isnan(row.average)]
    assert [row.name for row in averaged] == ["1431k"] and abs(averaged[0].mean - 19.87) <= 0.0051
    assert {len(row.scores) for row in SOLVED} == {len(milestones.PROBLEM_SOLVING)}


def test_tokens_of_the_milestones_are_their_steps_times_the_batch():
    for row in TINYLLAMA:
        assert row.tokens == pytest.approx(int(row.name.removesuffix("k")) * 1000 * 2_097_152, rel=1e-3)
    assert [row.note for row in TINYLLAMA if "BoolQ" in row.note] and TINYLLAMA[4].scores[5] == TINYLLAMA[5].scores[5]


def test_the_nearest_milestone():
    names = {tokens: milestones.nearest(tokens).name for tokens in (0, 1e9, 105e9, 400e9, 1.2e12, 9e12)}
    assert names == {0: "50k", 1e9: "50k", 105e9: "50k", 400e9: "240k", 1.2e12: "480k", 9e12: "1431k"}


def test_own_scores_stand_beside_the_published_ones():
    lines = milestones.beside(500e9, {task: 50.0 + i for i, task in enumerate(COMMON_SENSE)})
    assert [line.split()[0] for line in lines] == [
        "beside",
        "tokens",
        "this",
        *["TinyLlama"] * 2,
        "Pythia-1.0B",
        "(TinyLlama",
    ]
    assert lines[2].split()[2:] == ["500B", *(f"{50 + i:.2f}" for i in range(7)), "53.00"]
    assert "240k" in lines[3] and "503B" in lines[3] and lines[3].endswith("48.28") and lines[4].endswith("52.97")
    assert "–" in milestones.beside(5e8, {"piqa": 60.0})[2] and milestones.beside(5e8, {"mine": 60.0}) == []
    solved = milestones.beside(3e12, {"bbh_fewshot": 29.0, "mmlu": 26.0, "humaneval": 1.0, "drop": 2.0})
    assert "Instruct-Eval" in solved[0] and solved[2].split()[2:] == ["3T", "26.00", "29.00", "1.00", "2.00", "14.50"]
    assert [line.split()[-1] for line in solved[3:]] == ["19.87", "14.99"], "the nearest is the last"


def test_suites_are_the_papers():
    assert [task.name for task in suites.SUITES["tinyllama"]] == list(COMMON_SENSE)
    plain = {task.name for task in suites.SUITES["tinyllama"] if task.metric == "acc"}
    assert plain == {"winogrande", "boolq"} and {task.shots for task in suites.SUITES["tinyllama"]} == {0}
    assert [(t.shots, t.runs_code) for t in suites.SUITES["problem-solving"]] == [
        (5, False),
        (3, False),
        (0, True),
        (3, False),
    ]
    assert {task.name[-3:] for task in suites.SUITES["chinese"]} == {"_zh"}


def test_tasks_and_suites_are_named_together():
    tasks = expand("tinyllama, mine")
    assert tasks[:7] == suites.SUITES["tinyllama"] and tasks[7] == Task("mine")
    assert {task.shots for task in expand("tinyllama,mine", 4)} == {4}
    assert suites.suites_in("mine,chinese") == ["chinese"]
    for text, words in (("a,,b", "empty name"), ("", "empty name"), ("piqa,tinyllama", "piqa twice")):
        with pytest.raises(UsageError, match=words):
            expand(text)


def test_the_metric_of_a_task():
    assert chosen(Task("x"), ["acc", "acc_norm"]) == "acc_norm"
    assert chosen(Task("x", "acc"), ["acc", "acc_norm"]) == "acc"
    assert chosen(Task("x"), ["byte_perplexity", "bits_per_byte"]) == "bits_per_byte"
    assert chosen(Task("x"), ["rouge"]) == "rouge"
    with pytest.raises(UsageError, match="x has no metric acc_norm; it has rouge"):
        chosen(Task("x", "acc_norm"), ["rouge"])
