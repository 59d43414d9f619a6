"""A token store of any size that takes next to no disk: for measuring the loader without a corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from tinyllama_jax.data import durable, shards, store
from tinyllama_jax.data.shards import BIN, DOC, IDX, Shard

SEQUENCE = 2048
SHARES = {"prose": 0.7, "code": 0.3}
SHARD_WINDOWS = 1 << 18  # 1 GiB
PATTERNS = 16  # of where documents begin; two in a window on average


def make_store(folder: Path, tokens: int) -> Path:
    """About `tokens` tokens in two sources: real indices, document places and checksums, over tokens that are all 0,
    which a file system keeps as holes."""
    length, random = SEQUENCE + 1, np.random.default_rng(0)
    dtype, places = np.dtype("<u2"), shards.place_dtype(length)
    patterns = [np.sort(random.choice(length, n, replace=False)).astype(places) for n in random.poisson(2, PATTERNS)]
    crcs = [shards.window_crc(bytes(length * dtype.itemsize), p.tobytes(), p.size, length) for p in patterns]
    splits = {"train": {}, "validation": {}}
    for item, (domain, share) in enumerate(SHARES.items()):
        windows, made = int(tokens * share) // length, []
        for first in range(0, windows, SHARD_WINDOWS):
            pattern = np.arange(min(SHARD_WINDOWS, windows - first)) % PATTERNS
            counts = np.array([p.size for p in patterns])[pattern]
            index = np.zeros(pattern.size + 1, shards.INDEX_DTYPE)
            index["crc"][:-1], index["used"][:-1] = np.array(crcs, np.uint32)[pattern], length
            index["before"][1:] = np.cumsum(counts)
            documents = np.concatenate([patterns[i] for i in pattern])
            name = f"{item:06d}-{len(made):02d}"
            path = folder / "train" / domain / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}{BIN}").touch()
            os.truncate(f"{path}{BIN}", pattern.size * length * dtype.itemsize)
            Path(f"{path}{IDX}").write_bytes(index.tobytes())
            Path(f"{path}{DOC}").write_bytes(documents.tobytes())
            sha256 = {suffix: _sha256(Path(f"{path}{suffix}")) for suffix in (BIN, IDX, DOC)}
            made.append(Shard(name, item, pattern.size, documents.size, sha256))
        splits["train"][domain] = {
            "windows": windows,
            "tokens": windows * length,
            "documents": sum(shard.documents for shard in made),
            "bytes": 4 * windows * length,
            "shards": [dataclasses.asdict(shard) for shard in made],
        }
    tokenizer = random.bytes(500_000)  # as large as TinyLlama's; only its hash is looked at
    (folder / "tokenizer.model").write_bytes(tokenizer)
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    manifest = {
        "format_version": store.FORMAT_VERSION,
        "window_tokens": length,
        "packing": "none",
        "dtype": dtype.str,
        "tokenizer": {"files": {"tokenizer.model": sha256}, "sha256": sha256, "vocab_size": 32000},
        "splits": splits,
    }
    durable.write_record(folder / store.MANIFEST, manifest)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
