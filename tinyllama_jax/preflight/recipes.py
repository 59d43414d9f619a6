"""A recipe for fine-tuning as a run that can be compiled before its base and its data are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyllama_jax import configio
from tinyllama_jax.config import Model, Run, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.finetune.recipe import FineTune
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.presets import PRESETS, preset
from tinyllama_jax.train import saved

STEPS = 1000  # of a recipe whose data is not there: what is estimated is the time of so many


def resolved(experiment: str, paths: Sequence[str], settings: Sequence[str], base: str) -> Run:
    """The run of `MODULE:FUNCTION`; a recipe as one of STEPS steps on the model of `base`, a preset or a checkpoint."""
    made = configio.load_any(experiment, paths)
    if not isinstance(made, FineTune):
        return configio.override(configio.load_experiment(experiment, paths), settings)
    recipe = configio.override(replace(made, base=base), settings)
    tokens = STEPS * recipe.batch_sequences * recipe.sequence_tokens
    if recipe.text is not None:
        recipe = replace(recipe, text=replace(recipe.text, tokens=tokens))
    own = {"data": round(tokens / recipe.epochs)}
    replayed = {"old": tokens} if recipe.text and recipe.text.replay_store else None
    return run_of(recipe, _model(base), "data", own, replayed=replayed)


def _model(base: str) -> Model:
    if base in PRESETS or not Path(base.rpartition("@")[0] or base).exists():
        return preset(base)
    meta = saved.read_meta(saved.resolve(base))
    if meta.get("config", {}).get("adapter"):
        raise ConfigError(f"--base {base}: holds adapters only; merge them first (`tinyllama finetune merge`)")
    return saved.model_of(meta)
