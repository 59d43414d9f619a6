"""Each adapter with the library itself, and what it wrote read back from the disk."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quick_experiment import quick

from tinyllama_jax import config
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import json_lines, track
from tinyllama_jax.train.adapters import Adapter
from tinyllama_jax.train.track import Tracker

ALERT = {"alert": "stall", "step": 2, "text": "step 2 took long; look at the disk"}
PLAN = Plan((config.Stage(name="main", tokens=80, batch_tokens=8, mixture={"prose": 1}),), 4)
ALL = {"tensorboard": True, "wandb_project": "tests", "trackio_project": "tests"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, databases):
    """No service, no account, no network, and stdout stays empty."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    """Where trackio keeps its databases; it reads the variable once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    yield folder
    os.environ.pop("TRACKIO_DIR")
    if before is not None:
        os.environ["TRACKIO_DIR"] = before


def open_tracker(directory, *, resume_step=0, **tracking):
    run = config.replace(quick(), tracking=config.Tracking(**tracking))
    return Tracker(directory, run, PLAN, resume_step=resume_step)


def write_steps(tracker, steps, loss=lambda step: 1 / step):
    for step in steps:
        tracker.step({"step": step, "tokens": step * 8, "loss": loss(step), "timing": {"tokens_per_s": 50.0}})
        if step % 2 == 0:
            tracker.validation({"step": step, "tokens": step * 8, "domains": {"prose": {"loss": 2.0}}})


def interrupted(directory, **tracking):
    """Steps 1 to 6, then again from the checkpoint of step 4 to 8, as another process would."""
    tracker = open_tracker(directory, **tracking)
    write_steps(tracker, range(1, 7))
    tracker.alert(ALERT)
    tracker.close()
    tracker = open_tracker(directory, resume_step=4, **tracking)
    write_steps(tracker, range(5, 9))
    tracker.close()


def expected(loss=lambda step: 1 / step, last=8):
    return {("train/loss", step): pytest.approx(loss(step)) for step in range(1, last + 1)} | {
        ("validation/domains/prose/loss", step): 2.0 for step in range(2, last + 1, 2)
    }


def shown(rows):
    """{(name, step): value}; a name and step that are there twice are an error."""
    found = {}
    for name, step, value in rows:
        if name in ("train/loss", "validation/domains/prose/loss"):
            assert (name, step) not in found, f"{name} of step {step} is there twice"
            found[name, step] = value
    return found


def tensorboard(directory):
    """(name, step, value) of every scalar as TensorBoard shows them: a file that begins purges what is beyond it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    rows, texts = [], []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the record, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                rows = [row for row in rows if row[1] * 8 < event.step]
            rows += [(v.tag, event.step // 8, v.simple_value) for v in event.summary.value if not v.tensor.dtype]
            texts += [v.tensor.string_val[0].decode() for v in event.summary.value if v.tensor.dtype]
    return rows, texts


def wandb_records(path):
    """The records of a .wandb file: blocks of 32 KiB, in which a record has a checksum, a length and a kind."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        part = data[at + 7 : at + 7 + length] if kind in (1, 2) else part + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(part)


def wandb(directory):
    """(name, step, value) of all files of the page, and its alerts; another process writes them."""
    until = time.monotonic() + 30
    files = sorted(directory.glob("offline-run-*/run-*.wandb"))
    for path in files:
        while not any(r.WhichOneof("record_type") == "exit" for r in wandb_records(path)) and time.monotonic() < until:
            time.sleep(0.1)
    rows, alerts = [], []
    for record in (record for path in files for record in wandb_records(path)):
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        rows += [(name, values["_step"], value) for name, value in values.items()]
        if record.WhichOneof("record_type") == "alert":
            alerts.append(record.alert.text)
    return rows, alerts


def trackio(databases, page):
    with sqlite3.connect(databases / "tests.db") as database:
        found = database.execute("SELECT step, metrics FROM metrics WHERE run_name LIKE ?", [f"%-{page}"]).fetchall()
        alerts = database.execute("SELECT text FROM alerts WHERE run_name LIKE ?", [f"%-{page}"]).fetchall()
    rows = [(name, step, value) for step, metrics in found for name, value in json.loads(metrics).items()]
    return rows, [text for (text,) in alerts]


def test_tensorboard(tmp_path):
    interrupted(tmp_path, tensorboard=True)
    rows, texts = tensorboard(tmp_path / "tensorboard")
    assert shown(rows) == expected() and texts == [ALERT["text"]]


