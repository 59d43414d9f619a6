"""Evaluation windows from text that is not in a token store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from tinyllama_jax.data.sources import open_source
from tinyllama_jax.data.store import Windows
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import DataError
from tinyllama_jax.evaluate.loss import HeldOut


def text_windows(sources: Sequence[str], tokenizer: Tokenizer, marks: str, window_tokens: int, count: int) -> HeldOut:
    """The first `count` windows (0 = all) of each domain of `sources`, documents one after another, marked as the
    model's training data was.  Stops reading once every domain that it has met is full.

    Raises DataError when no domain fills one window.
    """
    tokens, documents = defaultdict(list), defaultdict(list)
    length: dict[str, int] = defaultdict(int)
    wanted = count * window_tokens if count else None
    for source in sources:
        for number, document in enumerate(open_source(source)):
            if wanted and length[document.domain] >= wanted:
                continue
            ids = tokenizer.encode_document(document.text, marks)
            tokens[document.domain].append(ids)
            documents[document.domain].append(np.full(len(ids), number, np.int32))
            length[document.domain] += len(ids)
    windows = {}
    for domain, parts in tokens.items():
        n = length[domain] // window_tokens
        n = min(n, count) if count else n
        if n:
            cut = n * window_tokens
            documents_NT = np.concatenate(documents[domain])[:cut].reshape(n, window_tokens)
            windows[domain] = Windows(
                np.concatenate(parts)[:cut].astype(np.int32).reshape(n, window_tokens),
                documents_NT - documents_NT[:, :1],
                np.full(n, window_tokens, np.int32),
            )
    if not windows:
        raise DataError(
            f"{', '.join(sources)}: {sum(length.values())} tokens in all, and no domain fills one window of "
            f"{window_tokens}; give more text or a smaller --sequence-tokens"
        )
    return windows
