import json

import jax
import pytest
from quick_experiment import quick_command

from tinyllama_jax.cli import main
from tinyllama_jax.config import Tracking
from tinyllama_jax.train import step
from tinyllama_jax.train.profile import Profile


def step_of(profile, number):
    profile.before(number)
    profile.after(jax.jit(lambda x: x + 1)(number))


def traces(folder):
    return list(folder.rglob("*.xplane.pb"))


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def test_a_run_is_traced_once_and_its_numbers_stay_the_same(finished, small_store, tmp_path, monkeypatch, capfd):
    folder, make, count, spent = tmp_path / "run" / "profile", step.make_train_step, iter(range(1000)), []
    profile = Profile(Tracking(profile_steps=2, profile_after_steps=3), folder)

    def traced(run):
        train_step = make(run)

        def call(*arguments):
            spent.append(profile.before(next(count)))
            state, metrics = train_step(*arguments)
            spent.append(profile.after(metrics))
            return state, metrics

        return call

    monkeypatch.setattr(step, "make_train_step", traced)
    assert main(quick_command(small_store, tmp_path / "run")) == 0
    profile.close()
    assert [i for i, seconds in enumerate(spent) if seconds] == [2 * 3, 2 * 4 + 1], "before the fourth, after the fifth"
    (trace,) = traces(folder)
    content = trace.read_bytes()
    assert b"train_step" in content, "the compiled step goes by its name"
    assert b"step_num" in content
    said = [line for line in capfd.readouterr().err.splitlines() if "xprof" in line]
    assert said == [f"trace of 2 steps: xprof --logdir {folder} (pip install xprof)"]
    assert records(tmp_path / "run") == records(finished)


def test_no_steps_asked_for_is_no_trace(tmp_path, capfd):
    profile = Profile(Tracking(), tmp_path / "profile")
    for number in range(20):
        step_of(profile, number)
    profile.close()
    assert not (tmp_path / "profile").exists() and capfd.readouterr().err == ""


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_ends_before_the_last_traced_step(tmp_path, capfd, steps):
    profile = Profile(Tracking(profile_steps=100, profile_after_steps=1), tmp_path / "profile")
    for number in range(steps):
        step_of(profile, number)
    profile.close()
    profile.close()
    assert len(traces(tmp_path / "profile")) == 1
    assert capfd.readouterr().err.count(f"trace of {steps - 1} steps") == 1


def test_it_fails_soft_with_one_line(tmp_path, capfd):
    (tmp_path / "profile").write_text("a file in the way")
    profile = Profile(Tracking(profile_steps=2, profile_after_steps=1), tmp_path / "profile")
    for number in range(6):
        step_of(profile, number)
    profile.close()
    assert capfd.readouterr().err.count("\n") == 1


def test_a_full_disk_fails_soft_with_one_line(mount, capfd):
    disk = mount("size=4k")
    profile = Profile(Tracking(profile_steps=2, profile_after_steps=0), disk / "profile")
    for number in range(6):
        step_of(profile, number)
    profile.close()
    said = capfd.readouterr().err
    assert "no trace in" in said and sum("trace" in line for line in said.splitlines()) == 1, said