def test_wandb(tmp_path):
    interrupted(tmp_path, wandb_project="tests")
    rows, alerts = wandb(tmp_path / "wandb")
    assert shown(rows) == expected() and alerts == [ALERT["text"]]
    page = (tmp_path / "wandb_id").read_text()
    assert {p.stem for p in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")} == {f"run-{page}"}, "one page"


def test_trackio(tmp_path, databases, capfd):
    interrupted(tmp_path, trackio_project="tests")
    rows, alerts = trackio(databases, (tmp_path / "trackio_id").read_text())
    assert shown(rows) == expected() and alerts == [ALERT["text"]]
    out, err = capfd.readouterr()
    assert out == "" and err.count(ALERT["text"]) == 1


def test_runs_of_one_name_have_pages_of_their_own(tmp_path, databases):
    pages = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        tracker = open_tracker(tmp_path / name, trackio_project="tests")
        write_steps(tracker, [1, 2])
        tracker.close()
        pages.add(page := (tmp_path / name / "trackio_id").read_text())
        assert shown(trackio(databases, page)[0]) == expected(last=2)
    assert len(pages) == 2


def test_steps_that_are_other_ones_the_second_time(tmp_path, databases):
    """As after a rollback: TensorBoard shows them as they were done at last, the others as at first; none twice."""
    for steps, resume_step, loss in ((range(1, 7), 0, lambda step: 1 / step), (range(5, 9), 4, lambda step: 3.0)):
        tracker = open_tracker(tmp_path, resume_step=resume_step, **ALL)
        write_steps(tracker, steps, loss)
        tracker.close()
    assert shown(tensorboard(tmp_path / "tensorboard")[0]) == expected(lambda s: 1 / s if s <= 4 else 3.0)
    kept = expected(lambda s: 1 / s if s <= 6 else 3.0)
    assert shown(wandb(tmp_path / "wandb")[0]) == kept
    assert shown(trackio(databases, (tmp_path / "trackio_id").read_text())[0]) == kept


def test_an_adapter_asked_for_later_shows_what_is_done_from_then_on(tmp_path, databases):
    tracker = open_tracker(tmp_path)
    write_steps(tracker, range(1, 7))
    tracker.close()
    tracker = open_tracker(tmp_path, resume_step=4, **ALL)
    write_steps(tracker, range(5, 9))
    tracker.close()
    late = {key: value for key, value in expected().items() if key[1] > 4}
    assert shown(wandb(tmp_path / "wandb")[0]) == late
    assert shown(trackio(databases, (tmp_path / "trackio_id").read_text())[0]) == late
    assert shown(tensorboard(tmp_path / "tensorboard")[0]) == late


def fails_soft(directory, capfd, name, **tracking):
    """All steps are recorded, and one line says what is off."""
    tracker = open_tracker(directory, **tracking)
    write_steps(tracker, [1, 2])
    tracker.alert(ALERT)
    write_steps(tracker, [3, 4])
    tracker.close()
    said = capfd.readouterr().err
    assert said.count(f"{name} is off: ") == 1 and said.count("metrics.jsonl goes on") == 1, said
    assert "Traceback" not in said and "Warning" not in said
    steps = [record["step"] for record in json_lines.read(directory / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    return said


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing(tmp_path, capfd, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert f"pip install 'tinyllama_jax[{name}]'" in fails_soft(tmp_path, capfd, name, **{f"{name}_project": "tests"})


def test_a_file_in_the_way(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file in the way")
    fails_soft(tmp_path, capfd, "TensorBoard", tensorboard=True)


class Failing(Adapter):
    name = "a view"

    def open(self):
        self.calls = []

    def write(self, scalars, record):
        self.calls.append(record["step"])
        if len(self.calls) == 2:
            raise RuntimeError("the network\nis gone")

    warn = finish = lambda self, *_: self.calls.append("more")


def test_an_adapter_that_raises_is_not_asked_again(tmp_path, capfd, monkeypatch):
    view = Failing()
    monkeypatch.setattr(track, "adapters", lambda *_, **__: [view])
    assert "a view is off: the network is gone; " in fails_soft(tmp_path, capfd, "a view")
    assert view.calls == [1, 2]


@pytest.mark.parametrize(("which", "name"), [("tensorboard", "TensorBoard"), ("trackio_project", "trackio")])
def test_a_full_disk(tmp_path, mount, which, name):
    """What the library writes is on a disk that fills up while it writes; the records are on another."""
    disk = mount("size=1m")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").symlink_to(disk, target_is_directory=True)
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_adapters
tracker = test_adapters.open_tracker({str(run_dir)!r}, {which}=test_adapters.ALL[{which!r}])
with open({str(disk / "filler")!r}, "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
for step in range(1, 101):
    test_adapters.write_steps(tracker, [step])
    time.sleep(0.03)
tracker.close()
"""
    environment = os.environ | {"TRACKIO_DIR": str(disk / "trackio"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{name} is off: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "No space left" in done.stderr or "full" in done.stderr
    assert len(list(json_lines.read(run_dir / "metrics.jsonl"))) == 100
