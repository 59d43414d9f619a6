"""From a recipe to a token store: scan, train or load the tokenizer, encode, rename into place.

The store is built in a hidden folder beside its final name, so under the final name there is a whole store or none,
whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tinyllama_jax import __version__
from tinyllama_jax.config import DataError, Recipe
from tinyllama_jax.data import corpora, store
from tinyllama_jax.data.corpora import Document
from tinyllama_jax.data.tokenizer import MODEL_FILE, Tokenizer, train_bpe

Progress = Callable[[int, int, str], None]  # (documents, tokens, phase), counted within the phase
SCAN, TRAIN, ENCODE, WAIT = "scan", "train tokenizer", "encode", "wait for another prepare"
HASH_RANGE = 1 << 64
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    progress: Progress = lambda documents, tokens, phase: None,
    shard_tokens: int = store.SHARD_TOKENS,
) -> Path:
    """Make the token store `out` unless it is there already; returns its path.

    A store made by the same recipe is opened (sizes checked) and left as it is; sources are not compared with what
    they were then.  Raises DataError for a store of another recipe or anything else under that name, for sources
    and tokenizers that cannot be used, and for a disk that cannot be written; nothing is overwritten.  Of
    several processes that want the same store one makes it and the others wait.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if _already_there(recipe, out):
            return out
        with _locked(out, progress):
            if not _already_there(recipe, out):
                _build(recipe, out, progress, shard_tokens)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space on the disk and try again" if error.errno in _DISK_FULL else "name another --out"
        raise DataError(f"{out}: the token store cannot be written: {reason}; {advice}") from error
    return out


def _already_there(recipe: Recipe, out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / store.MANIFEST).exists():
        raise DataError(f"{out}: exists and is no token store; name another --out")
    manifest = store.TokenStore.open(out).manifest
    for key, wanted in _recorded(recipe).items():
        found = manifest["recipe"].get(key)
        if found != wanted:
            raise DataError(
                f"{out}: was prepared with {key}={_shown(found)}, now {_shown(wanted)} is wanted; name another --out"
            )
    if recipe.tokenizer and Path(recipe.tokenizer).exists():
        wanted, found = Tokenizer.load(recipe.tokenizer).sha256, manifest["tokenizer"]["sha256"]
        if wanted != found:
            raise DataError(
                f"{out}: was prepared with another tokenizer (SHA-256 {found}) than {recipe.tokenizer} is now "
                f"({wanted}); name another --out"
            )
    return True


def _recorded(recipe: Recipe) -> dict:
    """The recipe as the manifest keeps it.  vocab_size only describes a tokenizer that is trained."""
    record = dataclasses.asdict(recipe)
    record["sources"] = list(recipe.sources)
    if recipe.tokenizer:
        del record["vocab_size"]
    return record


