"""What `import` and `export` do."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyllama_jax import configio
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.terminal import answer
from tinyllama_jax.train import saved


def import_(args: argparse.Namespace) -> None:
    from tinyllama_jax.interop import formats

    out, source = Path(args.out), Path(args.source)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out")
    with formats.reading(args.format, source) as found:
        from tinyllama_jax.train.checkpoint import save_params

        meta = {
            "step": 0,
            "tokens": 0,
            "name": source.resolve().name,
            "model": configio.to_dict(found.model),
            "document_marks": found.marks,
            "imported_from": {"format": args.format, "source": str(source)},
        }
        save_params(out, found.params, meta, tokenizer_files=found.tokenizer_files)
    value = {"checkpoint": str(out), "parameters": _count(found.params)}
    answer(args, value, [f"{out}: {value['parameters']:,} parameters"])


def export(args: argparse.Namespace) -> None:
    saved.resolve(args.checkpoint)  # before jax is imported
    from tinyllama_jax.config import Mesh
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.interop import formats
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        loaded = load(args.checkpoint, mesh)
        formats.write(args.format, loaded, Path(args.out), dtype=args.dtype)
    value = {"directory": args.out, "parameters": _count(loaded.params)}
    answer(args, value, [f"{args.out}: {value['parameters']:,} parameters in {args.dtype}, from {loaded.path}"])


def _count(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))
