"""Items by several processes, with one progress for all of them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama_jax.data import plan
from tinyllama_jax.errors import Unfinished, UserError

POLL_SECONDS = 0.2
# Of a worker, set once when it starts.
_state: dict = {}


def each(
    folder: Path, task: Callable, numbers: Sequence[int], workers: int, report: Callable[[int, int, int], None]
) -> list[tuple[int, UserError]]:
    """Runs task(state, number, report) for every number, in `workers` processes; -> the items that failed, with why.

    state: the frozen plan (and whatever the task keeps in it).  One failed item does not stop the others.  OSError (a
    disk that is full, say) and bugs do: they are raised here as themselves.  A process that is killed is Unfinished.
    """
    if not numbers:
        return []
    if workers == 1:
        state = {"plan": plan.load(folder)}
        return [failure for number in numbers if (failure := _attempt(task, state, number, report))]
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    # A place of its own for every worker and no lock, which one that is killed might hold for ever.
    counters = context.RawArray("q", 3 * workers)
    failures = []
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (folder, counters, os.getpid()))
    try:
        waiting = {pool.submit(_in_worker, task, number) for number in numbers}
        last = [0, 0, 0]
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            now = [sum(counters[place::3]) for place in range(3)]
            report(*(b - a for a, b in zip(last, now, strict=True)))
            last = now
            failures += [failure for future in done if (failure := future.result())]
    except concurrent.futures.process.BrokenProcessPool as error:
        raise Unfinished(
            f"{folder}: a worker process was killed (by the system, if memory ran out); finished items are kept: start "
            "again, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(failures, key=lambda failure: failure[0])


def _attempt(task: Callable, state: dict, number: int, report) -> tuple[int, UserError] | None:
    try:
        task(state, number, report)
    except UserError as error:
        return number, error
    return None


def _start(folder: Path, counters, parent: int) -> None:
    number = int(multiprocessing.current_process().name.rpartition("-")[2])  # workers are numbered one after another
    _state.update(plan=plan.load(folder), counters=counters, slot=number % (len(counters) // 3) * 3)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_worker(task: Callable, number: int) -> tuple[int, UserError] | None:
    counters, slot = _state["counters"], _state["slot"]

    def report(documents: int, tokens: int, n_bytes: int) -> None:
        counters[slot] += documents
        counters[slot + 1] += tokens
        counters[slot + 2] += n_bytes

    return _attempt(task, _state, number, report)
