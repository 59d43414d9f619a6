"""Several processes of one run on this machine, as a launcher would start them."""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Hung(Exception):
    """A run's watchdog ended it.

    On CPUs XLA runs independent collectives of one program in an order of its own in each process, and once in some
    thousands of steps each of two processes waits in another one (seen with gloo: an all-gather here, an all-reduce
    there).  A launcher starts such a run again, and a test begins again; devices with streams keep one order.
    """


def begun_again(test):
    """A test whose runs hang by themselves (see Hung) is begun again, in an empty folder."""

    @functools.wraps(test)
    def run(*args, tmp_path, **kwargs):
        for attempt in range(3):
            folder = tmp_path / f"attempt{attempt}"
            folder.mkdir()
            try:
                return test(*args, tmp_path=folder, **kwargs)
            except Hung as hung:
                last = hung
        raise last

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Hosts:
    """`count` processes of `command`; process i has environment(i, address) on top.  Leaves none behind."""

    def __init__(self, count: int, command: list[str], *, devices: int = 1, environment=None, wrap=None):
        address = f"127.0.0.1:{free_port()}"
        kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
        flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(count)]
        self.processes = []
        for i in range(count):
            own = environment(i, address) if environment else meeting(i, count, address)
            env = kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | own
            argv = (wrap(i) if wrap else []) + command
            log = self.logs[i]
            self.processes.append(
                subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log, text=True, start_new_session=True)
            )

    def said(self, i: int) -> str:
        self.logs[i].flush()
        with os.fdopen(os.dup(self.logs[i].fileno())) as log:
            log.seek(0)
            return log.read()

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses."""
        end = time.monotonic() + seconds
        statuses = [p.wait(timeout=max(0.1, end - time.monotonic())) for p in self.processes]
        self._raise_if_hung()
        return statuses

    def _raise_if_hung(self) -> None:
        for i in range(len(self.processes)):
            if " hung: " in self.said(i):
                raise Hung(self.said(i)[-1500:])

    def wait_until(self, condition, what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [p.poll() for p in self.processes]
            if None not in ended:
                self._raise_if_hung()
                assert condition(), f"all ended ({ended}) before {what}:\n{self._all_said()}"
                return  # it has come about since it was asked
            assert time.monotonic() < end, f"{what} did not happen:\n{self._all_said()}"
            time.sleep(0.01)

    def _all_said(self) -> str:
        return "\n".join(self.said(i)[-1500:] for i in range(len(self.processes)))

    def kill(self, i: int, number: int = signal.SIGKILL) -> None:
        self.processes[i].send_signal(number)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self.logs:
            log.close()


def meeting(i: int, count: int, address: str) -> dict[str, str]:
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]
