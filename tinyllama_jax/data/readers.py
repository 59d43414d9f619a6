"""Rows of text out of files: lines of JSON, parquet, plain text, records of TensorFlow Datasets.

A reader yields (origin, text, fields) and holds about one document at a time; of parquet, the pages that a column was
written in.  What it cannot read ends in a DataError that names the file and the place: nothing is skipped, and a file
that was cut short is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tinyllama_jax.errors import DataError

Row = tuple[str, str, dict[str, str]]  # origin, text, fields that were asked for and are there
BUFFER_BYTES = 1 << 20
BATCH_ROWS = 64  # of parquet and array_record that are in memory together
_BOM = b"\xef\xbb\xbf"
_MISSING = object()


def rows(file: Path, text: str = "text", fields: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of one file, by the end of its name.

    text: the column (or JSON field) that holds the text; fields: names of others that are wanted as strings.  Names may
    be dotted: `meta.lang` is `lang` inside of `meta`.  Plain files have neither columns nor fields.
    """
    suffix = suffix_of(file.name)
    if not suffix:
        raise DataError(f"{file}: unknown kind of file; the name must end in one of {', '.join(READERS)}")
    try:
        yield from READERS[suffix](file, text, fields)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or _line(error)}") from error


def suffix_of(name: str) -> str:
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


# --- plain text: one document per file ---


def _read_plain(file: Path, text: str, fields: tuple[str, ...]) -> Iterator[Row]:
    try:
        yield str(file), file.read_bytes().decode("utf-8-sig"), {}  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not valid UTF-8; convert the file to UTF-8") from error


# --- lines of JSON ---


def lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, which is decompressed as the end of its name says.  Raises DataError for damaged data and
    data that was cut short."""
    name = file.name
    how = _gzip_lines if name.endswith(".gz") else _zstd_lines if name.endswith(".zst") else _plain_lines
    return how(file)


def _read_jsonl(file: Path, text: str, fields: tuple[str, ...]) -> Iterator[Row]:
    with contextlib.closing(lines(file)) as found:
        yield from _parse_jsonl(file, found, text, fields)


def _plain_lines(file: Path) -> Iterator[bytes]:
    with file.open("rb", BUFFER_BYTES) as found:
        yield from found


def _gzip_lines(file: Path) -> Iterator[bytes]:
    _require_content(file)
    try:
        with gzip.open(file) as plain, io.BufferedReader(plain, BUFFER_BYTES) as found:
            yield from found
    except EOFError as error:
        raise DataError(f"{file}: ends in the middle of its gzip data; fetch the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip data ({_line(error)}); fetch the file again") from error


def _zstd_lines(file: Path) -> Iterator[bytes]:
    with _package("zstandard", file):
        import zstandard
    _require_content(file)
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as far as `zstd --ultra --long=31` goes
    try:
        with file.open("rb") as compressed:
            _require_whole_frames(file, compressed.fileno())
            plain = decompressor.stream_reader(compressed, read_across_frames=True, closefd=False)
            yield from io.BufferedReader(plain, BUFFER_BYTES)
    except zstandard.ZstdError as error:
        raise DataError(f"{file}: damaged zstd data ({_line(error)}); fetch the file again") from error


def _require_whole_frames(file: Path, descriptor: int) -> None:
    """Walks over the blocks of every frame (RFC 8878, 3.1), for the library takes the end of the file for the end of
    the data wherever it comes."""
    import zstandard

    size = os.fstat(descriptor).st_size
    place = 0
    while place < size:
        head = os.pread(descriptor, 18, place)  # the longest frame header
        if int.from_bytes(head[:4], "little") & ~0xF == 0x184D2A50:  # a skippable frame: magic, length, content
            place += 8 + int.from_bytes(head[4:8], "little")
            continue
        try:
            checksum = zstandard.get_frame_parameters(head).has_checksum
            place += zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            cut = place + len(head) == size and place > 0
            what = "ends in the middle of its" if cut else "damaged"
            raise DataError(f"{file}: {what} zstd data ({_line(error)}); fetch the file again") from error
        last = False
        while not last and place < size:
            block = int.from_bytes(os.pread(descriptor, 3, place), "little")
            last, repeated = bool(block & 1), block >> 1 & 3 == 1
            place += 3 + (1 if repeated else block >> 3)
        place += 4 * checksum if last else size  # the file ends and the frame goes on
    if place > size:
        raise DataError(f"{file}: ends in the middle of its zstd data; fetch the file again")


def _parse_jsonl(file: Path, lines: Iterable[bytes], text: str, fields: tuple[str, ...]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        origin = f"{file}:{number}"
        try:
            record = json.loads(str(line.removeprefix(_BOM), "utf-8"))
        except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
            raise DataError(f"{origin}: not a line of JSON ({_line(error)}); mend or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{origin}: not a JSON object; mend or remove the line")
        yield origin, _text(record, text, origin), strings(record, fields)


def _text(record: Mapping, name: str, origin: str) -> str:
    value = pick(record, name)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: byte {error.start} of {name!r} is not valid UTF-8; mend the file") from error
    if not isinstance(value, str):
        raise DataError(
            f'{origin}: has no field "{name}" that is a string, it has {some(record)}; mend the line, '
            "or write ?text=NAME after the path"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an escaped lone surrogate is JSON, but no text
            raise DataError(f"{origin}: the text holds a lone surrogate at character {error.start}") from error
    return value


# --- parquet ---


def _read_parquet(file: Path, text: str, fields: tuple[str, ...]) -> Iterator[Row]:
    for origin, values in parquet_rows(file, (text, *fields)):
        try:
            record = {name: value() for name, value in values.items()}
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: byte {error.start} is not valid UTF-8; mend the file") from error
        yield origin, _text(record, text, origin), strings(record, fields)


def parquet_rows(file: Path, wanted: Iterable[str] | None) -> Iterator[tuple[str, dict[str, Callable]]]:
    """(origin, {column: a function that gives its value}) of each row; the functions raise UnicodeDecodeError.

    wanted: columns, perhaps dotted; None = all.  Raises DataError for a file that is damaged or lacks a column.
    """
    with _package("pyarrow", file):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        ) as opened:
            there = opened.schema_arrow.names
            chosen = {
                name if name in there else name.split(".")[0]: name for name in (there if wanted is None else wanted)
            }
            for column, name in chosen.items():
                if column not in there:
                    raise DataError(
                        f"{file}: has no column {name!r}, it has {some(there)}; write ?text=COLUMN after the path"
                    )
            number = 0
            for batch in opened.iter_batches(BATCH_ROWS, columns=list(chosen), use_threads=False):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for i in range(batch.num_rows):
                    yield f"{file}#{number}", {name: column[i].as_py for name, column in columns.items()}
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{file}: damaged or no parquet file ({_line(error)}); fetch the file again") from error


# --- TensorFlow Datasets ---


def open_builder(folder: Path):
    """The prepared data set in `folder` (a builder of tensorflow_datasets; TensorFlow itself is not needed)."""
    with _package("tensorflow-datasets", folder):
        import tensorflow_datasets as tfds
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the library raises whatever its parsers do
        raise DataError(
            f"{folder}: is no prepared TensorFlow Dataset ({_line(error)}); name the folder with dataset_info.json"
        ) from error
    form = builder.info.file_format.value if builder.info.file_format else "unknown"
    if form != "array_record":
        why = {"parquet": "whose rows the library miscounts", "tfrecord": "which only TensorFlow reads"}.get(form, "")
        raise DataError(
            f"{folder}: is stored as {form}{f', {why}' if why else ''}; prepare it with file_format='array_record'"
        )
    return builder


def array_record_rows(
    file: Path, features, records: int, part: tuple[int, int], text: str, fields: tuple[str, ...]
) -> Iterator[Row]:
    """Rows [first, last) = part of one shard, which must have `records`: a cut one may read as a shorter one."""
    with _package("array-record", file):
        from array_record.python.array_record_module import ArrayRecordReader
    for name in (text, *fields):
        if name not in features and name.split(".")[0] not in features:
            raise DataError(f"{file}: has no feature {name!r}, it has {some(features)}; write ?text=FEATURE")
    try:
        reader = ArrayRecordReader(str(file), options="readahead_buffer_size:0,max_parallelism:0")
        if reader.num_records() != records:
            raise DataError(
                f"{file}: has {reader.num_records()} records, dataset_info.json says {records}; fetch the file again"
            )
        for first in range(*part, BATCH_ROWS):
            for number, record in enumerate(reader.read(first, min(first + BATCH_ROWS, part[1])), start=first):
                origin = f"{file}#{number}"
                row = features.deserialize_example_np(record)
                yield origin, _text(row, text, origin), strings(row, fields)
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:  # what the library's errors are
        raise DataError(f"{file}: damaged array_record data ({_line(error)}); fetch the file again") from error


# --- fields ---


def pick(record: Mapping, name: str, default=None):
    """record["a.b"] or record["a"]["b"]."""
    if name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            return default
        record = record[part]
    return record


def strings(record: Mapping, names: tuple[str, ...]) -> dict[str, str]:
    """The named fields as strings: text as it is, null as "", other values as JSON.  Those that are not there are left
    out."""
    found = {}
    for name in names:
        value = pick(record, name, _MISSING)
        if value is _MISSING:
            continue
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif value is None:
            value = ""
        string = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
        found[name] = string if string.isascii() else string.encode("utf-8", "replace").decode()
    return found


def some(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(repr(str(name)[:40]) for name in names[:10]) + (", ..." if names[10:] else "") or "none"


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _require_content(file: Path) -> None:
    if not file.stat().st_size:
        raise DataError(f"{file}: holds nothing, not even compressed data; fetch the file again")


@contextlib.contextmanager
def _package(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"{file}: reading it needs the package {name}; pip install {name}") from error


READERS: dict[str, Callable[[Path, str, tuple[str, ...]], Iterator[Row]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_jsonl,  # C4 and Dolma name lines of JSON so
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}
PLAIN = (".txt", ".md", ".py")
