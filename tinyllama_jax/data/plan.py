"""What a store will be made of, frozen before any of it is tokenised: inputs in work items, tokenizer, split.

A store is a function of its plan and of the sources' bytes.  Items know nothing of each other (duplicates apart), so
any number of machines may work on them in any order.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama_jax import __version__, configio
from tinyllama_jax.config import Recipe
from tinyllama_jax.data import durable, filters, sources
from tinyllama_jax.data.sources import Document, Input, Source
from tinyllama_jax.data.store import PLAN
from tinyllama_jax.data.tokenizer import JSON_CONFIG_FILE, JSON_FILE, MODEL_FILE, Tokenizer, train_bpe
from tinyllama_jax.errors import ConfigError, DataError

ITEMS = "items"
BEFORE_PLAN = (MODEL_FILE, JSON_FILE, JSON_CONFIG_FILE)  # what a killed `make` may have left
FORMAT_VERSION = 1
HASH_RANGE = 1 << 64
SCANNED_BYTES = 64 << 20  # smaller corpora are read once beforehand, so that neither split is empty
SCAN, TRAIN = "scan", "train tokenizer"
# (phase, documents, tokens, share of the input) so far in the phase
Progress = Callable[[str, int, int, float], None]


def silent(phase: str, documents: int, tokens: int, share: float) -> None:
    """Progress for nobody."""


@dataclass(frozen=True)
class Item:
    """What is tokenised at a time: consecutive inputs of one source."""

    number: int
    source: int  # in Recipe.sources
    inputs: tuple[Input, ...]

    @property
    def bytes(self) -> int:
        return sum(given.bytes for given in self.inputs)


class Plan:
    """A frozen plan.  folder: the store's.  sha256 identifies it.  thresholds: per domain the hash below which
    documents are held out."""

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record = folder, record
        self.sha256: str = record.get("checksum", "")
        self.recipe: Recipe = configio.from_dict(Recipe, record["recipe"])
        self.thresholds: dict[str, int] = record["thresholds"]
        self.items = [
            Item(number, item["source"], tuple(Input(*given) for given in item["inputs"]))
            for number, item in enumerate(record["items"])
        ]
        self.filters = filters.parse(self.recipe.filters)
        self._sources = [sources.parse(spec) for spec in self.recipe.sources]

    def source(self, item: Item) -> Source:
        return self._sources[item.source]

    def key(self, item: Item) -> str:
        """Identifies what the item is made from.  It outlives a new plan in which the item is the same, so that one
        mended file does not undo the work on others."""
        recipe = {**self.record["recipe"], "sources": self.recipe.sources[item.source], "item_bytes": 0}
        made_from = {
            "item": self.record["items"][item.number],
            "recipe": recipe,
            "tokenizer": self.record.get("tokenizer_sha256"),
            "thresholds": self.thresholds,
            "python": self.record.get("python_version"),
            "others": self.sha256 if self.filters.any_duplicates else "",
        }
        return durable.checksum(made_from)

    def documents(self, item: Item) -> Iterator[tuple[Input, Document]]:
        """All documents of an item's inputs.  Raises DataError for what cannot be read, and for an input that has not
        the size that it had when the plan was made."""
        source = self.source(item)
        for given in item.inputs:
            found = source.size(given)
            if found != given.bytes:
                raise DataError(
                    f"{source.where(given)}: has {found} bytes and had {given.bytes} when {self.folder / PLAN} was "
                    f"made; bring the file back, or remove {PLAN} and start again (other items are kept)"
                )
            for document in source.documents(given):
                yield given, document

    def tokenizer(self) -> Tokenizer:
        """The store's own copy.  Raises DataError if it is not the one that the plan was made with."""
        tokenizer = Tokenizer.load(self.folder)
        wanted = self.record["tokenizer_sha256"]
        if tokenizer.sha256 != wanted:
            raise DataError(
                f"{tokenizer.files[0]}: is not the tokenizer of {PLAN} (SHA-256 {tokenizer.sha256}, expected "
                f"{wanted}); bring it back, or remove {PLAN} and start again"
            )
        return tokenizer

    def split_of(self, domain: str, digest: bytes) -> str:
        """By the hash of the text alone: additions to a corpus change no document's side, and copies share one."""
        threshold = self.thresholds.get(domain, int(self.recipe.validation_share * HASH_RANGE))
        return "validation" if place_of(digest) < threshold else "train"


def place_of(digest: bytes) -> int:
    """The place of a document with that SHA-256 in [0, HASH_RANGE)."""
    return int.from_bytes(digest[:8], "big")


def digest_of(document: Document) -> bytes:
    data = document.text.encode() if document.tokens is None else document.tokens.astype("<u4").tobytes()
    return hashlib.sha256(data).digest()


