"""A run of several processes that is started, hurt and started again; used by tests and by the long proofs."""

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from hosts import Hosts, Hung

TESTS = Path(__file__).parent
PEER_SECONDS = 3
WATCHDOG_SECONDS = 40  # a step takes hundredths of one; compiling is allowed six times as long


def command(store: Path, workdir: Path, *settings: str) -> list[str]:
    """`train` for some 250 steps of hundredths of a second, saving every seven."""
    batch = 8 * 32
    fixed = (
        f"data.store={store}",
        *(f"curriculum.{stage}.batch_tokens={batch}" for stage in ("basic", "continual", "cooldown")),
        *(f"curriculum.{stage}.tokens={80 * batch}" for stage in ("basic", "continual", "cooldown")),
        f"curriculum.continual.ramp_tokens={20 * batch}",
        "checkpoint.temporary_steps=7",
        f"health.peer_seconds={PEER_SECONDS}",
        f"health.watchdog_seconds={WATCHDOG_SECONDS}",
        "evaluation.prompts=[]",
    )
    argv = [sys.executable, "-m", "tinyllama_jax", "train", "quick_experiment:quick", "--experiment-path", str(TESTS)]
    return [*argv, "--workdir", str(workdir), *(word for s in (*fixed, *settings) for word in ("--set", s))]


def lines(path: Path) -> list[dict]:
    """Complete lines; a process may be writing the last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def without_timing(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "timing"} for record in lines(path)]


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_to_the_end(count: int, argv: list[str], seconds: float = 280, **kwargs) -> list[str]:
    for attempt in range(3):
        with Hosts(count, argv, **kwargs) as hosts:
            try:
                statuses = hosts.wait(seconds)
            except Hung:
                if attempt == 2:
                    raise
                continue  # started again, as by a launcher
            said = [hosts.said(i) for i in range(count)]
            assert statuses == [0] * count, "\n".join(said)
            return said


class Kill(NamedTuple):
    """One process of a run killed; `seconds` until the last of the others had ended."""

    process: int
    steps_done: int
    seconds: float


def kill_once(count: int, argv: list[str], workdir: Path, chance: random.Random, *, beyond: int = 12) -> Kill | None:
    """Starts the run, kills one process with SIGKILL somewhere in the next `beyond` steps, and waits for the others.

    None if the run ended first.  Asserts that the others end by themselves in time, with status 1 and one line that
    names the killed one.
    """
    victim, others = chance.randrange(count), []
    with Hosts(count, argv) as hosts:
        first = steps_done(workdir)
        target = first + chance.randrange(1, beyond)
        started = len(lines(workdir / "events.jsonl"))

        def there() -> bool:
            if hosts.processes[0].poll() is not None:
                return True
            events = lines(workdir / "events.jsonl")[started:]
            begun = any(event["kind"] == "start" for event in events)
            return begun and (steps_done(workdir) >= target or any(e["kind"] == "finished" for e in events))

        hosts.wait_until(there, f"step {target}", seconds=200)
        time.sleep(chance.random() * 0.1)
        if any(process.poll() is not None for process in hosts.processes):
            assert hosts.wait(100) == [0] * count, "\n".join(hosts.said(i) for i in range(count))
            return None
        at = steps_done(workdir)
        hosts.kill(victim, signal.SIGKILL)
        before = time.monotonic()
        statuses = hosts.wait(120)
        took = time.monotonic() - before
        if statuses.count(0) == count - 1:
            return None  # the kill came after the others' goodbye
        told = []
        for i in range(count):
            if i != victim:
                others.append(hosts.said(i))
                assert statuses[i] == 1, f"process {i} ended with {statuses[i]}:\n{others[-1]}"
                mine = [line for line in others[-1].splitlines() if line.startswith("tinyllama")]
                assert len(mine) <= 1, others[-1]  # what process 0 says, the others need not
                told += mine
        assert told and all(f"process {victim} (" in line for line in told), others
        assert all("was not heard of" in line or "ended" in line for line in told), told
        assert took < PEER_SECONDS + 40, f"it took {took:.0f} s for the others to end"
    return Kill(victim, at, took)


def same_run(workdir: Path, whole: Path, *, exact: bool = False, tolerance: float = 1e-5, so_far: bool = False) -> int:
    """Asserts that a hurt run left the records of a whole one: every step once, the same batches, the same numbers.

    so_far: the run may not be at its end.  Returns the number of steps."""
    hurt, reference = without_timing(workdir / "metrics.jsonl"), without_timing(whole / "metrics.jsonl")
    if so_far:
        reference = reference[: len(hurt)]
    assert [r["step"] for r in hurt] == list(range(1, len(reference) + 1)), "a step is lost, or there twice"
    for a, b in zip(hurt, reference, strict=True):
        for key in ("tokens", "valid_tokens", "stage", "mixture", "epoch", "lr"):
            assert a[key] == b[key], (a["step"], key)
        assert not exact or a == b, (a, b)
        assert abs(a["loss"] - b["loss"]) <= tolerance, (a["step"], a["loss"], b["loss"])
    return len(hurt)
