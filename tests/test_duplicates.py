"""Duplicates: what is removed is what comparing all pairs would remove, whoever signed the items and when."""

import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.data import duplicates, filters
from tinyllama_jax.data.duplicates import Signatures, is_signed, read_removals, removals, sign, write_removals
from tinyllama_jax.data.sources import Document
from tinyllama_jax.errors import DataError

PLAN = "ab" * 32
EXACT, NEAR = filters.parse(("exact_duplicates",)), filters.parse(("near_duplicates=0.8",))
BOTH = filters.parse(("exact_duplicates", "near_duplicates=0.8"))


def doc(text: str = "", tokens: np.ndarray | None = None) -> Document:
    return Document("web", text, "memory", tokens=tokens)


def signed(folder: Path, items: list[list[Document]], which: filters.Filters, numbers=None) -> list[Path]:
    """Signature files of all items, written in the order of `numbers`; documents have the ordinals 0, 3, 6, ..."""
    files = [folder / f"{number}.sig" for number in range(len(items))]
    for number in numbers or range(len(items)):
        sign(((3 * i, document) for i, document in enumerate(items[number])), which).write(files[number], PLAN)
    return files


def decide(folder: Path, items: list[list[Document]], which: filters.Filters, numbers=None) -> list[dict[int, str]]:
    return list(removals(signed(folder, items, which, numbers), which, PLAN))


def texts(rng: random.Random, items: int, each: int, alphabet: list[str]) -> list[list[Document]]:
    return [[doc("".join(rng.choices(alphabet, k=rng.randrange(4)))) for _ in range(each)] for _ in range(items)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bucket", [7, 1 << 18])
def test_exact_removes_what_comparing_all_pairs_removes(tmp_path, monkeypatch, seed, bucket):
    monkeypatch.setattr(duplicates, "BUCKET_DOCUMENTS", bucket)
    rng = random.Random(seed)
    items = texts(rng, 6, rng.randrange(1, 60), ["a", "é", "語", "\n", "\ud800"])
    items[2] = []
    before, expected = [], []
    for item in items:
        expected.append({})
        for i, document in enumerate(item):
            if any(document.text == other for other in before):
                expected[-1][3 * i] = "exact_duplicates"
            before.append(document.text)
    order = rng.sample(range(6), 6)
    assert decide(tmp_path, items, EXACT, order) == expected
    assert sum(map(len, expected)) > 0


def test_tokens_are_compared_with_tokens_whatever_their_type(tmp_path):
    tokens = np.array([1, 300, 5], np.uint16)
    as_text = doc(tokens.astype("<u4").tobytes().decode("latin-1"))
    items = [
        [doc(tokens=tokens), as_text, doc(tokens=tokens[:2])],
        [doc(tokens=tokens.astype(np.int64)), doc(tokens=tokens[::-1])],
    ]
    assert decide(tmp_path, items, EXACT) == [{}, {0: "exact_duplicates"}]


def test_empty_corpora_and_documents(tmp_path):
    assert decide(tmp_path, [], BOTH) == []
    assert decide(tmp_path, [[], []], BOTH) == [{}, {}]
    empty = [doc("")] * 2
    assert decide(tmp_path, [empty, [doc(" ")]], EXACT) == [{3: "exact_duplicates"}, {}]
    assert decide(tmp_path, [empty, [doc(" ")]], BOTH) == [{3: "exact_duplicates"}, {0: "near_duplicates"}]


SIGN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_duplicates import BOTH, corpus, signed
signed(Path(sys.argv[1]), corpus(3, 0.9, 2, 20), BOTH, numbers=eval(sys.argv[2]))
"""


def test_signatures_do_not_depend_on_the_process(tmp_path):
    """Python's own hash of a string, for one, does."""
    content = []
    for seed, order in (("1", "[0, 1]"), ("2", "[1, 0]")):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SIGN, folder, order], env=environment, check=True)
        content.append([file.read_bytes() for file in sorted(folder.iterdir())])
    assert content[0] == content[1] and len(content[0]) == 2


# ---------------------------------------------------------------------------------------------------------
# Near duplicates


