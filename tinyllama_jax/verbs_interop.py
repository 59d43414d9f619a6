"""What `import` and `export` do."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllama_jax import configio
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.interop import formats
from tinyllama_jax.terminal import answer, say
from tinyllama_jax.train import saved

# Options of the two verbs that belong to some formats: None where not given.
READ_OPTIONS = ("context_tokens", "base")
WRITE_OPTIONS = ("dtype", "shard_size", "layout", "license", "language", "base_model")


def import_(args: argparse.Namespace) -> None:
    out, source = Path(args.out), Path(args.source)
    options = formats.chosen(args.format, "reads", {name: getattr(args, name) for name in READ_OPTIONS})
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out")
    with formats.reading(args.format, source, **options) as found:
        from tinyllama_jax.train.checkpoint import save_params

        for note in found.notes:
            say(note)
        meta = {
            "step": 0,
            "tokens": 0,
            "name": source.resolve().name,
            "model": configio.to_dict(found.model),
            "document_marks": found.marks,
            "imported_from": {"format": args.format, "source": str(source)},
        } | found.meta
        save_params(out, found.params, meta, tokenizer_files=found.tokenizer_files)
    value = {"checkpoint": str(out), "parameters": _count(found.params)}
    answer(args, value, [f"{out}: {value['parameters']:,} parameters"])


def export(args: argparse.Namespace) -> None:
    options = formats.chosen(args.format, "writes", {name: getattr(args, name) for name in WRITE_OPTIONS})
    path = saved.resolve(args.checkpoint)  # before jax is imported
    formats.refuse_misfit(args.format, path, saved.read_meta(path))
    from tinyllama_jax.config import Mesh
    from tinyllama_jax.generate.load import load, load_adapter
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        alone = formats.FORMATS[args.format].adapters
        loaded = load_adapter(args.checkpoint) if alone else load(args.checkpoint, mesh)
        more = formats.write(args.format, loaded, Path(args.out), **options)
    value = {"directory": args.out, "parameters": _count(loaded.params)} | more
    for note in more.get("notes", []):
        say(note)
    dtype = options.get("dtype", formats.FORMATS[args.format].dtypes[0])
    lines = [f"{args.out}: {value['parameters']:,} parameters in {dtype}, from {loaded.path}"]
    for program, text in more.get("use", {}).items():
        lines += ["", f"{program}:", *(f"  {line}" for line in text.splitlines())]
    answer(args, value, lines)


def _count(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))
