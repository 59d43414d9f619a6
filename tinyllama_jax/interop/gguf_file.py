"""The GGUF container: its header, walked with nothing in it trusted, and its tensors, read one at a time.

A file is magic, version, two counts, metadata (key, type, value), tensor infos (name, dimensions from the innermost,
type, offset) and, from the next multiple of the alignment on, the tensors' bytes; all little-endian
(github.com/ggml-org/ggml, docs/gguf.md).  A count or length is believed only when what is left of the file can hold
it, and a header is never larger than HEADER_BYTES, so reading a damaged one takes little memory and time.

GGUF has no checksum.  Files written here carry one in their metadata, which other programs ignore: the SHA-256 of the
file with zeros in the place of the sum, and the file's size.  Another size says that another program has written
the file anew, and the sum is then not about it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyllama_jax.errors import DataError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 128 << 20  # vocabularies of 256k tokens with their merges take 15 MB
STRINGS = 1 << 21  # in all arrays together: each is a Python object
NAME_BYTES = 1024
COPY = "copy the file again"

# Type of a metadata value -> struct's letter; strings and arrays are 8 and 9.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# What `gguf.quants` turns into float32 and language models are stored in.
TENSOR_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

CHECKSUM_KEY = "tinyllama_jax.checksum"
_CHECKSUM = re.compile(r"sha256:([0-9a-f]{64}):([0-9]{20})")
BLANK_CHECKSUM = f"sha256:{'0' * 64}:{'0' * 20}"


@dataclass(frozen=True)
class Tensor:
    """A tensor inside a file.  shape: outermost first, as NumPy's; start: from the beginning of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """metadata: numbers, bools, strings, lists of strings and NumPy arrays by key.  places: where strings begin."""

    path: Path
    size: int
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of metadata, of `kind`.  Raises DataError for one of another."""
        value = self.metadata.get(key, default)
        if type(value) is not kind:
            raise DataError(f"{self.path}: {key} is {short(value)}; it must be of type {kind.__name__}; {COPY}")
        return value


def short(value: Any) -> str:
    """What a file says, fit for one line of a message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def block(kind: str) -> tuple[int, int]:
    """Values in a block of this kind, and the bytes that they take."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


class _Walk:
    """A place in the header that moves on as values are taken."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self.file, self.size, self.path = file, size, path
        self.at, self.strings = 0, 0

    def wrong(self, what: str) -> DataError:
        return DataError(f"{self.path}: {what}; {COPY}")

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.wrong(f"is damaged or cut short: {what} at byte {self.at} does not fit into {self.size} bytes")
        if n > HEADER_BYTES - self.at:
            raise self.wrong(f"its header is larger than {HEADER_BYTES >> 20} MiB at {what}")
        data = self.file.read(n)
        if len(data) != n:
            raise self.wrong(f"became shorter while it was read, at {what}")
        self.at += n
        return data

    def number(self, letter: str, what: str) -> Any:
        data = self.take(struct.calcsize("<" + letter), what)
        if letter == "?" and data not in (b"\0", b"\1"):
            raise self.wrong(f"{what} is {data[0]}, no truth value")
        return struct.unpack("<" + letter, data)[0]

    def text(self, what: str, limit: int = HEADER_BYTES) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise self.wrong(f"{what} would be {length} bytes long; {limit} at most")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.number("Q", f"the number of {what}")
        if count * least_bytes > min(self.size, HEADER_BYTES) - self.at:
            raise self.wrong(f"is damaged or cut short: it cannot hold {count} {what}")
        return count

    def value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], key)
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            raise self.wrong(f"{key} is of the unknown type {kind}")
        of = self.number("I", f"the type of {key}")
        if of == STRING:
            count = self.count(f"strings of {key}", 8)
            self.strings += count
            if self.strings > STRINGS:
                raise self.wrong(f"holds more than {STRINGS} strings at {key}")
            return [self.text(key) for _ in range(count)]
        if of not in NUMBERS:
            raise self.wrong(f"{key} is an array of type {of}; only numbers and strings can be in one")
        dtype = np.dtype("<" + NUMBERS[of]) if of != 7 else np.dtype(np.uint8)
        return np.frombuffer(self.take(self.count(f"values of {key}", dtype.itemsize) * dtype.itemsize, key), dtype)


