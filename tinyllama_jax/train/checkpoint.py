"""Checkpoints that survive kills, full disks and flipped bits, of a run in one process or in many.

A checkpoint is a directory, `<checkpoints>/<step, 8 digits>/`:

    meta.json        what the caller gave, and under "checkpoint": step, permanent or not, and for every array its
                     shape, dtype and fingerprint (see fingerprint.py)
    params/          the arrays of one item (see checkpoint_files.py; `optimizer/` likewise, absent in imported weights)
    tokenizer/       the tokenizer's files
    checksums.json   SHA-256 of every other file

It is written under a temporary name and renamed when every byte is on the disk; the rename is the commit, so a
directory with a final name was once complete (places.py has what object stores do instead).  Whatever differs from its
checksums later is damage: orbax itself loads flipped bits without a word.  The fingerprints are taken from the arrays
as they were given to `save`, and compared with what lies on the devices after a restore: they cover all in between.

`save` copies to the host what this process writes, and returns; the rest happens in one thread of each process, which
starts nothing on a device.  The processes go from phase to phase together (agree.py), and process 0 does what there is
only one of: metadata, commit, clearing away.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import checkpoint_files, durable, fingerprint, named, restoring
from tinyllama_jax.train.agree import together
from tinyllama_jax.train.places import Lone, place_of
from tinyllama_jax.train.saved import read_meta as read_meta  # readers of arrays find them here
from tinyllama_jax.train.saved import resolve as resolve
from tinyllama_jax.train.saving import Save, not_written

READ_BACK = 4  # arrays at a time


class Checkpoints:
    """The checkpoints of one run.  Only the processes that train the run may construct this: process 0 cleans up.

    directory: a folder that all processes share, or the address of an object store such as `gs://bucket/run`.
    barrier_seconds: for which the processes wait for the last of them, in every phase of a save or restore.
    `on_event(kind, step)` is called from the writing thread of every process: `writing` when a save begins, `written`
    when all its bytes are on the disk under the temporary name, `committed` after the rename.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_temporary: int,
        on_event: Callable[[str, int], None] | None = None,
        peers: Peers = ALONE,
        barrier_seconds: float = 900.0,
    ):
        self._place = place_of(directory)
        self.directory = self._place.directory
        self._keep_temporary = keep_temporary
        self._on_event = on_event or (lambda kind, step: None)
        self._peers, self._barrier_seconds = peers, barrier_seconds
        self._thread: threading.Thread | None = None
        self.best: int | None = None  # a step that is kept although it is temporary
        self._compiling: Future | None = None  # what `save` needs first
        self._failure: CheckpointError | None = None
        self._together("checkpoints opened", lambda: self._place.mend() if peers.lead else None)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:  # what went wrong first is what the user must see
            self._join()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed and nobody was told; does not wait for one that is still being written."""
        return self._failure is not None

    def path(self, step: int) -> Path | str:
        return self._place.path(step)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return self._place.steps()

    def peek(self) -> dict | None:
        """Metadata of the newest checkpoint whose metadata is intact.  Reads no arrays and renames nothing.

        Every process must call it: all get what process 0 sees.
        """

        def newest() -> dict | None:
            for step in reversed(self.steps() if self._peers.lead else []):
                try:
                    return self._place.meta(step)
                except durable.Damaged:
                    continue  # `restore` says so and sets it aside
            return None

        return self._together("checkpoints peeked at", newest)[0]

    def intact(self, step: int) -> bool:
        """Whether the files of a checkpoint are as they were written.  Renames nothing; every process must call it."""

        def verified() -> bool:
            try:
                return not self._peers.lead or self._place.verify(step) is None
            except durable.Damaged:
                return False  # `restore` says so and sets it aside

        return self._together(f"step {step} verified", verified)[0]

    def save(
        self,
        step: int,
        items: dict[str, object],
        meta: dict,
        *,
        permanent: bool,
        blocking: bool,
        tokenizer_files: Iterable[str | Path] = (),
    ) -> None:
        """Copies `items` (pytrees of arrays) to the host, then writes in the background.

        Every process calls it with the same arguments; each copies and writes what its devices hold.  The arrays may
        be donated as soon as this returns.  A save that is still in progress is waited for, and raises here if it
        failed in any process (CheckpointError, in all of them; earlier checkpoints are intact).  `blocking` waits for
        the commit; `permanent and blocking` also reads everything back from the disk and compares.
        """
        self.wait()
        leaves = {name: named.leaves(tree) for name, tree in items.items()}
        host = checkpoint_files.on_host(leaves)
        if self._compiling is not None:
            self._compiling.exception()  # has ended
        # Of what was given, not of the copies; begun after them, for on a CPU the two would share the memory's speed.
        prints = {name: fingerprint.begin(one) for name, one in leaves.items()}
        meta = json.loads(json.dumps(meta))  # as it is now, and an error here rather than in the thread
        files = [Path(f) for f in tokenizer_files]
        save = Save(self._place, self._peers, self._barrier_seconds, self._on_event, step, host, prints)
        save.open(str(os.getpid()))
        arguments = (save, meta, permanent, permanent and blocking, files)
        # Not a daemon: an interpreter that ends in an exception still lets the save finish.
        self._thread = threading.Thread(target=self._save, args=arguments, name=f"checkpoint-{step}")
        self._thread.start()
        if blocking:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointError if the last save failed in any process."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        self.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(self, save: Save, meta, permanent, read_back, tokenizer_files) -> None:
        try:
            save.run(meta, permanent, tokenizer_files)
            if read_back:
                self._read_back(save)
            self._together(f"save {save.step} done", lambda: self._clear_away(save.step) if self._peers.lead else None)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # such as a peer that does not come: the training thread must hear of it
            self._failure = CheckpointError(not_written(self.path(save.step), error))

    def _read_back(self, save: Save) -> None:
        """Each process reads every so many-th array, whole, into host memory."""
        at, count = self._peers.index, self._peers.count

        def compare() -> None:
            checksums = self._place.checksums(save.step)
            self._compare(save.step, list(checksums)[at::count], checksums)
            mine = [(item, name) for item, leaves in save.about.items() for name in leaves][at::count]

            def one(item: str, name: str) -> None:
                about = save.about[item][name]
                needs = [n for n in checksums if n.startswith(f"{item}/{name}/") or n == f"{item}/_METADATA"]
                folder = self._place.fetch(save.step, needs)
                try:
                    array = restoring.read_arrays(folder, save.path, item, {name: named.in_host_memory(about)})[name]
                finally:
                    self._place.release(folder)
                if fingerprint.of_host(array) != about["fingerprint"]:
                    raise durable.Damaged(f"{save.path}: {item}.{name} differs from its fingerprint")

            # What was copied for writing is free again; of an object store one at a time, for they share a folder.
            with ThreadPoolExecutor(READ_BACK if self._place.shared else 1) as pool:
                list(pool.map(lambda which: one(*which), mine))

        try:
            self._together(f"save {save.step} read back", compare)
        except durable.Damaged as error:
            aside = self._set_aside(save.step)
            raise CheckpointError(f"{error}; read back right after writing, now {aside}") from error

    def _compare(self, step: int, names: list[str], checksums: dict[str, str]) -> None:
        folder = self._place.fetch(step, names)
        try:
            durable.compare(folder, checksums, names, self.path(step))
        finally:
            self._place.release(folder)

    def _set_aside(self, step: int) -> str:
        done = self._together(f"step {step} set aside", lambda: self._place.set_aside(step) if self._peers.lead else "")
        return done[0]

    def _clear_away(self, step: int) -> None:
        temporary = [s for s in self.steps() if not self._place.is_permanent(s)]
        for old in temporary[: -self._keep_temporary]:
            if old not in (step, self.best):
                self._place.remove(old)

    def _together(self, name: str, work: Callable[[], object]) -> list:
        return together(self._peers, name, self._barrier_seconds, work)

    def restore(
        self,
        items: dict[str, object],
        *,
        step: int | None = None,
        accept: Callable[[dict], object] = lambda meta: None,
    ) -> tuple[int, dict, dict] | None:
        """(step, items, meta) of the newest good checkpoint, or of `step`; None if there never was one.

        items: per item a pytree of `jax.ShapeDtypeStruct`; arrays come back on exactly their shardings (see `load`).
        accept: is called with the metadata before any array is read, and may raise to refuse the checkpoint.
        Every process calls it with the same arguments and gets the same step: one that is damaged for one of them is
        renamed to `<step>.corrupt`, named on stderr, and the one before is used.
        CheckpointError if all are damaged, or if the arrays are not the ones asked for.
        """
        if step is not None:
            if step not in (have := self._listed()):
                steps = ", ".join(map(str, have)) or "none"
                raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; steps there: {steps}")
            return step, *self._load(step, items, accept)
        bad = []
        for candidate in reversed(self._listed()):
            try:
                return candidate, *self._load(candidate, items, accept)
            except durable.Damaged as error:
                bad.append(f"{error}, now {self._set_aside(candidate)}")
                if self._peers.lead:
                    print(f"checkpoint set aside: {bad[-1]}", file=sys.stderr, flush=True)
        bad = bad or self._together("damaged before", self._place.set_aside_before)[0]
        if bad:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged ({'; '.join(bad)}); put back a good copy, "
                "or delete them all to start from nothing"
            )
        self._compiling = restoring.compile_ahead(restoring.placed(items))  # else the first save would take longer
        return None

    def _listed(self) -> list[int]:
        """The steps that process 0 sees."""
        return self._together("steps", lambda: self.steps() if self._peers.lead else [])[0]

    def _load(self, step: int, items: dict[str, object], accept: Callable[[dict], object]) -> tuple[dict, dict]:
        return restoring.load(self._place, step, items, accept, self._peers, self._barrier_seconds)


def load(
    path: str | Path, items: dict[str, object], *, peers: Peers = ALONE, barrier_seconds: float = 900.0
) -> dict[str, object]:
    """The named items of one checkpoint, as pytrees of the structure asked for.

    items: per item a pytree of `jax.ShapeDtypeStruct`.  A leaf's sharding decides where the array goes; if it has none,
    or only an abstract mesh (as from `jax.eval_shape`), the current mesh is meant.  File checksums and every array's
    fingerprint are verified.  CheckpointError if something is damaged, absent, or of another shape or dtype.
    """
    return restoring.load(Lone(Path(path)), 0, items, lambda meta: None, peers, barrier_seconds)[0]


def save_params(path: str | Path, params, meta: dict, tokenizer_files: Iterable[str | Path] = ()) -> Path:
    """Writes a permanent checkpoint of weights only at `path`, which must not exist.  For imports, in one process."""
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name another place or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        host = {name: np.asarray(leaf, order="C") for name, leaf in named.leaves(params).items()}
        prints = {"params": fingerprint.begin(host)}
        step = int(meta.get("step", 0))
        save = Save(Lone(path), ALONE, 0.0, lambda kind, step: None, step, {"params": host}, prints)
        save.open(str(os.getpid()))
        save.run(meta, True, [Path(f) for f in tokenizer_files])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: checkpoint could not be written: {durable.one_line(error)}") from error
    return path
