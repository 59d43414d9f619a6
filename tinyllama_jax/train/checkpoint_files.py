"""The arrays of a checkpoint as files.  The only module that imports orbax.

One folder per item, one folder per array in it (Zarr 3: `zarr.json`, and below `c/` a file for each chunk, which is
what one device held), and `_METADATA`.  Process 0 writes what describes, and each process the chunks that it holds and
none before it, so nothing need be merged and any process can be the last.

Orbax's handler of trees is called directly, and each process declares itself the only active one: `ocp.save` compares
paths over the devices (`broadcast_one_to_all`, which has no time limit), and its barriers let all wait for the full
limit when one of them fails.  Who waits for whom is for the caller to say.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

# Orbax raises what goes wrong and logs it too, as pages of nested tracebacks; the exception is enough.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

# Of a save that failed half way asyncio tells, too late, of each write that nobody waited for any more.
logging.getLogger("asyncio").addFilter(
    lambda record: not ("never retrieved" in record.getMessage() and f"{os.sep}orbax{os.sep}" in record.getMessage())
)

_unraisable = sys.unraisablehook


def _unless_late(about) -> None:
    """After one write has failed, each that was still under way would end in a page of stacks: its event loop has gone.

    It happens in orbax's own thread and loop, out of reach from here; the failure itself has been raised.
    """
    if not (isinstance(about.exc_value, RuntimeError) and str(about.exc_value) == "Event loop is closed"):
        _unraisable(about)


sys.unraisablehook = _unless_late

FORM = "zarr.json"  # in each array's folder: shape, dtype, chunks

Arrays = Mapping[str, jax.Array | np.ndarray]


class _Folder:
    """A folder that is there, in the form in which orbax asks for one that may come to be."""

    def __init__(self, path: Path):
        self.path = epath.Path(path.absolute())

    async def await_creation(self) -> epath.Path:
        return self.path


def on_host(items: Mapping[str, Arrays]) -> dict[str, dict[str, jax.Array | np.ndarray]]:
    """Copies that the next step cannot change, made at once; arrays over several processes stay as they are.

    Of those, `begin` copies what this process writes.
    """
    several = jax.process_count() > 1
    for array in (array for arrays in items.values() for array in arrays.values()):
        if isinstance(array, jax.Array) and not several:
            array.copy_to_host_async()  # all transfers are under way before the first is waited for
    copy = _copy_of_shards if several else _copy
    return {
        item: {name: copy(a) if isinstance(a, jax.Array) else np.array(a, order="C") for name, a in arrays.items()}
        for item, arrays in items.items()
    }


def _copy(array: jax.Array) -> np.ndarray:
    """On the CPU np.asarray would be a view of memory that the next step overwrites; elsewhere it is the transfer."""
    return np.asarray(array, order="C") if _apart(array) else np.array(array, order="C")


def _apart(array: jax.Array) -> bool:
    """Whether its device has memory of its own, and the array lies there."""
    platform = next(iter(array.sharding.device_set)).platform
    return platform != "cpu" and array.sharding.memory_kind in (None, "device")


def _copy_of_shards(array: jax.Array) -> jax.Array:
    """The same array if its device has memory of its own, from which orbax copies before `begin` returns."""
    if _apart(array):
        return array
    shards = [jax.device_put(np.array(shard.data), shard.device) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def begin(folder: Path, arrays: Arrays) -> Callable[[], None]:
    """Starts to write; jax arrays may be donated when this returns.  What it returns waits, in any thread, and raises.

    folder: exists, and is the same for all processes, or each has its own and the caller brings the files together.
    """
    stored = {name: array for name, array in arrays.items() if array.size}  # orbax refuses empty arrays
    if not stored:
        return lambda: None
    handler = ocp.handlers.PyTreeHandler(context=_context(stored))
    waiting = _run(handler.save(_Folder(folder), stored))

    async def finish() -> None:
        await waiting

    return lambda: _run(finish())


def read(folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct | np.ndarray]) -> dict[str, jax.Array | np.ndarray]:
    """The arrays, where the sharding of each target says, or in host memory for a NumPy target (which says its form).

    Each process reads the chunks that overlap with what its devices hold.
    """
    stored = {name: target for name, target in targets.items() if math.prod(target.shape)}
    found = {name: _empty(target) for name, target in targets.items() if name not in stored}
    if stored:
        handler = ocp.handlers.PyTreeHandler(context=_context(stored))

        async def load() -> dict:
            return await (await handler.load(epath.Path(folder.absolute()), stored))

        found |= _run(load())
    return {name: found[name] for name in targets}


def _empty(target) -> jax.Array | np.ndarray:
    value = np.zeros(target.shape, target.dtype)
    if isinstance(target, np.ndarray):
        return value
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: value[index])


def _context(arrays: Mapping) -> ocp.Context:
    """Settings under which saving needs no memory beside `arrays`, and loading that of one of them."""
    context = ocp.Context()
    context.multiprocessing.active_processes = {jax.process_index()}  # no barriers
    # Orbax counts its limit by the time of day, which may jump; and a disk that takes long is no failure.
    context.asynchronous.timeout_secs = None
    context.memory.deepcopy_host_arrays = False  # nobody changes them while they are saved
    context.memory.read_concurrent_bytes = 1 + max(_n_bytes(array) for array in arrays.values())  # must be more
    context.pytree.loading.partial_load = True  # the caller knows what it leaves out
    saving = context.array.saving
    saving.use_ocdbt = False  # one file for all would have to be merged from those of each process
    saving.use_compression = False  # it would spare a tenth of the disk, and cost a copy
    saving.use_replica_parallel = False  # copies on the devices
    saving.enable_write_sharding_file = False  # another mesh is as good
    saving.array_metadata_store = None
    return context


def _n_bytes(array) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _run(coroutine):
    """In a thread of its own, for the caller's may have an event loop already (a notebook)."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def needed(folder: Path, target: jax.ShapeDtypeStruct | np.ndarray) -> set[str]:
    """Names of the chunk files in an array's folder (whose FORM is there) that this process reads for `target`."""
    about = json.loads((folder / FORM).read_text())
    shape, chunks = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    if isinstance(target, np.ndarray):
        indices = [tuple(slice(None) for _ in shape)]
    else:
        indices = target.sharding.addressable_devices_indices_map(tuple(shape)).values()
    names = set()
    for index in indices:
        places = [()]
        for piece, size, chunk in zip(index, shape, chunks, strict=True):
            start, stop, _ = piece.indices(size)
            places = [(*p, i) for p in places for i in range(start // chunk, -(-stop // chunk))]
        names |= {"/".join(["c", *map(str, place)]) for place in places}
    return names
