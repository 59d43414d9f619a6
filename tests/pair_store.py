"""Pairs of answers for tests: windows as an example store gives them, and the part of its interface that is read."""

import hashlib

import numpy as np

from tinyllama_jax.config import Model
from tinyllama_jax.data.splits import Windows

WINDOW = 25
MODEL = Model(
    vocab_size=64,
    d_model=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    d_ff=64,
    context_tokens=32,
    compute_dtype="float32",
)


def pair(rng) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) of a few tokens each."""
    sizes = rng.integers((2, 1, 1), (5, 8, 8))
    return tuple(rng.integers(3, MODEL.vocab_size, n).tolist() for n in sizes)


def windows_of(pairs) -> Windows:
    """One window for each pair: prompt and chosen, prompt and rejected, padding; the answers are to be learned."""
    tokens, documents = np.zeros((2, len(pairs), WINDOW), np.int32)
    learned, used = np.zeros(tokens.shape, bool), np.zeros(len(pairs), np.int32)
    for n, (prompt, chosen, rejected) in enumerate(pairs):
        first, both = len(prompt) + len(chosen), 2 * len(prompt) + len(chosen) + len(rejected)
        tokens[n, :both] = [*prompt, *chosen, *prompt, *rejected]
        documents[n, first:] = 1
        learned[n, len(prompt) : first] = learned[n, first + len(prompt) : both] = True
        used[n] = both
    return Windows(tokens, documents, used, learned)


class Split:
    def __init__(self, windows: Windows):
        self._windows = windows

    def windows(self, window_tokens: int) -> int:
        assert window_tokens == WINDOW
        return len(self._windows.tokens_NT)

    def read(self, ids: np.ndarray, window_tokens: int) -> Windows:
        assert window_tokens == WINDOW
        return self._windows.rows(ids)


class PairStore:
    """What reference.py asks of an example store, in memory."""

    window_tokens, path = WINDOW, "pairs"

    def __init__(self, splits: dict[str, dict[str, Windows]]):
        self._splits = splits
        self.domains = sorted({domain for by_domain in splits.values() for domain in by_domain})
        tokens = [splits[s][d].tokens_NT.tobytes() for s in sorted(splits) for d in self.domains]
        self.manifest_sha256 = hashlib.sha256(b"".join(tokens)).hexdigest()

    def split(self, split: str, domain: str) -> Split:
        return Split(self._splits[split][domain])

    def with_reference(self, logps):
        return PairStore(
            {
                s: {d: windows._replace(reference_N2=logps[s][d]) for d, windows in by_domain.items()}
                for s, by_domain in self._splits.items()
            }
        )


def store(seed: int = 0, train: int = 9, validation: int = 5) -> PairStore:
    """One domain has no validation pairs."""
    rng = np.random.default_rng(seed)
    make = lambda count: windows_of([pair(rng) for _ in range(count)])  # noqa: E731
    return PairStore(
        {"train": {"good": make(train), "kind": make(3)}, "validation": {"good": make(validation), "kind": make(0)}}
    )
