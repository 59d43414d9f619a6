"""Every token of every document is in a window once, or is counted as dropped; packing cuts nothing that fits."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.windows import BLOCK_WINDOWS, PAD_ID, BestFit, InARow, best_fit_decreasing, packer

lengths = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 60)), max_size=120)


def documents(sizes) -> list[np.ndarray]:
    """Each token is unique: 1, 2, 3, ... in the order of the documents."""
    ends = np.cumsum(np.array(sizes, np.int64))
    return [np.arange(end - size + 1, end + 1, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]


def windows_of(windows, texts) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """All blocks together: tokens [N, W], places, used."""
    blocks = [block for text in texts for block in windows.add(text)] + list(windows.finish())
    for tokens, places, used in blocks:
        assert len(tokens) == len(places) == len(used)
    tokens = np.concatenate([b[0] for b in blocks]) if blocks else np.empty((0, windows.window_tokens), np.int32)
    return tokens, [p.tolist() for b in blocks for p in b[1]], [int(u) for b in blocks for u in b[2]]


def pieces_of(tokens, places, used) -> list[list[int]]:
    """The runs of tokens that begin at a place and end at the next, or where the padding begins."""
    return [
        row[begin:end].tolist()
        for row, begins, stop in zip(tokens, places, used, strict=True)
        for begin, end in zip(begins, [*begins[1:], stop], strict=True)
    ]


@given(lengths, st.integers(2, 20))
def test_documents_in_a_row_are_cut_where_windows_end(sizes, window):
    texts = documents(sizes)
    packed = InARow(window)
    tokens, places, used = windows_of(packed, texts)
    total = sum(sizes)
    assert tokens.ravel().tolist() == list(range(1, total // window * window + 1))
    assert used == [window] * len(tokens) and packed.dropped_tokens == total % window
    begins = [i * window + place for i, row in enumerate(places) for place in row]
    firsts = [int(text[0]) - 1 for text in texts]
    assert begins == [first for first in firsts if first < tokens.size]
    assert packed.dropped_documents == sum(first >= tokens.size for first in firsts)


@given(lengths, st.integers(2, 20), st.integers(1, 30))
def test_packed_documents_are_whole_and_there_once(sizes, window, buffer):
    texts = documents(sizes)
    packed = BestFit(window, buffer)
    tokens, places, used = windows_of(packed, texts)
    assert packed.dropped_tokens == packed.dropped_documents == 0
    expected = [text[i : i + window].tolist() for text in texts for i in range(0, text.size, window)]
    assert sorted(pieces_of(tokens, places, used)) == expected  # tokens count upwards, and so do documents
    assert all(row[0] == 0 and row == sorted(set(row)) and row[-1] < n for row, n in zip(places, used, strict=True))
    assert all((row[n:] == PAD_ID).all() for row, n in zip(tokens, used, strict=True))
    again = windows_of(BestFit(window, buffer), texts)
    assert np.array_equal(again[0], tokens) and again[1:] == (places, used)


@given(lengths.filter(len), st.integers(2, 20))
def test_windows_and_the_documents_in_them_stand_in_the_order_of_the_corpus(sizes, window):
    tokens, places, used = windows_of(BestFit(window, 10**6), documents(sizes))
    assert (np.diff(tokens[:, 0]) > 0).all()
    assert all((np.diff(row[:n].astype(int)) > 0).all() for row, n in zip(tokens, used, strict=True))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_decreasing_is_the_textbook_rule(sizes):
    """Against the rule as it is written: longest first, into the bin with the least room that suffices."""
    rooms, fills = [], np.zeros(len(sizes), int)
    for size in sorted(sizes, reverse=True):
        fitting = [r for r in rooms if r >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 50) - size)
    np.add.at(fills, best_fit_decreasing(np.array(sizes), 50), sizes)
    assert sorted((50 - fills[fills > 0]).tolist()) == sorted(rooms)


def heavy_tailed(tokens: int) -> list[np.ndarray]:
    """Documents as the web has them: median 545 tokens, mean 1000, some of hundreds of thousands."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(6.3, 1.1, tokens // 900)).astype(int) + 1
    sizes[:3] = 300_000, 2049, 2050
    return [np.zeros(size, np.int32) for size in sizes]


def test_packing_a_heavy_tail_wastes_little_and_cuts_what_must_be_cut():
    texts = heavy_tailed(9_000_000)
    packed = BestFit(2049)
    started = time.perf_counter()
    blocks = [block for text in texts for block in packed.add(text)] + list(packed.finish())
    seconds = time.perf_counter() - started
    windows, used = sum(len(b[0]) for b in blocks), sum(sum(b[2]) for b in blocks)
    assert used == sum(text.size for text in texts)
    assert 1 - used / (windows * 2049) < 0.002  # 0.05 % of the windows is padding
    assert used / seconds > 20e6  # 200 million tokens a second on an idle core
    pieces = sum(places.size for block in blocks for places in block[1])
    assert pieces == sum(-(-text.size // 2049) for text in texts)
    assert max(len(b[0]) for b in blocks) == BLOCK_WINDOWS


@pytest.mark.parametrize(("packing", "kind"), [("none", InARow), ("best_fit", BestFit)])
def test_a_recipe_names_its_packer(packing, kind):
    assert type(packer(packing, 2049)) is kind and packer(packing, 2049).window_tokens == 2049
