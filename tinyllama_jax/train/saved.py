"""Which checkpoint is meant, and what it says of itself.  No jax here: whoever reads no arrays need not wait for it."""

from __future__ import annotations

from pathlib import Path

from tinyllama_jax import configio
from tinyllama_jax.config import Adapter, Model
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import best, durable


def resolve(text: str | Path) -> Path:
    """The checkpoint directory meant by RUN (its newest), RUN@STEP, RUN@best (of those that are there, the one with the
    lowest validation loss), or a checkpoint directory itself."""
    path, step = Path(text), None
    head, at, tail = str(text).rpartition("@")
    if at and head and (tail.isdigit() or tail == "best") and not path.exists():
        path = Path(head)
        step = _best(path) if tail == "best" else int(tail)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected a run, RUN@STEP, RUN@best or a checkpoint")
    if step is None and ((path / "meta.json").is_file() or (path / "checksums.json").is_file()):
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is not None:
        return durable.of_step(directory, step)
    steps = durable.steps(directory)
    if not steps:
        raise CheckpointError(f"{path}: no complete checkpoint here; expected a run that has saved, or a checkpoint")
    return durable.path_of(directory, steps[-1])


def read_meta(path: str | Path) -> dict:
    """meta.json of a checkpoint, checked against its checksum; what was saved is at the top level."""
    return durable.verify(Path(path), only="meta.json")


def model_of(meta: dict) -> Model:
    """The architecture that a checkpoint's metadata describes."""
    return configio.from_dict(Model, meta["model"] if "model" in meta else meta["config"]["model"])


def _best(run: Path) -> int:
    folder = run / "checkpoints"
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such directory; expected a run")
    there = durable.steps(folder) if folder.is_dir() else []
    step = best.best(best.losses(run), there)
    if step is None:
        raise CheckpointError(f"{run}@best: no checkpoint there has a validation loss in {run / 'validation.jsonl'}")
    return step


def adapter_of(meta: dict) -> Adapter | None:
    """The adapters that a checkpoint holds, beside the weights of another one (bases.py); None when it is whole."""
    given = meta["adapter"] if "adapter" in meta else meta.get("config", {}).get("adapter")
    return None if given is None else configio.from_dict(Adapter, given)
