"""One run as one flat row of numbers and words: what it was, what it took, and how it ended.  No jax here.

    name, directory, status         "finished", "unfinished" (its loss is the last that was measured) or "failed"
    fingerprint, experiment, group  rows of one group share their noise: a trunk and the branches that fork from it
    parameters, non_embedding, matmul                 three definitions of N (flops.parameter_counts)
    tokens, planned_tokens, own_tokens                D that the weights saw, a fork's parent included; without it
    unique_tokens, epochs, tokens_per_parameter       of the sources it draws from; tokens / min(unique, tokens)
    flops, flops_palm, flops_6nd    for `tokens`: causal attention, the whole map, 6 N D
    steps, batch_tokens, sequence_tokens, lr, seed, weight_decay    the longest stage's batch; the peak rate
    loss, loss_se                   last validation, nats per token: mean over domains, and its standard error
    best_loss, best_loss_se, best_loss_tokens         the lowest validation of the run
    loss.DOMAIN, loss_se.DOMAIN, bits_per_byte.DOMAIN, seen_loss.DOMAIN, gap.DOMAIN    gap = fresh minus seen
    train_loss                      mean of the last 5 % of the steps
    seconds, tokens_per_s, goodput  while its processes lived; median over steps that do not compile; lab/goodput.py
    peak_memory_bytes, devices, device_kind           of the device that needed most, where the run recorded it
    store, tokenizer, order, git, version, jax        hashes, and what it was made with
    config.PATH, measure.PATH       every leaf of the resolved configuration, and of measures.json

What is not known, or not finite, is None.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax import config, configio, flops
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.lab import goodput
from tinyllama_jax.lab.runs import Run, Table

STATUSES = ("finished", "unfinished", "failed")
BEFORE_DOMAINS = (
    *("name", "directory", "status", "fingerprint", "experiment", "group"),
    *("parameters", "non_embedding", "matmul"),
    *("tokens", "planned_tokens", "own_tokens"),
    *("unique_tokens", "epochs", "tokens_per_parameter"),
    *("flops", "flops_palm", "flops_6nd"),
    *("steps", "batch_tokens", "sequence_tokens", "lr", "seed", "weight_decay"),
    *("loss", "loss_se", "best_loss", "best_loss_se", "best_loss_tokens"),
)
PER_DOMAIN = ("loss", "loss_se", "bits_per_byte", "seen_loss", "gap")
AFTER_DOMAINS = (
    *("train_loss", "seconds", "tokens_per_s", "goodput", "peak_memory_bytes", "devices", "device_kind"),
    *("store", "tokenizer", "order", "git", "version", "jax"),
)
FIXED = (*BEFORE_DOMAINS, *AFTER_DOMAINS)

LAST_SHARE = 0.05  # of the steps, for train_loss
_OF_METRICS = ("tokens", "loss", "batch_tokens", "skipped")
_OF_TIMING = ("time", "step_s", "data_wait_s", "compiled", "tokens_per_s", "peak_memory_bytes")


def row(directory: str | Path) -> dict[str, Any]:
    """The row of a run directory, which may belong to a run that is still going on.

    Raises DataError, one line, where there is no run, or its files are not as `train` writes them.
    """
    run = Run(directory)
    try:
        made = finite(_row(run))
        if groups := [name for name, value in made.items() if isinstance(value, (list, dict))]:
            raise TypeError(f"{groups[0]} is a group")
        return made
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, IndexError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{run.directory}: its records are not as `train` writes them ({said})") from None


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """NumPy's numbers as Python's, and None for what is not finite."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()
    }


