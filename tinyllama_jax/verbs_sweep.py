"""The verb `sweep`: the plan of a list of runs and its price, and the runs themselves on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllama_jax import __version__, configio
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, DataError, Preempted, UsageError, UserError
from tinyllama_jax.terminal import answer, say
from tinyllama_jax.verbs_launch import numbers

PYTHON = [sys.executable, "-m", "tinyllama_jax"]
SWEEP = "sweep.json"


def sweep(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab import plan, run_sweep

    runs = of_experiment(args.experiment, args.experiment_path, args.settings)
    workdir, known, chosen = Path(args.workdir), _finished(args.table), numbers("--runs", args.runs)
    if chosen and max(chosen) >= len(runs):
        raise UsageError(f"--runs {args.runs}: {args.experiment} is {len(runs)} runs, from 0 on")
    tasks = run_sweep.tasks(runs, workdir, known)
    if args.max_cost is not None and not args.target:
        raise UsageError(f"--max-cost {args.max_cost:g}: on which machine?  Name its --target")
    rows = plan.rows(runs, args.target, price=args.price)
    for row, task in zip(rows, tasks, strict=True):
        row |= {"state": _state(task), "directory": str(task.directory)}
    if chosen:
        rows, tasks = [rows[n] for n in chosen], [tasks[n] for n in chosen]
    totals = plan.totals([row for row in rows if row["state"] != "done"])
    if speed := plan.flops_per_second(_rows([*args.table, workdir / "runs.jsonl"])):
        totals["seconds_here"] = totals["flops"] / speed / max(1, args.slots)
    value = {"experiment": args.experiment, "runs": rows, "totals": totals}
    if args.dry_run:
        answer(args, value, plan.lines(rows, totals))
        return
    plan.check_cost(totals, args.max_cost, args.experiment)
    plan.check_space(workdir, totals)
    for line in plan.lines(rows, totals):
        say(line)
    _run(args, tasks, value)


def of_experiment(name: str, paths: Sequence[str], settings: Sequence[str]) -> list[Run]:
    """The runs of a sweep with `--set` applied to each.  Raises ConfigError for a list with the same run twice, and
    for one Run, which `train` trains."""
    from tinyllama_jax.lab.sweep import checked

    made = configio.load_runs(name, paths)
    if isinstance(made, Run):
        raise ConfigError(f"{name} is one run: `tinyllama train` trains it; a sweep's function returns a list of Runs")
    return checked(configio.override(run, settings) for run in made)


def _finished(tables: Sequence[str]) -> set[str]:
    """Fingerprints of the runs that tables say are finished."""
    for path in tables:
        if not _rows([path]):
            raise DataError(f"--table {path}: no run in it; give the runs.jsonl that a sweep writes")
    return {row["fingerprint"] for row in _rows(tables) if row.get("status") == "finished"}


def _rows(tables: Sequence[str | Path]) -> list[dict]:
    """Of those that are there."""
    there = [path for path in tables if Path(path).exists()]
    if not there:
        return []
    from tinyllama_jax.lab import table  # needs numpy, and a plan should not wait for that

    return [row for path in there for row in table.read(path)]


def _state(task) -> str:
    return "done" if task.state == "done" else "half done" if task.begun else "new"


def _run(args: argparse.Namespace, tasks: list, value: dict) -> None:
    from tinyllama_jax.data.durable import write_json
    from tinyllama_jax.lab import run_sweep, table
    from tinyllama_jax.lab.slots import slots

    workdir, places = Path(args.workdir), slots(args.slots, args.gpus_per_run)

    def record(_=None) -> None:
        """What is where, and the runs table, so far."""
        failed = {str(task.index): task.why for task in tasks if task.state in ("failed", "skipped")}
        write_json(workdir / SWEEP, described(args.experiment, args.settings, tasks) | {"failed": failed})
        there = [str(task.directory) for task in tasks if (task.directory / "run.json").exists()]
        if there or args.table:
            try:
                rows = table.rows([*args.table, *there])
                ours = {configio.fingerprint(task.run) for task in tasks}
                table.write([row for row in rows if row["fingerprint"] in ours], workdir / "runs.jsonl")
            except UserError as error:  # the runs are worth more than their table, which can be made again
                say(str(error))

    def commands(task) -> list[list[str]]:
        train = [*PYTHON, "train", f"{args.experiment}[{task.index}]"]
        train += ["--workdir", str(task.directory)]
        train += [word for setting in args.settings for word in ("--set", setting)]
        train += [word for path in args.experiment_path for word in ("--experiment-path", path)]
        bound = ["--max-restarts", str(args.max_restarts), "--workdir", str(task.directory)]
        supervised = [*PYTHON, "launch", "supervise", "--on", "local", *bound, "--", *train]
        asked = task.run.evaluation
        measure = [*PYTHON, "measure", str(task.directory)]
        return [supervised, measure] if asked.beyond_tokens or asked.decode else [supervised]

    with run_sweep.claimed(workdir, say) as lock:
        record()
        going = run_sweep.Sweep(tasks, commands, places, say, record, lock)
        going.run()
        record()
    if going.signal:
        left = sum(task.state == "waiting" for task in tasks)
        raise Preempted(f"{workdir}: stopped, {left} of {len(tasks)} runs are left; start again with the same command")
    bad = [task for task in tasks if task.state in ("failed", "skipped")]
    value["runs"] = [
        row | {"state": task.state, "why": task.why} for row, task in zip(value["runs"], tasks, strict=True)
    ]
    value["table"] = str(workdir / "runs.jsonl")
    lines = [f"{len(tasks) - len(bad)} of {len(tasks)} runs done; their table is {workdir / 'runs.jsonl'}"]
    answer(args, value, [*lines, f"next: tinyllama report {workdir}"])
    if bad:
        raise ConfigError(
            f"{workdir}: {len(bad)} of {len(tasks)} runs failed, first {bad[0].run.name}: {bad[0].why}; see "
            f"{run_sweep.log_path(bad[0])}, and start again with the same command"
        )


def described(experiment: str, settings: Sequence[str], tasks: Sequence) -> dict:
    """sweep.json."""
    return {
        "experiment": experiment,
        "settings": list(settings),
        "created_by": f"tinyllama_jax {__version__}",
        "runs": [
            {"name": task.run.name, "fingerprint": configio.fingerprint(task.run), "directory": task.directory.name}
            for task in tasks
        ],
    }
