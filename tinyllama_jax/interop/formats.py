"""The formats of other programs by name, each as a way in and a way out.

A format is one row of FORMATS: two functions below, and the options of `import` and `export` that they take.
Nothing heavy is imported here before a function is called, for `--help` lists the rows.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError, UsageError

if TYPE_CHECKING:  # it imports jax, which no refusal waits for
    from tinyllama_jax.generate.load import Loaded


@dataclass(frozen=True)
class Found:
    """What a foreign model holds: parameters as float32 NumPy arrays, and the tokenizer's files."""

    model: Model
    params: Any
    tokenizer_files: tuple[Path, ...] = ()
    marks: str = "bos"  # Llama's tokenizers put BOS before a text
    notes: tuple[str, ...] = ()  # lines for the user: what was left out or assumed
    meta: dict[str, Any] = field(default_factory=dict)  # what the checkpoint says of itself besides


@dataclass(frozen=True)
class Format:
    """One format.

    read(source, **options): a context manager that gives `Found`; files that are made for it live as long as that.
    write(loaded, out, **options): writes at `out`, which must be new, and returns what the answer says besides.
    reads, writes: names of the options that they take; all have defaults.
    dtypes: how weights can be written, the first when nothing is said.
    adapters: it holds adapters alone, which `write` gets as they are; other formats get whole models.
    """

    what: str
    read: Callable[..., contextlib.AbstractContextManager[Found]] | None = None
    write: Callable[..., dict[str, Any]] | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("dtype",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    adapters: bool = False


@contextlib.contextmanager
def _read_hf(source: Path) -> Iterator[Found]:
    from tinyllama_jax.interop import hf, hf_tokenizer

    model, params = hf.read_hf(source)
    files, marks, notes = hf_tokenizer.find(source)
    yield Found(model, params, files, marks, (*hf.left_out(source), *notes))


def _write_hf(
    loaded: Loaded,
    out: Path,
    *,
    dtype: str = "float32",
    shard_size: str = "5GB",
    license: str = "",
    language: str = "",
) -> dict[str, Any]:
    from tinyllama_jax.interop import hf, model_card
    from tinyllama_jax.verbs_data import count

    text = model_card.card(
        loaded.path, loaded.meta, loaded.model, out.absolute().name, license=license, language=language
    )
    hf.write_hf(
        loaded.params,
        loaded.model,
        out,
        dtype=dtype,
        tokenizer_files=_tokenizer_files(loaded),
        marks=loaded.marks,
        shard_bytes=count(shard_size.upper().removesuffix("B")),
        texts={"README.md": text},
    )
    return {"use": model_card.uses(str(out), loaded.model, dtype)}


@contextlib.contextmanager
def _read_litgpt(source: Path) -> Iterator[Found]:
    from tinyllama_jax.interop import hf_tokenizer, litgpt

    model, params, folder, notes = litgpt.read_litgpt(source)
    files, marks, more = hf_tokenizer.find(folder)
    yield Found(model, params, files, marks, (*notes, *more))


def _write_litgpt(loaded: Loaded, out: Path, *, dtype: str = "float32", layout: str = "litgpt") -> dict[str, Any]:
    from tinyllama_jax.interop import litgpt

    files = _tokenizer_files(loaded)
    litgpt.write_litgpt(loaded.params, loaded.model, out, layout=layout, dtype=dtype, files=files)
    return {"layout": layout}


@contextlib.contextmanager
def _read_meta(source: Path, *, context_tokens: int | None = None) -> Iterator[Found]:
    from tinyllama_jax.interop import hf_tokenizer, meta

    model, params, notes = meta.read_meta(source, context_tokens)
    files, marks, more = hf_tokenizer.find(source)
    yield Found(model, params, files, marks, (*notes, *more))


def _write_meta(loaded: Loaded, out: Path, *, dtype: str = "float32") -> dict[str, Any]:
    from tinyllama_jax.interop import meta

    meta.write_meta(loaded.params, loaded.model, out, dtype=dtype, files=_tokenizer_files(loaded))
    return {}


@contextlib.contextmanager
def _read_gguf(source: Path) -> Iterator[Found]:
    from tinyllama_jax.interop import gguf

    with tempfile.TemporaryDirectory() as folder:
        yield gguf.read_gguf(source, folder)


def _write_gguf(loaded: Loaded, out: Path, *, dtype: str = "F16") -> dict[str, Any]:
    from tinyllama_jax.interop import gguf

    return gguf.export(loaded, out, kind=dtype)


@contextlib.contextmanager
def _read_peft(source: Path, *, base: str = "") -> Iterator[Found]:
    if not base:
        raise UsageError("import peft needs --base CKPT, the checkpoint of the model that the adapter belongs to")
    from tinyllama_jax.interop import peft_base

    yield peft_base.read(source, base)


def _write_peft(
    loaded: Loaded,
    out: Path,
    *,
    dtype: str = "float32",
    base_model: str = "",
    license: str = "",
    language: str = "",
) -> dict[str, Any]:
    from tinyllama_jax.interop import peft_base

    return peft_base.write(loaded, out, dtype=dtype, base_model=base_model, license=license, language=language)


def _tokenizer_files(loaded: Loaded) -> list[Path]:
    folder = loaded.path / "tokenizer"
    return sorted(folder.iterdir()) if folder.is_dir() else []


FORMATS: dict[str, Format] = {
    "hf": Format(
        "Hugging Face safetensors and config.json",
        read=_read_hf,
        write=_write_hf,
        writes=("dtype", "shard_size", "license", "language"),
    ),
    "gguf": Format(
        "one file for llama.cpp and Ollama",
        read=_read_gguf,
        write=_write_gguf,
        dtypes=("F16", "F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    ),
    "litgpt": Format(
        "lit-gpt's lit_model.pth, of the TinyLlama repository or of today's litgpt",
        read=_read_litgpt,
        write=_write_litgpt,
        writes=("dtype", "layout"),
    ),
    "meta": Format(
        "Meta's consolidated.00.pth and params.json", read=_read_meta, write=_write_meta, reads=("context_tokens",)
    ),
    "peft": Format(
        "PEFT's adapters alone, without their base: LoRA and prefixes",
        read=_read_peft,
        write=_write_peft,
        reads=("base",),
        writes=("dtype", "base_model", "license", "language"),
        adapters=True,
    ),
}


def readable() -> list[str]:
    return [name for name, format in FORMATS.items() if format.read]


def writable() -> list[str]:
    return [name for name, format in FORMATS.items() if format.write]


def chosen(name: str, direction: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given (not None), for a format that takes them; direction: `reads` or `writes`.

    Raises UsageError for an option that this format has no use for, none is ignored, and for a dtype it does not have.
    """
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in getattr(FORMATS[name], direction):
            takers = ", ".join(other for other, format in FORMATS.items() if option in getattr(format, direction))
            raise UsageError(f"--{option.replace('_', '-')} is an option of the format {takers}; {name} has none such")
    dtypes = FORMATS[name].dtypes
    if given.get("dtype", dtypes[0]) not in dtypes:
        raise UsageError(f"--dtype {given['dtype']} is not one of {name}'s: {', '.join(dtypes)}")
    return given


def refuse_misfit(name: str, path: Path, meta: dict) -> None:
    """Raises ConfigError for a checkpoint with this metadata that the format cannot hold: a whole model as an adapter,
    or a prefix as part of a whole model."""
    from tinyllama_jax.train import saved

    adapter = saved.adapter_of(meta)
    if FORMATS[name].adapters and adapter is None:
        raise ConfigError(f"{path} holds a whole model and no adapter; `tinyllama export hf` writes it")
    if not FORMATS[name].adapters and adapter is not None and adapter.method == "prefix":
        raise ConfigError(
            f"{path} holds a prefix, which cannot be merged into weights; `tinyllama export peft` writes it"
        )


def reading(name: str, source: Path, **options: Any) -> contextlib.AbstractContextManager[Found]:
    """The model at `source`; files that are made for it live as long as the context.

    Raises DataError for what is not a whole model of that format, ConfigError for one that `Model` cannot represent.
    """
    read = FORMATS[name].read
    assert read, name
    return read(source, **options)


def write(name: str, loaded: Loaded, out: Path, **options: Any) -> dict[str, Any]:
    """Write a checkpoint's weights and tokenizer at `out`, which must be new.  Raises ConfigError and DataError.

    Returns what the answer to the user says besides.
    """
    writer = FORMATS[name].write
    assert writer, name
    return writer(loaded, out, **options)
