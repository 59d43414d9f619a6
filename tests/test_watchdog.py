import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllama_jax.train.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
HANG = """
import sys, time, threading
from tinyllama_jax.train.watchdog import Watchdog
with Watchdog(0.5, slow_factor=4) as watchdog:
    watchdog.patient("preparing the data")
    time.sleep(3)
    watchdog.at("compiling", slow=True)
    time.sleep(1)
    print("compiled", flush=True)
    for step in range(1, 12):
        watchdog.at("step %d" % step)
        time.sleep(0.01)
        watchdog.took(0.01)
    watchdog.at("step 12")
    def a_collective_that_never_ends():
        {hang}
    a_collective_that_never_ends()
"""


def run(hang):
    before = time.monotonic()
    program = HANG.replace("{hang}", hang)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done, time.monotonic() - before


def test_a_hung_step_ends_with_stacks_and_one_line():
    done, seconds = run("time.sleep(60)")
    assert done.returncode == 1 and done.stdout == "compiled\n", "what is slow has more time"
    assert "a_collective_that_never_ends" in done.stderr, "the stacks say where"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tinyllama train: hung: step 12 for ") and "health.watchdog_seconds=0.5" in last
    assert seconds < 30


def test_a_step_may_take_twenty_times_the_median(monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    watchdog = Watchdog(0.2)
    for _ in range(8):
        watchdog.took(0.1)
    with watchdog:
        watchdog.at("a long step")
        time.sleep(0.8)
        assert not ended
        watchdog._steps.clear()
        watchdog.at("a longer one")
        time.sleep(1.0)
        assert ended


@pytest.mark.parametrize("seconds", [0, 60])
def test_off_or_in_time_nothing_happens(seconds):
    with Watchdog(seconds) as watchdog:
        watchdog.at("step 1")
        watchdog.took(0.01)
