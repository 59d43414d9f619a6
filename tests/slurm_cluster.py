"""A Slurm of two nodes on this machine: the controller and two node daemons of Debian's packages, on loopback.

No munge, no system service, nothing outside a temporary folder: the daemons are children of this process, listen on
free ports, and are ended by their process ids.  `tests/install_slurm.sh` installs the packages.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

# A requeued job may not begin before its credential of the last run has expired, two minutes by default
# (AuthInfo=cred_expire); finished jobs stay known for a while, so that their state can be asked.
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=200000
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=120
KillWait={kill_wait}
MinJobAge=600
MpiDefault=none
GresTypes=gpu
NodeName=s[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=1 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=s[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=a100 Nodes=s[1-2] MaxTime=INFINITE State=UP
"""
# Files stand for the GPUs: scripts that ask for them can be tried, and would start.
GRES = "Name=gpu File={folder}/gpu[0-7]\n"


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/lib/slurm")


class Cluster:
    """Two idle nodes of one CPU each, while the context lasts.

    `env` is what its client programs need, `port` is free for jax's coordinator (node names do not resolve here).
    """

    def __init__(self, folder: Path, *, kill_wait: int = 20):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.daemons: list[subprocess.Popen] = []
        first, second = _free_pair()
        controller, self.port = _free(), _free()
        self.config = folder / "slurm.conf"
        for name in ("state", "spool-s1", "spool-s2"):
            (folder / name).mkdir()
        self.config.write_text(
            CONFIG.format(
                host=self.host, folder=folder, controller=controller, first=first, second=second, kill_wait=kill_wait
            )
        )
        (folder / "gres.conf").write_text(GRES.format(folder=folder))
        for number in range(8):
            (folder / f"gpu{number}").touch()
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(self.config), "PATH": f"{self.env['PATH']}:/usr/sbin:/sbin"}

    def __enter__(self) -> "Cluster":
        try:
            self._start([_find("slurmctld"), "-D", "-f", self.config], "slurmctld.out")
            for name in ("s1", "s2"):
                command = [_find("slurmd"), "-D", "-N", name, "-d", _find("slurmstepd"), "-f", self.config]
                self._start(command, f"slurmd-{name}.out")
            self._until(lambda: self.run(["sinfo", "-h", "-t", "idle", "-o", "%D"]).stdout.strip() == "2", 60, "idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.run(["scancel", "--user=root", "--signal=KILL", "--full"])
        self.run(["scancel", "--user=root"])
        with contextlib.suppress(TimeoutError):
            self._until(lambda: not self.run(["squeue", "-h"]).stdout.strip(), 15, "empty")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, argv: list, *, env: dict[str, str] | None = None, **more) -> subprocess.CompletedProcess:
        """A program on the login node, such as sbatch or `python -m tinyllama_jax launch`."""
        argv = [str(word) for word in argv]
        options = {"capture_output": True, "text": True, "timeout": 120, "cwd": self.folder} | more
        return subprocess.run(argv, env=self.env | (env or {}), **options)

    def show(self, job: str) -> dict[str, str]:
        """Slurm's record of a job: JobState, Restarts, ExitCode, StdOut, ..."""
        text = self.run(["scontrol", "show", "job", "-o", str(job)]).stdout.splitlines()
        return dict(word.split("=", 1) for word in text[0].split() if "=" in word) if text else {}

    def states(self, job: str) -> list[str]:
        """The state of the job, or of each task of an array."""
        text = self.run(["scontrol", "show", "job", "-o", str(job)]).stdout
        return [word[9:] for word in text.split() if word.startswith("JobState=")]

    def wait(self, job: str, states: tuple[str, ...] = ENDED, seconds: float = 120) -> list[str]:
        """Waits until the job, or every task of the array, is in one of the states, and gives them."""
        found: list[str] = []

        def reached() -> bool:
            found[:] = self.states(job)
            return bool(found) and all(state in states for state in found)

        self._until(reached, seconds, " or ".join(states), job)
        return found

    def log(self, job: str) -> str:
        """What the job has written so far."""
        where = self.show(job).get("StdOut", "")
        return Path(where).read_text() if where and Path(where).is_file() else ""

    def _start(self, command: list, name: str) -> None:
        with open(self.folder / name, "wb") as log:
            self.daemons.append(
                subprocess.Popen([str(w) for w in command], stdout=log, stderr=log, env=self.env, cwd=self.folder)
            )

    def _until(self, reached, seconds: float, what: str, job: str = "") -> None:
        end = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > end:
                queue = self.run(["squeue"]).stdout + self.run(["sinfo"]).stdout
                logs = "".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.out")))
                raise TimeoutError(
                    f"not {what} within {seconds} s\n{queue}\n{self.show(job) if job else ''}\n"
                    f"{self.log(job)[-4000:] if job else ''}\n{logs}"
                )
            time.sleep(0.3)


def _free() -> int:
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        return given.getsockname()[1]


def _free_pair() -> tuple[int, int]:
    """Two neighbouring ports, as slurm.conf writes the ports of a range of nodes."""
    while True:
        first = _free()
        with socket.socket() as given, contextlib.suppress(OSError, OverflowError):
            given.bind(("127.0.0.1", first + 1))
            return first, first + 1
