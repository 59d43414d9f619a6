"""Token stores from arrays, without text and without `prepare`; and ways to damage a file."""

import functools
import hashlib
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tinyllama_jax import configio
from tinyllama_jax.config import Recipe
from tinyllama_jax.data import durable
from tinyllama_jax.data.shards import ShardWriter, token_dtype
from tinyllama_jax.data.store import FORMAT_VERSION, SPLITS, TokenStore
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.data.windows import packer

VOCAB = 300


@functools.lru_cache(maxsize=1)
def tokenizer_bytes() -> bytes:
    """A tokenizer.model of VOCAB ids."""
    with tempfile.TemporaryDirectory() as folder:
        lines = (f"line {i} of some text: x = {i * 7919} + y[{i}]\n" for i in range(2000))
        return train_bpe(lines, VOCAB, Path(folder) / "tokenizer.model").read_bytes()


def documents(count: int, seed: int = 0, *, longest: int = 80, vocab_size: int = VOCAB) -> list[np.ndarray]:
    """Random documents of 1 to `longest` tokens, each with EOS at its end."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, longest, count)
    return [np.append(random.integers(3, vocab_size, size), 2).astype(np.int32) for size in sizes]


def make_store(
    folder: Path,
    domains: dict[str, list[np.ndarray]],
    window_tokens: int = 17,
    packing: str = "none",
    *,
    validation: dict[str, list[np.ndarray]] | None = None,
    items: int = 1,
    shard_windows: int = 1 << 20,
    vocab_size: int = VOCAB,
) -> TokenStore:
    """A store of the given documents (token arrays) per domain, complete with plan and item records.

    validation: held-out documents per domain; None = copies of the first tenth.  items: each domain's documents are
    cut into so many runs.  vocab_size: what the manifest claims; the tokenizer that lies there has VOCAB ids.
    """
    folder.mkdir(parents=True)
    (folder / "items").mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    tokenizer = Tokenizer.load(folder)
    recipe = Recipe(sources=tuple(domains), window_tokens=window_tokens, packing=packing)
    held_out = validation or {domain: given[: max(1, len(given) // 10)] for domain, given in domains.items()}
    plan = {"format_version": 1, "recipe": configio.to_dict(recipe), "items": [[]] * items * len(domains)}
    plan = durable.write_record(folder / "plan.json", plan)
    records, entries = [], {split: {domain: [] for domain in domains} for split in SPLITS}
    for domain in domains:
        for part in range(items):
            number, record = len(records), {"format_version": 1, "splits": {}}
            read, lengths, content = Counter(documents=0, bytes=0), [0] * 40, hashlib.sha256()
            for split, given in (("train", domains[domain]), ("validation", held_out[domain])):
                mine = given[len(given) * part // items : len(given) * (part + 1) // items]
                place = folder / split / domain
                place.mkdir(parents=True, exist_ok=True)
                entry = _write(place, number, mine, window_tokens, packing, shard_windows, token_dtype(vocab_size))
                record["splits"][split] = {domain: entry}
                entries[split][domain].append(entry)
                read.update(documents=len(mine), bytes=entry["bytes"])
                for tokens in mine:
                    lengths[tokens.size.bit_length() - 1] += 1
                    content.update(tokens.tobytes())
            tokens = sum(e["tokens"] + e["dropped_tokens"] for d in record["splits"].values() for e in d.values())
            record |= {
                "item": number,
                "content_sha256": content.hexdigest(),
                "read": dict(read),
                "removed": {"min_chars=1": 1},
                "source_dropped": {},
                "groups": [[domain, "", dict(read) | {"tokens": tokens}]],
                "lengths": {domain: lengths},
            }
            records.append(durable.write_record(folder / "items" / f"{number:06d}.json", record))
    manifest = {
        "format_version": FORMAT_VERSION,
        "created_by": "tests",
        "recipe": configio.to_dict(recipe),
        "plan_sha256": plan["checksum"],
        "items": len(records),
        "content_sha256": durable.checksum({"items": [record["content_sha256"] for record in records]}),
        "window_tokens": window_tokens,
        "packing": packing,
        "dtype": token_dtype(vocab_size).str,
        "document_marks": "eos",
        "tokenizer": {
            "files": {"tokenizer.model": hashlib.sha256(tokenizer_bytes()).hexdigest()},
            "sha256": tokenizer.sha256,
            "vocab_size": vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "read": dict(sum((Counter(record["read"]) for record in records), Counter())),
        "removed": {"min_chars=1": len(records)},
        "source_dropped": {},
        "groups": [
            [domain, "", _sum(r["groups"][0][2] for r in records if domain in r["lengths"])] for domain in domains
        ],
        "lengths": {
            domain: np.sum([r["lengths"][domain] for r in records if domain in r["lengths"]], axis=0).tolist()
            for domain in domains
        },
        "splits": {
            split: {
                domain: {key: sum(e[key] for e in given) for key in given[0] if key != "shards"}
                | {"shards": [shard for e in given for shard in e["shards"]]}
                for domain, given in by_domain.items()
            }
            for split, by_domain in entries.items()
        },
    }
    durable.write_record(folder / "manifest.json", manifest)
    return TokenStore.open(folder)


def _sum(counts) -> dict:
    return dict(sum(map(Counter, counts), Counter()))


def _write(folder, number, given, window_tokens, packing, shard_windows, dtype) -> dict:
    pack, writer = packer(packing, window_tokens), ShardWriter(folder, number, window_tokens, dtype, shard_windows)
    used = 0
    for block in (*(block for tokens in given for block in pack.add(tokens)), *pack.finish()):
        writer.add(*block)
        used += sum(block[2])
    writer.close()
    return {
        "windows": writer.windows,
        "tokens": used,
        "documents": sum(shard.documents for shard in writer.shards),
        "bytes": sum(3 * tokens.size for tokens in given),
        "dropped_tokens": pack.dropped_tokens,
        "dropped_documents": pack.dropped_documents,
        "shards": [asdict(shard) for shard in writer.shards],
    }


def flip(file: Path, offset: int) -> None:
    """Changes one bit."""
    with file.open("r+b") as data:
        data.seek(offset)
        byte = data.read(1)[0]
        data.seek(offset)
        data.write(bytes([byte ^ 1]))


def truncate(file: Path, less: int = 2) -> None:
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size - less)