def pair(rng: random.Random, similarity: float, shingles: int = 400) -> tuple[str, str, float]:
    """Two texts of which the sets of shingles have about that Jaccard similarity; and the exact one."""
    both = round(2 * shingles * similarity / (1 + similarity))
    words = [f"w{rng.getrandbits(60)}" for _ in range(2 * shingles + 4 - both)]
    a, b = words[: shingles + 4], words[: both + 4] + words[shingles + 4 :]
    return " ".join(a), "\n ".join(b), both / (2 * shingles - both)


def shingles_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[k:] for k in range(5)), strict=False)) or {tuple(words)}


def jaccard(a: str, b: str) -> float:
    a, b = shingles_of(a), shingles_of(b)
    return len(a & b) / len(a | b)


def corpus(seed: int, similarity: float, items: int, each: int) -> list[list[Document]]:
    """Documents of which many are others with some words changed: pairs of every similarity."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(2000)]
    made = []
    for _ in range(items * each):
        if made and rng.random() < 0.7:
            kept = similarity + (1 - similarity) * rng.random()
            text = [w if rng.random() < kept else rng.choice(words) for w in rng.choice(made[-20:])]
        else:
            text = rng.choices(words, k=rng.randrange(1, 80))
        made.append(text)
    documents = [doc(" ".join(text)) for text in made]
    return [documents[start : start + each] for start in range(0, len(documents), each)]


def test_the_estimate_is_the_similarity(tmp_path):
    rng = random.Random(0)
    for similarity in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        errors = []
        for _ in range(30):
            a, b, exact = pair(rng, similarity)
            assert exact == jaccard(a, b)
            first, second = sign([(0, doc(a)), (1, doc(b))], NEAR).minhashes_NP
            errors.append(np.mean(first == second) - exact)
        deviation = (exact * (1 - exact) / duplicates.PERMUTATIONS) ** 0.5
        assert abs(np.mean(errors)) <= 3 * deviation / 30**0.5 and np.max(np.abs(errors)) <= 4 * deviation


def test_similar_pairs_are_removed_and_different_ones_kept(tmp_path):
    rng = random.Random(1)
    similar, different = [], []
    for _ in range(40):
        similar += [doc(text) for text in pair(rng, 0.95)[:2]]
        different += [doc(text) for text in pair(rng, 0.2)[:2]]
    first, second, third = decide(tmp_path, [similar[::2] + different[::2], similar[1::2], different[1::2]], NEAR)
    assert first == {} and third == {}
    assert second == {3 * i: "near_duplicates" for i in range(40)}


def test_at_the_threshold_itself_few_candidates_are_missed():
    """The recall of the bands, against the formula and drawn."""
    rng = np.random.default_rng(0)
    for threshold in (0.03, 0.1, 0.5, 0.7, 0.8, 0.9, 0.96, 0.99, 1.0):
        bands, width = duplicates._bands(threshold)
        assert bands >= 2 and bands * width <= duplicates.PERMUTATIONS
        equal = rng.random((2000, bands, width)) < threshold
        assert equal.all(2).any(1).mean() >= duplicates.RECALL - 0.02, threshold


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_near_removes_what_comparing_all_pairs_removes(tmp_path, seed, threshold):
    items = corpus(seed, threshold - 0.1, 4, 40)
    which = filters.parse((f"near_duplicates={threshold}",))
    found = decide(tmp_path, items, which, numbers=[2, 0, 3, 1])
    kept, removed = [], 0
    slack = 4 * (threshold * (1 - threshold) / duplicates.PERMUTATIONS) ** 0.5
    for item, gone in zip(items, found, strict=True):
        for i, document in enumerate(item):
            nearest = max((jaccard(document.text, other) for other in kept), default=0.0)
            if 3 * i in gone:
                removed += 1
                assert nearest >= threshold - slack
            else:
                assert nearest <= threshold + slack and (threshold < 1 or nearest < 1)
                kept.append(document.text)
    assert 10 < removed < 150


def test_the_first_selection_changes_nothing(tmp_path, monkeypatch):
    """Documents that share no band are left out of the index; with all of them in it the result is the same."""
    items = corpus(7, 0.6, 3, 60)
    files = signed(tmp_path, items, BOTH)
    selected = list(removals(files, BOTH, PLAN))
    counted = []

    def everything(signed, starts, among, bands, width):
        counted.append(share(signed, starts, among, bands, width).sum())
        return among

    share = duplicates._share_a_band
    monkeypatch.setattr(duplicates, "_share_a_band", everything)
    assert list(removals(files, BOTH, PLAN)) == selected
    assert 0 < counted[0] < 180
    assert "near_duplicates" in {reason for item in selected for reason in item.values()}


def test_exact_duplicates_go_first_and_are_called_so(tmp_path):
    a, b, _ = pair(random.Random(5), 0.95)
    items = [[doc(a), doc("other text")], [doc(b), doc(a), doc(b)]]
    assert decide(tmp_path, items, BOTH) == [
        {},
        {0: "near_duplicates", 3: "exact_duplicates", 6: "exact_duplicates"},
    ]
    assert decide(tmp_path, items, NEAR) == [{}, dict.fromkeys((0, 3, 6), "near_duplicates")]


def test_what_was_removed_removes_nothing(tmp_path):
    """A chain of small changes: each is compared with those that were kept only."""
    words = [f"w{i}" for i in range(404)]
    chain = []
    for _ in range(12):
        chain.append(doc(" ".join(words)))
        words = [*words[20:], *(f"n{len(chain)}-{i}" for i in range(20))]  # 380 of 400 shingles stay
    assert jaccard(chain[0].text, chain[1].text) == 380 / 420
    (gone,) = decide(tmp_path, [chain], NEAR)
    kept = [document.text for i, document in enumerate(chain) if 3 * i not in gone]
    assert 3 <= len(kept) <= 6
    assert all(jaccard(a, b) < 0.9 for a, b in itertools.combinations(kept, 2))


def test_short_texts_are_one_shingle(tmp_path):
    items = [[doc("one two three four"), doc("one  two\tthree four"), doc("one two three")]]
    assert decide(tmp_path, items, NEAR) == [{3: "near_duplicates"}]


def test_scripts_without_spaces(tmp_path):
    rng = random.Random(3)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(500))
    other = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(500))
    items = [[doc(chinese), doc(chinese[:250] + "。" + chinese[250:]), doc(chinese[:100] + other)]]
    assert decide(tmp_path, items, NEAR) == [{3: "near_duplicates"}]


def test_near_duplicates_among_tokens(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32000, 1000).astype(np.uint16)
    changed, other = tokens.copy(), rng.integers(0, 32000, 1000).astype(np.uint16)
    changed[[100, 500]] += 1
    other[:300] = tokens[:300]
    assert decide(tmp_path, [[doc(tokens=t) for t in (tokens, changed, other)]], NEAR) == [{3: "near_duplicates"}]


@pytest.mark.parametrize("n", [1, 5, 1024, 1025, 3000])
def test_minhashes_are_those_of_datasketch(n):
    """One by one through the library's plain interface."""
    datasketch = pytest.importorskip("datasketch")
    tokens = np.random.default_rng(n).integers(0, 32000, n + 4)
    plain = datasketch.MinHash(duplicates.PERMUTATIONS, duplicates.SEED, hashfunc=int, scheme=duplicates.SCHEME)
    for shingle in duplicates._shingles(tokens.astype(np.uint64)):
        plain.update(shingle)
    (row,) = sign([(0, doc(tokens=tokens))], NEAR).minhashes_NP
    assert np.array_equal(row, plain.hashvalues) and row.dtype == np.uint32


