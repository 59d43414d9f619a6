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

import ml_dtypes
import numpy as np

from tinyllama_jax.errors import ConfigError, DataError

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


def read_json(path: Path) -> dict:
    """The JSON object in `path`.  Raises DataError when it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a Hugging Face model directory holds one") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); copy it again from its source") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not an object; copy it again from its source")
    return value


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file.  Raises DataError when the file is cut short, damaged or of an unknown dtype."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise DataError(f"{path} is truncated: {size} bytes do not hold its header; copy it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            begin, end = map(int, entry["data_offsets"])
            entries.append((name, entry["dtype"], tuple(map(int, entry["shape"])), begin, end))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); a model directory needs it") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} is not a safetensors file: its header is not readable; copy it again") from None
    stored = {}
    data = size - 8 - length
    for name, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            raise DataError(f"{path}: tensor {name} is {dtype}; only {', '.join(DTYPES)} can be imported")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize or begin < 0:
            raise DataError(f"{path}: tensor {name} {list(shape)} {dtype} has {end - begin} bytes; copy the file again")
        if end > data:
            raise DataError(f"{path} is truncated: tensor {name} ends at byte {end} of {data}; copy the file again")
        stored[name] = Stored(path, dtype, shape, 8 + length + begin)
    return stored


def scan(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory, sharded or not, from the headers alone.  Raises DataError."""
    if (directory / INDEX).exists():
        files = read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise DataError(f"{directory / INDEX} has no usable weight_map; copy it again from its source")
        stored = {}
        for name in sorted(set(files.values())):
            stored |= read_header(directory / name)
        for tensor, name in files.items():
            if tensor not in stored or stored[tensor].file.name != name:
                raise DataError(f"{directory / name} does not hold tensor {tensor}, which {INDEX} places there")
        return stored
    if not (directory / SINGLE).exists():
        other = next((p.name for p in sorted(directory.glob("*.bin"))), None)
        hint = f"; {other} is a pickle: save the model again with safe_serialization=True" if other else ""
        raise DataError(f"{directory} has neither {SINGLE} nor {INDEX}{hint}")
    return read_header(directory / SINGLE)


def read(stored: Stored) -> np.ndarray:
    """The tensor in the dtype it is stored in; one copy in memory."""
    dtype = DTYPES[stored.dtype]
    raw = np.fromfile(stored.file, np.uint8, math.prod(stored.shape) * dtype.itemsize, offset=stored.start)
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
    directory: Path, specs: Sequence[tuple[str, Shape]], tensors: Iterator[np.ndarray], dtype: str, shard_bytes: int
) -> None:
    """Write `tensors`, in the order of `specs`, into `directory`; only one exists in memory at a time.

    dtype: float32, float16 or bfloat16, rounded to nearest even.  Raises ConfigError when a finite value does not fit
    into it.
    """
    target = DTYPES[NAMES[dtype]]
    shards = _split(specs, target.itemsize, shard_bytes)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
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
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor, target)
    if target == np.float16 and np.any(np.isinf(stored) & np.isfinite(tensor)):
        raise ConfigError(f"{name} holds {np.abs(tensor).max():.3g}, too large for float16; export bfloat16 or float32")
    return memoryview(stored.reshape(-1).view(np.uint8))


def write_json(path: Path, value: dict) -> None:
    """Write `value` and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
