"""The weights that adapters were trained beside: said in a checkpoint's metadata, found again, and told from others.

meta["base"] = {"checkpoint": its absolute path when training began, "leaves_sha256": of its weights' fingerprints}
No jax here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import saved


def identity(path: str | Path, meta: dict) -> dict[str, str]:
    """What a run records of the checkpoint at `path`, whose metadata is `meta`, as its meta["base"].

    The sum is over names, shapes and fingerprints of the weights: a base that moves, or is imported again from the same
    files, is the same.
    """
    text = json.dumps(meta["checkpoint"]["leaves"]["params"], sort_keys=True)
    return {"checkpoint": str(Path(path).absolute()), "leaves_sha256": hashlib.sha256(text.encode()).hexdigest()}


def find(path: Path, meta: dict) -> tuple[Path, dict]:
    """(directory, metadata) of the base of the adapters at `path`, whose metadata is `meta`.

    Looked for where it was when training began; then as start.checkpoint says, from the current directory, and from
    the folders around the run, so that a project may move as a whole.
    Raises CheckpointError when it is at none of these places, or only other weights are.
    """
    recorded = meta.get("base", {})
    text = meta.get("config", {}).get("start", {}).get("checkpoint") or recorded.get("checkpoint", "")
    others, problems = [], []
    for place in _places(path, recorded.get("checkpoint", ""), text):
        try:
            base = saved.resolve(place)
            base_meta = saved.read_meta(base)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if recorded.get("leaves_sha256") in (None, identity(base, base_meta)["leaves_sha256"]):
            return base, base_meta
        others.append(base)
    if others:
        raise CheckpointError(
            f"{path} holds adapters of {text}, but {others[0]} holds other weights than those that they were trained "
            "beside; put these back there"
        )
    raise CheckpointError(f"{path} holds adapters of {text}, which is not usable: {problems[0]}; put it back there")


def _places(path: Path, recorded: str, text: str) -> Iterator[str]:
    if recorded:
        yield recorded
    step = Path(recorded).name  # the run may have gone on since
    for folder in ("", *map(str, list(path.absolute().parents)[1:6])):
        place = str(Path(folder) / text)
        yield place
        run = place.rpartition("@")[0] or place
        if step.isdigit():
            yield f"{run}@{int(step)}"
