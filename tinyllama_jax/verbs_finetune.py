"""The verb `finetune`: a recipe, a base and data become a run, which is trained like any other."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllama_jax import configio
from tinyllama_jax.config import replace
from tinyllama_jax.errors import UsageError
from tinyllama_jax.finetune.recipe import FineTune
from tinyllama_jax.terminal import Progress, answer


def recipe_of(args: argparse.Namespace) -> FineTune:
    """The experiment's recipe with --base, --data and --validation, then --set, put in."""
    recipe = configio.load_recipe(args.experiment, args.experiment_path)
    if args.base:
        recipe = replace(recipe, base=args.base)
    if recipe.examples is None:
        if args.validation or len(args.data) > 1:
            raise UsageError(f"{args.experiment} goes on with text: --data names its token store, and nothing else")
        if args.data:
            recipe = replace(recipe, text=replace(recipe.text, store=args.data[0]))
    else:
        if args.data:
            # What the recipe holds out belongs to its own data; without --validation a share of this is held out.
            own = replace(recipe.examples, sources=tuple(args.data), validation_sources=())
            recipe = replace(recipe, examples=own)
        if args.validation:
            recipe = replace(recipe, examples=replace(recipe.examples, validation_sources=tuple(args.validation)))
    recipe = configio.override(recipe, args.settings)
    if not recipe.base:
        raise UsageError(f"{args.experiment}: begin with what?  --base names a run or a checkpoint")
    if recipe.text is not None and not recipe.text.store:
        raise UsageError(f"{args.experiment}: go on with what?  --data names a token store (`tinyllama prepare`)")
    return recipe


def finetune(args: argparse.Namespace) -> None:
    from tinyllama_jax import distributed
    from tinyllama_jax.train import saved

    recipe = recipe_of(args)
    base = saved.resolve(recipe.base)  # before jax: nobody waits for a misspelt name
    saved.read_meta(base)
    where = distributed.place(args.coordinator, args.processes, args.process)
    with distributed.joined(where, peer_seconds=recipe.health.peer_seconds) as peers, Progress() as progress:
        from tinyllama_jax.finetune.data import with_data
        from tinyllama_jax.train.loop import train

        run = with_data(recipe, base, Path(args.workdir), peers, progress)
        train(
            run,
            Path(args.workdir),
            experiment=args.experiment,
            allow_config_change=args.allow_config_change,
            progress=progress,
            peers=peers,
        )


def merge(args: argparse.Namespace) -> None:
    from tinyllama_jax.train import saved

    saved.read_meta(saved.resolve(args.checkpoint))
    from tinyllama_jax.finetune.merged import merge

    path = merge(args.checkpoint, Path(args.out))
    value = {"checkpoint": args.checkpoint, "out": str(path)}
    answer(args, value, [f"{args.checkpoint}: merged into {path}"])
