"""RUN/measures.json: what is measured of a run besides its training, and kept beside it.

    {"beyond": {ROPE: {LENGTH: {"loss", "loss_se", "by_position", "domains"}}},       evaluate/beyond.py
     "decode": {"bROWS": {"cCONTEXT": {"tokens_per_s", "prefill_tokens_per_s", "cache_bytes"}}},    generate/speed.py
     "cache_bytes_per_token": 768,
     "provenance": {"beyond": {"step", ...}, "decode": {...}}}

A section grows with every measurement of the same checkpoint under the same conditions, and is replaced when these
are others: numbers of two checkpoints never stand in one section.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyllama_jax import configio
from tinyllama_jax.config import Run
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab.runs import Run as RunDirectory

FILE = "measures.json"


def read(directory: Path) -> dict[str, Any]:
    """What is measured so far; {} when there is no file.  DataError when it is damaged."""
    path = directory / FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it and measure again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no JSON object; remove it and measure again")
    return value


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both; where they tell of one section under other conditions (`provenance`), only the new."""
    was, now = old.get("provenance", {}), new["provenance"]
    value = old | {name: found for name, found in new.items() if name not in now}
    for section, conditions in now.items():
        kept = old.get(section, {}) if was.get(section) == conditions else {}
        value[section] = kept | {key: kept.get(key, {}) | found for key, found in new[section].items()}
    return value | {"provenance": was | now}


def asked(run: RunDirectory, evaluation: dict[str, Any]) -> Run:
    """The run's configuration with these fields of its evaluation instead of its own, if there are any.

    Raises ConfigError when nothing is asked for, or what is makes no sense for the run.
    """
    tree = run.config
    if evaluation:
        tree["evaluation"] |= {"beyond_tokens": [], "beyond_ropes": [], "decode": []} | evaluation
    config = configio.from_dict(Run, tree)
    own = config.evaluation
    if not own.beyond_tokens and not own.decode:
        raise ConfigError(
            f"{run.directory}: its configuration asks for no measurement; give --beyond or --decode, or set "
            "evaluation.beyond_tokens or evaluation.decode in the experiment"
        )
    return config


def measure(
    directory: Path, config: Run, *, sequences: int | None = None, dtype: str = "", say=lambda text: None
) -> dict[str, Any]:
    """Measures the newest checkpoint as `config.evaluation` says, adds that to RUN/measures.json, returns its content.

    sequences: windows of the longest length per domain, as for evaluate.beyond.text.  dtype: computed in; empty = the
    run's.  `say` is told what is left out.  Raises CheckpointError when there is no checkpoint, DataError or
    ConfigError when text and lengths do not fit.
    """
    import jax

    from tinyllama_jax.config import Mesh
    from tinyllama_jax.data.joined import reopen
    from tinyllama_jax.evaluate import beyond
    from tinyllama_jax.generate import speed
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh
    from tinyllama_jax.train.json_lines import plain
    from tinyllama_jax.train.start import versions

    old, evaluation, dtype = read(directory), config.evaluation, dtype or config.model.compute_dtype
    mesh, found = make_mesh(Mesh()), {"provenance": {}}
    with computing(mesh, dtype):
        loaded = load(str(directory), mesh, dtype=dtype)
        conditions = {
            "step": loaded.meta["step"],
            "tokens": loaded.meta["tokens"],
            "dtype": dtype,
            "device_kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "versions": versions(),
        }
        if evaluation.beyond_tokens:
            store = reopen(loaded.meta["store"], cache=config.data.cache)
            windows = beyond.text(config, store, sequences)
            why_not = beyond.suitable(loaded.model, evaluation.beyond_ropes)[1]
            if why_not:
                say(f"{directory}: {why_not}")
            found["beyond"] = beyond.measure(loaded.params, config, loaded.model, mesh, windows)
            found["provenance"]["beyond"] = conditions | {
                "store": store.manifest_sha256,
                "window_tokens": max(evaluation.beyond_tokens),
                "windows": {domain: len(read.tokens_NT) for domain, read in windows.items()},
            }
        if evaluation.decode:
            found["decode"] = speed.measure(loaded.params, loaded.model, evaluation.decode)
            found["cache_bytes_per_token"] = speed.cache_bytes_per_token(loaded.model)
            found["provenance"]["decode"] = conditions
    value = merged(old, plain(found))
    write_json(directory / FILE, value)
    return value
