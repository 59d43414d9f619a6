"""Does a longer context work?  Loss by position and passkey retrieval of any checkpoint, at chosen lengths.

    {"checkpoint", "step", "tokens", "trained_tokens", SECTION: {ROPE: {LENGTH: ...}}, "provenance": {SECTION: {...}}}

SECTION is `positions` (evaluate/beyond.py) or `passkey` (evaluate/passkey.py).  Results of one checkpoint under one
provenance can be joined by lab.measures.merged, as RUN/measures.json is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama_jax import configio
from tinyllama_jax.config import Mesh, Model, Run
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.evaluate import beyond, passkey, retrieval
from tinyllama_jax.evaluate.measure import held_out_windows
from tinyllama_jax.evaluate.progress import Requests
from tinyllama_jax.generate.load import Loaded, load
from tinyllama_jax.sharding import computing, make_mesh
from tinyllama_jax.train.json_lines import plain

Say = Callable[[str], object]


def positions(
    checkpoint: str,
    lengths: Sequence[int],
    *,
    ropes: Sequence[str] = (),
    corpus: Sequence[str] = (),
    sequences: int = 0,
    dtype: str = "float32",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Loss by position in windows of `lengths`, on the same text at every length.

    ropes: as for beyond.suitable.  corpus: text sources or token stores instead of the run's own held-out text;
    sequences: windows of the longest length per domain (0 = all).
    Raises CheckpointError, ConfigError or DataError as `measure` does, and ConfigError for lengths that do not divide
    the longest one.
    """
    longest = max(lengths)
    if odd := [n for n in lengths if n < 1 or longest % n]:
        raise ConfigError(
            f"--positions {longest:,}: {odd[0]:,} does not divide it; every length must divide the longest"
        )
    mesh = make_mesh(Mesh())
    with computing(mesh, dtype):
        loaded = load(checkpoint, mesh, dtype=dtype)
        run, trained = trained_as(loaded)
        masking = run.data.document_masking if run else False
        treated(loaded.model, ropes, trained, lengths, say)
        windows, _ = held_out_windows(checkpoint, loaded, run, corpus, longest + 1, sequences)
        found = beyond.at_lengths(
            loaded.params,
            loaded.model,
            mesh,
            windows,
            trained=trained,
            lengths=lengths,
            ropes=ropes,
            masking=masking,
            done=lambda rope, length, loss: say(f"{rope}, {length:,} tokens: {loss:.4f} nats per token"),
        )
    conditions = {
        "window_tokens": longest,
        "windows": {domain: len(read.tokens_NT) for domain, read in windows.items()},
        "text": {domain: hashlib.sha256(read.tokens_NT).hexdigest() for domain, read in windows.items()},
        "document_masking": masking,
    }
    return _value(loaded, trained, dtype, "positions", found, conditions)


def keys(
    checkpoint: str,
    lengths: Sequence[int],
    *,
    ropes: Sequence[str] = (),
    depths: Sequence[float] = passkey.DEPTHS,
    count: int = passkey.KEYS,
    choices: int = passkey.CHOICES,
    seed: int = 0,
    dtype: str = "float32",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Passkey retrieval at `lengths` and `depths`, of `count` keys, each beside `choices` - 1 wrong ones.

    Raises CheckpointError where there is no checkpoint or it has no tokenizer, ConfigError and DataError as
    passkey.Prompts does, before anything is computed.
    """
    mesh = make_mesh(Mesh())
    with computing(mesh, dtype):
        loaded = load(checkpoint, mesh, dtype=dtype)
        _, trained = trained_as(loaded)
        made = passkey.Prompts(loaded.tokenizer(), loaded.marks, keys=count, choices=choices, seed=seed)
        prompts = {length: made.at(length, depths) for length in sorted(set(lengths))}
        treated(loaded.model, ropes, trained, lengths, say)
        todo = beyond.treatments(loaded.model, ropes, trained, lengths)
        total, answered = len(todo) * count * len(depths), 0
        found: dict[str, dict[str, Any]] = {}
        with Requests() as progress:

            def on_done(n: int) -> None:
                nonlocal answered
                answered += n
                progress("passkey", answered, total)

            for rope, length in todo:
                at = beyond.stretched(loaded.model, rope, trained, length)
                answers = retrieval.answers(loaded.params, at, mesh, prompts[length], made.said, on_done)
                found.setdefault(rope, {})[str(length)] = passkey.summary(prompts[length], answers)
    conditions = {
        "depths": list(depths),
        "keys": count,
        "choices": choices,
        "chance": 1 / choices,
        "key_tokens": made.answer_tokens,
        "seed": seed,
    }
    return _value(loaded, trained, dtype, "passkey", found, conditions)


def trained_as(loaded: Loaded) -> tuple[Run | None, int]:
    """The run that a checkpoint is of, if it is, and the length of the windows it was trained in: the context of a
    model from elsewhere."""
    run = configio.from_dict(Run, loaded.meta["config"]) if "config" in loaded.meta else None
    return run, run.data.sequence_tokens if run else loaded.model.context_tokens


def treated(model: Model, ropes: Sequence[str], trained: int, lengths: Sequence[int], say: Say) -> None:
    """Says which treatments make no sense for the model; raises UsageError when none of those asked for does,
    or the lengths are too short for them."""
    left, why_not = beyond.suitable(model, ropes)
    if not left:
        raise UsageError(f"--rope {','.join(ropes)}: {why_not}")
    if not beyond.treatments(model, ropes, trained, lengths):
        raise UsageError(f"--rope {','.join(ropes)}: up to the {trained:,} tokens of training there is only as-trained")
    if why_not and any(length > trained for length in lengths):
        say(why_not)


def _value(
    loaded: Loaded, trained: int, dtype: str, section: str, found: dict[str, Any], conditions: dict[str, Any]
) -> dict[str, Any]:
    meta = loaded.meta
    value = {
        "checkpoint": str(loaded.path),
        "step": meta["step"],
        "tokens": meta["tokens"],
        "trained_tokens": trained,
        section: found,
        "provenance": {section: {"step": meta["step"], "dtype": dtype, **conditions}},
    }
    return plain(value)
