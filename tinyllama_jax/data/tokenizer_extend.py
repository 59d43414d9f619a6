"""Longer vocabularies: every old id keeps its meaning, and new ones follow."""

from __future__ import annotations

from tinyllama_jax.data.tokenizer import Tokenizer


def begins_with(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether the vocabulary of `new` is that of `old`, word for word, with perhaps more words behind it."""
    return new.pieces()[: old.vocab_size] == old.pieces()