def read_header(path: Path) -> Header:
    """Everything but the tensors' bytes.  Raises DataError for whatever is no whole, consistent GGUF file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _read(_Walk(file, size, path), path, size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); name a .gguf file") from None


def _read(walk: _Walk, path: Path, size: int) -> Header:
    if walk.take(4, "the magic number") != MAGIC:
        raise DataError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}; name a .gguf file")
    version = walk.number("I", "the version")
    if version not in VERSIONS:
        swapped = " (it is big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
        raise DataError(f"{path} is GGUF version {version}{swapped}; little-endian {VERSIONS} can be read: convert it")
    tensors = walk.count("tensors", 32)
    header = Header(path, size)
    for _ in range(walk.count("metadata keys", 13)):
        key = walk.text("a metadata key", NAME_BYTES)
        if key in header.metadata:
            raise walk.wrong(f"metadata key {short(key)} is there twice")
        kind = walk.number("I", f"the type of {short(key)}")
        header.places[key] = walk.at + 8  # of a string, behind its length
        header.metadata[key] = walk.value(kind, short(key))
    infos = [_tensor_info(walk) for _ in range(tensors)]
    alignment = header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise walk.wrong(f"general.alignment is {short(alignment)}, no power of two")
    data, end = -(-walk.at // alignment) * alignment, 0
    for tensor in sorted(infos, key=lambda t: t.start):
        if tensor.name in header.tensors:
            raise walk.wrong(f"tensor {short(tensor.name)} is there twice")
        if tensor.start % alignment:
            raise walk.wrong(f"tensor {short(tensor.name)} begins at {tensor.start}, no multiple of {alignment}")
        if tensor.start < end:
            raise walk.wrong(f"tensor {short(tensor.name)} overlaps the one before it")
        end = tensor.start + tensor.n_bytes
        if data + end > size:
            raise walk.wrong(f"is cut short: tensor {short(tensor.name)} ends at byte {data + end} of {size}")
        start = data + tensor.start
        header.tensors[tensor.name] = Tensor(tensor.name, tensor.kind, tensor.shape, start, tensor.n_bytes)
    return header


def _tensor_info(walk: _Walk) -> Tensor:
    """A tensor with its offset inside the data as `start`."""
    import gguf

    name = walk.text("a tensor's name", NAME_BYTES)
    axes = walk.number("I", f"the dimensions of {short(name)}")
    if not 1 <= axes <= 4:
        raise walk.wrong(f"tensor {short(name)} has {axes} dimensions")
    shape = tuple(walk.number("Q", f"the shape of {short(name)}") for _ in range(axes))[::-1]
    number, start = walk.number("I", f"the type of {short(name)}"), walk.number("Q", f"the offset of {short(name)}")
    try:
        kind = gguf.GGMLQuantizationType(number).name
    except ValueError:
        raise walk.wrong(f"tensor {short(name)} is of the unknown type {number}") from None
    if kind not in TENSOR_KINDS:
        raise DataError(f"{walk.path}: tensor {short(name)} is {kind}; only {', '.join(TENSOR_KINDS)} can be imported")
    values, n_bytes = block(kind)
    if 0 in shape or shape[-1] % values:
        raise walk.wrong(f"tensor {short(name)} {list(shape)} is no multiple of {kind}'s {values} values")
    return Tensor(name, kind, shape, start, math.prod(shape) // values * n_bytes)


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """The tensor as float32, dequantised by `gguf.quants`."""
    import gguf

    values, n_bytes = block(tensor.kind)
    raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.start)
    if raw.size != tensor.n_bytes:
        raise DataError(f"{path}: became shorter while it was read, at tensor {short(tensor.name)}; {COPY}")
    rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // values * n_bytes)
    with np.errstate(all="ignore"):  # whatever the bits say
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])


def seal(path: Path) -> None:
    """Put the size and the checksum of a file that was written with BLANK_CHECKSUM into it, and force it to disk."""
    header = read_header(path)
    with path.open("r+b") as file:
        for text in (f"sha256:{'0' * 64}:{header.size:020d}", None):
            file.seek(header.places[CHECKSUM_KEY])
            file.write((text or f"sha256:{_digest(header)}:{header.size:020d}").encode())
            file.flush()
        os.fsync(file.fileno())


def check(header: Header) -> None:
    """Raises DataError when the file has a checksum of its own and is not what it was written as."""
    found = _CHECKSUM.fullmatch(str(header.metadata.get(CHECKSUM_KEY)))
    if found and int(found[2]) == header.size and found[1] != _digest(header):
        raise DataError(
            f"{header.path} differs from its checksum: it is damaged, or was edited without removing {CHECKSUM_KEY}; "
            f"{COPY}"
        )


def _digest(header: Header) -> str:
    """SHA-256 of the file with zeros where the sum itself stands."""
    place = header.places[CHECKSUM_KEY] + len("sha256:")
    with header.path.open("rb") as file:
        digest = hashlib.sha256(file.read(place))
        file.seek(place + 64)
        digest.update(b"0" * 64)
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()
