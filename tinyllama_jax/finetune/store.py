"""The example store: what fine-tuning learns from, as windows of whole examples with a mark on what is learned.

    STORE/manifest.json           what it was made of and how, counts, hashes; written last
    STORE/tokenizer/              the tokenizer's files
    STORE/SPLIT/DOMAIN.windows    one record per window: CRC32 of the rest, tokens before the padding (uint32 each), the
                                  tokens (uint16, uint32 above 65536 ids), and a bit per token each for: it is learned;
                                  an example begins here
    STORE/malformed.txt           rows that could not be used, if there were any

Records have one size, so a window is one read of a known place, and none is handed out unchecked.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable
from tinyllama_jax.data.shards import token_dtype
from tinyllama_jax.data.splits import Windows, size_problem
from tinyllama_jax.data.storage import REMEDY, LocalFile, Storage
from tinyllama_jax.data.store import MANIFEST, check_sha256
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.generate.chat import TEMPLATES, Chat, control_ids

FORMAT_VERSION = 1
KIND, TOKENIZER, SUFFIX, MALFORMED = "examples", "tokenizer", ".windows", "malformed.txt"


def window_dtype(window_tokens: int, vocab_size: int) -> np.dtype:
    """Of one record."""
    bits = -(-window_tokens // 8)
    return np.dtype(
        [
            ("crc", "<u4"),
            ("used", "<u4"),
            ("tokens", token_dtype(vocab_size), (window_tokens,)),
            ("learned", "u1", (bits,)),
            ("begins", "u1", (bits,)),
        ]
    )


class ExampleSplit:
    """The windows of one domain in one split.

    window_tokens; tokens (without padding), learned (of them), documents (examples, of pairs both answers).
    """

    def __init__(self, path: Path, entry: dict, window_tokens: int, dtype: np.dtype):
        self.path, self.window_tokens, self.dtype = path, window_tokens, dtype
        self.tokens: int = entry["tokens"]
        self.learned: int = entry["learned"]
        self.documents: int = entry["documents"]
        self.reference_N2: np.ndarray | None = None
        self._windows: int = entry["windows"]

    def windows(self, window_tokens: int) -> int:
        """Raises ConfigError for another length than the store's."""
        if window_tokens != self.window_tokens:
            raise ConfigError(
                f"{self.path}: its examples were put into windows of {self.window_tokens} tokens and cannot be read in "
                f"windows of {window_tokens}; set data.sequence_tokens={self.window_tokens - 1}, or another data.store"
            )
        return self._windows

    def read(self, window_ids: np.ndarray, window_tokens: int) -> Windows:
        """Windows [N].  Raises DataError naming file and window on a wrong checksum, IndexError for a window that does
        not exist, ConfigError for another length than the store's."""
        ids = np.asarray(window_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.windows(window_tokens)):
            raise IndexError(f"{self.path}: windows {ids.min()}..{ids.max()} of {self.windows(window_tokens)}")
        self.windows(window_tokens)
        records = np.empty(ids.size, self.dtype)
        rows = records.view(np.uint8).reshape(ids.size, self.dtype.itemsize)
        for row, number, crc in zip(rows, ids.tolist(), records["crc"], strict=True):
            self._file.read_into(number * self.dtype.itemsize, row.data)
            crc = int.from_bytes(row[:4].tobytes(), "little")
            if zlib.crc32(row[4:]) != crc:
                raise DataError(
                    f"{self.path}: window {number} differs from its checksum; the store is damaged, {REMEDY}"
                )
        begins = self._bits(records["begins"])
        begins[:, 0] = True  # counted from the window's first example, wherever that began
        return Windows(
            records["tokens"].astype(np.int32),
            np.cumsum(begins, axis=1, dtype=np.int32) - 1,
            records["used"].astype(np.int32),
            self._bits(records["learned"]),
            None if self.reference_N2 is None else self.reference_N2[ids],
        )

    def _bits(self, packed: np.ndarray) -> np.ndarray:
        return np.unpackbits(packed, axis=1, count=self.window_tokens).view(bool)

    @functools.cached_property
    def _file(self) -> LocalFile:
        try:
            return LocalFile(str(self.path))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); {REMEDY}") from error


