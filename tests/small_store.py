"""A small token store made of what every Python brings along: its help texts and some of its source."""

import argparse
import ast
import dataclasses
import inspect
import pydoc_data.topics
import tempfile
from pathlib import Path


def make(folder: Path) -> Path:
    """folder/store: two domains, prose and code, a vocabulary of 512; in about a second."""
    from tinyllama_jax.config import Recipe
    from tinyllama_jax.data.prepare import prepare

    for domain in ("prose", "code"):
        (folder / domain).mkdir(parents=True)
    for name, text in sorted(pydoc_data.topics.topics.items())[:60]:
        (folder / "prose" / f"{name}.txt").write_text(text)
    for module in (argparse, ast, dataclasses, inspect, tempfile):
        source = inspect.getsource(module)
        for number, start in enumerate(range(0, len(source), 8000)):
            (folder / "code" / f"{module.__name__}_{number}.py").write_text(source[start : start + 8000])
    sources = (f"prose={folder}/prose", f"code={folder}/code")
    recipe = Recipe(sources=sources, vocab_size=512, validation_share=0.1, window_tokens=33)
    return prepare(recipe, folder / "store")
