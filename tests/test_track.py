import json
import math
import subprocess
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_jax import config
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import json_lines
from tinyllama_jax.train.track import Tracker

RECORDS = ("metrics.jsonl", "validation.jsonl", "samples.jsonl")


@pytest.fixture
def plan():
    stage = config.Stage(name="main", tokens=80, batch_tokens=8, mixture={"prose": 1})
    return Plan((stage,), 4)


def open_tracker(directory, plan, *, resume_step=0):
    run = SimpleNamespace(tracking=config.Tracking())
    return Tracker(directory, run, plan, resume_step=resume_step)


def write_steps(tracker, steps):
    for step in steps:
        tracker.step({"step": step, "tokens": step * 8, "loss": 1 / step, "timing": {"tokens_per_s": 50.0}})
        if step % 2 == 0:
            tracker.validation({"step": step, "tokens": step * 8, "domains": {"prose": {"loss": 2.0}}})
            tracker.sample({"step": step, "tokens": step * 8, "prompt": "a", "text": "b\n\u2028é"})


def read(path):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_resume_leaves_what_an_uninterrupted_run_would_have(tmp_path, plan):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for directory in (whole, cut):
        directory.mkdir()
    tracker = open_tracker(whole, plan)
    write_steps(tracker, range(1, 11))
    tracker.close()
    tracker = open_tracker(cut, plan)
    write_steps(tracker, range(1, 8))  # killed at 7; the newest checkpoint is of step 4
    tracker.event("start")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tok')
    tracker = open_tracker(cut, plan, resume_step=4)
    tracker.event("start")
    write_steps(tracker, range(5, 11))
    tracker.close()
    for name in RECORDS:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    first, cut_back, second = read(cut / "events.jsonl")
    assert first["kind"] == second["kind"] == "start"
    assert (cut_back["kind"], cut_back["step"], cut_back["steps"]) == ("cut_back", 4, 3)
    assert not [p for p in cut.iterdir() if p.name.startswith(".")]


def test_starting_afresh_empties_the_records_but_keeps_the_history(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan)
    tracker.validation({"step": 0, "tokens": 0, "domains": {}})
    tracker.event("start", how="fresh")
    tracker.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": "2')
    tracker = open_tracker(tmp_path, plan)
    tracker.event("start", how="again")
    tracker.close()
    assert read(tmp_path / "validation.jsonl") == []
    assert [event["how"] for event in read(tmp_path / "events.jsonl")] == ["fresh", "again"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_back_exactly(value):
    assert json.loads(json.dumps(json_lines.plain({"loss": value})))["loss"] == value


def test_every_line_is_strict_json(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan)
    tracker.step({"step": 1, "tokens": 8, "loss": math.nan, "a": [math.inf, np.float32(0.5)], "n": np.int64(3)})
    tracker.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 8, "loss": None, "a": [None, 0.5], "n": 3}]


def test_lines_are_readable_at_once_and_events_come_from_any_thread(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan)
    write_steps(tracker, [1])
    assert len(read(tmp_path / "metrics.jsonl")) == 1

    def many():
        for number in range(200):
            tracker.event("committed", step=number, padding="x" * 500)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(tmp_path / "events.jsonl")) == 800
    tracker.sync()
    tracker.close()


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path, plan, capfd):
    tracker = open_tracker(tmp_path, plan)
    write_steps(tracker, range(1, 11))
    tracker.close()
    out, err = capfd.readouterr()
    steps = [line for line in err.splitlines() if line.startswith("step") and "/10" in line]
    assert out == "" and "\r" not in err
    assert len(steps) == 2 and steps[0].startswith("step 1/10  loss 1.0000  tokens/s 50")  # the first and the last
    assert "step 2  validation  prose 2.0000" in err


def test_progress_is_a_bar_on_a_terminal(tmp_path, plan, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    tracker = open_tracker(tmp_path, plan, resume_step=4)
    write_steps(tracker, range(5, 11))
    tracker.close()
    err = capfd.readouterr().err
    assert "4/10" in err and "10/10" in err and "loss=0.1000" in err and "\r" in err


def test_a_full_disk_is_one_line_and_the_incomplete_line_is_dropped_on_resume(mount, plan):
    disk = mount("size=64k")
    tracker = open_tracker(disk, plan)
    with pytest.raises(
        json_lines.RecordFailed, match="metrics.jsonl: cannot be written: No space left on device"
    ) as full:
        for step in range(1, 1000):
            tracker.step({"step": step, "tokens": step, "loss": 1.0, "padding": "x" * 333})
    assert full.value.exit_status == 1, "as a save that fails: a launcher may start it again"
    tracker.close()
    lines = (disk / "metrics.jsonl").read_text().split("\n")
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    open_tracker(disk, plan, resume_step=step).close()
    assert [record["step"] for record in read(disk / "metrics.jsonl")] == list(range(1, len(lines)))


def test_what_is_cut_back_is_counted_with_its_time(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan)
    for step in range(1, 8):
        timing = {"step_s": 2.0, "time": 100.0 + step}
        tracker.step({"step": step, "tokens": step * 8, "loss": 1.0, "timing": timing})
    tracker.close()
    open_tracker(tmp_path, plan, resume_step=7).close()  # nothing is done again
    open_tracker(tmp_path, plan, resume_step=5).close()
    (event,) = read(tmp_path / "events.jsonl")
    event.pop("time")
    assert event == {"kind": "cut_back", "step": 5, "steps": 2, "seconds": 4.0, "until": 107.0}


def test_an_alert_is_an_event_and_one_line(tmp_path, plan, capfd):
    tracker = open_tracker(tmp_path, plan)
    tracker.alert({"alert": "stall", "step": 3, "text": "step 3 took long; look at the disk", "seconds": 9.0})
    tracker.close()
    (event,) = read(tmp_path / "events.jsonl")
    assert (event["kind"], event["alert"], event["step"], event["seconds"]) == ("alert", "stall", 3, 9.0)
    assert capfd.readouterr().err == "alert: stall: step 3 took long; look at the disk\n"


def test_every_line_tells_the_goodput_so_far(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan)
    tracker.event("start", how="fresh", step=0, seconds=100.0)
    for step in (1, 2):
        tracker.step({"step": step, "tokens": step * 8, "loss": 1.0, "timing": {"step_s": 20.0}})
    tracker.close()
    assert [r["timing"]["goodput"] for r in read(tmp_path / "metrics.jsonl")] == pytest.approx([0.2, 0.4], rel=0.05)
    tracker = open_tracker(tmp_path, plan, resume_step=1)
    tracker.event("start", how="resumed", step=1, seconds=0.0)
    tracker.step({"step": 2, "tokens": 16, "loss": 1.0, "timing": {"step_s": 30.0, "compiled": True}})
    tracker.step({"step": 3, "tokens": 24, "loss": 1.0, "timing": {"step_s": 30.0}})
    tracker.close()
    shares = [r["timing"]["goodput"] for r in read(tmp_path / "metrics.jsonl")]
    assert shares == pytest.approx([0.2, 0.2, 0.5], rel=0.05)