def load(folder: str | Path) -> Plan:
    """The frozen plan in a store's folder.  Raises DataError when there is none or it was changed."""
    file = Path(folder) / PLAN
    try:
        record = json.loads(file.read_bytes())
        version, checksum = record["format_version"], record["checksum"]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); `prepare plan` makes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({error}); remove {file.parent} and prepare again") from error
    if version != FORMAT_VERSION or durable.checksum(record) != checksum:
        raise DataError(f"{file}: is damaged or of another version; remove {file.parent} and prepare again")
    return Plan(file.parent, record)


def make(recipe: Recipe, folder: Path, progress: Progress) -> Plan:
    """Freezes a plan in an existing folder: lists the inputs, reads small corpora once, copies or trains the tokenizer,
    and writes plan.json last."""
    given = [sources.parse(spec) for spec in recipe.sources]
    if recipe.tokenizer:
        Tokenizer.load(recipe.tokenizer)  # a wrong name is said before everything is read
    for source in given:
        marks = source.options["marks"] if source.layout == "litpkds" else recipe.document_marks
        if marks != recipe.document_marks:
            raise ConfigError(
                f"{source.spec}: its documents are marked by {marks!r} and the store's by {recipe.document_marks!r}; "
                f"ask for --document-marks {marks}"
            )
    record = {
        "format_version": FORMAT_VERSION,
        "created_by": f"tinyllama_jax {__version__}",
        "recipe": configio.to_dict(recipe),
        "thresholds": {},
        "items": [
            {"source": number, "inputs": [list(one) for one in group]}
            for number, source in enumerate(given)
            for group in _groups(source.inputs(), recipe.item_bytes)
        ],
    }
    if any(source.layout == "python" for source in given):
        record["python_version"] = platform.python_version()
    plan = Plan(folder, record)
    if not recipe.tokenizer or sum(item.bytes for item in plan.items) <= SCANNED_BYTES:
        plan.thresholds = record["thresholds"] = _thresholds(plan, progress)
    tokenizer = _tokenizer(plan, progress)
    record["tokenizer_sha256"] = tokenizer.sha256
    return Plan(folder, durable.write_record(folder / PLAN, record))


def clear(folder: Path) -> None:
    """Removes what is written before plan.json."""
    for name in (PLAN, *BEFORE_PLAN):
        for file in folder.glob(f".{name}.tmp*"):
            file.unlink()
    for name in BEFORE_PLAN:
        (folder / name).unlink(missing_ok=True)


def _groups(inputs: list[Input], item_bytes: int) -> Iterator[list[Input]]:
    """Neighbours that have `item_bytes` together; the last ones may have less."""
    group: list[Input] = []
    size = 0
    for one in inputs:
        group.append(one)
        size += one.bytes
        if size >= item_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_empty(document: Document) -> bool:
    """Without a visible character, or without a token."""
    return not document.text.strip() if document.tokens is None else not document.tokens.size


def _read(plan: Plan, phase: str, progress: Progress) -> Iterator[Document]:
    count, passed = 0, 0
    total = max(1, sum(item.bytes for item in plan.items))
    for item in plan.items:
        for _, document in plan.documents(item):
            count += 1
            progress(phase, count, 0, passed / total)
            if not is_empty(document) and plan.filters.refusal(document) is None:
                yield document
        passed += item.bytes


def _thresholds(plan: Plan, progress: Progress) -> dict[str, int]:
    """They give way where one side would be empty."""
    lowest, highest, count = {}, {}, Counter()
    for document in _read(plan, SCAN, progress):
        place, domain = place_of(digest_of(document)), document.domain
        lowest[domain] = min(lowest.get(domain, HASH_RANGE), place)
        highest[domain] = max(highest.get(domain, -1), place)
        count[domain] += 1
    if not count:
        raise DataError(f"{' '.join(plan.recipe.sources)}: no document is left; look at the sources and the filters")
    for domain, n in count.items():
        if lowest[domain] == highest[domain]:
            what = "one document" if n == 1 else f"{n} copies of one document"
            raise DataError(
                f"domain {domain!r} holds {what}, and validation needs one of its own; cut the text into several files "
                f"or into lines of a .jsonl"
            )
    share = int(plan.recipe.validation_share * HASH_RANGE)
    return {domain: min(max(share, lowest[domain] + 1), highest[domain]) for domain in sorted(count)}


def _tokenizer(plan: Plan, progress: Progress) -> Tokenizer:
    """The store's own copy of the tokenizer; a trained one has seen the training documents only."""
    clear(plan.folder)
    if plan.recipe.tokenizer:
        Tokenizer.load(plan.recipe.tokenizer).copy_to(plan.folder)
    else:
        texts = (d.text for d in _read(plan, TRAIN, progress) if plan.split_of(d.domain, digest_of(d)) == "train")
        train_bpe(texts, plan.recipe.vocab_size, plan.folder / MODEL_FILE)
    tokenizer = Tokenizer.load(plan.folder)
    for file in tokenizer.files:
        durable.write(file, file.read_bytes())
    return tokenizer
