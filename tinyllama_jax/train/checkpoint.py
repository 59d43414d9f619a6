"""Checkpoints that survive kills, full disks and flipped bits.  The only module that imports orbax.

A checkpoint is a directory, `<checkpoints>/<step, 8 digits>/`:

    meta.json        what the caller gave, and under "checkpoint": step, permanent or not, and for every array its
                     shape, dtype and CRC32
    params/          one orbax directory per item (`optimizer/` likewise; absent in imported weights)
    tokenizer/       the tokenizer's files
    checksums.json   SHA-256 of every other file

It is written under a temporary name and renamed when every byte is on the disk; the rename is the commit, so a
directory with a final name was once complete.  Whatever differs from its checksums later is damage: orbax itself loads
flipped bits without a word.

Arrays are written by `ocp.save` from NumPy copies in one thread of our own, not by `ocp.save_async` from jax arrays:
the copy makes it safe to donate the state to the next step, the thread touches neither jax devices nor the mesh (which
`jax.set_mesh` sets for one thread only), and checksums and commit follow in the same thread.  The price is one copy of
the state in host memory, and that a single process must be able to see all of it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import durable

# Orbax raises what goes wrong and logs it too, as pages of nested tracebacks; the exception is enough.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run.  Only the process that trains the run may construct this: it cleans up.

    `on_event(kind, step)` is called from the writing thread: `writing` when a save begins, `written` when all its
    bytes are on the disk under the temporary name, `committed` after the rename.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_temporary: int,
        on_event: Callable[[str, int], None] | None = None,
        peers=None,
        barrier_seconds: float = 900.0,
    ):
        if jax.process_count() > 1:
            raise CheckpointError("checkpoints of a run over several processes are not supported; use one process")
        self.directory = Path(directory)
        self._keep_temporary = keep_temporary
        self._on_event = on_event or (lambda kind, step: None)
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        durable.mend(self.directory)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
        else:  # what went wrong first is what the user must see
            self._join()

    def path(self, step: int) -> Path:
        return durable.path_of(self.directory, step)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return durable.steps(self.directory)

    @property
    def failed(self) -> bool:
        """Whether the last save has failed and nobody has been told."""
        return self._failure is not None

    def peek(self) -> dict | None:
        """Metadata of the newest checkpoint whose metadata is intact.  Reads no arrays and renames nothing."""
        for step in reversed(self.steps()):
            try:
                return read_meta(self.path(step))
            except durable.Damaged:
                continue  # `restore` says so and sets it aside
        return None

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

        The arrays may be donated as soon as this returns.  A save that is still in progress is waited for, and raises
        here if it failed (CheckpointError).  `blocking` waits for the commit; `permanent and blocking` also reads
        everything back from the disk and compares.
        """
        self.wait()
        host = {name: _host_copy(tree) for name, tree in items.items()}
        meta = json.loads(json.dumps(meta))  # as it is now, and an error here rather than in the thread
        files = [Path(f) for f in tokenizer_files]
        arguments = (step, host, meta, permanent, permanent and blocking, files)
        # Not a daemon: an interpreter that ends in an exception still lets the save finish.
        self._thread = threading.Thread(target=self._save, args=arguments, name=f"checkpoint-{step}")
        self._thread.start()
        if blocking:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointError if the last save failed."""
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

    def _save(self, step, host, meta, permanent, read_back, tokenizer_files) -> None:
        final = self.path(step)
        try:
            self._on_event("writing", step)
            if final.exists():  # a step that was permanent once stays so
                permanent = permanent or durable.is_permanent(final)
            _write(final, step, host, meta, permanent, tokenizer_files, lambda: self._on_event("written", step))
            self._on_event("committed", step)
            if read_back:
                try:
                    _read(final, host)
                except durable.Damaged as error:
                    raise CheckpointError(
                        f"{error}; read back right after writing, now {durable.set_aside(final)}"
                    ) from error
            temporary = [s for s in self.steps() if not durable.is_permanent(self.path(s))]
            for old in temporary[: -self._keep_temporary]:
                if old != step:
                    durable.remove(self.path(old))
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # whatever orbax raises: the training thread must hear of it
            self._failure = CheckpointError(
                f"{final}: checkpoint could not be written: {durable.one_line(error)}; earlier checkpoints are intact"
            )

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
        A damaged checkpoint is renamed to `<step>.corrupt`, named on stderr, and the one before is used.
        CheckpointError if all are damaged, or if the arrays are not the ones asked for.
        """
        if step is not None:
            return step, *_load(durable.of_step(self.directory, step), items, accept)
        bad = []
        for candidate in reversed(self.steps()):
            path = self.path(candidate)
            try:
                return candidate, *_load(path, items, accept)
            except durable.Damaged as error:
                bad.append(f"{error}, now {durable.set_aside(path)}")
                print(f"checkpoint set aside: {bad[-1]}", file=sys.stderr, flush=True)
        bad = bad or [str(path) for path in sorted(self.directory.glob("*.corrupt*"))]
        if bad:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged ({'; '.join(bad)}); put back a good copy, "
                "or delete them all to start from nothing"
            )
        return None


