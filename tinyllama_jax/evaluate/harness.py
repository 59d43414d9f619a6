"""Downstream tasks by lm-evaluation-harness, in this process: its tasks, prompts and metrics, our model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllama_jax.data.durable import write
from tinyllama_jax.evaluate.harness_tasks import Tasks
from tinyllama_jax.evaluate.suites import SHARES, Task, chosen

DRAWS = 1000  # of the bootstrap, for metrics whose standard error has no closed form


def evaluate(model, tasks: Tasks, *, limit: int = 0, allow_code: bool = False) -> dict[str, Any]:
    """{results, mean, all, samples} of a `harness_model.Model`.  limit: documents per task (0 = all).

    results: {task: {metric, value, stderr, shots, samples}}, value and stderr as the harness counts them (a share of 1
    where it is one), stderr None where there is none.  mean: of the values when all of them are shares, else None.
    all: every metric of every task and group.  samples: {task: one record per document}.
    """
    import numpy as np
    from lm_eval import evaluator

    random.seed(tasks.seed)
    np.random.seed(tasks.seed)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=tasks.seed)  # anew: the same examples for every model
    with _quiet():
        found = evaluator.evaluate(
            lm=model,
            task_dict=dict(tasks.loaded),
            limit=limit or None,
            bootstrap_iters=DRAWS,
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    metrics = found["results"] | found.get("groups", {})
    results = {}
    for task in tasks.asked:
        results |= _rows(task, tasks, found, metrics)
    return {
        "results": results,
        "mean": mean(results.values()),
        "all": {name: _plain(values) for name, values in metrics.items()},
        "samples": found["samples"],
    }


def mean(results: Iterable[dict[str, Any]]) -> float | None:
    """Of the values; None where one of them is no share."""
    results = list(results)
    if not results or not all(result["metric"] in SHARES for result in results):
        return None
    return math.fsum(result["value"] for result in results) / len(results)


def _rows(task: Task, tasks: Tasks, found: dict, metrics: dict) -> dict[str, dict[str, Any]]:
    """A task's row; a group's too where it sums its members up, and theirs where it does not."""
    if any("," in key for key in metrics.get(task.name, {})):
        return {task.name: _result(task, tasks, found, metrics[task.name])}
    rows = {}
    for member in tasks.loaded["group_map"][task.name]:
        rows |= _rows(replace(task, name=member), tasks, found, metrics)
    return rows


def _result(task: Task, tasks: Tasks, found: dict, metrics: dict) -> dict[str, Any]:
    """One row of the answer.  A metric is counted per filter of the answers; the first filter stands for it."""
    filters: dict[str, str] = {}
    for key in metrics:
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            filters.setdefault(name, kind)
    metric = chosen(task, list(filters))
    stderr = metrics.get(f"{metric}_stderr,{filters[metric]}")
    members = _members(task.name, tasks.loaded)
    shots = {int(tasks.loaded["tasks"][name].get_config("num_fewshot") or 0) for name in members}
    return {
        "metric": metric,
        "value": float(metrics[f"{metric},{filters[metric]}"]),
        "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
        "shots": max(shots),
        "samples": sum(found["n-samples"][name]["effective"] for name in members),
    }


def _members(name: str, loaded: dict) -> list[str]:
    if name in loaded["tasks"]:
        return [name]
    return [member for child in loaded["group_map"][name] for member in _members(child, loaded)]


def _plain(values: dict) -> dict[str, Any]:
    return {k: float(v) if isinstance(v, (int, float)) else v for k, v in values.items() if k != "sample_count"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints to stdout, which is for the answer, and forks for its bootstrap, which a process with jax's
    threads must not do."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def write_samples(path: str | Path, samples: dict[str, list[dict]]) -> None:
    """One JSON object per document and filter, with its task, into a file that appears when it is complete."""
    lines = [
        json.dumps({"task": task, **record}, default=str, ensure_ascii=False) + "\n"
        for task, records in samples.items()
        for record in records
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(Path(path), "".join(lines).encode())


def run(
    checkpoint: str,
    tasks: Tasks,
    *,
    start: str = "bos",
    dtype: str = "float32",
    batch_rows: int = 32,
    limit: int = 0,
    allow_code: bool = False,
) -> tuple[dict[str, Any], dict[str, list[dict]], Path]:
    """(the answer of `eval --tasks`, its samples, the checkpoint's directory)."""
    from tinyllama_jax.config import Mesh
    from tinyllama_jax.evaluate.harness_model import Model
    from tinyllama_jax.evaluate.progress import Requests
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh

    began, mesh = time.monotonic(), make_mesh(Mesh())
    with computing(mesh, dtype), Requests() as progress:
        loaded = load(checkpoint, mesh, dtype=dtype)
        model = Model(loaded, mesh, start=start, batch_rows=batch_rows, seed=tasks.seed, on_done=progress)
        found = evaluate(model, tasks, limit=limit, allow_code=allow_code)
    samples = found.pop("samples")
    value = {
        "checkpoint": str(loaded.path),
        "step": loaded.meta["step"],
        "tokens": loaded.meta["tokens"],
        **found,
        "harness": importlib.metadata.version("lm_eval"),
        "seed": tasks.seed,
        "limit": limit,
        "start": start,
        "dtype": dtype,
        "seconds": time.monotonic() - began,
    }
    return value, samples, loaded.path
