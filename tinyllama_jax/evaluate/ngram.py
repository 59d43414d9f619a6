"""What counting alone achieves: unigram and bigram baselines for a model's validation loss.

Fitted on the windows that the model itself was trained on, they say how much of a low loss is owed to token
frequencies (unigram) and to the token just before (bigram); a model that learned more than that is below both.

The bigram is interpolated modified Kneser-Ney (Chen & Goodman 1999, "An empirical study of smoothing techniques
for language modeling", Computer Speech and Language 13, eqs. 24-27): the strongest smoothing of their comparison,
so that the baseline is not a straw man.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinyllama_jax.errors import DataError

_UNIGRAM_PSEUDOCOUNT = 0.5  # Krichevsky & Trofimov 1981; at millions of tokens its value hardly matters
_PENDING_PAIRS = 1 << 23  # pairs collected between two merges: 64 MiB


@dataclass(frozen=True)
class _Discounted:
    """Absolute discounting with one discount for counts of 1, of 2 and of 3 or more."""

    by_count: tuple[float, float, float]

    @classmethod
    def of(cls, counts: np.ndarray) -> _Discounted:
        """Discounts D_k = k - (k+1) Y n_{k+1}/n_k with Y = n_1/(n_1 + 2 n_2), n_k = number of counts equal to k.

        Where too few counts exist for the estimate, D_k falls back to k Y, and Y to 0.75 when there are no
        singletons; any D_k in (0, k] keeps the distribution proper, the estimate only makes it good.
        """
        n = [int((counts == k).sum()) for k in range(1, 5)]
        y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.75
        estimates = [k - (k + 1) * y * n[k] / n[k - 1] if n[k - 1] else k * y for k in (1, 2, 3)]
        d1, d2, d3 = (min(max(d, 0.01), float(k)) for k, d in zip((1, 2, 3), estimates, strict=True))
        return cls((d1, d2, d3))

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """What to take away from each of `counts`; 0 from a count of 0."""
        return np.asarray((0.0, *self.by_count))[np.minimum(counts, 3)]


@dataclass(frozen=True, eq=False)
class NGram:
    """Fitted baselines over a vocabulary of V tokens.  Made by `fit`.

    P(b | a) = max(c(ab) - D, 0) / c(a.) + backoff(a) P_continuation(b), where P_continuation counts in how many
    different contexts b occurs, itself discounted and interpolated with the uniform distribution.
    """

    vocab_size: int
    fitted_on_tokens: int  # predicted tokens counted, repeated windows left out
    unigram_V: np.ndarray  # float64 probabilities
    continuation_V: np.ndarray  # float64 probabilities
    backoff_V: np.ndarray  # float64 weight of the continuation distribution after each token; 1 after an unseen one
    pair_codes: np.ndarray  # int64, sorted: a * V + b of the pairs seen
    pair_probabilities: np.ndarray  # float64, the discounted first term of P(b | a)

    def unigram_nll(self, windows: np.ndarray) -> np.ndarray:
        """Nats for each target of `windows` [n, T+1]: -ln P(w[:, 1:]), float64 [n, T]."""
        return -np.log(self.unigram_V)[_checked(windows, self.vocab_size)[:, 1:]]

    def bigram_nll(self, windows: np.ndarray) -> np.ndarray:
        """Nats for each target of `windows` [n, T+1]: -ln P(w[:, 1:] | w[:, :-1]), float64 [n, T]."""
        windows = _checked(windows, self.vocab_size)
        previous, target = windows[:, :-1], windows[:, 1:]
        return -np.log(self._seen(previous * self.vocab_size + target) + self._unseen(previous, target))

    def bigram_probabilities(self, previous: int) -> np.ndarray:
        """The whole distribution after one token, float64 [V]; it sums to 1."""
        target = np.arange(self.vocab_size)
        return self._seen(previous * self.vocab_size + target) + self._unseen(np.full_like(target, previous), target)

    def evaluate(
        self, windows: np.ndarray, token_bytes: np.ndarray, *, valid: np.ndarray | None = None
    ) -> dict[str, dict[str, float]]:
        """Both baselines on `windows` [n, T+1]: {"unigram": {"loss", "bits_per_byte"}, "bigram": {...}}.

        `loss` is nats per token.  `token_bytes` [V] holds the UTF-8 bytes that each token stands for; `valid` [n, T]
        marks the targets that count (all by default), as in the model's own loss.
        """
        targets = _checked(windows, self.vocab_size)[:, 1:]
        valid = np.ones(targets.shape, bool) if valid is None else valid
        tokens, text_bytes = int(valid.sum()), int(np.asarray(token_bytes, np.int64)[targets][valid].sum())
        answers = {}
        for name, nll in (("unigram", self.unigram_nll(windows)), ("bigram", self.bigram_nll(windows))):
            nats = float(nll[valid].sum())
            answers[name] = {
                "loss": nats / tokens if tokens else math.nan,
                "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan,
            }
        return answers

    def _seen(self, codes: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.pair_codes, codes)
        places = np.minimum(places, len(self.pair_codes) - 1)
        return np.where(self.pair_codes[places] == codes, self.pair_probabilities[places], 0.0)

    def _unseen(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        return self.backoff_V[previous] * self.continuation_V[target]


def fit(windows_iter: Iterable[np.ndarray], vocab_size: int) -> NGram:
    """Count the targets w[:, 1:] and the pairs (w[:, :-1], w[:, 1:]) of windows [n, T+1] of token ids.

    A window met again (a second epoch over a source) is counted once: repeats say nothing new about the text, and
    they would destroy the counts of counts that the discounts are estimated from.  Memory grows with the number of
    distinct pairs, not with V x V.  Raises DataError when there are no windows or an id lies outside [0, V).
    """
    codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[np.ndarray] = []
    waiting, met = 0, set()
    for windows in windows_iter:
        windows = _first_time(_checked(windows, vocab_size), met)
        pending.append((windows[:, :-1] * vocab_size + windows[:, 1:]).ravel())
        waiting += pending[-1].size
        if waiting > _PENDING_PAIRS:
            codes, counts = _merge(codes, counts, pending)
            pending, waiting = [], 0
    codes, counts = _merge(codes, counts, pending)
    if not len(codes):
        raise DataError(
            "n-gram baselines: the windows to fit on hold no tokens; give at least one window of two tokens"
        )

    previous, target = np.divmod(codes, vocab_size)
    tokens_V = np.bincount(target, weights=counts, minlength=vocab_size)
    unigram_V = (tokens_V + _UNIGRAM_PSEUDOCOUNT) / (tokens_V.sum() + _UNIGRAM_PSEUDOCOUNT * vocab_size)

    contexts_V = np.bincount(target, minlength=vocab_size)  # different tokens seen before each token
    taken_V = _Discounted.of(contexts_V)(contexts_V)
    continuation_V = (contexts_V - taken_V + taken_V.sum() / vocab_size) / contexts_V.sum()

    taken = _Discounted.of(counts)(counts)
    after_V = np.bincount(previous, weights=counts, minlength=vocab_size)
    taken_after_V = np.bincount(previous, weights=taken, minlength=vocab_size)
    return NGram(
        vocab_size=vocab_size,
        fitted_on_tokens=int(counts.sum()),
        unigram_V=unigram_V,
        continuation_V=continuation_V,
        backoff_V=np.where(after_V > 0, taken_after_V / np.maximum(after_V, 1), 1.0),
        pair_codes=codes,
        pair_probabilities=(counts - taken) / after_V[previous],
    )


def _checked(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.dtype.kind not in "iu":
        raise DataError(f"n-gram baselines: windows must be integers [n, T+1], not {windows.dtype} {windows.shape}")
    if windows.size and not (0 <= windows.min() and windows.max() < vocab_size):
        worst = windows.max() if windows.max() >= vocab_size else windows.min()
        raise DataError(f"n-gram baselines: token id {worst} lies outside the vocabulary of {vocab_size}")
    return windows.astype(np.int64, copy=False)


def _first_time(windows: np.ndarray, met: set[int]) -> np.ndarray:
    """The rows not met before; `met` remembers their 64-bit fingerprints (a random multilinear hash)."""
    with np.errstate(over="ignore"):
        multipliers = np.random.default_rng(0).integers(1 << 63, size=windows.shape[1], dtype=np.uint64) * 2 + 1
        fingerprints = ((windows.astype(np.uint64) + 1) * multipliers).sum(axis=1, dtype=np.uint64)
    new = np.zeros(len(windows), bool)
    for i, fingerprint in enumerate(fingerprints.tolist()):
        if fingerprint not in met:
            met.add(fingerprint)
            new[i] = True
    return windows[new]


def _merge(codes: np.ndarray, counts: np.ndarray, pending: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if not pending:
        return codes, counts
    new_codes, new_counts = np.unique(np.concatenate(pending), return_counts=True)
    merged, place = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
    return merged, np.bincount(place, weights=np.concatenate([counts, new_counts])).astype(np.int64)
