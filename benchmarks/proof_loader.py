"""Proof that reading is fast from the first batch on, anywhere in a run, in memory that the corpus does not decide.

    make proof-loader        # three minutes; 15 MB of disk beside files that are holes

Makes stores of 10**8 and 10**9 tokens in two sources and measures both as data.py does: mixed, shuffled, every window
checked against its CRC32, with segment ids, positions and masks of documents, on one core.  Writes
results/proof_loader.json.  Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import data
from lines import RESULTS, conclude, origin
from made_store import SEQUENCE, make_store

from tinyllama_jax.data.store import TokenStore

MEMORY_BYTES = 8 << 20  # between the two sizes


def prove(folder: Path, sizes: tuple[int, ...], *, runs: int, seconds: float, rounds: int) -> dict:
    """All measurements for stores of `sizes` tokens, made in `folder`: {size: {what: {...}}}."""
    results = {}
    for tokens in sizes:
        path = folder / f"{tokens:.0e}"
        path.mkdir()
        make_store(path, tokens)
        results[f"{tokens:.0e}"] = found = {
            "stored_tokens": sum(data.sources(TokenStore.open(path)).values()),
            **data.measure(path, data.BATCH_TOKENS, data.TRAINING, runs=runs, seconds=seconds, rounds=rounds),
            "memory": data.measured("memory", path, data.BATCH_TOKENS, 20),
        }
        print(json.dumps({f"{tokens:.0e}": found}), file=sys.stderr, flush=True)
    return results


def failures(results: dict, **claims: float) -> list[str]:
    """The claims that the results do not keep; `claims` in place of those of data.py."""
    failed = [f"{size}: {text}" for size, found in results.items() for text in data.failures(found, **claims)]
    peaks = [found["memory"]["peak_resident_bytes"] for found in results.values()]
    if max(peaks) - min(peaks) > MEMORY_BYTES:
        failed.append(f"memory differs by {(max(peaks) - min(peaks)) / 1e6:.1f} MB")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "proof_loader.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proof-loader-") as folder:
        results = prove(Path(folder), (10**8, 10**9), runs=3, seconds=8, rounds=60)
    record = {
        "benchmark": "proof_loader",
        "claims": {
            "tokens_per_processor_s": data.SPEED,
            "share_of_step": data.SHARE,
            "training_tokens_per_s": data.TRAINING,
            "processor_s_to_first_batch": data.FIRST_SECONDS,
            "later_batch_over_first": data.SEEK_RATIO,
            "memory_difference_bytes": MEMORY_BYTES,
        },
        **origin(),
        "batch_tokens": data.BATCH_TOKENS,
        "sequence_tokens": SEQUENCE,
        "results": results,
    }
    return conclude(record, failures(results), args.out)


if __name__ == "__main__":
    sys.exit(main())
