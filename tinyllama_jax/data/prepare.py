"""From a recipe to a token store: plan, run the items, finalize.

Each step may be repeated and does only what is missing, so a killed one is simply started again, and the items may be
made by any number of processes on any number of machines that share the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tinyllama_jax import configio
from tinyllama_jax.config import Recipe
from tinyllama_jax.data import items, plan, store, tasks
from tinyllama_jax.data.durable import writing
from tinyllama_jax.data.manifest import finalize
from tinyllama_jax.data.plan import BEFORE_PLAN, ITEMS, Plan, Progress, silent
from tinyllama_jax.data.shards import token_dtype
from tinyllama_jax.data.store import PLAN
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import DataError

TOKENIZE, WAIT = "tokenize", "wait for another prepare"


def prepare(recipe: Recipe, out: str | Path, *, processes: int = 1, progress: Progress = silent) -> Path:
    """Makes the token store `out` unless it is there already; returns its path.

    A store of the same recipe is opened (sizes checked) and left as it is; a half-made one is finished.
    Raises DataError for a store of another recipe or anything else under that name, for sources and tokenizers that
    cannot be used, and for a disk that cannot be written; nothing is overwritten.  Of several processes that want the
    same store one makes it and the others wait.
    """
    out = Path(os.path.abspath(out))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not _complete(recipe, out):
            with locked(out, progress):
                if not _complete(recipe, out):
                    frozen = freeze(recipe, out, progress)
                    run(frozen, range(len(frozen.items)), processes, progress)
                    finalize(frozen)
    return out


def freeze(recipe: Recipe, out: str | Path, progress: Progress = silent) -> Plan:
    """The frozen plan of store `out`: made now, or before with the same recipe."""
    out = Path(out)
    with writing(out):
        if (out / PLAN).exists():
            frozen = plan.load(out)
            _require_same(recipe, frozen.recipe, out)
            return frozen
        new = not out.exists()
        if not new and not _may_hold_a_store(out):
            raise DataError(f"{out}: exists and is no token store; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        try:
            return plan.make(recipe, out, progress)
        except BaseException:
            plan.clear(out)
            if new:
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise


def _may_hold_a_store(out: Path) -> bool:
    """An empty folder, what a killed plan left, or the items of a plan that was taken away to make another."""
    before = (*BEFORE_PLAN, *(f".{name}." for name in (PLAN, *BEFORE_PLAN)))
    names = {entry.name for entry in out.iterdir() if not entry.name.startswith(before)}
    return not names or ITEMS in names and names <= {ITEMS, store.MANIFEST, *store.SPLITS}


def run(frozen: Plan, numbers: Sequence[int], processes: int = 1, progress: Progress = silent) -> None:
    """Makes those of the numbered items that are not done.

    Raises DataError naming the first item that failed; the others are made all the same.
    """
    dtype = token_dtype(frozen.tokenizer().vocab_size)
    missing = [n for n in numbers if items.finished(frozen, frozen.items[n], dtype) is None]
    with writing(frozen.folder):
        (frozen.folder / ITEMS).mkdir(exist_ok=True)
        if missing and frozen.filters.any_duplicates:
            tasks.find_duplicates(frozen, numbers, processes, progress)
        tasks.work(frozen, tasks.tokenize, missing, processes, TOKENIZE, progress)


def _complete(recipe: Recipe, out: Path) -> bool:
    if not (out / store.MANIFEST).exists():
        return False
    manifest = store.TokenStore.open(out).manifest
    if "view_of" in manifest:
        raise DataError(f"{out}: is a view of another store; name another --out")
    _require_same(recipe, configio.from_dict(Recipe, manifest["recipe"]), out)
    if recipe.tokenizer and Path(recipe.tokenizer).exists():
        wanted, found = Tokenizer.load(recipe.tokenizer).sha256, manifest["tokenizer"]["sha256"]
        if wanted != found:
            raise DataError(
                f"{out}: was prepared with another tokenizer (SHA-256 {found}) than {recipe.tokenizer} is now "
                f"({wanted}); name another --out"
            )
    return True


def _require_same(wanted: Recipe, found: Recipe, out: Path) -> None:
    for line in configio.differences(found, wanted):
        raise DataError(f"{out}: was prepared with another recipe ({line}); name another --out")


@contextlib.contextmanager
def locked(out: Path, progress: Progress) -> Iterator[None]:
    """Holds `.NAME.lock` beside `out`; the system lets go of it when the process dies."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(WAIT, 0, 0, 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The holder before us removed the name with the lock in hand: then ours guards nothing, and we start over.
        if _is_open_at(lock, path):
            break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _is_open_at(lock: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
