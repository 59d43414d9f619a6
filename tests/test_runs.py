import json

import numpy as np
import pytest
from synthetic_run import lines, write_run

from tinyllama_jax.errors import DataError
from tinyllama_jax.lab.runs import Run


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "r", "plan": {"stages": [], "total_steps": 3}}))
    return tmp_path


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "loss": 1.0 / step, **more}


def test_columns_of_nested_keys(tmp_path):
    run = Run(write_run(tmp_path / "r", steps=40, validation_every=10, domains=("prose", "v1.5/code")))
    assert run.column("loss").dtype == float and len(run.column("loss")) == 40
    assert run.column("mixture.v1.5/code").sum() + run.column("mixture.prose").sum() == pytest.approx(40)
    assert run.column("domains.v1.5/code.loss", "validation").shape == (4,)
    assert run.column("stage")[0] == "base" and run.column("stage")[-1] == "cooldown"
    assert run.sources == run.domains == ["prose", "v1.5/code"]
    assert run.step == 40 and run.finished and run.tokens == run.plan["total_tokens"]
    assert run.last_validation("prose") == run.column("domains.prose.loss", "validation")[-1]
    assert np.isnan(run.column("no.such.column")).all() and len(run.column("no.such.column")) == 40


def test_missing_optional_files(directory):
    run = Run(directory)
    assert run.step == run.tokens == 0 and not run.finished
    assert len(run.column("loss")) == len(run.column("loss", "validation")) == 0
    assert run.samples == run.events == run.domains == run.sources == []
    assert run.baselines == {} and run.config == {}


def test_half_written_last_line_is_left_out_and_counted(directory):
    lines(directory / "metrics.jsonl", [record(1), record(2)])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 30, "lo')
    run = Run(directory)
    assert run.column("step").tolist() == [1, 2] and run.metrics.damaged_lines == 1


def test_a_number_that_is_cut_short_is_not_read_as_a_record(directory):
    (directory / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n12\n[3]\n{}\n" + json.dumps(record(2)))
    run = Run(directory)
    assert run.column("step").tolist() == [1, 2] and run.metrics.damaged_lines == 3


def test_null_nan_and_missing_values_are_nan_and_columns_stay_aligned(directory):
    text = '{"step": 1, "loss": null}\n{"step": 2, "loss": NaN, "a": {"b": 5}}\n{"step": 3, "loss": "NaN"}\n'
    (directory / "metrics.jsonl").write_text(text + '{"step": 4, "loss": 2.5, "skipped": true}\n')
    run = Run(directory)
    np.testing.assert_array_equal(run.column("loss"), [np.nan, np.nan, np.nan, 2.5])
    np.testing.assert_array_equal(run.column("a.b"), [np.nan, 5, np.nan, np.nan])
    np.testing.assert_array_equal(run.column("skipped"), [np.nan, np.nan, np.nan, 1])


def test_steps_written_again_after_a_resume_replace_the_earlier_ones(directory):
    first = [record(step, attempt=1) for step in (1, 2, 3, 4, 5)]
    lines(directory / "metrics.jsonl", first + [record(step, attempt=2) for step in (3, 4)])
    run = Run(directory)
    assert run.column("step").tolist() == [1, 2, 3, 4]
    assert run.column("attempt").tolist() == [1, 1, 2, 2]


def test_samples_of_one_prompt_and_step_are_kept_once(directory):
    lines(directory / "samples.jsonl", [{"step": 5, "prompt": p, "text": t} for p, t in ("ax", "bx", "ay")])
    assert [(s["prompt"], s["text"]) for s in Run(directory).samples] == [("a", "y"), ("b", "x")]


def test_a_run_being_written_is_read_anew_by_each_run_object(directory):
    lines(directory / "metrics.jsonl", [record(1)])
    before = Run(directory)
    assert before.step == 1 and not before.finished
    lines(directory / "metrics.jsonl", [record(1), record(2), record(3)])
    assert before.step == 1 and Run(directory).step == 3 and Run(directory).finished


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\xff\xfe"])
def test_no_run_directory_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as error:
        Run(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such run directory"):
        Run(tmp_path / "nowhere")


def test_unknown_table(directory):
    with pytest.raises(DataError, match="metrics, validation"):
        Run(directory).column("loss", "events")
