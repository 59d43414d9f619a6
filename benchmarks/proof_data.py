"""Proof that a store is the same bytes however it was made, and that nothing of the text is lost in it.

    make proof-data        # a million documents: 4 GB of disk, about half an hour on two cores

Generates corpora in SlimPajama's and StarCoder's layouts (corpus.py) and prepares them with the commands a user types:
with one worker, and with two that are killed (-9) ten times in between, by turns the whole process group and one worker
alone.  Then the corpora are read and encoded again by other code than prepare's (zstandard, pyarrow and SentencePiece
by themselves, every text in one piece) and the store is compared with that, token by token and text by text.
Writes results/proof_data.json.  Exit status 1 when a claim fails.  Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import corpus
import numpy as np
import pyarrow.parquet
import sentencepiece
import zstandard
from lines import RESULTS, ROOT, origin

from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.tokenizer import train_bpe

CLAIM = (
    "one worker, and two killed ten times in between, make the same bytes; every document that lies wholly in kept "
    "windows decodes to its text; the dropped tokens are those that the manifest counts"
)
KILLS = 10
ITEMS = 100  # about so many at least, so that every kill falls between others
VOCAB_SIZE, VOCAB_CHARACTERS = 8192, 4_000_000  # of a vocabulary trained on so much of the text


class Failed(RuntimeError):
    """A claim that does not hold."""


# --- making the stores ---


def command(folder: Path, out: Path, workers: int, item_bytes: int) -> list[str]:
    sources = (f"slimpajama:{folder / 'corpus/slimpajama'}", f"starcoder:{folder / 'corpus/starcoder'}")
    options = ("--workers", workers, "--tokenizer", folder / "tokenizer.model", "--item-bytes", item_bytes)
    program = (sys.executable, "-m", "tinyllama_jax", "prepare", *sources, "--out", out, *options)
    return [str(word) for word in program]


def start(words: list[str]) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **quiet)


def finish(words: list[str]) -> float:
    """Runs prepare to its end; -> seconds."""
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failed(f"prepare ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - begin


def workers_of(process: subprocess.Popen) -> list[int]:
    """Those of its children that tokenise."""
    found = []
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"spawn_main" in words:
            found.append(int(child))
    return found


def killed(words: list[str], out: Path, kills: int, items: int, pause: float, choose: random.Random) -> list[dict]:
    """Starts prepare and kills it, again and again; -> what was killed, when.

    The first kill falls into the first second, the others up to `pause` seconds after so many more of the items were
    done.  Raises Failed when prepare came to its end.
    """
    log = []
    for number in range(kills):
        process, begin = start(words), time.perf_counter()
        enough = items * number * 2 // (3 * kills)  # so that much is left to do after the last
        while number and done_items(out) < enough and process.poll() is None:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, pause if number else 1))
        victims = workers_of(process) if number % 2 else []
        ended = process.poll() is not None
        if victims:
            os.kill(choose.choice(victims), signal.SIGKILL)
            ended |= process.wait(timeout=600) == 0
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if ended or (out / "manifest.json").exists():
            raise Failed(f"prepare ended with {process.returncode} at kill {number + 1}; make more documents")
        what = "one worker" if victims else "process group"
        log.append({"killed": what, "after_s": round(time.perf_counter() - begin, 2), "items_done": done_items(out)})
    return log


def done_items(out: Path) -> int:
    return len(list((out / "items").glob("[0-9]*.json")))


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for file in sorted(store.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                found[file.relative_to(store).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


# --- reading the corpora again ---


def texts(path: Path) -> Iterator[str]:
    """The documents of one file that belong into the store."""
    if path.suffix == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(100, columns=["content"]):
            yield from (text for text in batch.column(0).to_pylist() if text.strip())
        return
    with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as lines:
        rest = b""
        while chunk := lines.read(1 << 22):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                record = json.loads(line)
                if record["meta"]["redpajama_set_name"] != "RedPajamaGithub" and record["text"].strip():
                    yield record["text"]


class Expected:
    """What one item should have put into one domain of one split, compared with what is there."""

    def __init__(self, store: TokenStore, split: str, domain: str, item: int, eos: int):
        entry = store.split(split, domain)
        windows = np.cumsum([0] + [shard.windows for shard in entry.shards])
        mine = [i for i, shard in enumerate(entry.shards) if shard.item == item]
        ids = np.arange(windows[mine[0]], windows[mine[-1] + 1]) if mine else np.arange(0)
        found = entry.read(ids, store.window_tokens)
        ends = found.tokens_NT == eos
        if not (np.diff(found.documents_NT, axis=1) == ends[:, :-1]).all():
            raise Failed(f"{split}/{domain}, item {item}: documents do not begin where one has ended")
        self.where = f"{split}/{domain}, item {item}"
        self.tokens, self.place, self.counts = found.tokens_NT.reshape(-1), 0, Counter()

    def add(self, text: str, sp: sentencepiece.SentencePieceProcessor) -> None:
        ids = [*sp.encode(text), sp.eos_id()]
        there = self.tokens[self.place : self.place + len(ids)].tolist()
        if there != ids[: len(there)]:
            raise Failed(f"{self.where}: other tokens than SentencePiece gives from {self.place} on")
        if len(there) == len(ids):
            # A vocabulary of this kind rewrites one thing: it spells a space as U+2581, so that this becomes a space.
            if sp.decode(there[:-1]) != text.replace("\u2581", " "):
                raise Failed(f"{self.where}: the document at {self.place} does not come back from its tokens")
            self.counts["decoded"] += 1
        else:
            self.counts["cut" if there else "dropped"] += 1
        self.place += len(ids)
        self.counts.update(tokens=len(there), dropped_tokens=len(ids) - len(there), bytes=len(text.encode()))


def compare(store_path: Path, number: int) -> dict[str, Counter]:
    """One item of the store against its inputs: per split/domain, what was counted."""
    plan = json.loads((store_path / "plan.json").read_bytes())
    item = plan["items"][number]
    domain, _, root = plan["recipe"]["sources"][item["source"]].partition(":")
    threshold = plan["thresholds"].get(domain, int(plan["recipe"]["validation_share"] * 2**64))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(store_path / "tokenizer.model"))
    store = TokenStore.open(store_path)
    expected = {s: Expected(store, s, domain, number, sp.eos_id()) for s in ("train", "validation")}
    for path, *_ in item["inputs"]:
        for text in texts(Path(root) / path):
            place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            expected["validation" if place < threshold else "train"].add(text, sp)
    return {f"{split}/{domain}": one.counts for split, one in expected.items()}


def check(store_path: Path, items: int) -> dict[str, dict]:
    """The whole store against the corpora and its manifest; -> counts per split/domain.  Raises Failed."""
    total: dict[str, Counter] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for found in pool.map(compare, [store_path] * items, range(items)):
            for key, counts in found.items():
                total.setdefault(key, Counter()).update(counts)
    for split, domains in json.loads((store_path / "manifest.json").read_bytes())["splits"].items():
        for domain, entry in domains.items():
            counts = total[f"{split}/{domain}"]
            wanted = {
                "tokens": counts["tokens"],
                "dropped_tokens": counts["dropped_tokens"],
                "documents": counts["decoded"] + counts["cut"],
                "dropped_documents": counts["dropped"],
                "bytes": counts["bytes"],
            }
            for key, value in wanted.items():
                if entry[key] != value:
                    raise Failed(f"{split}/{domain}: the manifest counts {entry[key]} {key}, there are {value}")
    return {key: dict(sorted(counts.items())) for key, counts in sorted(total.items())}


# --- all of it ---


def prove(folder: Path, documents: int, seed: int, kills: int = KILLS) -> dict:
    """-> what was found.  Raises Failed when a claim does not hold."""
    begin = time.perf_counter()
    counts = corpus.make(folder / "corpus", documents, seed)
    pools = corpus.pools()
    train_bpe(
        (pools[name][: VOCAB_CHARACTERS // 2] for name in ("prose", "code")), VOCAB_SIZE, folder / "tokenizer.model"
    )
    made = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in (folder / "corpus").rglob("*") if file.is_file())
    one, two = folder / "one", folder / "two"
    seconds = {"generate": made, "one worker": finish(command(folder, one, 1, size // ITEMS))}
    items = done_items(one)
    pause = min(10.0, 2 * seconds["one worker"] / items)
    log = killed(command(folder, two, 2, size // ITEMS), two, kills, items, pause, random.Random(seed))
    seconds["two workers, after the last kill"] = finish(command(folder, two, 2, size // ITEMS))
    files = digests(one)
    if (others := digests(two)) != files:
        differ = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
        raise Failed(f"{len(differ)} files differ after kills, first {differ[0]}")
    begin = time.perf_counter()
    found = check(two, items)
    seconds["compare with the corpora"] = time.perf_counter() - begin
    manifest = json.loads((two / "manifest.json").read_bytes())
    return {
        "documents": counts,
        "corpus_bytes": size,
        "read": manifest["read"],
        "left_out": manifest["removed"] | manifest["source_dropped"],
        "items": items,
        "kills": log,
        "files_equal": len(files),
        "store_bytes": sum((two / name).stat().st_size for name in files),
        "compared": found,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="where the 4 GB go; default: the temporary directory")
    parser.add_argument("--out", type=Path, default=RESULTS / "proof_data.json")
    args = parser.parse_args()
    packages = ("sentencepiece", "zstandard", "pyarrow", "numpy")
    record = {
        "benchmark": "proof_data",
        "claim": CLAIM,
        **origin(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "seed": args.seed,
    }
    record["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    with tempfile.TemporaryDirectory(prefix="proof-data-", dir=args.workdir) as folder:
        try:
            record |= prove(Path(folder), args.documents, args.seed)
        except Failed as error:
            print(f"proof_data: {error}", file=sys.stderr)
            return 1
    print(json.dumps(record), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
