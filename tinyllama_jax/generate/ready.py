"""A checkpoint made ready to answer: its engine, its tokenizer, and the context that they compute in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tinyllama_jax.config import Execution
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.generate import chat
from tinyllama_jax.generate.engine import Engine
from tinyllama_jax.generate.load import Loaded, load_serving, prompt_tokens, serving_mesh
from tinyllama_jax.sharding import computing


@dataclass(frozen=True)
class Ready:
    loaded: Loaded
    tokenizer: Tokenizer
    start: tuple[int, ...]  # ids at the beginning of every prompt
    engine: Engine
    inside: Callable[[], AbstractContextManager]  # whichever thread steps the engine does it inside of this

    def chat(self, template: chat.Template) -> chat.Chat:
        return chat.Chat(template, self.tokenizer, self.start, chat.control_ids(self.loaded.path / "tokenizer"))


def ready(checkpoint: str, *, dtype: str, weights: str, rows: int, context_tokens: int = 0) -> Ready:
    """weights: dtype, int8 or int4.  Raises CheckpointError, ConfigError and DataError."""
    mesh = serving_mesh(checkpoint)
    with computing(mesh, dtype):
        loaded = load_serving(checkpoint, mesh, dtype=dtype, weights=weights)
        tokenizer = loaded.tokenizer()
        engine = Engine(loaded.params, loaded.model, Execution(), rows=rows, context_tokens=context_tokens)
    start = tuple(prompt_tokens(tokenizer, loaded.marks, ""))
    return Ready(loaded, tokenizer, start, engine, lambda: computing(mesh, dtype))
