"""Which ids mean the same text to two models, so that one can read what the other writes.

Chat models often have a few tokens more than their base: TinyLlama-Chat v0.1 has 32001 and v0.2 and v0.3 32003 beside
the 32000 of Llama.  One vocabulary is then the beginning of the other.
"""

from __future__ import annotations

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.errors import ConfigError, UserError
from tinyllama_jax.generate.load import Loaded


def common_ids(target: Loaded, draft: Loaded) -> int:
    """Ids below this number are the same tokens in both checkpoints.

    Raises ConfigError that names both unless their tokenizers are the same, or the smaller one is the beginning of the
    larger.  Without a tokenizer beside either, models with equally many ids are believed to agree.
    """
    shared = min(target.model.vocab_size, draft.model.vocab_size)
    one, other = _tokenizer(target), _tokenizer(draft)
    if one is None and other is None:
        if target.model.vocab_size != draft.model.vocab_size:
            raise ConfigError(
                f"{target.path} has {target.model.vocab_size} ids and {draft.path} {draft.model.vocab_size}, and no "
                "tokenizer says what they mean; take a draft with the target's vocabulary"
            )
        return shared
    if one is None or other is None:
        without = target if one is None else draft
        with_ = draft if one is None else target
        raise ConfigError(
            f"{without.path} holds no tokenizer to compare with that of {with_.path}; take checkpoints that both do"
        )
    if one.sha256 == other.sha256:
        return shared
    ours, theirs = one.pieces(), other.pieces()
    for i, (piece, its) in enumerate(zip(ours, theirs, strict=False)):
        if piece != its:
            raise ConfigError(
                f"{target.path} and {draft.path} have different tokenizers: id {i} is {piece!r} in the first, {its!r} "
                "in the second; take a draft with the target's vocabulary"
            )
    return min(shared, len(ours), len(theirs))


def _tokenizer(loaded: Loaded) -> Tokenizer | None:
    try:
        return loaded.tokenizer()
    except UserError:
        if (loaded.path / "tokenizer").is_dir():
            raise  # it is there and damaged
        return None
