"""Whether a store is, byte for byte and count for count, what its manifest says."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable
from tinyllama_jax.data.columns import CHECKSUM_BYTES
from tinyllama_jax.data.plan import ITEMS, Progress, silent
from tinyllama_jax.data.shards import Shard
from tinyllama_jax.data.splits import size_problem
from tinyllama_jax.data.storage import Storage
from tinyllama_jax.data.store import MANIFEST, PLAN, TokenStore, check_sha256, parent_path, read_manifest
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.verify_shard import Counts, check_shard, end_with_parent
from tinyllama_jax.data.views import entry_of
from tinyllama_jax.errors import DataError, Unfinished

VERIFY = "verify"


def verify(path: str | Path, *, workers: int = 1, progress: Progress = silent) -> list[str]:
    """Reads all of a store, or of a view and its store, in `workers` processes; -> everything that is wrong with it,
    one line each; none if it is sound.

    Checked: that every file is there, with its size and SHA-256, and no other; every window's checksum; token ids,
    document places and padding; the counts of the manifest, of the plan and of the items' records; the tokenizer; of
    a view, that it is of this store and holds the windows it says.
    """
    storage = Storage(path)
    try:
        manifest, _ = read_manifest(storage)
        if "view_of" in manifest:
            return _verify_view(storage, manifest, workers, progress)
        return _Verification(storage, manifest).findings(workers, progress)
    except DataError as error:
        return [str(error)]


class _Verification:
    def __init__(self, storage: Storage, manifest: dict):
        self.storage, self.manifest = storage, manifest
        self.files = storage.files()
        self.dtype = np.dtype(manifest["dtype"])
        self.shards = [
            (f"{split}/{domain}", Shard(**shard))
            for split, domains in manifest["splits"].items()
            for domain, entry in domains.items()
            for shard in entry["shards"]
        ]

    def findings(self, workers: int, progress: Progress) -> list[str]:
        return [*self._names(), *self._plan(), *self._tokenizer(), *self._records(), *self._shards(workers, progress)]

    def _names(self) -> Iterator[str]:
        known = {MANIFEST, PLAN, *self.manifest["tokenizer"]["files"]}
        for folder, shard in self.shards:
            known |= {f"{folder}/{shard.name}{suffix}" for suffix in shard.sha256}
        for number in range(self.manifest["items"]):
            known |= {_record(number), _record(number, ".dup")}
        for name in sorted(self.files.keys() - known):
            yield f"{self.storage.where(name)}: is no part of the store; remove it"

    def _plan(self) -> Iterator[str]:
        where = self.storage.where(PLAN)
        try:
            plan = _checked(self.storage, PLAN)
        except DataError as error:
            yield str(error)
            return
        if plan["checksum"] != self.manifest["plan_sha256"]:
            yield f"{where}: is not the plan that the manifest names ({self.manifest['plan_sha256']})"
        if len(plan["items"]) != self.manifest["items"]:
            yield f"{where}: has {len(plan['items'])} items, the manifest says {self.manifest['items']}"

    def _tokenizer(self) -> Iterator[str]:
        said = self.manifest["tokenizer"]
        try:
            for name, expected in said["files"].items():
                check_sha256(self.storage, name, expected)
            tokenizer: Tokenizer = TokenStore(self.storage, self.manifest, "").tokenizer()
        except DataError as error:
            yield str(error)
            return
        for name in ("sha256", "vocab_size", "bos_id", "eos_id"):
            found = getattr(tokenizer, name)
            if found != said[name]:
                yield f"{self.storage.root}: the tokenizer's {name} is {found}, the manifest says {said[name]}"

    def _records(self) -> list[str]:
        records, findings = {}, []

        def read(number: int) -> None:
            try:
                records[number] = _checked(self.storage, _record(number))
                if _record(number, ".dup") in self.files:
                    _check_columns(self.storage, _record(number, ".dup"))
            except DataError as error:
                findings.append(str(error))

        self.storage.each(read, range(self.manifest["items"]))
        if findings:
            return sorted(findings)
        ordered = [records[number] for number in range(self.manifest["items"])]
        content = durable.checksum({"items": [record["content_sha256"] for record in ordered]})
        found = {**_added(ordered), "content_sha256": content}
        said = {**_added([self.manifest]), "content_sha256": self.manifest["content_sha256"]}
        where = self.storage.where(ITEMS)
        return [
            f"{where}: the items' records do not add up to what the manifest says of {what}"
            for what in sorted(found.keys() | said.keys())
            if found.get(what, type(said.get(what))()) != said.get(what, type(found.get(what))())
        ]

    def _shards(self, workers: int, progress: Progress) -> list[str]:
        whole, findings = [], []
        for folder, shard in self.shards:
            sizes = shard.sizes(self.manifest["window_tokens"], self.dtype)
            names = {f"{folder}/{shard.name}{suffix}": size for suffix, size in sizes.items()}
            problems = [problem for name, size in names.items() if (problem := size_problem(self.files, name, size))]
            findings += [f"{self.storage.root}/{problem}" for problem in problems]
            if not problems:
                whole.append((folder, shard))
        check = functools.partial(
            check_shard,
            self.storage.root,
            window_tokens=self.manifest["window_tokens"],
            dtype=self.dtype,
            packed=self.manifest["packing"] != "none",
            vocab_size=self.manifest["tokenizer"]["vocab_size"],
        )
        total, done = max(1, sum(shard.windows for _, shard in whole)), Counts()
        counts: dict[str, Counts] = defaultdict(Counts)
        found: dict[int, list[str]] = {}
        for number, (found[number], counted) in _each(check, whole, workers):
            counts[whole[number][0]] += counted
            done += counted
            progress(VERIFY, done.documents, done.tokens, done.windows / total)
        findings += [line for number in sorted(found) for line in found[number]]
        return findings or list(self._counts(counts))  # what is damaged or missing was not counted

    def _counts(self, counts: dict[str, Counts]) -> Iterator[str]:
        for split, domains in self.manifest["splits"].items():
            for domain, entry in domains.items():
                for what, n in counts[f"{split}/{domain}"]._asdict().items():
                    if entry[what] != n:
                        where = self.storage.where(f"{split}/{domain}")
                        yield f"{where}: holds {n} {what}, the manifest says {entry[what]}"


def _verify_view(storage: Storage, manifest: dict, workers: int, progress: Progress) -> list[str]:
    extra = sorted(storage.files().keys() - {MANIFEST})
    findings = [f"{storage.where(name)}: is no part of the view; remove it" for name in extra]
    findings += verify(parent_path(storage, manifest["view_of"]["path"]), workers=workers, progress=progress)
    try:
        view = TokenStore.open(storage.root)
        for domain, said in manifest["splits"]["train"].items():
            entry = entry_of(view.parent, domain, said["windows"], manifest["view_of"]["seed"])
            findings += [
                f"{storage.root}: domain {domain!r}: {what} is {entry[what]}, the manifest says {said[what]}"
                for what in entry
                if entry[what] != said[what]
            ]
    except DataError as error:
        findings.append(str(error))
    return findings


def _record(number: int, suffix: str = ".json") -> str:
    return f"{ITEMS}/{number:06d}{suffix}"


def _checked(storage: Storage, name: str) -> dict:
    """A record that carries its own checksum."""
    where = storage.where(name)
    try:
        record = json.loads(storage.bytes(name))
        sound = durable.checksum(record) == record["checksum"]
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: is damaged ({type(error).__name__}: {error})") from error
    if not sound:
        raise DataError(f"{where}: was edited or damaged: it differs from its checksum")
    return record


def _check_columns(storage: Storage, name: str) -> None:
    """A file as columns.py writes it."""
    where = storage.where(name)
    try:
        data = storage.bytes(name)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(data[CHECKSUM_BYTES + 1 :]).hexdigest().encode() != data[:CHECKSUM_BYTES]:
        raise DataError(f"{where}: differs from its checksum")


def _added(records: Iterable[dict]) -> dict[str, object]:
    """What records say together: counts of this and that, lists of shards.  A manifest is one of everything."""
    sums: dict[str, object] = defaultdict(Counter)
    for record in records:
        sums["documents read"].update(record["read"])
        sums["documents removed"].update(record["removed"])
        sums["what sources left out"].update(record["source_dropped"])
        for domain, group, counts in record["groups"]:
            sums[f"group {group!r} of {domain}"].update(counts)
        for domain, lengths in record["lengths"].items():
            sums[f"the lengths in {domain}"].update(dict(enumerate(lengths)))
        for split, domains in record["splits"].items():
            for domain, entry in domains.items():
                sums[f"{split}/{domain}"].update({key: n for key, n in entry.items() if key != "shards"})
                sums.setdefault(f"the shards of {split}/{domain}", []).extend(entry["shards"])
    return sums


def _each(check: Callable, jobs: list[tuple], workers: int) -> Iterator[tuple[int, tuple[list[str], Counts]]]:
    """(number of the job, its result), in any order."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from ((number, check(*job)) for number, job in enumerate(jobs))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        numbers = {pool.submit(check, *job): number for number, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(numbers):
                yield numbers[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise Unfinished("a worker process was killed (by the system, if memory ran out); start again") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
