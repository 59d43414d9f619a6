"""One work item: from its documents to durable token shards and a record that says so.

Shards are written into a folder of the worker's own and renamed into the store; the record comes last, and an item is
done when its record is there and its shards have the sizes it names.  Killed at any instant, an item is not done and
is made again, byte for byte the same; two workers on one item write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable
from tinyllama_jax.data.plan import ITEMS, Item, Plan, is_empty
from tinyllama_jax.data.shards import Shard, ShardWriter, token_dtype
from tinyllama_jax.data.sources import Document, Input
from tinyllama_jax.data.store import SPLITS
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.windows import packer
from tinyllama_jax.errors import DataError

SHARD_BYTES = 1 << 30
Report = Callable[[int, int, int], None]  # documents, tokens and input bytes since the last report
LONGEST = 40  # powers of two in the histogram of document lengths
EMPTY = "empty"  # among what was removed: documents without a visible character


def record_path(folder: Path, number: int) -> Path:
    return folder / ITEMS / f"{number:06d}.json"


def finished(plan: Plan, item: Item, dtype: np.dtype) -> dict | None:
    """The item's record, or None while it is not done (no valid record, another plan's, or a shard is not there)."""
    try:
        record = json.loads(record_path(plan.folder, item.number).read_bytes())
        if record["checksum"] != durable.checksum(record) or record["key"] != plan.key(item):
            return None
        for split, domains in record["splits"].items():
            for domain, entry in domains.items():
                for shard in entry["shards"]:
                    for suffix, size in Shard(**shard).sizes(plan.recipe.window_tokens, dtype).items():
                        if (plan.folder / split / domain / f"{shard['name']}{suffix}").stat().st_size != size:
                            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def run(plan: Plan, item: Item, tokenizer: Tokenizer, removed: Mapping[int, str], report: Report) -> dict:
    """Makes the item; returns its record.

    removed: duplicates, by their place among the item's documents -> the filter that found them.
    Raises DataError for an input that cannot be read, OSError when the store cannot be written.
    """
    temporary = plan.folder / ITEMS / f".{item.number:06d}.tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        record = _fill(plan, item, tokenizer, removed, report, temporary)
        for split, domains in record["splits"].items():
            for domain, entry in domains.items():
                place = plan.folder / split / domain
                durable.make_folder(place, below=plan.folder)
                for shard in entry["shards"]:
                    for file in (temporary / split / domain).glob(f"{shard['name']}.*"):
                        file.replace(place / file.name)
                durable.sync(place)
        return durable.write_record(record_path(plan.folder, item.number), record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Part:
    """What one item adds to one domain of one split."""

    def __init__(self, plan: Plan, item: Item, folder: Path, dtype: np.dtype):
        folder.mkdir(parents=True)
        window_tokens = plan.recipe.window_tokens
        self.documents = self.bytes = self.tokens = 0
        self._packer = packer(plan.recipe.packing, window_tokens)
        per_shard = max(1, SHARD_BYTES // (window_tokens * dtype.itemsize))
        self._shards = ShardWriter(folder, item.number, window_tokens, dtype, per_shard)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self.bytes += text_bytes
        for block in self._packer.add(tokens):
            self._write(block)

    def entry(self) -> dict:
        for block in self._packer.finish():
            self._write(block)
        self._shards.close()
        return {
            "windows": self._shards.windows,
            "tokens": self.tokens,
            "documents": sum(shard.documents for shard in self._shards.shards),
            "bytes": self.bytes,
            "dropped_tokens": self._packer.dropped_tokens,
            "dropped_documents": self._packer.dropped_documents,
            "shards": [asdict(shard) for shard in self._shards.shards],
        }

    def _write(self, block) -> None:
        self.tokens += sum(block[2])
        self._shards.add(*block)


def _fill(
    plan: Plan, item: Item, tokenizer: Tokenizer, removed: Mapping[int, str], report: Report, folder: Path
) -> dict:
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[tuple[str, str], _Part] = {}
    content = hashlib.sha256()
    read, refused = Counter(documents=0, bytes=0), Counter()
    groups = defaultdict(Counter)
    lengths = defaultdict(lambda: [0] * LONGEST)
    passed = Passed(item, report)
    source = plan.source(item)
    before = Counter(source.dropped)
    for place, (given, document) in enumerate(plan.documents(item)):
        data = document.text.encode() if document.tokens is None else document.tokens.astype("<u4").tobytes()
        digest = hashlib.sha256(data).digest()
        content.update(digest)
        read.update(documents=1, bytes=len(document.text) and len(data))
        reason = EMPTY if is_empty(document) else plan.filters.refusal(document) or removed.get(place)
        if reason is not None:
            refused[reason] += 1
            passed.document(given, 0, len(data))
            continue
        tokens = _tokens(plan, tokenizer, document)
        key = plan.split_of(document.domain, digest), document.domain
        if key not in parts:
            parts[key] = _Part(plan, item, folder / key[0] / document.domain, dtype)
        text_bytes = len(data) if document.tokens is None else 0
        parts[key].add(tokens, text_bytes)
        groups[document.domain, document.group].update(documents=1, tokens=tokens.size, bytes=text_bytes)
        lengths[document.domain][int(tokens.size).bit_length() - 1] += 1
        passed.document(given, tokens.size, len(data))
    passed.end()
    splits = {split: {} for split in SPLITS}
    for split, domain in sorted(parts):
        splits[split][domain] = parts[split, domain].entry()
    return {
        "format_version": 1,
        "item": item.number,
        "key": plan.key(item),
        "content_sha256": content.hexdigest(),
        "read": dict(read),
        "removed": dict(sorted(refused.items())),
        "source_dropped": dict(sorted((source.dropped - before).items())),
        "groups": [[domain, group, dict(n)] for (domain, group), n in sorted(groups.items())],
        "lengths": dict(sorted(lengths.items())),
        "splits": splits,
    }


class Passed:
    """Reports how far an item is in bytes of its input.  Inside of an input that is estimated from the text so far,
    with the compression of the inputs before it; at its end it is exact."""

    def __init__(self, item: Item, report: Report):
        self._item, self._report = item, report
        self._given, self._text, self._reported = None, 0, 0
        self._all_text, self._all_bytes = 0, 0

    def document(self, given: Input, tokens: int, text_bytes: int) -> None:
        if given is not self._given:
            self._next(given)
        self._text += text_bytes
        ratio = self._all_bytes / self._all_text if self._all_text else 0.25
        reached = max(self._reported, min(int(self._text * ratio), given.bytes))
        self._report(1, tokens, reached - self._reported)
        self._reported = reached

    def end(self) -> None:
        self._next(None)
        self._report(0, 0, self._item.bytes - self._all_bytes)  # inputs without a document

    def _next(self, given: Input | None) -> None:
        if self._given is not None:
            self._report(0, 0, self._given.bytes - self._reported)
            self._all_text, self._all_bytes = self._all_text + self._text, self._all_bytes + self._given.bytes
        self._given, self._text, self._reported = given, 0, 0


def _tokens(plan: Plan, tokenizer: Tokenizer, document: Document) -> np.ndarray:
    if document.tokens is None:
        return tokenizer.encode_document(document.text, plan.recipe.document_marks)
    largest = int(document.tokens.max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{document.origin}: has token {largest}, the tokenizer only {tokenizer.vocab_size}; name the tokenizer "
            "that the file was made with"
        )
    return document.tokens
