"""One checkpoint back onto the devices, verified on the way: files by their checksums, arrays by their fingerprints."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from tinyllama_jax.distributed import Peers
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import checkpoint_files, durable, fingerprint, named
from tinyllama_jax.train.agree import together
from tinyllama_jax.train.places import Bucket, Folder
from tinyllama_jax.train.saving import FORMAT


def load(
    place: Folder | Bucket,
    step: int,
    items: dict[str, object],
    accept: Callable[[dict], object],
    peers: Peers,
    barrier_seconds: float,
) -> tuple[dict, dict]:
    """(items, meta) of the checkpoint of `step`.

    Each process reads what its devices are to hold.  In a shared folder the processes share the hashing of all files;
    from an object store each verifies what it downloads.  Raises Damaged in all processes when it is damaged for any.
    """
    path = place.path(step)
    targets = placed(items)
    compiling = compile_ahead(targets)
    found: dict[str, dict[str, jax.Array]] = {}
    folders: list[Path] = []

    def phase(name: str, work: Callable[[], object]) -> list:
        return together(peers, f"restore {step} {name}", barrier_seconds, work)

    def verified(names: list[str]) -> Path:
        folder = place.fetch(step, names)
        folders.append(folder)
        durable.compare(folder, place.checksums(step), names, path)
        return folder

    def verify() -> dict | None:
        checksums = place.checksums(step)
        every = sorted({*checksums, "meta.json"})
        mine = every[peers.index :: peers.count] if place.shared else [n for n in every if _describes(n)]
        folder = verified(sorted({*mine, "meta.json"}))
        return json.loads((folder / "meta.json").read_text()) if peers.lead else None

    def read() -> None:
        for item, wanted in targets.items():
            if not place.shared:
                verified(_chunks(folders[0], item, wanted, place.checksums(step)))
            found[item] = read_arrays(folders[0], path, item, wanted)

    try:
        meta = phase("verified", verify)[0]
        check_format(path, meta)
        accept(meta)
        saved = meta["checkpoint"]["leaves"]
        named.check_same(path, targets, saved)
        phase("read", read)
        compiling.exception()  # has ended
        # A computation on all devices, which every process begins because all have read.
        prints = {item: fingerprint.begin(arrays) for item, arrays in found.items()}
        phase("compared", lambda: _compare(path, prints, saved))
    finally:
        for folder in folders:
            place.release(folder)
    loaded = {}
    for item, tree in items.items():
        for name, array in found[item].items():
            sharding = targets[item][name].sharding
            assert array.sharding.is_equivalent_to(sharding, array.ndim), f"{item}.{name} is on another mesh"
        loaded[item] = jax.tree.unflatten(jax.tree.structure(tree), list(found[item].values()))
    return loaded, meta


def placed(items: dict[str, object]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The targets by item and name, each with a sharding."""
    return {
        item: {name: named.placed(leaf) for name, leaf in named.leaves(tree).items()} for item, tree in items.items()
    }


def compile_ahead(targets: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> Future:
    """Compiles what takes the fingerprints of such arrays, in a thread, for seconds in which there is other work.

    It starts nothing on a device.  If it fails, or arrays come with other shardings, `fingerprint.begin` compiles.
    """
    precision = jax.config.jax_default_matmul_precision  # part of the key of what is compiled, as the mesh is

    def work() -> None:
        for leaves in targets.values():
            leaves = tuple(leaf for leaf in leaves.values() if math.prod(leaf.shape))
            mesh = next((m for leaf in leaves if (m := getattr(leaf.sharding, "mesh", None)) is not None), None)
            on_mesh = contextlib.nullcontext() if mesh is None or mesh.empty else jax.set_mesh(mesh)
            with on_mesh, jax.default_matmul_precision(precision):
                fingerprint.program().lower(leaves).compile()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def check_format(path, meta: dict) -> None:
    """Raises CheckpointError for what another version wrote."""
    version = meta["checkpoint"].get("format") if isinstance(meta.get("checkpoint"), dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: is of checkpoint format {version}, and this version reads format {FORMAT} only; "
            "use the version of tinyllama_jax that wrote it"
        )


def read_arrays(folder: Path, path, item: str, targets: dict) -> dict:
    """Arrays of one item from files that were verified; `path` is for messages."""
    try:
        return checkpoint_files.read(folder / item, targets)
    except Exception as error:  # the files are as written, so this is orbax; do not call it damage
        raise CheckpointError(f"{path}: orbax cannot read {item}: {durable.one_line(error)}") from error


def _describes(name: str) -> bool:
    return name.rpartition("/")[2] in ("meta.json", "_METADATA", checkpoint_files.FORM)


def _chunks(folder: Path, item: str, targets: dict, checksums: dict[str, str]) -> list[str]:
    names = []
    for name, target in targets.items():
        if f"{item}/{name}/{checkpoint_files.FORM}" in checksums:  # empty arrays have no files
            names += [f"{item}/{name}/{n}" for n in checkpoint_files.needed(folder / item / name, target)]
    missing = sorted(set(names) - set(checksums))
    if missing:
        raise CheckpointError(f"{folder}: lacks {missing[0]}")
    return names


def _compare(path, prints: dict[str, Callable[[], dict[str, str]]], saved: dict) -> None:
    for item, finish in prints.items():
        for name, found in finish().items():
            if saved[item][name]["fingerprint"] != found:
                raise durable.Damaged(f"{path}: {item}.{name} differs from its fingerprint")
