"""What the soak does to a run: to its processes, its disk, its checkpoints and its clock."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from hosts import Hosts
from many_hosts import lines, steps_done

BEGIN_SECONDS = 240  # for a start, on a machine that does much else
END_SECONDS = 150  # for an end: a peer's silence, the farewell, a save, and the same slack
ENOUGH_SECONDS = 10  # of training, where many steps take long
DISK_BYTES = 64 << 20
NO_ROOM_BYTES = 1200 << 10  # free on a full disk, at most: less than a checkpoint of the run needs

# The same program with another time of day, that jumps by up to a day and a half, forwards and backwards, three times a
# second.  Only the wall clock: a monotonic clock does not jump.
CLOCK = """
import datetime, os, random, sys, time
real, chance, began, jumps = time.time, random.Random(int(os.environ["SOAK_CLOCK"])), time.monotonic(), []
def now():
    number = int(3 * (time.monotonic() - began))
    while len(jumps) <= number:
        jumps.append(chance.choice((-1, 0, 1)) * 10 ** chance.uniform(0, 5.1))
    return real() + jumps[number]
class Jumping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(now(), tz)
time.time, time.time_ns, datetime.datetime = now, lambda: int(now() * 1e9), Jumping
from tinyllama_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Disk:
    """A small disk in memory, mounted at `place`; `mounted` is false where that is not permitted."""

    def __init__(self, place: Path):
        place.mkdir(parents=True)
        self.place, self._ballast = place, place / "ballast"
        words = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place))
        self.mounted = shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0

    def fill(self, left: int) -> None:
        """At most so much stays free, also where others have made room since the last call."""
        size = self._ballast.stat().st_size if self._ballast.exists() else 0
        more = shutil.disk_usage(self.place).free - left
        if more > 0:
            with open(self._ballast, "ab") as file, contextlib.suppress(OSError):  # another was quicker
                os.posix_fallocate(file.fileno(), size, more)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", self.place], check=True)


def damage(checkpoint: Path, chance: random.Random) -> str:
    """Flips one bit of one of its files, cuts it short or deletes it; returns which."""
    file = chance.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))
    kind = chance.choice(("flipped bit", "truncated file", "deleted file"))
    if kind == "deleted file":
        file.unlink()
    elif kind == "truncated file":
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return kind


