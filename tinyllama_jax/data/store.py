"""The token store: what is trained on, readable at any place at any time.

    STORE/manifest.json            counts, hashes, the tokenizer's identity, the recipe; written last
    STORE/tokenizer.model (or .json)
    STORE/plan.json, items/        what was prepared from what
    STORE/SPLIT/DOMAIN/            token shards (shards.py)

A store is what its manifest says: whatever is read has been checked against a checksum in it or below it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import posixpath
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable
from tinyllama_jax.data.splits import ChosenWindows, Split, view_keys
from tinyllama_jax.data.splits import Windows as Windows
from tinyllama_jax.data.storage import REMEDY, Storage
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import DataError

FORMAT_VERSION = 2
MOST_OPEN_SHARDS = 1024
MANIFEST, PLAN = "manifest.json", "plan.json"
SPLITS = ("train", "validation")


class TokenStore:
    """An opened store, or an opened view of one (views.py).

    path; manifest; manifest_sha256 (of the file: identifies the data); domains; vocab_size; window_tokens;
    parent (the store that a view is of, else None).
    """

    def __init__(self, storage: Storage, manifest: dict, manifest_sha256: str, parent: TokenStore | None = None):
        self.storage, self.manifest, self.manifest_sha256, self.parent = storage, manifest, manifest_sha256, parent
        self.path = Path(storage.root) if not storage.remote else storage.root
        self.domains = tuple(manifest["splits"]["train"])
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.window_tokens: int = manifest["window_tokens"]
        self._splits: dict[tuple[str, str], Split | ChosenWindows] = {}
        if parent:
            self._splits |= parent._splits
            for domain, entry in manifest["splits"]["train"].items():
                keys = view_keys(manifest["view_of"]["seed"], domain)
                self._splits["train", domain] = ChosenWindows(parent.split("train", domain), entry, keys, self.path)
            return
        dtype, packed = np.dtype(manifest["dtype"]), manifest["packing"] != "none"
        readers = functools.lru_cache(maxsize=_open_shards())(Split.open)
        for split, domains in manifest["splits"].items():
            for domain, entry in domains.items():
                part = Split(storage, f"{split}/{domain}", entry, self.window_tokens, dtype, packed, readers)
                self._splits[split, domain] = part

    @property
    def location(self) -> str:
        """Where it is found again from any directory."""
        return self.storage.root if self.storage.remote else str(Path(self.storage.root).resolve())

    @classmethod
    def open(cls, path: str | Path, *, cache: str | Path = "") -> TokenStore:
        """Checks the manifest, the tokenizer files and the size of every shard; other files are none of its business.

        cache: a local folder that keeps what is read of a remote store.
        Raises DataError naming the file, what was expected and what was found.
        """
        storage = Storage(path, cache)
        manifest, sha256 = read_manifest(storage)
        if "view_of" in manifest:
            return cls(storage, manifest, sha256, _parent(storage, manifest["view_of"], cache))
        storage.identify(sha256)
        for name, expected in manifest["tokenizer"]["files"].items():
            check_sha256(storage, name, expected)
        store = cls(storage, manifest, sha256)
        for split in store._splits.values():
            split.check_sizes()
        return store

    def split(self, split: str, domain: str) -> Split | ChosenWindows:
        if (split, domain) not in self._splits:
            raise DataError(
                f"{self.path}: has no {split} tokens of domain {domain!r}; it holds {', '.join(self.domains)}"
            )
        return self._splits[split, domain]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; its files stay readable as long as the process lives."""
        if self.parent:
            return self.parent.tokenizer()
        return Tokenizer.load(self._tokenizer_folder / next(iter(self.manifest["tokenizer"]["files"])))

    @functools.cached_property
    def _tokenizer_folder(self) -> Path:
        if not self.storage.remote:
            return Path(self.path)
        folder = Path(tempfile.mkdtemp(prefix="tinyllama-tokenizer-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name in self.manifest["tokenizer"]["files"]:
            (folder / name).write_bytes(self.storage.bytes(name))
        return folder


def _open_shards() -> int:
    """Shards of a store that are kept open: three files each, and half of what the process may open is for others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(limit // 6, MOST_OPEN_SHARDS))


def read_manifest(storage: Storage) -> tuple[dict, str]:
    """-> (manifest, SHA-256 of its file).  Raises DataError when it is missing, damaged or of another version."""
    file = storage.where(MANIFEST)
    try:
        data = storage.bytes(MANIFEST)
    except OSError as error:
        raise DataError(_without_manifest(storage, error)) from error
    try:
        manifest = json.loads(data)
        version, checksum = manifest["format_version"], manifest["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
    if manifest.get("kind") == "examples":
        raise DataError(f"{storage.root}: holds examples for fine-tuning and no running text; name another store")
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    found = durable.checksum(manifest)
    if found != checksum:
        raise DataError(f"{file}: was edited or damaged (checksum {found}, expected {checksum}); {REMEDY}")
    return manifest, hashlib.sha256(data).hexdigest()


def _without_manifest(storage: Storage, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{storage.where(MANIFEST)}: cannot be read ({error.strerror or error})"
    try:
        storage.bytes(PLAN)
    except OSError:
        return f"{storage.root}: is no token store ({MANIFEST}: {error.strerror or error}); make one with prepare"
    return f"{storage.root}: has no {MANIFEST} yet; give the same prepare command again, it goes on"


def _parent(storage: Storage, view_of: dict, cache: str | Path) -> TokenStore:
    """The store that a view is of.  Raises DataError when it is not there or not the same any more."""
    path = parent_path(storage, view_of["path"])
    try:
        parent = TokenStore.open(path, cache=cache)
    except DataError as error:
        raise DataError(f"{storage.root}: is a view of a store that cannot be opened: {error}") from error
    if parent.manifest_sha256 != view_of["manifest_sha256"]:
        raise DataError(
            f"{storage.root}: is a view of {path} as it was with manifest {view_of['manifest_sha256']}, and it now has "
            f"{parent.manifest_sha256}; bring that store back, or make the view again under another name"
        )
    return parent


def parent_path(storage: Storage, path: str) -> str:
    """Where a view's store is: `path` is a URL, or relative to the view."""
    if "://" in path:
        return path
    if not storage.remote:
        return os.path.normpath(os.path.join(os.path.realpath(storage.root), path))
    protocol, mark, root = storage.root.rpartition("://")
    return protocol + mark + posixpath.normpath(posixpath.join(root, path))


def check_sha256(storage: Storage, name: str, expected: str) -> None:
    where = storage.where(name)
    try:
        found = hashlib.sha256(storage.bytes(name)).hexdigest()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{where}: part of the token store is missing ({reason}); {REMEDY}") from error
    if found != expected:
        raise DataError(f"{where}: is not the file the manifest names (SHA-256 {found}, expected {expected}); {REMEDY}")
