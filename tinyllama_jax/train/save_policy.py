"""When a checkpoint is due and what a failed one means.

A periodic save that fails is a warning: the run goes on and tries again after checkpoint.retry_seconds, for the
checkpoint before it is still there.  A stage's end, the run's end and the save before stopping must succeed, and so
must one of checkpoint.max_failed_saves in a row; otherwise the run ends with status 1, to be started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tinyllama_jax.config import Checkpoint
from tinyllama_jax.errors import CheckpointError


class SaveFailed(CheckpointError):
    """The state could not be saved; the last good checkpoint is intact, and a launcher may start the run again."""

    exit_status = 1


class Saver:
    """Periodic saves by the clock of process 0, and the policy for those that fail.

    write(step, permanent, blocking) saves and raises CheckpointError, now or for the save before; warn(step, text)
    tells the person.
    """

    def __init__(
        self,
        cfg: Checkpoint,
        write: Callable[[int, bool, bool], None],
        warn: Callable[[int, str], None],
    ):
        self.cfg, self._write, self._warn = cfg, write, warn
        self.failed_in_a_row = 0
        self._unknown = False  # a save is under way, or has ended without a word
        self._due_at = self._next()

    def _next(self) -> float:
        return time.monotonic() + self.cfg.temporary_seconds if self.cfg.temporary_seconds else float("inf")

    def due(self) -> bool:
        """Whether the clock asks for a temporary save; true once, then not until the next one is due."""
        if time.monotonic() < self._due_at:
            return False
        self._due_at = self._next()
        return True

    def save(self, step: int, *, permanent: bool, essential: bool) -> None:
        """essential: wait until it is on the disk, and end the run if it cannot be."""
        try:
            self._write(step, permanent, essential)
        except CheckpointError as error:
            # What failed may be the save before this one: then this one has not begun.
            self.failure(step, error)
            if not essential:
                return
            try:
                self._write(step, permanent, essential)
            except CheckpointError as again:
                raise SaveFailed(f"step {step} must be saved and cannot be: {again}") from again
        self._due_at = self._next()
        if essential or self._unknown:  # this one is on the disk, or the one before it was
            self.failed_in_a_row = 0
        self._unknown = not essential

    def failure(self, step: int, error: CheckpointError) -> None:
        """Counts a failed save; raises SaveFailed when there were too many in a row."""
        self.failed_in_a_row += 1
        self._unknown = False
        if self.failed_in_a_row >= self.cfg.max_failed_saves:
            raise SaveFailed(f"{self.failed_in_a_row} saves in a row have failed, the last one: {error}") from error
        self._warn(step, f"{error}; tried again in {self.cfg.retry_seconds:g} s")
        self._due_at = time.monotonic() + self.cfg.retry_seconds
