"""A sweep before it is started: what each run is, what it takes, and what all of them take together.  No jax here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama_jax import configio, flops
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan
from tinyllama_jax.terminal import duration

FLOAT32_BYTES = 4  # of a parameter in a checkpoint, for its weight and each moment


def rows(runs: Sequence[Run], targets: Sequence[str] = (), *, price: float | None = None) -> list[dict[str, Any]]:
    """One row for each run.

    parameters, non_embedding, matmul   three definitions of N (flops.parameter_counts)
    tokens, own_tokens                  D, and of it what this run trains itself (a fork continues another)
    unique_tokens, epochs               of what it sees; None where its token store is not there yet
    flops, flops_palm, flops_6nd        of own tokens: causal attention, the whole map, 6 N D
    steps, batch_tokens, lr             of the longest stage's batch
    disk_bytes                          checkpoints that stay, and those that come and go
    on                                  for each target {"seconds", "usd", "tokens_per_s"}
    """
    return [_row(run, targets, price) for run in runs]


def _row(run: Run, targets: Sequence[str], price: float | None) -> dict[str, Any]:
    plan, counts = Plan(run.curriculum, run.data.sequence_tokens), flops.parameter_counts(run.model)
    length = run.data.sequence_tokens
    begin = run.fork.tokens if run.fork else 0
    own = plan.total_tokens - begin
    longest = max(plan.stages, key=lambda stage: stage.end_tokens - stage.start_tokens)
    unique = unique_tokens(run)
    return {
        "name": run.name,
        "fingerprint": configio.fingerprint(run),
        "parameters": counts["total"],
        "non_embedding": counts["non_embedding"],
        "matmul": counts["matmul"],
        "tokens": plan.total_tokens,
        "own_tokens": own,
        "unique_tokens": unique,
        "epochs": None if unique is None else plan.total_tokens / min(unique, plan.total_tokens),
        "tokens_per_parameter": plan.total_tokens / counts["total"],
        "flops": own * flops.flops_per_token(run.model, length, "causal"),
        "flops_palm": own * flops.flops_per_token(run.model, length, "palm"),
        "flops_6nd": 6 * counts["total"] * own,
        "steps": plan.total_steps - plan.step_at(begin) if begin else plan.total_steps,
        "batch_tokens": longest.batch_tokens,
        "lr": run.lr.peak,
        "fork": run.fork.run if run.fork else "",
        "disk_bytes": disk_bytes(run, plan, counts["total"]),
        "on": {target: _on(run, target, price) for target in targets},
    }


def _on(run: Run, target: str, price: float | None) -> dict[str, float]:
    from tinyllama_jax.preflight import money

    value = money.estimate(run, target, price=price)
    cost = value["cost_usd"]["total"]
    return {"seconds": value["days"] * 86_400, "usd": cost, "tokens_per_s": value["tokens_per_s"]}


def unique_tokens(run: Run) -> int | None:
    """Tokens of training text in the sources that the curriculum takes from, or the run's own budget of them; None
    where the store is not there."""
    if run.data.unique_tokens:
        return run.data.unique_tokens
    manifest = Path(run.data.store) / "manifest.json"
    try:
        domains = json.loads(manifest.read_text())["splits"]["train"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    used = {source for stage in run.curriculum for source, weight in stage.mixture.items() if weight > 0}
    return sum(int(domains[source]["tokens"]) for source in used if source in domains) or None


def disk_bytes(run: Run, plan: Plan, parameters: int) -> int:
    """Checkpoints: every stage's end, the permanent ones, and the temporary ones that are kept, with one under way."""
    every = run.checkpoint.permanent_tokens
    kept = len(plan.stages) + len(run.checkpoint.permanent_at_tokens) + (plan.total_tokens // every if every else 0)
    temporary = run.checkpoint.keep_temporary + 1
    return (kept + temporary) * FLOAT32_BYTES * (1 + run.optimizer.moments) * parameters


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"runs", "tokens", "flops", "disk_bytes", "on": {target: {"seconds", "usd"}}} of the rows together; seconds as if
    one run went on after the other."""
    targets = list(rows[0]["on"]) if rows else []
    return {
        "runs": len(rows),
        "tokens": sum(row["own_tokens"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "disk_bytes": sum(row["disk_bytes"] for row in rows),
        "on": {t: {unit: sum(row["on"][t][unit] for row in rows) for unit in ("seconds", "usd")} for t in targets},
    }


def flops_per_second(rows: Sequence[dict[str, Any]]) -> float:
    """How fast the finished runs of a runs table went, pauses and validation included; 0 where none is."""
    done = [row for row in rows if row.get("status") == "finished" and row.get("seconds") and row.get("tokens")]
    work = sum(row["flops"] * row["own_tokens"] / row["tokens"] for row in done)
    return work / sum(row["seconds"] for row in done) if done else 0.0


def check_cost(totals: dict[str, Any], dollars: float | None, experiment: str) -> None:
    """Raises ConfigError when what is left would cost more than `dollars` on one of the targets."""
    for target, value in totals["on"].items():
        if dollars is not None and value["usd"] > dollars:
            raise ConfigError(
                f"the {totals['runs']} runs of {experiment} that are left are estimated at ${value['usd']:,.0f} on "
                f"{target}, more than --max-cost {dollars:,.0f}; plan fewer of them, choose another target, or raise it"
            )


def check_space(workdir: Path, totals: dict[str, Any]) -> None:
    """Raises ConfigError when the disk below `workdir` does not hold the checkpoints of what is left."""
    there = next(path for path in (workdir, *Path(os.path.abspath(workdir)).parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if totals["disk_bytes"] > free:
        raise ConfigError(
            f"{workdir}: the checkpoints of {totals['runs']} runs take {totals['disk_bytes'] / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; make room, or keep fewer with --set checkpoint.keep_temporary=1"
        )


def lines(rows: Sequence[dict[str, Any]], totals: dict[str, Any]) -> list[str]:
    """The plan for a person: a line for each run, and their sum."""
    targets = list(rows[0]["on"]) if rows else []
    header = ["run", "N", "not embed.", "D", "D/N", "epochs", "FLOPs", "steps", "batch", "rate", "disk", "state"]
    header += [f"{target} {what}" for target in targets for what in ("time", "$")]
    table = [header]
    for row in rows:
        cells = [row["name"], _si(row["parameters"]), _si(row["non_embedding"]), _si(row["tokens"])]
        cells += [f"{row['tokens_per_parameter']:.3g}", "?" if row["epochs"] is None else f"{row['epochs']:.3g}"]
        cells += [f"{row['flops']:.3g}", f"{row['steps']:,}", _si(row["batch_tokens"]), f"{row['lr']:.3g}"]
        cells += [_si(row["disk_bytes"]) + "B", row.get("state", "")]
        for target in targets:
            cells += [duration(row["on"][target]["seconds"]), f"{row['on'][target]['usd']:,.2f}"]
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    said = ["  ".join(map(str.rjust, cells[1:], widths[1:])) for cells in table]
    said = [cells[0].ljust(widths[0]) + "  " + text for cells, text in zip(table, said, strict=True)]
    whole = f"{totals['runs']} runs to go: {totals['tokens']:,} tokens, {totals['flops']:.3g} FLOPs"
    whole += f", {_si(totals['disk_bytes'])}B of checkpoints"
    if totals.get("seconds_here"):
        whole += f"; here {duration(totals['seconds_here'])}, as fast as those that are done"
    return [*said, whole] + [
        f"  on {target}, one after the other: {duration(value['seconds'])}, ${value['usd']:,.2f}"
        for target, value in totals["on"].items()
    ]


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"
