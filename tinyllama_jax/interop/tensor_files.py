"""The safetensors format, read and written one tensor at a time.

A file is eight bytes of little-endian length, a JSON header {name: {dtype, shape, data_offsets}} of that length, and
the tensors' bytes, back to back (github.com/huggingface/safetensors, "Format").  A sharded model adds
model.safetensors.index.json, which says which file holds which tensor.

Files are read with plain reads, not mapped: mapped pages count as the process's memory, and a machine that just
fits the model would not fit the model and its file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.json_files import parse, read_json, shown, write_json

HEADER_LIMIT = 100_000_000  # bytes, as the format says
MAX_DIMS = 32  # dimensions; NumPy has 64, a Llama 2
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor inside a file: where its bytes begin (from the file's start) and what they mean."""

    file: Path
    dtype: str
    shape: Shape
    start: int


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file.

    What the format's own reader demands is demanded here: a header of at most 100 MB, and tensors that fill the rest
    of the file, back to back.  So what the header claims is never more than what the file holds.
    Raises DataError when the file is cut short, damaged, of an unknown dtype or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise DataError(f"{path} is truncated: {size} bytes do not hold its header; copy it again")
            if length > HEADER_LIMIT:
                raise DataError(f"{path} is not a safetensors file: a header of {length} bytes; {HEADER_LIMIT} is most")
            header = parse(file.read(length))
        header.pop("__metadata__", None)
        entries = [_entry(name, entry) for name, entry in header.items()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); a model directory needs it") from None
    except ValueError as error:
        why = f"its header is not readable ({str(error).splitlines()[0][:120]})"
        raise DataError(f"{path} is not a safetensors file: {why}; copy it again") from None
    stored, at, data = {}, 0, size - 8 - length
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        what = f"{path}: tensor {shown(name)} {shown(list(shape))}"
        if dtype not in DTYPES:
            raise DataError(f"{what} is {shown(dtype)}; only {', '.join(DTYPES)} can be imported")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise DataError(f"{what} {dtype} has {end - begin} bytes; copy the file again")
        if end > data:
            raise DataError(f"{path} is truncated: tensor {shown(name)} ends at byte {end} of {data}; copy it again")
        if begin != at:
            overlap = "overlaps the one before" if begin < at else "leaves a gap"
            raise DataError(f"{what} begins at byte {begin}, not {at}: it {overlap}; copy the file again")
        stored[name] = Stored(path, dtype, shape, 8 + length + begin)
        at = end
    if at != data:
        raise DataError(f"{path} has {data - at} bytes that belong to no tensor; copy it again")
    return stored


def _entry(name: str, entry: Any) -> tuple[str, str, Shape, int, int]:
    """(name, dtype, shape, begin, end) of one entry of a header, each of the right type and below 2^63.

    Raises ValueError.
    """
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"tensor {shown(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {shown(name)} has the dtype {shown(dtype)}")
    for what, numbers, limit in (("shape", shape, MAX_DIMS), ("data_offsets", offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > limit:
            raise ValueError(f"tensor {shown(name)} has the {what} {shown(numbers)}")
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):  # a bool is an int to isinstance
            raise ValueError(f"tensor {shown(name)} has the {what} {shown(numbers)}")
    if len(offsets) != 2:
        raise ValueError(f"tensor {shown(name)} has the data_offsets {shown(offsets)}")
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def scan(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory, sharded or not, from the headers alone.  Raises DataError."""
    if (directory / INDEX).exists():
        files = read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(map(_plain, files.values())):
            raise DataError(f"{directory / INDEX} has no usable weight_map; copy it again from its source")
        stored = {}
        for name in sorted(set(files.values())):
            stored |= read_header(directory / name)
        for tensor, name in files.items():
            if tensor not in stored or stored[tensor].file.name != name:
                what = f"tensor {shown(tensor)}, which {INDEX} places there"
                raise DataError(f"{directory / name} does not hold {what}")
        return stored
    if not (directory / SINGLE).exists():
        other = next((p.name for p in sorted(directory.glob("*.bin"))), None)
        hint = f"; {other} is a pickle: save the model again with safe_serialization=True" if other else ""
        raise DataError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}")
    return read_header(directory / SINGLE)


def _plain(name: Any) -> bool:
    """Whether an index may name this file: one in its own folder, of this format."""
    return isinstance(name, str) and Path(name).name == name and name.isprintable() and name.endswith(".safetensors")


def read(stored: Stored) -> np.ndarray:
    """The tensor in the dtype it is stored in; one copy in memory.  Raises DataError when the file has shrunk."""
    dtype = DTYPES[stored.dtype]
    size = math.prod(stored.shape) * dtype.itemsize
    try:
        raw = np.fromfile(stored.file, np.uint8, size, offset=stored.start)
    except OSError as error:
        raise DataError(f"{stored.file} cannot be read ({error.strerror or error}); copy it again") from None
    if len(raw) != size:
        raise DataError(f"{stored.file} was cut short while it was read; copy it again")
    return raw.view(dtype).reshape(stored.shape)


def _split(specs: Sequence[tuple[str, Shape]], itemsize: int, shard_bytes: int) -> list[list[tuple[str, Shape]]]:
    """Consecutive tensors in files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards, room = [], 0
    for name, shape in specs:
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, shape))
        room -= size
    return shards


def write(
    directory: Path,
    specs: Sequence[tuple[str, Shape]],
    tensors: Iterator[np.ndarray],
    dtype: str,
    shard_bytes: int,
    *,
    single: str = SINGLE,
) -> None:
    """Write `tensors`, in the order of `specs`, into `directory`; only one exists in memory at a time.

    dtype: float32, float16 or bfloat16, rounded to nearest even.  Raises ConfigError when a finite value does not fit
    into it.  single: the name of a file that holds them all.
    """
    target = DTYPES[NAMES[dtype]]
    shards = _split(specs, target.itemsize, shard_bytes)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in shard:
            begin, end = end, end + math.prod(shape) * target.itemsize
            header[tensor] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            places[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the data begins aligned
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor, shape in shard:
                file.write(_bytes_of(tensor, shape, next(tensors), target))
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(math.prod(shape) for _, shape in specs) * target.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / INDEX, index)


def _bytes_of(name: str, shape: Shape, tensor: np.ndarray, target: np.dtype) -> memoryview:
    assert tensor.shape == shape, (name, tensor.shape, shape)  # the header is already written
    return memoryview(cast(name, tensor, target).reshape(-1).view(np.uint8))


def cast(name: str, tensor: np.ndarray, target: np.dtype) -> np.ndarray:
    """Contiguous, in `target`, rounded to nearest even.  Raises ConfigError when a finite value does not fit."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor, target)
    if target == np.float16 and np.any(np.isinf(stored) & np.isfinite(tensor)):
        raise ConfigError(f"{name} holds {np.abs(tensor).max():.3g}, too large for float16; export bfloat16 or float32")
    return stored
