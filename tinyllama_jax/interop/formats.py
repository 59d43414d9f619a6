"""The formats of other programs by name, each as a way in and a way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_jax.config import Model

if TYPE_CHECKING:  # it imports jax, which no refusal waits for
    from tinyllama_jax.generate.load import Loaded


@dataclass(frozen=True)
class Found:
    """What a foreign model holds: parameters as float32 NumPy arrays, and the tokenizer's files."""

    model: Model
    params: Any
    tokenizer_files: tuple[Path, ...] = ()
    marks: str = "bos"  # Llama's tokenizers put BOS before a text


@contextlib.contextmanager
def reading(name: str, source: Path) -> Iterator[Found]:
    """The model at `source`; files that are made for it live as long as the context.

    Raises DataError for what is not a whole model of that format, ConfigError for one that `Model` cannot represent.
    """
    from tinyllama_jax.interop import hf

    assert name == "hf", name
    model, params = hf.read_hf(source)
    files = [source / file for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")]
    yield Found(model, params, tuple(file for file in files if file.is_file()))


def write(name: str, loaded: Loaded, out: Path, *, dtype: str) -> None:
    """Write a checkpoint's weights and tokenizer at `out`, which must be new.  Raises ConfigError and DataError."""
    from tinyllama_jax.interop import hf

    assert name == "hf", name
    folder = loaded.path / "tokenizer"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    hf.write_hf(loaded.params, loaded.model, out, dtype=dtype, tokenizer_files=files)
