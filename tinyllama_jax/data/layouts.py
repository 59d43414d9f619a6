"""The corpora that TinyLlama's runs were made of, as they lie on a disk, and other layouts that are more than files."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from tinyllama_jax.data import litpkds, readers, stdlib
from tinyllama_jax.data.sources import Document, Input, Source, listed, share, unknown
from tinyllama_jax.errors import DataError, UsageError

JSONL = (".jsonl.zst", ".jsonl", ".jsonl.gz")
PART_BYTES = 256 << 20  # of an array_record shard that is one input
SET_NAME = "meta.redpajama_set_name"
REDPAJAMA_SETS = tuple(
    f"RedPajama{name}" for name in ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
)
# StarCoder's folders that hold no files of one language; their other columns differ, `content` is there all the same.
NO_LANGUAGES = (
    "git-commits-cleaned",
    "github-issues-filtered-structured",
    "jupyter-scripts-dedup-filtered",
    "jupyter-structured-clean-dedup",
)


class SlimPajama(Source):
    """cerebras/SlimPajama-627B: SPLIT/chunk*/*.jsonl.zst with `text` and `meta.redpajama_set_name`, which is the group.

    drop: sets that are left out, by default GitHub's, as TinyLlama did (its code came from StarCoder).
    """

    layout = "slimpajama"
    known = {"drop": "RedPajamaGithub", "split": "train", "fields": ""}
    suffixes = JSONL

    def __init__(self, spec: str, domain: str, path: Path, given: Mapping[str, str]):
        super().__init__(spec, domain, path, given)
        self.group_field = SET_NAME
        self.drop = listed(self.options["drop"])
        for name in self.drop:
            if name not in REDPAJAMA_SETS:
                unknown(f"source {spec!r}: RedPajama set", name, REDPAJAMA_SETS)

    def files(self) -> list[str]:
        split = self.options["split"]
        if not (self.path / split).is_dir() and "split" not in self.given:
            return super().files()
        return [name for name in super().files() if name.startswith(f"{split}/")]

    def read(self, given: Input) -> Iterator[Document]:
        for document in super().read(given):
            if not document.group:
                raise DataError(f"{document.origin}: has no field {SET_NAME}; read it with the layout files")
            if document.group in self.drop:
                self.dropped[f"drop={document.group}"] += 1
            else:
                yield document


class StarCoder(Source):
    """bigcode/starcoderdata: LANGUAGE/*.parquet with `content`; the folder is the group.

    languages: folders that are read, `*` for all; by default all but NO_LANGUAGES.
    """

    layout = "starcoder"
    known = {"languages": "", "text": "content", "fields": ""}
    suffixes = (".parquet",)

    def files(self) -> list[str]:
        names = [name for name in super().files() if name.count("/") == 1]
        there = sorted({name.split("/")[0] for name in names})
        return _of_folders(names, self._wanted(there))

    def _wanted(self, there: list[str]) -> set[str]:
        patterns = listed(self.options["languages"])
        if not patterns:
            return set(there) - set(NO_LANGUAGES)
        return _matching(self, "language", patterns, there)

    def nothing(self) -> str:
        return "no .parquet file in the folder of a language below this folder; name StarCoder's folder"

    def group_of(self, path: str, fields: Mapping[str, str]) -> str:
        return path.split("/")[0]


class SkyPile(Source):
    """Skywork/SkyPile-150B: *.jsonl with `text`."""

    layout = "skypile"
    known = {"fields": ""}
    suffixes = JSONL


class ProofPile(Source):
    """EleutherAI/proof-pile-2: SUBSET/SPLIT/*.jsonl.zst with `text`; the subset is the group."""

    layout = "proofpile"
    known = {"subsets": "*", "split": "train", "fields": ""}
    suffixes = JSONL

    def files(self) -> list[str]:
        names = [name for name in super().files() if name.split("/")[1:-1] == [self.options["split"]]]
        there = sorted({name.split("/")[0] for name in names})
        return _of_folders(names, _matching(self, "subset", listed(self.options["subsets"]), there))

    def nothing(self) -> str:
        return f"no SUBSET/{self.options['split']}/*.jsonl.zst below this folder; name Proof-Pile's folder"

    def group_of(self, path: str, fields: Mapping[str, str]) -> str:
        return path.split("/")[0]


def _matching(source: Source, what: str, patterns: tuple[str, ...], there: list[str]) -> set[str]:
    wanted: set[str] = set()
    for pattern in patterns if there else ():
        found = fnmatch.filter(there, pattern)
        if not found:
            raise DataError(f"{source.path}: has no {what} {pattern!r}, it has {readers.some(there)}")
        wanted.update(found)
    return wanted


def _of_folders(names: list[str], folders: set[str]) -> list[str]:
    return [name for name in names if name.split("/")[0] in folders]


class Tfds(Source):
    """A data set that TensorFlow Datasets has prepared as array_record; shards in parts of PART_BYTES, by rows."""

    layout = "tfds"
    known = {"split": "train", "text": "text", "group": "", "fields": ""}

    @functools.cached_property
    def builder(self):
        return readers.open_builder(self.path)

    @functools.cached_property
    def shards(self) -> dict[str, int]:
        """Records of each file of the split."""
        splits, name = self.builder.info.splits, self.options["split"]
        if name not in splits:  # a slice such as train[:5%] is none either: it would be another corpus under one name
            raise DataError(f"{self.path}: has no split {name!r}, it has {readers.some(splits)}; write ?split=NAME")
        return {
            Path(file).name: records
            for file, records in zip(splits[name].filepaths, splits[name].shard_lengths, strict=True)
        }

    def files(self) -> list[str]:
        return sorted(self.shards)

    def nothing(self) -> str:
        return f"split {self.options['split']!r} has no files; write ?split=NAME"

    def split(self, given: Input) -> list[Input]:
        parts = max(1, -(-given.bytes // PART_BYTES))
        return [Input(given.path, self.size(Input(given.path, 0, part, parts)), part, parts) for part in range(parts)]

    def rows(self, given: Input, fields: tuple[str, ...]) -> Iterator[readers.Row]:
        if given.path not in self.shards:
            raise DataError(f"{self.where(given)}: is no longer in dataset_info.json; bring the data set back")
        records = self.shards[given.path]
        part = share(records, given.part, given.parts), share(records, given.part + 1, given.parts)
        file = self.root / given.path
        return readers.array_record_rows(file, self.builder.info.features, records, part, self.text_column, fields)


class LitPkds(Source):
    """TinyLlama's packed .bin files, already tokenised.

    prefix: how the files' names begin (`train_slim`, `train_star`, `validation`); bos, eos: ids of the tokenizer that
    they were made with; marks: see `litpkds.Stream`.  TinyLlama v1.0's own had `bos`, its code ended in `eos`.
    """

    layout = "litpkds"
    known = {"prefix": "train", "marks": "eos", "bos": "1", "eos": "2"}
    suffixes = (".bin",)
    holds_text = False

    def __init__(self, spec: str, domain: str, path: Path, given: Mapping[str, str]):
        super().__init__(spec, domain, path, given)
        if self.options["marks"] not in litpkds.MARKS:
            unknown(f"source {spec!r}: marks", self.options["marks"], litpkds.MARKS)
        for name in ("bos", "eos"):
            if not self.options[name].isdecimal():
                raise UsageError(f"source {spec!r}: {name}={self.options[name]!r} is no token id; write a whole number")
        self.stream = litpkds.Stream(self.options["marks"], int(self.options["bos"]), int(self.options["eos"]))

    def files(self) -> list[str]:
        return [name for name in super().files() if name.split("/")[-1].startswith(self.options["prefix"])]

    def nothing(self) -> str:
        return f"no file {self.options['prefix']}*.bin; write ?prefix=NAME after the path for files of other names"

    def read(self, given: Input) -> Iterator[Document]:
        file = self.root / given.path
        for place, tokens in self.stream.documents(file):
            yield Document(self.domain, "", f"{file}#{place}", tokens=tokens)
        if filler := self.stream.filler(file, litpkds.read(file)):
            self.dropped["filler_tokens"] += filler


class Library(Source):
    """The standard library of the Python that runs: domains `prose` and `code`."""

    layout = "python"
    known = {}

    @property
    def root(self) -> Path:
        return stdlib.library()

    def inputs(self) -> list[Input]:
        return [Input(".", stdlib.library_bytes())]

    def size(self, given: Input) -> int:
        return stdlib.library_bytes()

    def read(self, given: Input) -> Iterator[Document]:
        return iter(stdlib.python_documents())


LAYOUTS: dict[str, type[Source]] = {
    kind.layout: kind for kind in (Source, SlimPajama, StarCoder, SkyPile, ProofPile, Tfds, LitPkds)
}
