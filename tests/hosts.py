"""Several processes of one run on this machine, as a launcher would start them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
        return [p.wait(timeout=max(0.1, end - time.monotonic())) for p in self.processes]

    def wait_until(self, condition, what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [p.poll() for p in self.processes]
            texts = "\n".join(self.said(i)[-1500:] for i in range(len(ended)))
            assert any(status is None for status in ended), f"all ended ({ended}) before {what}:\n{texts}"
            assert time.monotonic() < end, f"{what} did not happen:\n{texts}"
            time.sleep(0.01)

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
