"""Documents that a corpus holds twice: signatures of each item, one decision over all, a list for each item.

    sign(numbered documents, filters).write(SIG, plan)                      # per item, by any worker
    for path, removed in zip(LISTS, removals(SIGS, filters, plan), strict=True):  # once, when all are signed
        write_removals(path, removed, plan)
    read_removals(LIST, plan)                                               # per item: ordinal -> filter

Of duplicates the first in (item, ordinal) order stays, whoever signed them and when.

exact_duplicates: texts with the same 128-bit BLAKE2b hash.
near_duplicates=T: in that order, a document is removed when its Jaccard similarity to one that was kept is at least T;
exact duplicates are out before.  Similarity is that of the sets of shingles (5 words in a row), estimated by 128
MinHashes (Broder 1997); its standard error is sqrt(T (1 - T) / 128), 0.035 at T = 0.8.  The pairs to compare come
from locality-sensitive hashing (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4): at least 95 % of
those as similar as T (T > 0.02), and more of those beyond.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllama_jax.data import columns
from tinyllama_jax.data.columns import Columns
from tinyllama_jax.data.filters import EXACT, NEAR, Filters
from tinyllama_jax.errors import DataError

if TYPE_CHECKING:
    from tinyllama_jax.data.sources import Document

SIGNATURES, REMOVALS = "signatures", "removals"
REASONS = ("", EXACT, NEAR)  # by the number that stands for it
BUCKET_DOCUMENTS = 1 << 18  # whose hashes are compared at a time
PERMUTATIONS, SEED, SCHEME = 128, 1, "affine32"
RECALL = 0.95
SHINGLE_WORDS = 5
CHUNK_SHINGLES = 1024  # of which all permutations are computed at a time: 512 KiB, whatever the document's length
# Odd multipliers of SplitMix64 and MurmurHash3; which ones matters to nobody, as long as they stay the same.
ODD = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], np.uint64
)
# Scripts that set no spaces: Thai and Lao, Burmese, Khmer, Japanese and Chinese.  Each character counts as a word.
UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])")


@dataclass(frozen=True)
class Signatures:
    """Of one item's N documents that pass its filters.

    ordinals_N: uint64, ascending; the documents' places among all that the item reads.
    hashes_N2: uint64, the high and the low half.  minhashes_NP: uint32, or [N, 0] without near_duplicates.
    """

    ordinals_N: np.ndarray
    hashes_N2: np.ndarray
    minhashes_NP: np.ndarray

    def write(self, path: Path, plan: str) -> None:
        """In the order of the hashes, so that a bucket of them is one place of the file; equal ones stay in order."""
        order = np.lexsort((self.hashes_N2[:, 1], self.hashes_N2[:, 0]))
        arrays = {
            "high": self.hashes_N2[order, 0],
            "low": self.hashes_N2[order, 1],
            "ordinals": self.ordinals_N[order],
            "minhashes": self.minhashes_NP[order].T,  # a band of all documents is one place, too
        }
        columns.write(path, SIGNATURES, plan, arrays)


def is_signed(path: Path, plan: str) -> bool:
    """Whether the item's signatures are there, whole, and of this plan."""
    try:
        Columns(path, SIGNATURES, plan)
    except DataError:
        return False
    return True


def sign(documents: Iterable[tuple[int, Document]], filters: Filters) -> Signatures:
    """The signatures of (ordinal, document), in ascending order.  Memory: 24 bytes a document; 536 for near duplicates.

    Raises DataError when near duplicates are asked for and datasketch is not installed.
    """
    ordinals, hashes, minhashes = array("Q"), bytearray(), bytearray()
    minhash = _minhash() if filters.near is not None else None
    for ordinal, document in documents:
        ordinals.append(ordinal)
        hashes += _hash(document)
        if minhash is not None:
            minhash.clear()
            shingles = _shingles(_words(document))
            for start in range(0, shingles.size, CHUNK_SHINGLES):
                # One value, an array of hashes: the hash function is called once for all of them.
                minhash.update_batch([shingles[start : start + CHUNK_SHINGLES]])
            minhashes += minhash.hashvalues.tobytes()
    n = len(ordinals)
    return Signatures(
        np.frombuffer(ordinals, np.uint64) if n else np.zeros(0, np.uint64),
        np.frombuffer(hashes, np.uint64).reshape(n, 2),
        np.frombuffer(minhashes, np.uint32).reshape(n, PERMUTATIONS if minhash is not None else 0),
    )


