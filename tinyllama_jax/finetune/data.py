"""The run of a recipe: its data prepared, its base looked at."""

from __future__ import annotations

from pathlib import Path

from tinyllama_jax.config import Run, replace
from tinyllama_jax.data.plan import Progress
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.distributed import Peers
from tinyllama_jax.finetune.prepare import prepare
from tinyllama_jax.finetune.recipe import FineTune
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.train import saved


def with_data(recipe: FineTune, base: Path, workdir: Path, peers: Peers, progress: Progress) -> Run:
    """The run.  Examples are prepared by process 0 if they are not there yet, while the others wait.

    base: the checkpoint that recipe.base names.  The run names it by its own directory, so that it stays what it began
    with when the base's run goes on.  Raises ConfigError and DataError.
    """
    meta = saved.read_meta(base)
    recipe = replace(recipe, base=str(base))
    model = saved.model_of(meta)
    window = recipe.sequence_tokens + 1
    if recipe.examples is not None:
        path = recipe.store or str(workdir / "examples")
        if peers.lead:
            prepare(
                recipe.examples,
                path,
                window_tokens=window,
                tokenizer_folder=base / "tokenizer",
                marks=meta.get("document_marks", "bos"),
                progress=progress,
            )
        peers.tell("examples prepared")
        store = ExampleStore.open(path)
        return run_of(recipe, model, path, _tokens(store, window), store.vocab_size)
    store = TokenStore.open(recipe.text.store)
    replayed = _tokens(TokenStore.open(recipe.text.replay_store), window) if recipe.text.replay_store else {}
    return run_of(recipe, model, recipe.text.store, _tokens(store, window), store.vocab_size, replayed)


def _tokens(store: TokenStore | ExampleStore, window_tokens: int) -> dict[str, int]:
    """What the windows of each source predict; sources that fill none are left out."""
    windows = {name: store.split("train", name).windows(window_tokens) for name in store.domains}
    return {name: n * (window_tokens - 1) for name, n in windows.items() if n}
