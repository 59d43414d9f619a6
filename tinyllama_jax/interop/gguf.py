"""One GGUF file for llama.cpp, Ollama and what builds on them <-> a `Model`, its parameters and its tokenizer.

The header of a file that is read is checked by gguf_file.py before anything else looks at it; what the tensors' bytes
mean is up to the package `gguf`, which also writes the files.  Both directions hold one tensor beside the model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllama_jax.config import Model
from tinyllama_jax.data.durable import sync
from tinyllama_jax.data.durable import write as write_bytes
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import gguf_kinds, gguf_model, gguf_tokenizer, gguf_tokenizer_files, modelfile
from tinyllama_jax.interop.formats import Found
from tinyllama_jax.interop.gguf_file import BLANK_CHECKSUM, CHECKSUM_KEY, Header, check, read_header, read_tensor, seal
from tinyllama_jax.interop.hf import Params, assemble, hf_shapes, hf_tensors

if TYPE_CHECKING:  # it imports jax
    from tinyllama_jax.generate.load import Loaded

QUANTISATION_VERSION = 2  # of ggml's block layouts


def export(loaded: Loaded, out: Path, *, kind: str) -> dict[str, Any]:
    """Write a checkpoint, and a Modelfile beside it; what to tell a person: notes, Modelfile, command line."""
    place = modelfile.place_for(out)
    folder = loaded.path / "tokenizer"
    found = write_gguf(
        loaded.params,
        loaded.model,
        out,
        kind=kind,
        tokenizer_folder=folder if folder.is_dir() else None,
        marks=loaded.marks,
        name=str(loaded.meta.get("name") or out.stem),
    )
    template, eos = (found.chat_template, found.eos) if found else ("", "")
    context = loaded.model.context_tokens
    text = modelfile.modelfile(out, context, template, eos)
    write_bytes(place, text.encode())
    command = modelfile.command(out, context, template)
    return {
        "notes": gguf_kinds.fallbacks(loaded.model, kind),
        "modelfile_path": str(place),
        "modelfile": text,
        "command": command,
        "use": {"llama.cpp": command, "Ollama": modelfile.create(place, out), str(place): text},
    }


def write_gguf(
    params: Params,
    model: Model,
    out_file: str | Path,
    *,
    kind: str = "F16",
    tokenizer_folder: str | Path | None = None,
    marks: str = "bos",
    name: str = "",
) -> gguf_tokenizer.Vocabulary | None:
    """Write the model as one file; returns the vocabulary in it, None without a tokenizer.

    kind: F32 (bit for bit), F16 or BF16, rounded to nearest even, or Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 (gguf_kinds.py says
    what stays more precise).  marks: how documents were marked in training.  name: what programs show.
    The file appears under its name when it is complete and on the disk; peak memory is one tensor, in float32 and as
    it is stored, beside `params`.
    Raises ConfigError when the file exists, or the model or its tokenizer has no equal in llama.cpp, and DataError
    when there is no room or the tokenizer is damaged.
    """
    out = Path(out_file)
    if kind not in gguf_kinds.FILE_TYPES:
        raise ConfigError(f"export dtype is {kind!r}; of gguf it must be one of {', '.join(gguf_kinds.FILE_TYPES)}")
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out")
    values, factors = gguf_model.metadata(model)
    folder = None if tokenizer_folder is None else Path(tokenizer_folder)
    found = gguf_tokenizer.vocabulary(folder, model.vocab_size, marks) if folder else None

    import gguf

    values |= {"general.type": "model", "general.name": name or out.stem}
    values["general.file_type"] = gguf_kinds.FILE_TYPES[kind]
    if kind in gguf_kinds.QUANTISED:
        values["general.quantization_version"] = QUANTISATION_VERSION
    tokens = found.metadata if found else {"ggml.model": "none"}
    values |= {f"tokenizer.{key}": value for key, value in tokens.items()}
    values[CHECKSUM_KEY] = BLANK_CHECKSUM
    with _temporary(out) as unfinished:
        writer = gguf.GGUFWriter(unfinished, gguf_model.ARCHITECTURE)
        try:
            for key, value in values.items():
                _add(writer, key, value)
            _write_tensors(writer, params, model, kind, factors)
        finally:
            writer.close()
        seal(unfinished)
        unfinished.replace(out)
        sync(out.parent)
    return found


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A name beside `out` that is gone afterwards.  Raises DataError for what the disk has against the file."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}; free space or name another --out"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _add(writer, key: str, value) -> None:
    """Metadata in the type that llama.cpp expects for it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write_tensors(writer, params: Params, model: Model, kind: str, factors) -> None:
    """First every tensor's place in the header, then one tensor after the other."""
    import gguf

    kinds, shapes = gguf_kinds.kinds(model, kind), hf_shapes(model)
    if factors is not None:
        writer.add_tensor_info(gguf_model.ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
    for name, stored in kinds.items():
        size, of = gguf_kinds.tensor_bytes(shapes[name], stored), gguf.GGMLQuantizationType[stored]
        # A dtype other than bytes says that the shape is of values.
        writer.add_tensor_info(gguf_model.gguf_name(name), shapes[name], np.dtype("f4"), size, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in hf_tensors(params, model):
        tensor = gguf_model.interleave(name, tensor, model)
        writer.write_tensor_data(gguf_kinds.quantise(gguf_model.gguf_name(name), tensor, kinds[name]))


def read_gguf(file: str | Path, folder: str | Path) -> Found:
    """The model in a file; its tokenizer is rebuilt in `folder`.

    Every kind that is in gguf_file.TENSOR_KINDS, dequantised to float32.  Peak memory is the float32 model and one
    tensor.  Raises DataError for a file that is damaged or contradicts itself, ConfigError for a model or a tokenizer
    that cannot be represented here.  Both before any weight is read.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file} is no file; name a .gguf file")
    header = read_header(file)
    check(header)
    model = gguf_model.model_from(header)
    files, marks = gguf_tokenizer_files.write_files(header, model.vocab_size, Path(folder))
    return Found(model, assemble(model, _reader(header, model)), files, marks)


def _reader(header: Header, model: Model):
    def read(name: str):
        tensor = read_tensor(header.path, header.tensors[gguf_model.gguf_name(name)])
        return gguf_model.halve(name, tensor, model)

    return read