def removals(files: Sequence[Path], filters: Filters, plan: str) -> Iterator[dict[int, str]]:
    """What is to be removed, item by item: ordinal -> the filter that removes it.

    files: of the signatures of all items, in the items' order.  Memory: 1 byte per document and 20 MB for a bucket of
    hashes; with near duplicates 50 bytes per document, and 5 KB per document that looks like another one (T = 0.8).
    Raises DataError for signatures that are missing, damaged or of another plan.
    """
    signed = [Columns(path, SIGNATURES, plan) for path in files]
    starts = np.cumsum([0] + [item.rows("high") for item in signed])
    reasons = np.zeros(starts[-1], np.uint8)
    if filters.exact:
        _find_exact(signed, starts, reasons)
    if filters.near is not None:
        _find_near(signed, starts, reasons, filters.near)
    return (_per_item(item, reasons[start:stop]) for item, (start, stop) in zip(signed, pairwise(starts), strict=True))


def write_removals(path: Path, removed: Mapping[int, str], plan: str) -> None:
    """One item's."""
    arrays = {
        "ordinals": np.array(sorted(removed), np.uint64),
        "reasons": np.array([REASONS.index(removed[ordinal]) for ordinal in sorted(removed)], np.uint8),
    }
    columns.write(path, REMOVALS, plan, arrays)


def read_removals(path: Path, plan: str) -> dict[int, str]:
    """Raises DataError for a list that is missing, damaged or of another plan."""
    stored = Columns(path, REMOVALS, plan)
    pairs = zip(stored.read("ordinals").tolist(), stored.read("reasons").tolist(), strict=True)
    return {ordinal: REASONS[reason] for ordinal, reason in pairs}


def _per_item(item: Columns, reasons_N: np.ndarray) -> dict[int, str]:
    rows = np.flatnonzero(reasons_N)
    pairs = zip(item.read("ordinals")[rows].tolist(), reasons_N[rows].tolist(), strict=True)
    return {ordinal: REASONS[reason] for ordinal, reason in sorted(pairs)}


# ---------------------------------------------------------------------------------------------------------
# Signing


def _hash(document: Document) -> bytes:
    if document.tokens is not None:
        data, kind = document.tokens.astype("<u4").tobytes(), b"tokens"
    else:
        data, kind = document.text.encode("utf-8", "surrogatepass"), b"text"
    return hashlib.blake2b(data, digest_size=16, person=kind).digest()


def _words(document: Document) -> np.ndarray:
    """uint64 [N]: a number for each word of a text, or the tokens."""
    if document.tokens is not None:
        return document.tokens.astype(np.uint64)
    words = UNSPACED.sub(r" \1 ", document.text).split()
    # Words hold no space: encoding them together is quicker than each for itself.
    encoded = " ".join(words).encode("utf-8", "surrogatepass").split(b" ") if words else []
    return np.fromiter(map(zlib.crc32, encoded), np.uint64, len(encoded))


def _shingles(words_N: np.ndarray) -> np.ndarray:
    """uint32 [max(1, N - 4)]: a hash for each 5 words in a row; fewer words are one shingle.

    Vector multiply-shift hashing (Dietzfelbinger 1996): the high half of sum_k words[i + k] ODD[k] modulo 2^64.
    """
    if words_N.size < SHINGLE_WORDS:
        sums = (words_N * ODD[: words_N.size]).sum(keepdims=True, dtype=np.uint64)
    else:
        n = words_N.size - SHINGLE_WORDS + 1
        sums = np.zeros(n, np.uint64)
        for k, odd in enumerate(ODD):
            sums += words_N[k : k + n] * odd
    return (sums >> np.uint64(32)).astype(np.uint32)


