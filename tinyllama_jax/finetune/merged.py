"""A base with a run's adapters in it as an ordinary checkpoint, which needs neither any more."""

from __future__ import annotations

from pathlib import Path

from tinyllama_jax.config import Mesh
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import adapted
from tinyllama_jax.generate.load import load
from tinyllama_jax.sharding import computing, make_mesh
from tinyllama_jax.train import bases, saved
from tinyllama_jax.train.checkpoint import save_params

KEPT = ("step", "tokens", "name", "model", "document_marks", "store", "fingerprint", "versions", "imported_from")


def merge(source: str, out: str | Path) -> Path:
    """Write the model that the adapters in `source` (a run, RUN@STEP, RUN@best, a checkpoint) make of their base.

    float32, with the tokenizer that lies with the adapters.  A base that was frozen in int8, int4 or nf4 is the
    dequantised one, so that the merged model computes what was trained.  What it was merged of is kept in its metadata.
    Raises ConfigError where there is no adapter, for a prefix and when `out` exists; CheckpointError when something is
    missing, damaged or not the base of these adapters.
    """
    path, out = saved.resolve(source), Path(out)
    meta = saved.read_meta(path)
    if adapted.adapter(path, meta).method == "prefix":
        raise ConfigError(f"{path} holds a prefix, which cannot be merged into weights; use it as it is")
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out")
    base, _ = bases.find(path, meta)
    about = {name: meta[name] for name in KEPT if name in meta}
    about["merged"] = {
        "adapter": meta["adapter"] if "adapter" in meta else meta["config"]["adapter"],
        "adapters": str(path.absolute()),
        "base": str(base.absolute()),
    }
    if "config" in meta:
        about["config"] = meta["config"] | {"adapter": None}
    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        loaded = load(str(path), mesh)
        folder = path / "tokenizer"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return save_params(out, loaded.params, about, tokenizer_files=files)
