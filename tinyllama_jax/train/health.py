"""What a long run needs besides arithmetic: a directory of its own, room on the disk, and a reason to give up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.errors import ConfigError, UserError
from tinyllama_jax.train.rollback import TooManySkips

LOCK_NAME = ".lock"


class Diverged(UserError):
    """Too many steps in a row were skipped; starting again the same way would end the same way."""

    exit_status = 1


def diverged(failed: TooManySkips, rollbacks: int) -> Diverged:
    """What to tell the user when going back has not helped, or is not allowed."""
    tried = f", after {rollbacks} rollback(s)" if rollbacks else ""
    return Diverged(
        f"diverged: {failed} (loss or gradient not finite, or beyond optimizer.skip_sigma){tried}; go back to an "
        "earlier checkpoint with a lower lr.peak, a longer lr.warmup_tokens or a smaller optimizer.clip_norm, and look "
        "at metrics.jsonl for where it began"
    )


def check_space(workdir: str | Path, need_bytes: int) -> None:
    """Raises ConfigError when the run directory's disk has less room than that: better now than at the first save."""
    free = shutil.disk_usage(workdir).free
    if free < need_bytes:
        raise ConfigError(
            f"run directory {workdir}: {free / 2**20:,.1f} MiB free, but two checkpoints need "
            f"{need_bytes / 2**20:,.1f} MiB; free some space or name another"
        )


@contextlib.contextmanager
def claim(workdir: str | Path) -> Iterator[Path]:
    """Makes the run directory and holds it for this process alone.

    ConfigError when the place cannot be written to, a file is in the way, or another process trains there.  The lock
    ends with the process, however it ends.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK_NAME, "a+")
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"run directory {workdir}: a file is in the way ({error.filename}); name another") from error
    except OSError as error:
        raise ConfigError(f"run directory {workdir}: {error.strerror}; name one that you can write to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise ConfigError(
                f"run directory {workdir}: process {owner} is training there; wait for it, or name another"
            ) from error
        except OSError as error:  # some network file systems have no locks
            print(f"run directory {workdir}: not locked ({error.strerror})", file=sys.stderr)
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as error:
            raise ConfigError(f"run directory {workdir}: {error.strerror}; free some space or name another") from error
        yield workdir
