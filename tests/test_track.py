import json
import math
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quick_experiment import quick

from tinyllama_jax import config, errors
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import track
from tinyllama_jax.train.track import Tracker

RECORDS = ("metrics.jsonl", "validation.jsonl", "samples.jsonl")


@pytest.fixture
def plan():
    stage = config.Stage(name="main", tokens=80, batch_tokens=8, mixture={"prose": 1})
    return Plan((stage,), 4)


def open_tracker(directory, plan, *, resume_step=0, tensorboard=False):
    run = SimpleNamespace(tracking=config.Tracking(tensorboard=tensorboard))
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
    assert len(read(cut / "events.jsonl")) == 2
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
    assert json.loads(json.dumps(track.plain({"loss": value})))["loss"] == value


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


def test_tensorboard_gets_the_same_numbers_over_tokens(tmp_path, plan):
    tracker = open_tracker(tmp_path, plan, tensorboard=True)
    write_steps(tracker, [1, 2])
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    from tensorboardX.proto.event_pb2 import Event

    data, scalars = events.read_bytes(), {}
    while data:  # length, its checksum, the record, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        data = data[16 + size :]
    assert scalars["train/loss", 8] == 1.0 and scalars["train/loss", 16] == 0.5
    assert scalars["validation/domains/prose/loss", 16] == 2.0
    assert scalars["train/timing/tokens_per_s", 8] == 50.0


def test_tensorboard_fails_soft_with_one_warning(tmp_path, plan, capfd):
    (tmp_path / "tensorboard").write_text("a file in the way")
    tracker = open_tracker(tmp_path, plan, tensorboard=True)
    write_steps(tracker, [1, 2])
    tracker.close()
    assert capfd.readouterr().err.count("TensorBoard is off") == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_a_full_disk_is_one_line_and_the_incomplete_line_is_dropped_on_resume(mount, plan):
    disk = mount("size=64k")
    tracker = open_tracker(disk, plan)
    with pytest.raises(errors.ConfigError, match="metrics.jsonl: cannot be written: No space left on device"):
        for step in range(1, 1000):
            tracker.step({"step": step, "tokens": step, "loss": 1.0, "padding": "x" * 333})
    tracker.close()
    lines = (disk / "metrics.jsonl").read_text().split("\n")
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    open_tracker(disk, plan, resume_step=step).close()
    assert [record["step"] for record in read(disk / "metrics.jsonl")] == list(range(1, len(lines)))


def wandb_run():
    return config.replace(quick(), tracking=config.Tracking(wandb_project="tests"))


def test_wandb_keeps_the_numbers_offline(tmp_path, plan, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, wandb_run(), plan, resume_step=0)
    write_steps(tracker, [1, 2])
    tracker.close()
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # another process writes it, and a busy machine lets that wait
    while b"validation/domains/prose/loss" not in stored.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"train/loss" in stored.read_bytes() and b"validation/domains/prose/loss" in stored.read_bytes()
    page = (tmp_path / "wandb_id").read_text()
    assert page in stored.name
    Tracker(tmp_path, wandb_run(), plan, resume_step=1).close()
    assert (tmp_path / "wandb_id").read_text() == page, "a resumed run continues its page"


def test_wandb_fails_soft_with_one_warning(tmp_path, plan, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    tracker = Tracker(tmp_path, wandb_run(), plan, resume_step=0)
    write_steps(tracker, [1, 2])
    tracker.close()
    assert capfd.readouterr().err.count("wandb is off") == 1
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2]
