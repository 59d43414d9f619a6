"""A folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.errors import ConfigError


def refuse_what_exists(directory: Path) -> None:
    """Raises ConfigError when `directory` is anything but absent or an empty folder."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty; export into a new directory")


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder beside `directory`, renamed to it when the block ends well and removed when it does not."""
    refuse_what_exists(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's are private
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone under this name when all went well