class ExampleStore:
    """An opened store, for whatever reads windows of a TokenStore.

    path; location (from any directory); manifest; manifest_sha256; domains; vocab_size; window_tokens; pairs.
    """

    parent = None

    def __init__(self, path: Path, manifest: dict, manifest_sha256: str):
        self.path, self.manifest, self.manifest_sha256 = path, manifest, manifest_sha256
        self.storage = Storage(path)
        self.location = str(path.resolve())
        self.domains = tuple(manifest["splits"]["train"])
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.window_tokens: int = manifest["window_tokens"]
        self.pairs: bool = manifest["pairs"]
        dtype = window_dtype(self.window_tokens, self.vocab_size)
        self._splits = {
            (split, domain): ExampleSplit(path / split / f"{domain}{SUFFIX}", entry, self.window_tokens, dtype)
            for split, domains in manifest["splits"].items()
            for domain, entry in domains.items()
        }

    @classmethod
    def open(cls, path: str | Path) -> ExampleStore:
        """Checks the manifest, the tokenizer's files and the size of every file of windows.

        Raises DataError naming the file, what was expected and what was found.
        """
        path = Path(path)
        manifest, sha256 = read_manifest(path)
        storage = Storage(path)
        for name, expected in manifest["tokenizer"]["files"].items():
            check_sha256(storage, name, expected)
        store = cls(path, manifest, sha256)
        found = storage.files()
        for split in store._splits.values():
            name, size = split.path.relative_to(path).as_posix(), split.windows(store.window_tokens)
            if problem := size_problem(found, name, size * split.dtype.itemsize):
                raise DataError(f"{path}/{problem}; {REMEDY}")
        return store

    def split(self, split: str, domain: str) -> ExampleSplit:
        if (split, domain) not in self._splits:
            raise DataError(
                f"{self.path}: has no {split} examples of domain {domain!r}; it holds {', '.join(self.domains)}"
            )
        return self._splits[split, domain]

    @property
    def tokenizer_folder(self) -> Path:
        return self.path / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_folder)

    @property
    def tokenizer_files(self) -> list[Path]:
        """All that describes the tokenizer, the template that dialogues are written in too."""
        return sorted(self.tokenizer_folder.iterdir())

    def chat(self) -> Chat:
        """How its dialogues are written, to ask a model what it has learned."""
        made = self.manifest["examples"]
        tokenizer = self.tokenizer()
        return Chat(
            TEMPLATES[self.manifest["template"]],
            tokenizer,
            tokenizer.start(self.manifest["document_marks"]),
            control_ids(self.tokenizer_folder),
            system_of(made["system"], made["empty_system"]),
        )

    def with_reference(self, reference: dict[str, dict[str, np.ndarray]]) -> ExampleStore:
        """The same store, whose windows carry {split: {domain: float32 [windows, 2]}}.  Raises ConfigError when they
        are not as many as the windows."""
        made = copy.copy(self)
        made._splits = dict(self._splits)
        for (name, domain), split in self._splits.items():
            values, windows = reference[name][domain], split.windows(self.window_tokens)
            if values.shape != (windows, 2):
                raise ConfigError(f"{split.path}: {values.shape} reference values for {windows} windows of pairs")
            split = copy.copy(split)
            split.reference_N2 = np.asarray(values, np.float32)
            made._splits[name, domain] = split
        return made


def system_of(system: str, empty: bool) -> str | None:
    """Of dialogues that have no system message: None = they get none."""
    return system or ("" if empty else None)


def is_example_store(path: str | Path) -> bool:
    """Whether the manifest there says so; whether it is whole is for `open` to say."""
    try:
        return json.loads((Path(path) / MANIFEST).read_bytes()).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(path: Path) -> tuple[dict, str]:
    """-> (manifest, SHA-256 of its file).  Raises DataError when it is missing, damaged or of another kind."""
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: is no example store ({MANIFEST}: {error.strerror or error})") from error
    try:
        manifest = json.loads(data)
        kind, version, checksum = manifest.get("kind"), manifest["format_version"], manifest["checksum"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
    if kind != KIND:
        raise DataError(f"{path}: is no example store but one of running text; name another data.store")
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: has format version {version}, this program reads {FORMAT_VERSION}; make it again")
    if (found := durable.checksum(manifest)) != checksum:
        raise DataError(f"{file}: was edited or damaged (checksum {found}, expected {checksum}); {REMEDY}")
    return manifest, hashlib.sha256(data).hexdigest()
