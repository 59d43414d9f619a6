"""Compiled programs are kept on disk, so that a run that starts again does not compile what it has compiled before.

It is JAX's persistent cache, switched on, in a folder per set of programs:

    ~/.cache/tinyllama_jax/programs/PROCESSOR/SET/      XDG_CACHE_HOME instead of ~/.cache where it is set
        jit_train_step-<key>-cache                      JAX's, by a key of program, options, devices and versions
        jit_train_step-<key>-cache.sha256               ours

JAX writes an entry in place and reads it without a check.  So an entry is sealed with its hash once it is known to be
whole, and removed when it cannot be unpacked (its process was killed, the disk was full: JAX warns, and compiles).  One
that is not what was sealed (a flipped bit) is removed when a process starts.  JAX_COMPILATION_CACHE_DIR, when set, is
used as it is and not looked after; JAX_ENABLE_COMPILATION_CACHE=false compiles everything anew.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

LIMIT_BYTES = 4 << 30  # of all sets together; those that were not used for longest go first
ENTRY, SEAL = "-cache", ".sha256"


class Programs:
    """What was compiled and what was found, since the start of this process."""

    def __init__(self):
        self.folder: Path | None = None
        self.watching, self.thread = False, threading.get_ident()
        self.found, self.compile_s = 0, 0.0

    def on_event(self, event: str, **_) -> None:
        self.found += event == "/jax/compilation_cache/cache_hits"

    def on_duration(self, event: str, seconds: float, **_) -> None:
        # A program that is found counts with the time that it takes to read it; one that another thread compiles
        # meanwhile (train/restoring.py) is not waited for.
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == self.thread:
            self.compile_s += seconds


NOW = Programs()


def keep(of: str, folder: Path | None = None, *, tidy: bool = True) -> Path | None:
    """Keeps this process's programs; -> the folder, or None where the environment decides or nothing can be written.

    of: what the programs are made from, in any spelling that is the same next time; sets of different `of` are apart.
    folder: instead of the user's, such as one inside a run directory.  tidy: False in all but one of the processes
    that start together.  Call before anything is compiled.
    """
    import jax

    if not NOW.watching:
        NOW.watching = True
        jax.monitoring.register_event_listener(NOW.on_event)
        jax.monitoring.register_event_duration_secs_listener(NOW.on_duration)
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    path = folder or _home() / _processor() / hashlib.sha256(of.encode()).hexdigest()[:16]
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)  # who may write here may run programs as this user
        if tidy:
            _remove_damaged(path)
            if folder is None:
                os.utime(path)
                _make_room(path)
        with open(path / f".{os.getpid()}", "w"):
            os.unlink(path / f".{os.getpid()}")
    except OSError as error:
        print(f"programs are not kept: {path}: {error.strerror}", file=sys.stderr, flush=True)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    if NOW.folder is None and tidy:
        atexit.register(seal)
    NOW.folder = path
    return path


def seal() -> None:
    """Marks the entries that are there and whole; removes those that are not.  Never fails: it is only a cache."""
    if NOW.folder is None:
        return
    with contextlib.suppress(OSError):
        for entry in NOW.folder.glob(f"*{ENTRY}"):
            mark = entry.with_name(entry.name + SEAL)
            if mark.exists():
                continue
            if _whole(entry):
                part = mark.with_name(f"{mark.name}.{os.getpid()}")
                part.write_text(_sha256(entry))
                part.rename(mark)
            else:
                entry.unlink()


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama_jax" / "programs"


def _processor() -> str:
    """Programs use this processor's instructions, and homes are shared by machines of many kinds."""
    about = platform.machine() + metadata.version("jaxlib")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def _remove_damaged(path: Path) -> None:
    for entry in path.glob(f"*{ENTRY}"):
        mark = entry.with_name(entry.name + SEAL)
        # What has no seal may be another process's, who has just compiled it.
        if mark.exists() and mark.read_text() != _sha256(entry):
            print(f"{entry}: not what was written; removed, and compiled again", file=sys.stderr, flush=True)
            entry.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)


def _make_room(used: Path) -> None:
    """Removes the sets that were not used for longest until all are within LIMIT_BYTES; never the one in use."""
    sets = sorted((path for path in used.parent.parent.glob("*/*") if path != used), key=lambda p: p.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in [*sets, used]}
    total = sum(sizes.values())
    for path in sets:
        if total <= LIMIT_BYTES:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]


def _whole(entry: Path) -> bool:
    """Whether it can be unpacked, as JAX will do."""
    import zstandard

    try:
        zstandard.ZstdDecompressor().decompress(entry.read_bytes())
    except zstandard.ZstdError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_step(began: float) -> dict:
    """Seconds since `began` (of the epoch), of them spent on programs, and how many were found instead of compiled."""
    return {"seconds": time.time() - began, "compile_s": round(NOW.compile_s, 3), "programs_found": NOW.found}