def steps(directory: str | Path) -> list[int]:
    """Committed steps in a directory of checkpoints, ascending."""
    return durable.steps(Path(directory)) if Path(directory).is_dir() else []


def set_aside_after(directory: str | Path, step: int) -> None:
    """Renames the checkpoints after `step` to `<step>.left`; none is deleted."""
    for later in [s for s in steps(directory) if s > step]:
        path = durable.path_of(Path(directory), later)
        path.rename(durable.free_name(path, "left"))


def load(path: str | Path, items: dict[str, object]) -> dict[str, object]:
    """The named items of one checkpoint, as pytrees of the structure asked for.

    items: per item a pytree of `jax.ShapeDtypeStruct`.  A leaf's sharding decides where the array goes; if it has none,
    or only an abstract mesh (as from `jax.eval_shape`), the current mesh is meant.  File checksums and every array's
    CRC32 are verified.  CheckpointError if something is damaged, absent, or of another shape or dtype.
    """
    return _load(Path(path), items, lambda meta: None)[0]


def read_meta(path: str | Path) -> dict:
    """meta.json of a checkpoint, checked against its checksum; what was saved is at the top level."""
    return durable.verify(Path(path), only="meta.json")


def save_params(path: str | Path, params, meta: dict, tokenizer_files: Iterable[str | Path] = ()) -> Path:
    """Writes a permanent checkpoint of weights only at `path`, which must not exist.  For imports."""
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name another place or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [Path(f) for f in tokenizer_files]
        host = {name: np.asarray(leaf, order="C") for name, leaf in _named_leaves(params).items()}
        _write(path, int(meta.get("step", 0)), {"params": host}, meta, True, files, lambda: None)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: checkpoint could not be written: {durable.one_line(error)}") from error
    return path


def resolve(text: str | Path) -> Path:
    """The checkpoint directory meant by RUN (its newest), RUN@STEP, or a checkpoint directory itself."""
    path, step = Path(text), None
    head, at, tail = str(text).rpartition("@")
    if at and head and tail.isdigit() and not path.exists():
        path, step = Path(head), int(tail)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected a run, RUN@STEP or a checkpoint")
    if step is None and ((path / "meta.json").is_file() or (path / "checksums.json").is_file()):
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is not None:
        return durable.of_step(directory, step)
    steps = durable.steps(directory)
    if not steps:
        raise CheckpointError(f"{path}: no complete checkpoint here; expected a run that has saved, or a checkpoint")
    return durable.path_of(directory, steps[-1])


def _load(path: Path, items: dict[str, object], accept: Callable[[dict], object]) -> tuple[dict, dict]:
    """(items, meta)."""
    targets = {name: _named_leaves(tree) for name, tree in items.items()}
    meta = durable.verify(path)
    accept(meta)
    _check_same_arrays(path, targets, meta["checkpoint"]["leaves"])
    arrays = _read(path, targets, meta)
    loaded = {}
    for item, tree in items.items():
        placed = []
        for name, leaf in targets[item].items():
            sharding = _sharding(leaf)
            # may_alias: a buffer shared with NumPy could not be donated
            placed.append(jax.device_put(arrays[item].pop(name), sharding, may_alias=False))
            assert placed[-1].sharding.is_equivalent_to(sharding, leaf.ndim), f"{item}.{name} is on another mesh"
        loaded[item] = jax.tree.unflatten(jax.tree.structure(tree), placed)
    return loaded, meta