class Life:
    """One start of a run of 1 or 2 processes, from its beginning to its end.

    Every fault below asserts that it ended as a launcher and a person may rely on, and leaves no process behind.
    """

    def __init__(self, hosts: Hosts, workdir: Path, disk: Disk, chance: random.Random, enough_steps: int):
        self.hosts, self.workdir, self.disk, self.chance = hosts, workdir, disk, chance
        self.count, self._enough = len(hosts.processes), enough_steps
        self._before = len(self.events())

    def events(self) -> list[dict]:
        return lines(self.workdir / "events.jsonl")

    def mine(self) -> list[dict]:
        """Events of this life."""
        return self.events()[self._before :]

    def began(self) -> dict | None:
        return next((event for event in self.mine() if event["kind"] == "start"), None)

    def over(self) -> bool:
        return any(process.poll() is not None for process in self.hosts.processes)

    def until(self, condition, what: str, seconds: float = BEGIN_SECONDS) -> None:
        """Returns when it holds, or when a process has ended."""
        self.hosts.wait_until(lambda: self.over() or condition(), what, seconds)

    def live(self) -> None:
        """Trains for some steps, or for some seconds where those take long."""
        self.until(lambda: self.began() is not None, "the start")
        target, end = steps_done(self.workdir) + self.chance.randrange(self._enough), time.monotonic() + ENOUGH_SECONDS
        self.until(lambda: steps_done(self.workdir) >= target or time.monotonic() > end, f"step {target}")
        time.sleep(self.chance.random() * 0.1)

    def end(self, *allowed: int, of: tuple[int, ...] | None = None, saying: str = "") -> list[int]:
        """Waits for all; asserts these statuses (of the processes `of`), no stacks, and one line where it failed."""
        try:
            statuses = self.hosts.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process did not end within {END_SECONDS} s:\n{self._said()}") from None
        told = []
        for i, status in enumerate(statuses):
            text = self.hosts.said(i)
            assert "Traceback" not in text, f"process {i}:\n{text}"
            if of is None or i in of:
                assert status in (*allowed, 0), f"process {i} ended with {status}, not {allowed}:\n{text}"
                own = [line for line in text.splitlines() if line.startswith("tinyllama")]
                assert len(own) <= 1, text
                told += own
        failed = any(s > 0 for i, s in enumerate(statuses) if of is None or i in of)
        if failed:
            assert told and all(saying in line for line in told), f"no line says {saying!r}:\n{self._said()}"
        return statuses

    def _said(self) -> str:
        return "\n".join(f"process {i}:\n{self.hosts.said(i)}" for i in range(self.count))

    # --- the faults ---

    def kill_all(self) -> None:
        """At any instant, also while it starts."""
        if self.chance.random() < 0.4:
            time.sleep(self.chance.uniform(0, 15))
        else:
            self.live()
        for i in range(self.count):
            self.hosts.kill(i)
        self.end(-signal.SIGKILL)

    def kill_one(self) -> None:
        """The others must notice, and name it."""
        self.live()
        victim = self.chance.randrange(self.count)
        self.hosts.kill(victim)
        others = tuple(i for i in range(self.count) if i != victim)
        self.end(1, of=others, saying=f"process {victim} (")

    def terminate(self) -> None:
        """Not a step may be lost."""
        self.live()
        if self.chance.random() < 0.7:
            self.hosts.kill(self.chance.randrange(self.count), self.chance.choice((signal.SIGTERM, signal.SIGUSR1)))
        else:
            (self.workdir / "stop").touch()
        statuses = self.end(75, saying="start again with the same command")
        (self.workdir / "stop").unlink(missing_ok=True)  # it may have come after the last step
        if 75 in statuses:
            saved = (self.workdir / "checkpoints" / f"{steps_done(self.workdir):08d}").is_dir()
            assert saved, "steps were lost:\n" + self._said()

    def suspend(self) -> None:
        """One process stands still.  Alone it goes on afterwards; another one of the run does not wait for it."""
        self.live()
        victim = self.chance.randrange(self.count)
        self.hosts.kill(victim, signal.SIGSTOP)
        if self.count == 1:
            time.sleep(self.chance.uniform(0.1, 3))
            self.hosts.kill(victim, signal.SIGCONT)
            before = steps_done(self.workdir)
            self.until(lambda: steps_done(self.workdir) > before, "a step after the standstill", END_SECONDS)
            self.hosts.kill(victim)
            self.end(-signal.SIGKILL)
            return
        other = 1 - victim
        try:
            self.hosts.processes[other].wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {other} waits for ever for a stopped one:\n{self._said()}") from None
        finally:
            self.hosts.kill(victim, signal.SIGCONT)
        self.end(1, of=(other,), saying=f"process {victim} (")
        assert self.hosts.processes[victim].returncode in (0, 1), self._said()

    def fill_disk(self) -> None:
        """Saves fail: a warning, and the end with status 1 after three; the run goes on where there is room again."""
        self.live()
        left, stay = self.chance.choice((0, self.chance.randrange(NO_ROOM_BYTES))), self.chance.random() < 0.5

        def failed() -> bool:
            self.disk.fill(left)
            return any(event["kind"] == "save_failed" for event in self.mine())

        try:
            self.until(failed, "a save that fails")
            if stay:
                self.until(lambda: failed() and False, "the end after saves that fail")
            else:
                self.disk.free()
                before = len(self.events())
                committed = "checkpoint_committed"
                self.until(
                    lambda: any(event["kind"] == committed for event in self.events()[before:]), "a save with room"
                )
                self.kill_now()
            self.end(1, -signal.SIGKILL, saying="o space left on ")
        finally:
            self.disk.free()

    def kill_now(self) -> None:
        if not self.over():
            for i in range(self.count):
                self.hosts.kill(i)
