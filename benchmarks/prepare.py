"""Speed of `prepare` beside the bare tokenizers: how much of a core its reading, hashing and writing take.

    python benchmarks/prepare.py         # about ten minutes on two cores, 1 GB of disk

Generates text in SlimPajama's layout (corpus.py: prose and some code, 4 kB on average) and trains a vocabulary.  Then,
by turns and several times: SentencePiece's `encode` of every text by itself, and the same with Hugging Face's
tokenizers and the same vocabulary (by each of its two ways, without threads), both from memory; and `prepare` as a user
types it with one worker and with two, from the .jsonl.zst files to a finished store.  All get the same tokens out of
the same text, so speeds compare as times do.

Processor time is of all threads and processes, which other programs disturb less than the clock; the number of cores
that two workers are worth is by the clock.  Prints one line of JSON.  Exit status 1 when the tokens differ.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import corpus
from lines import ROOT, emit, isolated, origin, spread

from tinyllama_jax.data.sources import open_source
from tinyllama_jax.data.tokenizer import train_bpe, write_tokenizer_json

DOCUMENTS = 45_000  # of which 31,500 are in SlimPajama's layout: 72 MB, more than `prepare` reads beforehand
VOCAB_SIZE, VOCAB_CHARACTERS = 8192, 4_000_000
ITEM_BYTES = 1 << 20
BATCH = 1000  # texts that tokenizers get at once


def timed(encode: Callable[[list[str]], int], texts: list[str]) -> dict:
    encode(texts[:100])
    clock, processor = time.perf_counter(), time.process_time()
    tokens = encode(texts)
    return {
        "seconds": time.perf_counter() - clock,
        "processor_s": time.process_time() - processor,
        "tokens": tokens,
    }


def texts_of(folder: Path) -> list[str]:
    return [document.text for document in open_source(f"slimpajama:{folder / 'corpus/slimpajama'}")]


def sentencepiece_alone(folder: Path) -> dict:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return timed(lambda texts: sum(len(sp.encode(text)) for text in texts), texts_of(folder))


def tokenizers_alone(folder: Path, method: str) -> dict:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text, as it is for SentencePiece
    encode = getattr(tokenizer, method)

    def batches(texts: list[str]) -> int:
        groups = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        return sum(len(one.ids) for group in groups for one in encode(group, add_special_tokens=False))

    return timed(batches, texts_of(folder))


def prepare(folder: Path, workers: int) -> dict:
    """A whole store by the command; the tokens without the mark that ends each document."""
    out = folder / "store"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what another measurement wrote is not waited for in this one
    source = f"slimpajama:{folder / 'corpus/slimpajama'}"
    options = ("--workers", workers, "--tokenizer", folder / "tokenizer.model", "--item-bytes", ITEM_BYTES)
    words = (sys.executable, "-m", "tinyllama_jax", "prepare", source, "--out", out, *options)
    begin = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([str(word) for word in words], cwd=ROOT, **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    manifest = json.loads((out / "manifest.json").read_bytes())
    groups = [counts for *_, counts in manifest["groups"]]
    tokens = sum(counts["tokens"] - counts["documents"] for counts in groups)
    return {"seconds": seconds, "processor_s": usage.ru_utime + usage.ru_stime, "tokens": tokens}


def measure(folder: Path, rounds: int) -> dict[str, list[dict]]:
    """Every measurement once in each round, in a process of its own."""
    ways = {
        "sentencepiece": lambda: isolated(sentencepiece_alone, folder),
        "prepare, 1 worker": lambda: prepare(folder, 1),
        "tokenizers encode_batch": lambda: isolated(tokenizers_alone, folder, "encode_batch"),
        "tokenizers encode_batch_fast": lambda: isolated(tokenizers_alone, folder, "encode_batch_fast"),
        "prepare, 2 workers": lambda: prepare(folder, 2),
    }
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def summary(found: dict[str, list[dict]]) -> dict:
    """Speeds, and their ratios round by round."""

    def ratio(over: str, under: str, key: str) -> dict:
        return spread([b[key] / a[key] for a, b in zip(found[over], found[under], strict=True)], 3)

    one, two = "prepare, 1 worker", "prepare, 2 workers"
    fastest = min(
        (name for name in found if name.startswith("tokenizers")),
        key=lambda name: statistics.median(line["processor_s"] for line in found[name]),
    )
    return {
        "tokens": found[one][0]["tokens"],
        "tokens_per_processor_s": {n: spread([x["tokens"] / x["processor_s"] for x in f]) for n, f in found.items()},
        "tokens_per_s": {n: spread([x["tokens"] / x["seconds"] for x in f]) for n, f in found.items()},
        "prepare_over_sentencepiece": ratio(one, "sentencepiece", "processor_s"),
        "prepare_over_tokenizers": ratio(one, fastest, "processor_s"),
        "tokenizers": fastest,
        "two_workers_over_one": ratio(two, one, "seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, help="where the files go; default: the temporary directory")
    parser.add_argument("--out", type=Path, help="a file that the line is added to")
    args = parser.parse_args()
    packages = ("sentencepiece", "tokenizers", "zstandard", "numpy")
    line = {"benchmark": "prepare", **origin(), "cores": os.cpu_count()}
    line["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=args.workdir) as name:
        folder = Path(name)
        corpus.make(folder / "corpus", args.documents, 0, corpus.PLAIN)
        shutil.rmtree(folder / "corpus/starcoder")
        texts = (corpus.pools()[pool][: VOCAB_CHARACTERS // 2] for pool in ("prose", "code"))
        model = train_bpe(texts, VOCAB_SIZE, folder / "tokenizer.model")
        write_tokenizer_json(model, folder / "tokenizer.json")
        found = measure(folder, args.rounds)
    line |= {"vocab_size": VOCAB_SIZE, "documents": args.documents, **summary(found)}
    if args.out:
        with args.out.open("a") as file:
            emit(line, file)
    else:
        emit(line)
    counts = {name: sorted({one["tokens"] for one in lines}) for name, lines in found.items()}
    if len({tuple(count) for count in counts.values()}) != 1:
        print(f"prepare: the tokens differ: {counts}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