def _check_same_arrays(path: Path, targets: dict[str, dict], saved: dict[str, dict]) -> None:
    for item, leaves in targets.items():
        if item not in saved:
            raise CheckpointError(f"{path}: holds no {item!r}, only {', '.join(sorted(saved))}")
        for name in sorted(set(leaves) ^ set(saved[item])):
            side = "the checkpoint lacks it" if name in leaves else "only the checkpoint has it"
            raise CheckpointError(f"{path}: {item}.{name}: {side}; it was saved by another model or optimizer")
        for name, leaf in leaves.items():
            expected, found = _describe(leaf), (tuple(saved[item][name]["shape"]), saved[item][name]["dtype"])
            if expected != found:
                raise CheckpointError(
                    f"{path}: {item}.{name}: expected {_text(expected)}, found {_text(found)}; it was saved by another "
                    "model or optimizer"
                )


def _write(final: Path, step, host, meta, permanent, tokenizer_files, before_commit: Callable[[], None]) -> None:
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        durable.require_room(temporary, sum(array.nbytes for arrays in host.values() for array in arrays.values()))
        for item, arrays in host.items():
            stored = {name: array for name, array in arrays.items() if array.size}  # orbax refuses empty arrays
            if stored:
                with _orbax(stored):
                    ocp.save((temporary / item).absolute(), stored)
        for source in tokenizer_files:
            (temporary / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(source, temporary / "tokenizer" / source.name)
        leaves = {
            item: {
                name: {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": _crc32(array)}
                for name, array in arrays.items()
            }
            for item, arrays in host.items()
        }
        about = {"format": 1, "step": step, "permanent": permanent, "leaves": leaves}
        (temporary / "meta.json").write_text(json.dumps({**meta, "checkpoint": about}, indent=1) + "\n")
        durable.seal(temporary)
        before_commit()
        durable.commit(temporary, final)
    except BaseException:
        durable.discard(temporary)
        raise


def _orbax(arrays: dict[str, np.ndarray]) -> ocp.Context:
    """Settings under which saving needs no memory, and loading two arrays at most, beside `arrays` themselves.

    By default orbax copies all of them before it compresses all of them, and reads each into a buffer of its own.
    Compression would spare a tenth of the disk.
    """
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # nobody changes them while they are saved
    context.array.saving.use_compression = False
    context.memory.read_concurrent_bytes = 2 * max(array.nbytes for array in arrays.values())
    return context


def _read(path: Path, wanted: dict[str, dict], meta: dict | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by item and name, each compared with its CRC32; without `meta` the files are verified first."""
    saved = (meta or durable.verify(path))["checkpoint"]["leaves"]
    arrays = {}
    for item in wanted:
        targets = {name: np.empty(leaf["shape"], leaf["dtype"]) for name, leaf in saved[item].items()}
        stored = {name: target for name, target in targets.items() if target.size}
        try:
            arrays[item] = targets
            if stored:
                with _orbax(stored):
                    arrays[item] |= ocp.load((path / item).absolute(), stored)
        except Exception as error:  # the files are as written, so this is orbax; do not call it damage
            raise CheckpointError(f"{path}: orbax cannot read {item}: {durable.one_line(error)}") from error
        for name, leaf in saved[item].items():
            if _crc32(arrays[item][name]) != leaf["crc32"]:
                raise durable.Damaged(f"{path}: {item}.{name} differs from its checksum")
    return arrays


def _named_leaves(tree) -> dict[str, object]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    assert len(named) == len(flat), "two leaves share a name"
    return named


def _host_copy(tree) -> dict[str, np.ndarray]:
    leaves = _named_leaves(tree)
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()  # all transfers are under way before the first is waited for
    # np.array copies: on the CPU np.asarray would be a view of memory that the next step overwrites
    return {name: np.array(leaf, order="C") for name, leaf in leaves.items()}


def _describe(leaf) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def _text(description: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = description
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _sharding(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, PartitionSpec() if sharding is None else sharding.spec)


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
