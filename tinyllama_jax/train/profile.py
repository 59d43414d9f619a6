"""A profiler trace of a few early steps, for xprof: what the devices do, and where the host makes them wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tinyllama_jax.config import Tracking


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Profile:
    """Traces `tracking.profile_steps` steps after `tracking.profile_after_steps` of this start, once, into `folder`.

    Called around the dispatch of each step.  A trace that fails is one line, and training goes on.
    """

    def __init__(self, tracking: Tracking, folder: str | Path, *, say: Callable[[str], None] = _to_stderr):
        self._first, self._steps = tracking.profile_after_steps, tracking.profile_steps
        self._traced = 0
        self._folder, self._say = Path(folder), say
        self._waits = tracking.profile_steps > 0
        self._tracing = False
        self._mark = None

    def before(self, step_of_this_start: int) -> float:
        """step_of_this_start: the number of steps that this process has dispatched already.

        Returns the seconds that beginning the trace took, which are not the step's.
        """
        spent = 0.0
        if self._waits and step_of_this_start >= self._first:
            self._waits = False
            spent = self._try(self._start)
        if self._tracing:  # so that xprof can tell the steps apart
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step_of_this_start)
            self._mark.__enter__()
        return spent

    def after(self, outputs: Any) -> float:
        """outputs: what the step was dispatched to compute; waited for at the last traced step, so that it is whole.

        Returns the seconds that writing the trace took, which are not the step's.
        """
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            self._traced += 1
        if self._tracing and self._traced == self._steps:
            jax.block_until_ready(outputs)
            return self.close()
        return 0.0

    def close(self) -> float:
        """Ends a trace that is under way; a run may end before its last step.  Returns the seconds that it took."""
        if not self._tracing:
            return 0.0
        self._tracing = False
        return self._try(self._stop)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would be told, at the price of the steps being slower
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._say(f"trace of {self._traced} steps: xprof --logdir {self._folder} (pip install xprof)")

    def _try(self, function: Callable[[], None]) -> float:
        before = time.perf_counter()
        try:
            function()
        except Exception as error:  # a trace must not stop a run
            self._tracing = False
            self._say(f"no trace in {self._folder}: {' '.join(str(error).split())[:200]}")
        return time.perf_counter() - before
