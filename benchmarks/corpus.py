"""Generated corpora as SlimPajama and StarCoder lie on a disk, for proofs and measurements.

    python benchmarks/corpus.py --documents 1000000 --out /tmp/corpus --seed 0

Sizes are drawn from a heavy tail (log-normal), one document in a hundred is empty or nothing but spaces, and a few have
16 MB.  The text is the Python standard library's in random pieces, with runs of one character, and every Unicode scalar
value, assigned or not.  The bytes depend on the seed, the releases of Python, zstandard and pyarrow, and nothing else;
every file has random numbers of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama_jax.data.stdlib import python_documents

SETS = {  # shares of SlimPajama's documents, about
    "RedPajamaCommonCrawl": 0.4,
    "RedPajamaC4": 0.38,
    "RedPajamaGithub": 0.09,
    "RedPajamaStackExchange": 0.06,
    "RedPajamaWikipedia": 0.05,
    "RedPajamaArXiv": 0.01,
    "RedPajamaBook": 0.01,
}
LANGUAGES = ("c", "html", "markdown", "python", "rust")
ISSUES = "github-issues-filtered-structured"  # has other columns, and is no language
SLIMPAJAMA_SHARE = 0.7
FILE_DOCUMENTS = 2000  # fewer where there would be less than 40 files
SIGMA, LONGEST = 1.5, 1 << 20  # characters
EMPTY = ("", " ", "\n", " \n\t\u3000\n")
LARGE_BYTES, LARGE_EVERY = 16 << 20, 250_000


class Mix(NamedTuple):
    """What the documents are: characters of the median (the mean is three times as much), and shares."""

    median: int
    kinds: Mapping[str, float]
    with_large: bool = True


HARD = Mix(330, {"prose": 0.5, "code": 0.25, "mixed": 0.14, "unicode": 0.05, "run": 0.05, "empty": 0.01})
PLAIN = Mix(1400, {"prose": 0.9, "code": 0.1}, with_large=False)  # as long as SlimPajama's: 1000 tokens, about

SCALARS = 0x110000 - 0x800  # Unicode without surrogates


@functools.cache
def pools() -> dict[str, str]:
    """What documents are pieces of."""
    scalars = np.random.default_rng(0).permutation(SCALARS)
    scalars[scalars >= 0xD800] += 0x800
    library = python_documents()
    pools = {domain: "\n".join(d.text for d in library if d.domain == domain) for domain in ("prose", "code")}
    return pools | {"unicode": scalars.astype("<u4").tobytes().decode("utf-32-le")}


def piece(random: np.random.Generator, pool: str, characters: int) -> str:
    start = int(random.integers(len(pool)))
    text = pool[start : start + characters]
    while len(text) < characters:  # around the end
        text += pool[: characters - len(text)]
    return text


def text(random: np.random.Generator, kind: str, characters: int) -> str:
    if kind == "empty":
        return EMPTY[random.integers(len(EMPTY))]
    if kind == "run":
        unit = ("a", " ", "\n", "=", "\u4f60", "ab", "0", "\u2581", "\U0001f642")[random.integers(9)]
        return "x" + unit * (characters // len(unit))
    if kind == "mixed":
        parts = random.multinomial(characters, (0.4, 0.4, 0.1, 0.1))
        names = random.permutation(("prose", "code", "unicode", "run"))
        return "".join(text(random, name, int(n)) for name, n in zip(names, parts, strict=True))
    return piece(random, pools()[kind], characters)


def large(number: int) -> str:
    """About LARGE_BYTES of UTF-8; the first has all of Unicode in it."""
    random = np.random.default_rng(number)
    kind = ("unicode", "a", "prose", " ")[number % 4]
    if kind in pools():
        per_character = len(pools()[kind].encode()) / len(pools()[kind])
        return piece(random, pools()[kind], int(LARGE_BYTES / per_character))
    return "x" + kind * LARGE_BYTES


def texts(seed: int, layout: int, file: int, count: int, larges: range, mix: Mix) -> Iterator[str]:
    """The documents of one file.  larges: numbers of the large ones, which the first files have one each of."""
    random = np.random.default_rng((seed, layout, file))
    kinds = random.choice(list(mix.kinds), count, p=list(mix.kinds.values()))
    sizes = np.minimum(random.lognormal(np.log(mix.median), SIGMA, count), LONGEST).astype(int) + 1
    special = {int(random.integers(count)): file} if layout == 0 and file in larges else {}
    for place, (kind, size) in enumerate(zip(kinds.tolist(), sizes.tolist(), strict=True)):
        yield large(special[place]) if place in special else text(random, kind, size)


def write_slimpajama(path: Path, documents: Iterator[str], seed: tuple[int, ...]) -> None:
    random, escaped = np.random.default_rng(seed), seed[-1] % 2 == 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as packed:
        for document in documents:
            name = random.choice(list(SETS), p=list(SETS.values()))
            record = {"text": document, "meta": {"redpajama_set_name": str(name)}}
            packed.write(json.dumps(record, ensure_ascii=escaped).encode() + b"\n")


def write_starcoder(path: Path, documents: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = list(documents)
    columns = {
        "max_stars_repo_path": [f"src/{i}" for i in range(len(content))],
        "max_stars_repo_name": ["someone/something"] * len(content),
        "max_stars_count": pyarrow.array(range(len(content)), pyarrow.int64()),
        "id": [str(i) for i in range(len(content))],
        "content": pyarrow.array(content, pyarrow.large_string()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="snappy", row_group_size=1000)


def make(out: Path, documents: int, seed: int, mix: Mix = HARD) -> dict[str, int]:
    """Writes out/slimpajama/train/chunk1/*.jsonl.zst and out/starcoder/LANGUAGE/*.parquet.

    Returns how many documents each has, `documents` together.  A folder of issues, which are not among them, lies
    beside the languages.
    """
    slimpajama = round(documents * SLIMPAJAMA_SHARE)
    counts = {"slimpajama": slimpajama, "starcoder": documents - slimpajama}
    per_file = min(FILE_DOCUMENTS, max(1, documents // 40))
    larges = range(max(1, documents // LARGE_EVERY) if mix.with_large else 0)
    for layout, (name, count) in enumerate(counts.items()):
        for file, first in enumerate(range(0, count, per_file)):
            found = texts(seed, layout, file, min(per_file, count - first), larges, mix)
            if layout == 0:
                path = out / name / "train" / "chunk1" / f"example_train_{file}.jsonl.zst"
                write_slimpajama(path, found, (seed, 2, file))
            else:
                language = LANGUAGES[file % len(LANGUAGES)]
                write_starcoder(out / name / language / f"train-{file // len(LANGUAGES):05d}.parquet", found)
    issues = out / "starcoder" / ISSUES / "train-00000.parquet"
    issues.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"repo": ["a/b"], "issue_id": [1], "events": ["opened"], "content": ["not code"]})
    pyarrow.parquet.write_table(table, issues)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.documents < 10:
        parser.error("--documents must be at least 10")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    counts = make(args.out, args.documents, args.seed)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {counts} documents, {size:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
