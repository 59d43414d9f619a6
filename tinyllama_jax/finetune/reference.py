"""Log-probabilities of all pairs' answers with the weights at the start, which a preference run is measured against.

They are computed once, before the first step, and kept in the run directory, so that training holds one model and
not two, and a resumed run, whose weights have moved on, goes on with the same numbers:

    RUN/reference.npz    float32 [windows, 2] under SPLIT/DOMAIN
    RUN/reference.json   what they were computed from, and the checksum of that file
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tinyllama_jax import configio
from tinyllama_jax.config import Run
from tinyllama_jax.data import durable
from tinyllama_jax.data.plan import Progress, silent
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError
from tinyllama_jax.finetune.pairs import AnswerLogps
from tinyllama_jax.terminal import say

ARRAYS, RECORD = "reference.npz", "reference.json"
SPLITS = ("train", "validation")
READ_WINDOWS = 256  # of the store at a time

Logps = dict[str, dict[str, np.ndarray]]  # by split and domain


def references(
    store: Any,
    run: Run,
    weights: Callable[[], Any],
    mesh: Mesh,
    workdir: Path,
    *,
    base: str,
    peers: Peers = ALONE,
    progress: Progress = silent,
) -> Any:
    """The example store `store`, whose windows also carry the log-probabilities of their answers.

    weights: makes the parameters at the start, on `mesh`; called only when something has to be computed.
    base: names their content, such as the checksum of the checkpoint's checksums.
    Every process computes its rows of each batch, and all get all of them; process 0 alone reads, decides and writes.
    What lies in `workdir` and is damaged, or was computed from something else, is named in a line and computed again.
    Raises CheckpointError when the weights make no finite numbers, ConfigError when the directory cannot be written,
    DataError when another process sees another file than process 0.
    """
    made_from, problem = _made_from(store, run, base), ""
    found = None
    if peers.lead:
        found, problem = _read(workdir, made_from)
        if problem:
            say(f"{workdir / ARRAYS}: {problem}; the references are computed again")
    checksum = peers.tell("references", found and found[1])
    if checksum and not peers.lead:
        found, problem = _read(workdir, made_from)
        if not found or found[1] != checksum:
            raise DataError(
                f"{workdir / ARRAYS}: not the file that {peers.names[0]} reads{problem and f' ({problem})'}; "
                "the run directory must be one that all processes share"
            )
    if not checksum:
        logps = _compute(store, run, weights(), mesh, peers, progress)
        if peers.lead:
            _write(workdir, made_from, logps)
        return store.with_reference(logps)
    return store.with_reference(found[0])


def _made_from(store: Any, run: Run, base: str) -> dict[str, Any]:
    """All that decides the numbers, as JSON gives it back."""
    start = configio.to_dict(run)["start"]
    del start["checkpoint"]  # where it lies; `base` says what it is
    adapter = run.adapter and configio.to_dict(run)["adapter"]
    value = {
        "store": store.manifest_sha256,
        "base": base,
        "start": start,
        "model": configio.to_dict(run)["model"],
        "adapter": adapter,
        "seed": run.seed,  # of new rows of the embedding, and of adapters
        "windows": {split: _windows(store, split) for split in SPLITS},
    }
    return json.loads(json.dumps(value))


def _windows(store: Any, split: str) -> dict[str, int]:
    return {domain: store.split(split, domain).windows(store.window_tokens) for domain in store.domains}


def _compute(store: Any, run: Run, params: Any, mesh: Mesh, peers: Peers, progress: Progress) -> Logps:
    measure = AnswerLogps(
        run.model,
        run.execution,
        mesh,
        batch_sequences=run.evaluation.batch_sequences,
        peers=peers,
        barrier_seconds=run.checkpoint.barrier_seconds,
    )
    counts = {split: _windows(store, split) for split in SPLITS}
    total, done, tokens = sum(sum(by_domain.values()) for by_domain in counts.values()), 0, 0
    logps: Logps = {}
    for split, by_domain in counts.items():
        logps[split] = {}
        for domain, windows in by_domain.items():
            source, parts = store.split(split, domain), [np.zeros((0, 2), np.float32)]
            for first in range(0, windows, READ_WINDOWS):
                ids = np.arange(first, min(first + READ_WINDOWS, windows))
                read = source.read(ids, store.window_tokens)
                parts.append(measure(params, read))
                bad = np.flatnonzero(~np.isfinite(parts[-1]).all(axis=1))
                if bad.size:
                    raise CheckpointError(
                        f"start.checkpoint={run.start.checkpoint}: gives pair {ids[bad[0]]} of {split}/{domain} no "
                        "finite log-probability; evaluate it, and take another"
                    )
                done, tokens = done + ids.size, tokens + int(read.used_N.sum())
                progress("references", 2 * done, tokens, done / total)
            logps[split][domain] = np.concatenate(parts)
    return logps


def _write(workdir: Path, made_from: dict[str, Any], logps: Logps) -> None:
    """The record last: until it is there, nothing vouches for the arrays."""
    content = io.BytesIO()
    np.savez(content, **{f"{split}/{domain}": x for split, by in logps.items() for domain, x in by.items()})
    data = content.getvalue()
    try:
        durable.write(workdir / ARRAYS, data)
        record = {"sha256": hashlib.sha256(data).hexdigest(), "made_from": made_from}
        durable.write_record(workdir / RECORD, record)
    except OSError as error:
        raise ConfigError(
            f"{workdir / ARRAYS}: the references cannot be written: {error.strerror}; free some space or name another "
            "run directory"
        ) from error


def _read(workdir: Path, made_from: dict[str, Any]) -> tuple[tuple[Logps, str] | None, str]:
    """(log-probabilities and their checksum, ""), or (None, what is wrong); nothing is wrong where nothing is."""
    try:
        record = json.loads((workdir / RECORD).read_text())
        if record["checksum"] != durable.checksum(record):
            return None, f"{RECORD} differs from its checksum"
        differs = [name for name, value in made_from.items() if record["made_from"].get(name) != value]
        if differs:
            return None, f"was computed from another {' and '.join(differs)}"
        data = (workdir / ARRAYS).read_bytes()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return None, "" if missing == RECORD else f"{missing} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"{RECORD} cannot be read"
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        return None, f"differs from its checksum in {RECORD}"
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        logps = {
            split: {domain: arrays[f"{split}/{domain}"] for domain in by} for split, by in made_from["windows"].items()
        }
    return (logps, record["sha256"]), ""