def _datasketch():
    try:
        import datasketch
    except ImportError as error:
        raise DataError(f"filter {NEAR!r} needs a package: pip install 'datasketch>=2,<3'") from error
    return datasketch


def _minhash():
    return _datasketch().MinHash(PERMUTATIONS, SEED, hashfunc=lambda hashes: hashes, scheme=SCHEME)


# ---------------------------------------------------------------------------------------------------------
# Deciding


def _find_exact(signed: list[Columns], starts: np.ndarray, reasons: np.ndarray) -> None:
    """Marks every document whose hash an earlier one has, a bucket of the hashes' top bits at a time."""
    bits = max(0, int(reasons.size // BUCKET_DOCUMENTS).bit_length())
    inner = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(0, np.uint64)
    borders = []
    for item in signed:
        high = item.read("high")
        borders.append(np.concatenate([[0], np.searchsorted(high, inner), [high.size]]))
    for bucket in range(1 << bits):
        parts = [
            (item, start, border[bucket], border[bucket + 1])
            for item, start, border in zip(signed, starts[:-1], borders, strict=True)
            if border[bucket] < border[bucket + 1]
        ]
        if not parts:
            continue
        high, low = (np.concatenate([item.read(name, a, b) for item, _, a, b in parts]) for name in ("high", "low"))
        rows = np.concatenate([np.arange(start + a, start + b) for _, start, a, b in parts])
        order = np.lexsort((low, high))  # stable: equal hashes stay in (item, ordinal) order
        high, low = high[order], low[order]
        reasons[rows[order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]]] = REASONS.index(EXACT)


def _find_near(signed: list[Columns], starts: np.ndarray, reasons: np.ndarray, threshold: float) -> None:
    """Marks what is similar to an earlier document that stays.

    Only documents that share a band with another one go into the index: the others could find nothing in it, and
    nothing could find them.
    """
    bands, width = _bands(threshold)
    index = _datasketch().MinHashLSH(num_perm=PERMUTATIONS, params=(bands, width))
    shared = _share_a_band(signed, starts, reasons == 0, bands, width)
    query, kept = _minhash(), []
    for item, (start, stop) in zip(signed, pairwise(starts), strict=True):
        rows = np.flatnonzero(shared[start:stop])
        if not rows.size:
            continue
        rows = rows[np.argsort(item.read("ordinals")[rows])]
        minhashes_CP = np.stack([item.read("minhashes", p, p + 1)[0, rows] for p in range(PERMUTATIONS)], axis=1)
        for row, minhash_P in zip(rows, minhashes_CP, strict=True):
            query.hashvalues = minhash_P
            if any(np.mean(kept[other] == minhash_P) >= threshold for other in index.query(query)):
                reasons[start + row] = REASONS.index(NEAR)
            else:
                index.insert(len(kept), query)
                kept.append(minhash_P)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, width): the widest bands of which RECALL of all pairs of that similarity share one, 1 - (1 - T^w)^b."""
    for width in range(PERMUTATIONS // 2, 0, -1):
        bands = PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return PERMUTATIONS, 1


def _share_a_band(signed: list[Columns], starts: np.ndarray, among: np.ndarray, bands: int, width: int) -> np.ndarray:
    """bool [documents]: those `among` them that have the same MinHashes in a band as another of them.

    Bands are compared by a 64-bit hash: an accident names a document too many, never one too few.
    """
    shared = np.zeros(among.size, bool)
    rows = np.flatnonzero(among)
    keys = np.empty(among.size, np.uint64)
    for band in range(bands):
        for item, (start, stop) in zip(signed, pairwise(starts), strict=True):
            mixed = np.zeros(stop - start, np.uint64)
            for minhash_N in item.read("minhashes", band * width, (band + 1) * width):
                mixed = (mixed ^ minhash_N) * ODD[0]
                mixed ^= mixed >> np.uint64(32)
            keys[start:stop] = mixed
        compared = keys[rows]
        order = np.argsort(compared)
        compared = compared[order]
        same = compared[1:] == compared[:-1]
        shared[rows[order[1:][same]]] = shared[rows[order[:-1][same]]] = True
    return shared