def test_without_datasketch_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match="pip install 'datasketch"):
        sign([], NEAR)
    assert decide(tmp_path, [[doc("a")] * 2], EXACT) == [{3: "exact_duplicates"}]


# ---------------------------------------------------------------------------------------------------------
# Files


def test_what_is_read_is_what_was_written(tmp_path):
    (gone,) = decide(tmp_path, [[doc(text) for text in "abcabca"]], EXACT)
    for removed in (gone, {}, {5: "near_duplicates", 1 << 40: "exact_duplicates"}):
        write_removals(tmp_path / "list", removed, PLAN)
        assert read_removals(tmp_path / "list", PLAN) == removed
    assert gone == dict.fromkeys((9, 12, 15, 18), "exact_duplicates")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.sig", "list"]


def test_every_damage_is_noticed(tmp_path):
    (file,) = signed(tmp_path, [[doc("a b"), doc("c")]], BOTH)
    removed = tmp_path / "list"
    write_removals(removed, {3: "near_duplicates"}, PLAN)
    rng = random.Random(0)
    for path, read in ((file, lambda: removals([file], BOTH, PLAN)), (removed, lambda: read_removals(removed, PLAN))):
        whole = path.read_bytes()
        read()
        damages = [whole[:n] for n in (0, 1, 64, 65, 100, len(whole) - 1)] + [whole + b"\0", b"\n" * 100]
        for place in {*range(0, 70), *rng.sample(range(len(whole)), 100), len(whole) - 1}:
            damages.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        for damage in damages:
            path.write_bytes(damage)
            with pytest.raises(DataError, match=f"{path.name}: is damaged; remove it"):
                read()
            assert not is_signed(path, PLAN)
        path.write_bytes(whole)
    assert is_signed(file, PLAN) and not is_signed(removed, PLAN)


