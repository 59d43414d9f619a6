"""Where a run's time went, on a history with known answers and on one with a real kill in it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from quick_experiment import quick_command
from synthetic_run import lines, write_run

from tinyllama_jax.lab.goodput import LOSSES, Goodput, account, goodput
from tinyllama_jax.lab.report import write_report
from tinyllama_jax.lab.runs import Run

EPOCH = 1.75e9


def event(at, kind, **fields):
    return {"time": datetime.fromtimestamp(EPOCH + at, UTC).isoformat(), "kind": kind, **fields}


def step(number, end, seconds, *, wait=0.0, compiled=False, skipped=0):
    timing = {"time": EPOCH + end, "step_s": seconds, "data_wait_s": wait} | ({"compiled": True} if compiled else {})
    return {"step": number, "loss": 2.0, "tokens": number, "batch_tokens": 8, "skipped": skipped, "timing": timing}


# A step takes 2 s.  The first process lives from 0 to 33 s and is killed in step 8; the second begins at 40 s.
EVENTS = [
    event(10, "start", step=0, seconds=10.0),
    event(14, "evaluated", step=0, seconds=4.0),
    event(27, "saved", step=4, seconds=1.0),
    event(47.9, "cut_back", step=4, steps=3, seconds=6.0, until=EPOCH + 33),
    event(48, "start", step=4, seconds=8.0, restore_s=3.0),
    event(69, "saved", step=10, seconds=1.0),
    event(69, "finished", step=10),
]
METRICS = [
    step(1, 20, 6.0, compiled=True),
    *(step(n, 18 + 2 * n, 2.0) for n in (2, 3, 4)),
    step(5, 53, 5.0, compiled=True),
    step(6, 55, 2.0),
    step(7, 57, 2.0),
    step(8, 64, 7.0, wait=6.0),
    step(9, 66, 2.0, skipped=1),
    step(10, 68, 2.0),
]
LOST = dict(
    start=15.0, restore=3.0, compile=7.0, data=5.0, save=2.0, evaluate=4.0, skipped=2.0, redone=6.0, down=7.0, other=0.0
)


def test_every_second_has_its_place():
    found = goodput(EVENTS, METRICS)
    assert found["lost"] == pytest.approx(LOST, abs=1e-5) and list(found["lost"]) == list(LOSSES)
    assert found["wall_s"] == pytest.approx(69) and found["train_s"] == pytest.approx(18)
    assert found["goodput"] == pytest.approx(18 / 69)


def test_a_run_that_is_still_alive_is_accounted_for_until_now():
    found = goodput(EVENTS, METRICS, now=EPOCH + 79)
    assert found["wall_s"] == pytest.approx(79) and found["lost"]["other"] == pytest.approx(10, abs=1e-5)


def test_the_figure_of_a_line_agrees_with_the_account(tmp_path):
    """Without the steps that compiled, whose usual length is not known yet when they are written."""
    running = Goodput(EVENTS[:-2], METRICS[:4])
    for record in METRICS[4:]:
        share = running.share(record["timing"]["time"], record)
    assert share == pytest.approx((18 - 2 * 2 - 1) / 68)  # of the step that waited, all that it did not wait counts


def test_a_wait_hidden_behind_the_device_is_no_loss():
    hidden = [step(n, 2 * n, 2.0, wait=0.9) for n in range(1, 20)]
    assert goodput([event(0, "start")], hidden)["lost"]["data"] == 0
    bound = [step(n, 2 * n, 2.0, wait=1.9) for n in range(1, 20)]
    assert goodput([event(0, "start")], bound)["lost"]["data"] == pytest.approx(19 * 1.9)


def test_a_wait_is_measured_a_step_or_two_after_it_made_one_longer():
    late = [step(n, 2 * n, 12.0 if n == 5 else 2.0, wait=11.0 if n == 7 else 0.0) for n in range(1, 20)]
    assert goodput([event(0, "start")], late)["lost"]["data"] == pytest.approx(10)


def test_a_rollback_is_counted_where_the_process_goes_on():
    events = [event(0, "start"), event(20, "cut_back", step=5, steps=5, seconds=10.0, until=EPOCH + 20)]
    found = goodput(events, [step(n, 2 * n if n < 6 else 2 * n + 10, 2.0) for n in range(1, 11)])
    assert found["lost"] == pytest.approx(dict.fromkeys(LOSSES, 0.0) | {"redone": 10.0})
    assert found["wall_s"] == pytest.approx(30)


def test_a_run_before_its_first_step_or_event():
    assert goodput([], [])["wall_s"] == 0 and math.isnan(goodput([], [])["goodput"])
    assert math.isnan(goodput([event(0, "start"), event(5, "stopped")], [])["goodput"])
    assert goodput([event(5, "stopped")], [])["wall_s"] == 0
    assert goodput([], METRICS[:4])["goodput"] == pytest.approx((6 + 6 - 4) / 12)


def test_a_process_that_trains_twice_did_not_start_before_it_stopped():
    """As in a notebook, where the process is older than the run."""
    events = [event(10, "start", seconds=10.0), event(20, "stopped"), event(30, "start", seconds=30.0, restore_s=1.0)]
    found = goodput(events, [step(n, 10 + 2 * n if n < 6 else 20 + 2 * n, 2.0) for n in range(1, 11)])
    assert found["lost"] == pytest.approx(dict.fromkeys(LOSSES, 0.0) | {"start": 19.0, "restore": 1.0})
    assert found["wall_s"] == pytest.approx(40)


def test_a_clock_that_was_set_back_breaks_nothing():
    events = [event(0, "start"), event(-50, "start"), {"kind": "odd"}, {"kind": "start", "time": "yesterday"}]
    found = goodput(events, [step(1, -40, 2.0), step(2, 3, 2.0)])
    assert found["wall_s"] >= 0 and all(seconds >= 0 for seconds in found["lost"].values())


def test_the_report_tells_it(tmp_path):
    run = write_run(tmp_path / "r", steps=10, validation_every=0)
    alerts = [event(60, "alert", alert="stall", step=8, text="step 8 took <long>") for _ in range(30)]
    again = event(48, "cut_back", step=4, steps=3, seconds=6.0, until=EPOCH + 33)
    lines(run / "events.jsonl", [*EVENTS[:3], again, *EVENTS[4:], *alerts])
    (run / "rollbacks.json").write_text('{"rollbacks": [{"from": 8, "to": 4}]}')
    lines(run / "metrics.jsonl", METRICS)
    text = write_report(run).read_text()
    assert "Where the time went" in text and "1 min 9 s since the first start, 26.1% trained" in text
    assert "validation and samples</td>" in text and "5.8%" in text
    assert "30 alerts: 30 × stall." in text and text.count("step 8 took &lt;long&gt;") == 30
    assert "1 rollback: from step 8 to 4." in text and "3 steps done again, from 1 checkpoint." in text
    assert "1 skipped step: 9." in text and "> evaluated<" not in text


@pytest.mark.slow
def test_a_run_that_is_killed_and_started_again(small_store, tmp_path):
    workdir = tmp_path / "run"
    more = ("checkpoint.temporary_steps=20", "curriculum.cooldown.tokens=30720", "evaluation.prompts=[]")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from tinyllama_jax.cli import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(sys.argv[1:]))", *quick_command(small_store, workdir, *more)]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    metrics, began = workdir / "metrics.jsonl", time.time()
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 55:
        assert first.poll() is None and time.time() < began + 120
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed, steps = time.time(), metrics.read_bytes().count(b"\n")
    time.sleep(2.0)
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    wall = time.time() - began

    run = Run(workdir)
    (again,) = [e for e in run.events if e["kind"] == "cut_back"]
    assert again["steps"] == steps - again["step"] > 0 and again["seconds"] > 0
    assert again["until"] <= killed
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = goodput(run.events, records)
    lost = found["lost"]
    assert lost["redone"] == again["seconds"] and lost["compile"] > 0 and lost["down"] >= 2.0
    assert min(lost["start"], lost["restore"], lost["save"], lost["evaluate"]) > 0
    assert lost["other"] < 0.1 * found["wall_s"], "nearly every second is accounted for"
    assert found["train_s"] + sum(lost.values()) == pytest.approx(found["wall_s"], rel=0.03)
    assert wall / 3 < found["wall_s"] < wall + 1.0, "all but loading programs before the first event"
    assert 0 < found["goodput"] < 1
    assert records[-1]["timing"]["goodput"] == pytest.approx(found["goodput"], abs=0.1)
    columns = {name: run.column(f"timing.{name}") for name in ("time", "step_s", "data_wait_s", "compiled")}
    columns |= {name: run.column(name) for name in ("batch_tokens", "skipped")}
    assert account(run.events, columns)["lost"] == pytest.approx(lost)
    assert np.isfinite(columns["time"]).all()
    print(json.dumps(found, indent=1))
