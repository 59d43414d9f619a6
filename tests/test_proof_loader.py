"""The proof of the loader at a hundredth of its size: every claim but the speed, of which only the order is asked."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import made_store
import proof_loader

from tinyllama_jax.data.store import TokenStore

# What other test processes on the same cores leave of the claims about time; a cost that grows with the place in the
# run, or with the store, is far beyond.
BUSY = {"speed": 10e6, "seek": 4, "first_s": 60}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("loader")


@pytest.fixture(scope="module")
def results(stores):
    return proof_loader.prove(stores, (10**6, 10**7), runs=1, seconds=0.5, rounds=25)


@pytest.mark.slow
def test_the_claims_hold(results):
    assert proof_loader.failures(results, **BUSY) == []
    assert [found["stored_tokens"] for found in results.values()] == [pytest.approx(n, rel=0.01) for n in (1e6, 1e7)]


@pytest.mark.slow
def test_a_claim_that_fails_is_named_with_the_size(results):
    worse = copy.deepcopy(results)
    worse["1e+07"]["tokens_per_processor_s"]["median"] = 9e6
    (failed,) = proof_loader.failures(worse, **BUSY)
    assert failed.startswith("1e+07: 9.0 million tokens a second")
    worse = copy.deepcopy(results)
    worse["1e+06"]["memory"]["peak_resident_bytes"] += 20 << 20
    (failed,) = proof_loader.failures(worse, **BUSY)
    assert "memory differs by" in failed


def test_the_store_is_a_real_one_with_holes_for_tokens(tmp_path):
    opened = TokenStore.open(made_store.make_store(tmp_path, 10**6))
    for domain, share in made_store.SHARES.items():
        split = opened.split("train", domain)
        assert split.tokens == split.windows(2049) * 2049 == pytest.approx(share * 1e6, rel=0.01)
        windows = split.read(np.arange(split.windows(2049)), 2049)  # every one against its checksum
        assert not windows.tokens_NT.any() and (windows.used_N == 2049).all()
        assert windows.documents_NT.max() > 2 and windows.documents_NT.dtype == np.int32
    held = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.bin"))
    assert held < 100_000 < sum(path.stat().st_size for path in tmp_path.rglob("*.bin"))