def test_missing_files_and_files_of_another_plan(tmp_path):
    (file,) = signed(tmp_path, [[doc("a")]], EXACT)
    assert is_signed(file, PLAN) and not is_signed(file, "cd" * 32) and not is_signed(tmp_path / "none", PLAN)
    with pytest.raises(DataError, match="0.sig: holds signatures of another plan"):
        removals([file], EXACT, "cd" * 32)
    with pytest.raises(DataError, match="none: cannot be read .No such file"):
        removals([file, tmp_path / "none"], EXACT, PLAN)
    with pytest.raises(DataError, match="0.sig: holds signatures"):
        read_removals(file, PLAN)


MEMORY = """
import sys
from pathlib import Path
from tinyllama_jax.data import duplicates, filters

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10

files = sorted(Path(sys.argv[1]).glob("*.sig"))
exact = filters.parse(("exact_duplicates",))
list(duplicates.removals(files[:1], exact, sys.argv[2]))  # what the libraries themselves take
before, found = peak(), 0
for gone in duplicates.removals(files, exact, sys.argv[2]):
    found += len(gone)
print(found, peak() - before)
"""


def test_exact_removal_needs_little_memory(tmp_path):
    """Two million hashes, 48 MB of signatures."""
    rng = np.random.default_rng(0)
    hashes_N2 = rng.integers(0, 1 << 64, (2_000_000, 2), np.uint64)
    hashes_N2[1_900_000:] = hashes_N2[rng.choice(1_900_000, 100_000, replace=False)]
    ordinals = np.arange(125_000, dtype=np.uint64)
    for number, part in enumerate(np.split(rng.permutation(hashes_N2), 16)):
        Signatures(ordinals, part, np.zeros((125_000, 0), np.uint32)).write(tmp_path / f"{number:02d}.sig", PLAN)
    command = [sys.executable, "-c", MEMORY, tmp_path, PLAN]
    found, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert found == 100_000
    assert grown < 32 << 20


def test_all_128_bits_count(tmp_path):
    """Half a hash would call texts equal by accident from some 2^32 documents on."""
    hashes_N2 = np.array([[1, 1], [1, 2], [2, 1], [1, 1 << 63], [1, 2]], np.uint64)
    Signatures(np.arange(5, dtype=np.uint64), hashes_N2, np.zeros((5, 0), np.uint32)).write(tmp_path / "sig", PLAN)
    assert list(removals([tmp_path / "sig"], EXACT, PLAN)) == [{4: "exact_duplicates"}]


def test_hashes_are_those_of_the_text():
    data = hashlib.blake2b("naïve\n語".encode(), digest_size=16, person=b"text").digest()
    (row,) = sign([(0, doc("naïve\n語"))], EXACT).hashes_N2
    assert row.tobytes() == data