def leaves(value: Any, prefix: str) -> dict[str, Any]:
    """{"PREFIX.a.b": leaf} of nested dictionaries and lists, whose elements are numbered from 0."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in leaves(inner, f"{prefix}.{key}").items()}


def _row(run: Run) -> dict[str, Any]:
    metrics = Table(run.directory / "metrics.jsonl", (*_OF_METRICS, *(f"timing.{name}" for name in _OF_TIMING)))
    settings, asked, parsed = run.info, run.config, _parsed(run)
    begin = (asked.get("fork") or {}).get("tokens", 0)
    tokens = int(max(_newest(metrics.column("tokens")), begin))
    steps = int(_newest(metrics.column("step")))
    counts, per_token = _sizes(run, parsed)
    unique = _unique_tokens(run)
    total = counts.get("total")
    store, devices, versions = (settings.get(name) or {} for name in ("store", "devices", "versions"))
    longest = max(run.stages, key=lambda s: s["end_tokens"] - s["start_tokens"], default={})
    lr = asked.get("lr") or {}
    columns = {
        "name": run.name,
        "directory": str(run.directory),
        "status": _status(run, steps),
        "fingerprint": settings.get("fingerprint"),
        "experiment": settings.get("experiment") or None,
        "group": _group(run),
        "parameters": total,
        "non_embedding": counts.get("non_embedding"),
        "matmul": counts.get("matmul"),
        "tokens": tokens,
        "planned_tokens": run.plan.get("total_tokens"),
        "own_tokens": tokens - begin,
        "unique_tokens": unique,
        "epochs": tokens / min(unique, tokens) if unique and tokens else None,
        "tokens_per_parameter": tokens / total if total else None,
        "flops": tokens * per_token["causal"] if "causal" in per_token else None,
        "flops_palm": tokens * per_token["palm"] if "palm" in per_token else None,
        "flops_6nd": 6 * total * tokens if total else None,
        "steps": steps,
        "batch_tokens": longest.get("batch_tokens"),
        "sequence_tokens": (asked.get("data") or {}).get("sequence_tokens"),
        "lr": max(rate for _, rate in lr["points"]) if lr.get("kind") == "piecewise" else lr.get("peak"),
        "seed": asked.get("seed"),
        "weight_decay": (asked.get("optimizer") or {}).get("weight_decay"),
        **_validation(run.validation),
        "train_loss": _train_loss(metrics.column("loss")),
        **_speed(run, metrics),
        "devices": devices.get("count"),
        "device_kind": devices.get("kind"),
        "store": store.get("manifest_sha256"),
        "tokenizer": store.get("tokenizer_sha256"),
        "order": _order(run),
        "git": settings.get("git") or versions.get("git"),
        "version": versions.get("tinyllama_jax"),
        "jax": versions.get("jax"),
    }
    return columns | leaves(asked, "config") | leaves(read_json(run.directory / "measures.json"), "measure")


def _parsed(run: Run) -> config.Run | None:
    """The configuration, unless another version of this package wrote it and means something else by it."""
    try:
        return configio.from_dict(config.Run, run.config)
    except ConfigError:
        return None


def _sizes(run: Run, parsed: config.Run | None) -> tuple[dict[str, int], dict[str, float]]:
    """(parameter counts, training FLOPs per token by convention), as recorded, else from the configuration."""
    recorded = run.info.get("model") or {}
    counts, per_token = recorded.get("parameters") or {}, recorded.get("train_flops_per_token") or {}
    if parsed is not None:
        counts = flops.parameter_counts(parsed.model) | counts
        length = parsed.data.sequence_tokens
        per_token = {c: flops.flops_per_token(parsed.model, length, c) for c in ("causal", "palm")} | per_token
    return counts, per_token


def _status(run: Run, steps: int) -> str:
    """Finished means measured at the end, too: a loss from before it would be a false point of a fit."""
    planned = run.last_step
    measured = run.column("step", "validation")
    if 0 < planned <= steps and (not len(measured) or measured[-1] >= planned):
        return "finished"
    directory = run.directory.absolute()  # `.` has neither a name nor another parent
    failed = read_json(directory.parent / "sweep.json").get("failed")
    return "failed" if isinstance(failed, dict) and directory.name in failed else "unfinished"


def _group(run: Run) -> str:
    parent = (run.config.get("fork") or {}).get("run")
    if not parent:
        return run.name
    if parent.startswith("@"):
        return parent[1:]
    for directory in (Path(parent), run.directory.parent / Path(parent).name):
        if name := read_json(directory / "run.json").get("name"):
            return str(name)
    return parent


def _unique_tokens(run: Run) -> int | None:
    """Of its sources, as the run recorded them (of a view, if it saw one); else its budget; else as its store says,
    if that is still the same."""
    store, data = run.info.get("store") or {}, run.config.get("data") or {}
    mixtures = [stage["mixture"] for stage in run.config.get("curriculum") or []]
    used = {source for mixture in mixtures for source, weight in mixture.items() if weight > 0}
    if recorded := store.get("train_tokens"):
        return sum(recorded.get(source, 0) for source in used) or None
    if budget := data.get("unique_tokens"):
        return int(budget) if budget > 0 else None
    try:
        content = (Path(store.get("path") or data["store"]) / "manifest.json").read_bytes()
        domains = json.loads(content)["splits"]["train"]
    except (OSError, ValueError, KeyError):  # gone, or elsewhere
        return None
    if store.get("manifest_sha256") not in (None, hashlib.sha256(content).hexdigest()):
        return None
    return sum(domains[source]["tokens"] for source in used if source in domains) or None


def _validation(table: Table) -> dict[str, Any]:
    """Last and lowest loss over the domains.  Domains are measured apart, so their standard errors add as squares."""
    domains = [name[8:-5] for name in table.names if name.startswith("domains.") and name.endswith(".loss")]
    empty = dict.fromkeys(("loss", "loss_se", "best_loss", "best_loss_se", "best_loss_tokens"))
    if not domains:
        return empty
    loss_RD, se_RD, bits_RD, tokens_RD = (
        np.stack([table.column(f"domains.{d}.{what}") for d in domains], 1)
        for what in ("loss", "loss_se", "bits_per_byte", "tokens")
    )
    seen_RD = np.stack([table.column(f"seen.{d}.loss") for d in domains], 1)
    there_RD = ~np.isnan(tokens_RD) | ~np.isnan(loss_RD)  # a loss that is not finite was measured, and is kept
    rows = np.flatnonzero(there_RD.any(1))
    if not len(rows):
        return empty
    count_R = there_RD[rows].sum(1)
    mean_R = np.where(there_RD, loss_RD, 0.0)[rows].sum(1) / count_R
    error_R = np.sqrt((np.where(there_RD, se_RD, 0.0)[rows] ** 2).sum(1)) / count_R
    found = empty | {"loss": mean_R[-1], "loss_se": error_R[-1]}
    if np.isfinite(mean_R).any():
        best = int(np.argmin(np.where(np.isfinite(mean_R), mean_R, np.inf)))
        at = table.column("tokens")[rows[best]]
        found |= {"best_loss": mean_R[best], "best_loss_se": error_R[best]}
        found["best_loss_tokens"] = int(at) if math.isfinite(at) else None
    last = rows[-1]
    measured = {"loss": loss_RD, "loss_se": se_RD, "bits_per_byte": bits_RD}
    measured |= {"seen_loss": seen_RD, "gap": loss_RD - seen_RD}
    for what in PER_DOMAIN:
        for i, domain in enumerate(domains):
            if there_RD[last, i] and not (what in ("seen_loss", "gap") and np.isnan(seen_RD[last, i])):
                found[f"{what}.{domain}"] = measured[what][last, i]
    return found


def _train_loss(loss_S: np.ndarray) -> float | None:
    last = loss_S[-max(1, round(LAST_SHARE * len(loss_S))) :]
    last = last[np.isfinite(last)]  # a step whose loss is not finite is skipped
    return last.mean() if len(last) else None


def _speed(run: Run, metrics: Table) -> dict[str, Any]:
    timing = {name: metrics.column(f"timing.{name}") for name in _OF_TIMING}
    beside = {name: metrics.column(name) for name in ("batch_tokens", "skipped")}
    account = goodput.account(run.events, timing | beside)
    lived = account["wall_s"] - account["lost"]["down"]
    speed = timing["tokens_per_s"]
    steady = speed[(timing["compiled"] != 1) & np.isfinite(speed)]
    peaks = np.append(timing["peak_memory_bytes"], run.column("timing.peak_memory_bytes", "validation"))
    peaks = peaks[np.isfinite(peaks)]
    return {
        "seconds": lived if lived > 0 else None,
        "tokens_per_s": np.median(steady) if len(steady) else None,
        "goodput": account["goodput"],
        "peak_memory_bytes": int(peaks.max()) if len(peaks) else None,
    }


def _order(run: Run) -> str | None:
    """The name of the batches that it saw, from its newest checkpoint."""
    folder = Path((run.config.get("checkpoint") or {}).get("directory") or run.directory / "checkpoints")
    try:
        newest = max((path for path in folder.iterdir() if path.name.isdigit()), default=None)
    except OSError:  # none, or elsewhere
        return None
    return read_json(newest / "meta.json").get("order") if newest else None


def _newest(values: np.ndarray) -> float:
    return values[-1] if len(values) and math.isfinite(values[-1]) else 0


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that may be missing or half written: empty then."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
