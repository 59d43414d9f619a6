import os
import signal
import subprocess
import sys
import threading

import pytest

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.train import health, rollback
from tinyllama_jax.train.notice import Notice


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_handlers_are_put_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Notice() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_interrupt_interrupts_at_once():
    with Notice() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may lose its patience too; that is no second Ctrl-C
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def body():
        with Notice() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGTERM) is before


def test_consecutive_skips_end_the_run_with_a_status_that_may_be_retried():
    error = health.diverged(rollback.TooManySkips(100, 20), 2)
    assert "last 20 steps up to step 100 were skipped" in str(error) and "after 2 rollback(s)" in str(error)
    assert error.exit_status == 1 and "\n" not in str(error)


def test_one_process_per_run_directory(tmp_path):
    with health.claim(tmp_path / "runs/a") as workdir:
        assert workdir.is_dir()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} is training there"):
            with health.claim(workdir):
                pass
        with health.claim(tmp_path / "runs/b"):
            pass
    with health.claim(tmp_path / "runs/a"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from tinyllama_jax.train import health\n"
        "with health.claim(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} is training there"):
            with health.claim(tmp_path):
                pass
        process.kill()
    with health.claim(tmp_path):
        assert (tmp_path / health.LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_a_file_in_the_way_is_one_line_and_is_kept(tmp_path):
    (tmp_path / "run").write_text("precious")
    for workdir in (tmp_path / "run", tmp_path / "run/deeper"):
        with pytest.raises(ConfigError, match="a file is in the way") as caught:
            with health.claim(workdir):
                pass
        assert "\n" not in str(caught.value)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_place_that_cannot_be_written_to_is_one_line(mount):
    disk = mount("ro")
    for workdir in (disk, disk / "run"):
        with pytest.raises(ConfigError, match="Read-only file system"):
            with health.claim(workdir):
                pass


def test_too_little_space_is_said_before_training(tmp_path):
    health.check_space(tmp_path, 1)
    with pytest.raises(ConfigError, match="MiB free, but two checkpoints need 1,073,741,824.0 MiB"):
        health.check_space(tmp_path, 2**50)