def _shown(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else repr(value)


@contextlib.contextmanager
def _locked(out: Path, progress: Progress) -> Iterator[None]:
    """Holds `.NAME.lock` beside `out`; the system lets go of it when the process dies."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, 0, WAIT)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The holder before us removed the name with the lock in hand: then ours guards nothing, and we start over.
        if _is_open_at(lock, path):
            break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _is_open_at(lock: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _build(recipe: Recipe, out: Path, progress: Progress, shard_tokens: int) -> None:
    prefix = f".{out.name}.building-"
    for leftover in out.parent.iterdir():
        if leftover.name.startswith(prefix):  # we hold the lock, so whoever made it is dead
            shutil.rmtree(leftover)
    folder = out.with_name(f"{prefix}{os.getpid()}")
    folder.mkdir()
    try:
        _fill(recipe, folder, progress, shard_tokens)
        folder.rename(out)  # over an empty folder at most: anything else under that name was refused
        store.sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(recipe: Recipe, folder: Path, progress: Progress, shard_tokens: int) -> None:
    scans = _scan(recipe, progress)
    tokenizer = _tokenizer(recipe, folder, scans, progress)
    dtype = store.token_dtype(tokenizer.vocab_size)
    writers = {
        split: {domain: store.SplitWriter(folder / split / domain, dtype, shard_tokens) for domain in scans}
        for split in store.SPLITS
    }
    again = {domain: _Scan() for domain in scans}
    tokens = 0
    for count, document in enumerate(_documents(recipe), start=1):
        digest = again.setdefault(document.domain, _Scan()).add(document)
        if document.domain not in scans:
            break
        encoded = tokenizer.encode_document(document.text, recipe.document_marks)
        split = _split_of(digest, scans[document.domain], recipe.validation_share)
        writers[split][document.domain].add(encoded, len(document.text.encode()))
        tokens += encoded.size
        progress(count, tokens, ENCODE)
    for domain, scan in again.items():
        if domain not in scans or scan.content_sha256 != scans[domain].content_sha256:
            raise DataError(f"domain {domain!r}: the sources changed while they were read; try again")
    splits = {split: {domain: w.entry() for domain, w in of_split.items()} for split, of_split in writers.items()}
    for split in store.SPLITS:
        store.sync_folder(folder / split)
    store.write_manifest(folder, _manifest(recipe, tokenizer, dtype.str, scans, splits))
    store.sync_folder(folder)


def _manifest(recipe: Recipe, tokenizer: Tokenizer, dtype: str, scans: dict[str, _Scan], splits: dict) -> dict:
    """Without times and paths of this machine: the same sources give the same manifest, byte for byte."""
    manifest = {
        "created_by": f"tinyllama_jax {__version__}",
        "recipe": _recorded(recipe),
        "dtype": dtype,
        "document_marks": recipe.document_marks,
        "tokenizer": {
            "files": {file.name: store.sha256_of(file) for file in tokenizer.files},
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "domains": {
            domain: {"documents": scan.documents, "bytes": scan.bytes, "content_sha256": scan.content_sha256}
            for domain, scan in scans.items()
        },
        "splits": splits,
    }
    if corpora.PYTHON in recipe.sources:
        manifest["python_version"] = platform.python_version()
    return manifest


def _documents(recipe: Recipe) -> Iterator[Document]:
    for spec in recipe.sources:
        yield from corpora.open_source(spec)


class _Scan:
    """What one pass over a domain learns: its size, its content, and the hashes that bound the split."""

    def __init__(self):
        self.documents = self.bytes = 0
        self.lowest, self.highest = HASH_RANGE, -1
        self._content = hashlib.sha256()

    def add(self, document: Document) -> int:
        """-> the document's place in [0, HASH_RANGE), a function of its text alone."""
        data = document.text.encode()
        digest = hashlib.sha256(data).digest()
        self._content.update(digest)
        place = int.from_bytes(digest[:8], "big")
        self.documents += 1
        self.bytes += len(data)
        self.lowest, self.highest = min(self.lowest, place), max(self.highest, place)
        return place

    @property
    def content_sha256(self) -> str:
        return self._content.hexdigest()  # of the SHA-256 of each document's text, in order


def _scan(recipe: Recipe, progress: Progress) -> dict[str, _Scan]:
    scans: dict[str, _Scan] = {}
    for count, document in enumerate(_documents(recipe), start=1):
        scans.setdefault(document.domain, _Scan()).add(document)
        progress(count, 0, SCAN)
    for domain, scan in scans.items():
        if scan.lowest == scan.highest:
            what = "one document" if scan.documents == 1 else f"{scan.documents} copies of one document"
            raise DataError(
                f"domain {domain!r} holds {what}, and validation needs one of its own; cut the text into several files "
                f"or into lines of a .jsonl"
            )
    return scans


def _split_of(place: int, scan: _Scan, share: float) -> str:
    """Documents below a threshold are held out: the choice survives additions to the corpus and never tears copies of
    a text apart.  The threshold gives way where one side would be empty."""
    threshold = min(max(int(share * HASH_RANGE), scan.lowest + 1), scan.highest)
    return "validation" if place < threshold else "train"


def _tokenizer(recipe: Recipe, folder: Path, scans: dict[str, _Scan], progress: Progress) -> Tokenizer:
    """The store's own copy of the tokenizer; a trained one has seen the training documents only."""
    if recipe.tokenizer:
        Tokenizer.load(recipe.tokenizer).copy_to(folder)
    else:
        train_bpe(_training_texts(recipe, scans, progress), recipe.vocab_size, folder / MODEL_FILE)
    tokenizer = Tokenizer.load(folder)
    for file in tokenizer.files:
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return tokenizer


def _training_texts(recipe: Recipe, scans: dict[str, _Scan], progress: Progress) -> Iterator[str]:
    for count, document in enumerate(_documents(recipe), start=1):
        place = _Scan().add(document)
        scan = scans.get(document.domain)
        if scan is not None and _split_of(place, scan, recipe.validation_share) == "train":
            yield document.text
        progress(count, 0, TRAIN)
