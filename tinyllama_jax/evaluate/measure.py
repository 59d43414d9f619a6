"""Loss and bits per byte of a run or checkpoint: on its own held-out text, on a corpus, beside n-gram baselines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyllama_jax import configio
from tinyllama_jax.config import Execution, Mesh, Run
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.data.joined import reopen
from tinyllama_jax.data.pipeline import Pipeline, valid_targets
from tinyllama_jax.data.store import MANIFEST, TokenStore
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate import ngram
from tinyllama_jax.evaluate.corpus import text_windows
from tinyllama_jax.evaluate.loss import HeldOut, Validator, held_out
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.generate.load import Loaded, load
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import computing, make_mesh

COUNTED_TOKENS = 500_000_000  # n-grams are counted in memory on one core; beyond this they say little anyway


def measure(
    checkpoint: str,
    *,
    corpus: Sequence[str] = (),
    sequences: int = 0,
    sequence_tokens: int = 0,
    baselines: bool = False,
    dtype: str = "float32",
) -> dict:
    """{checkpoint, step, tokens, sequence_tokens, domains: {name: {loss, bits_per_byte, tokens, bytes}}}.

    corpus: text sources or token stores instead of the run's own held-out text.  sequences: windows per domain (0 =
    all); sequence_tokens: their length (0 = the run's).  baselines: also unigram and bigram models fitted on the
    tokens that the run saw, kept in the run directory for its report.
    Raises ConfigError, DataError or CheckpointError for what does not exist or does not fit together.
    """
    mesh = make_mesh(Mesh())
    with computing(mesh, dtype):
        loaded = load(checkpoint, mesh, dtype=dtype)
        run = configio.from_dict(Run, loaded.meta["config"]) if "config" in loaded.meta else None
        masking = run.data.document_masking if run else False
        length = sequence_tokens or (run.data.sequence_tokens if run else loaded.model.context_tokens)
        if length > loaded.model.context_tokens:
            raise ConfigError(f"windows of {length} tokens exceed the model's context of {loaded.model.context_tokens}")
        if baselines and (run is None or corpus):
            raise ConfigError("--baselines needs a run and its own store: they are fitted on what the run saw")
        if baselines and run.data.examples is not None:
            raise ConfigError("--baselines count running text, and this run learned from examples")
        windows, store = held_out_windows(checkpoint, loaded, run, corpus, length + 1, sequences)
        token_bytes_V = loaded.tokenizer().token_bytes()
        validator = Validator(
            windows,
            token_bytes_V,
            loaded.model,
            Execution(),
            mesh,
            batch_sequences=8,
            document_masking=masking,
        )
        domains = validator(loaded.params)
    value = {
        "checkpoint": str(loaded.path),
        "step": loaded.meta["step"],
        "tokens": loaded.meta["tokens"],
        "sequence_tokens": length,
        "domains": domains,
    }
    if baselines:
        counted = _baselines(run, store, loaded.meta["step"], windows, token_bytes_V)
        for domain, kinds in counted["domains"].items():
            kinds["model"] = {k: domains[domain][k] for k in ("loss", "bits_per_byte")}
        value["baselines"] = counted
        if loaded.path.parent.name == "checkpoints":
            write_json(loaded.path.parent.parent / "baselines.json", counted | {"step": loaded.meta["step"]})
    return value


def held_out_windows(
    checkpoint: str, loaded: Loaded, run: Run | None, corpus: Sequence[str], window_tokens: int, sequences: int
) -> tuple[HeldOut, TokenStore | None]:
    """Windows of `corpus`, text sources or token stores; without one the run's own held-out text, and its store.

    Raises ConfigError and DataError as `measure` does.
    """
    if not corpus:
        if run is None:
            raise ConfigError(f"{checkpoint} is not a run and has no text of its own; name some with --corpus")
        store = _own_store(checkpoint, loaded, run)
        return held_out(store, window_tokens, sequences), store
    windows: HeldOut = {}
    for source in corpus:
        if "://" in source or (Path(source) / MANIFEST).is_file():
            store = TokenStore.open(source)
            if store.manifest["tokenizer"]["sha256"] != loaded.tokenizer().sha256:
                raise DataError(f"{source} was made with another tokenizer than that of {loaded.path}")
            windows |= held_out(store, window_tokens, sequences)
        else:
            windows |= text_windows([source], loaded.tokenizer(), loaded.marks, window_tokens, sequences)
    return windows, None


def _own_store(checkpoint: str, loaded: Loaded, run: Run):
    if run.data.examples is None:
        return reopen(loaded.meta["store"], cache=run.data.cache)
    store = ExampleStore.open(loaded.meta["store"]["path"])
    if store.pairs:
        raise ConfigError(
            f"{checkpoint} learned from pairs; their loss is in its validation.jsonl; name text with --corpus"
        )
    return store


def _baselines(run: Run, store: TokenStore, step: int, windows: HeldOut, token_bytes_V: np.ndarray) -> dict:
    """What counting would have reached after `step` steps: n-grams fitted on the very windows of the run."""
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    tokens = plan.tokens_at(step)
    if tokens > COUNTED_TOKENS:
        raise ConfigError(f"the run saw {tokens} tokens; n-gram baselines are counted for at most {COUNTED_TOKENS}")
    pipeline = Pipeline(store, run.data, plan, run.seed, vocab_size=run.model.vocab_size)

    def seen():
        for _, windows in itertools.chain.from_iterable(map(pipeline.windows, range(step))):
            whole = windows.used_N == pipeline.window_tokens
            if whole.any():
                yield windows.tokens_NT[whole]
            for row, used in zip(windows.tokens_NT[~whole], windows.used_N[~whole], strict=True):
                if used > 1:
                    yield row[None, :used]

    model = ngram.fit(seen(), run.model.vocab_size)
    masking = run.data.document_masking
    return {
        "fitted_on_tokens": tokens,
        "domains": {
            domain: model.evaluate(found.tokens_NT, token_bytes_V, valid=valid_targets(found, masking))
            for domain, found in windows.items()
        },
    }
