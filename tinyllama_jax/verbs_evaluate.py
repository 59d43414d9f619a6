"""What `eval` and `score` do."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from tinyllama_jax import verbs_context
from tinyllama_jax.config import Mesh
from tinyllama_jax.errors import UsageError
from tinyllama_jax.terminal import answer, say
from tinyllama_jax.train import saved
from tinyllama_jax.verbs_generate import load_rows

# Options that say something of some kinds of evaluation only, with what they are when they are not given.
LOSS, TASKS, PASSKEY, POSITIONS = KINDS = ("loss", "tasks", "passkey", "positions")
DEFAULTS = {"corpus": [], "sequences": 0, "sequence_tokens": 0, "baselines": False}
DEFAULTS |= {"include_path": [], "shots": None, "limit": 0, "batch_rows": 32, "start": "bos", "seed": 1234}
DEFAULTS |= {"allow_code_execution": False, "samples": ""}
DEFAULTS |= {"rope": "", "plots": "", "depths": "0,0.25,0.5,0.75,1", "keys": 10, "choices": 10}
BELONGS = dict.fromkeys(DEFAULTS, (TASKS,))
BELONGS |= dict.fromkeys(("sequence_tokens", "baselines"), (LOSS,))
BELONGS |= dict.fromkeys(("corpus", "sequences"), (LOSS, POSITIONS))
BELONGS |= dict.fromkeys(("rope", "plots"), (PASSKEY, POSITIONS))
BELONGS |= dict.fromkeys(("depths", "keys", "choices"), (PASSKEY,))
BELONGS["seed"] = (TASKS, PASSKEY)


def evaluate(args: argparse.Namespace) -> None:
    _check(args)
    if args.every_tokens:
        _along(args)
        return
    saved.resolve(args.checkpoint)  # before jax is imported
    kind = _kind(args)
    if kind == TASKS:
        value, samples, path = _downstream(args)(args.checkpoint)
        if args.samples:
            from tinyllama_jax.evaluate.harness import write_samples

            write_samples(args.samples, samples)
        _keep(args, value, path)
        lines = task_table(value)
    elif kind == LOSS:
        value = _loss(args, args.checkpoint)
        lines = table(value)
    else:
        value = verbs_context.measure(args, args.checkpoint)
        _keep(args, value, Path(value["checkpoint"]))
        if args.plots:
            verbs_context.draw(value, args.plots)
        lines = verbs_context.table(value)
    _answer(args, value, lines)


def _kind(args: argparse.Namespace) -> str:
    return TASKS if args.tasks else verbs_context.section(args) or LOSS


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together, or make no sense alone."""
    asked = [f"--{kind}" for kind in KINDS[1:] if getattr(args, kind)]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are evaluations of their own; ask for one at a time")
    kind = _kind(args)
    for name, default in DEFAULTS.items():
        if kind not in BELONGS[name] and getattr(args, name) != default:
            option, wants = "--" + name.replace("_", "-"), [f"--{k}" for k in BELONGS[name] if k != LOSS]
            why = f"goes not with --{kind}" if LOSS in BELONGS[name] else f"goes with {' or '.join(wants)}"
            raise UsageError(f"{option} {why}")
    for name, least in (("limit", 0), ("every_tokens", 0), ("batch_rows", 1), ("shots", 0), ("sequences", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if kind in (PASSKEY, POSITIONS):
        verbs_context.check(args)
    if args.watch and not args.every_tokens:
        raise UsageError("--watch goes with --every-tokens")
    if args.samples and args.every_tokens:
        raise UsageError("--samples is of one checkpoint; leave out --every-tokens")
    if args.plots and args.every_tokens:
        raise UsageError("--plots is of one checkpoint; leave out --every-tokens and see `report`")


def _loss(args: argparse.Namespace, checkpoint: str) -> dict:
    from tinyllama_jax.evaluate.measure import measure

    return measure(
        checkpoint,
        corpus=args.corpus,
        sequences=args.sequences,
        sequence_tokens=args.sequence_tokens,
        baselines=args.baselines,
        dtype=args.dtype,
    )


def _downstream(args: argparse.Namespace):
    """checkpoint -> (value, samples, path), with the tasks and their data read once."""
    from tinyllama_jax.evaluate.harness_tasks import load_tasks
    from tinyllama_jax.evaluate.suites import expand

    asked = expand(args.tasks, args.shots)
    allowed = args.allow_code_execution
    tasks = load_tasks(asked, include_path=args.include_path, allow_code=allowed, seed=args.seed)

    def run(checkpoint: str):
        from tinyllama_jax.evaluate import harness

        return harness.run(
            checkpoint,
            tasks,
            start=args.start,
            dtype=args.dtype,
            batch_rows=args.batch_rows,
            limit=args.limit,
            allow_code=allowed,
        )

    return run


def _label(args: argparse.Namespace) -> str:
    from tinyllama_jax.evaluate.records import label

    return label(args.tasks, shots=args.shots, limit=args.limit) if args.tasks else _kind(args)


def _keep(args: argparse.Namespace, value: dict, path: Path) -> None:
    """Beside the run, where the checkpoint belongs to one."""
    from tinyllama_jax.evaluate import records

    run = records.run_of(path)
    if run is not None:
        say(f"kept as {records.put(run, _label(args), value)}")


def _along(args: argparse.Namespace) -> None:
    from tinyllama_jax.evaluate.schedule import follow
    from tinyllama_jax.lab.runs import Run

    Run(args.checkpoint)  # a run directory, before anything slow is imported
    if args.tasks:
        run = _downstream(args)
        results = follow(args.checkpoint, _label(args), args.every_tokens, lambda at: run(at)[0], watch=args.watch)
    else:
        at_mark = functools.partial(_loss if _kind(args) == LOSS else verbs_context.measure, args)
        results = follow(args.checkpoint, _label(args), args.every_tokens, at_mark, watch=args.watch)
    value = {"run": args.checkpoint, "every_tokens": args.every_tokens, "evaluations": results}
    lines = [f"{args.checkpoint}: {len(results)} checkpoints, {sum(r['new'] for r in results)} evaluated now"]
    for one in results:
        said = one.get("domains") or one.get("results", {})
        numbers = ", ".join(f"{name} {_short(measured)}" for name, measured in said.items())
        numbers = numbers or verbs_context.short(one)
        lines.append(f"  step {one['step']:>9,}  {one['tokens']:>18,} tokens  {numbers}")
    _answer(args, value, lines)


def _short(measured: dict) -> str:
    return f"{measured['loss']:.4f}" if "loss" in measured else _value(measured)[0]


def _value(result: dict) -> tuple[str, str]:
    """A task's value and standard error: percent for shares."""
    from tinyllama_jax.evaluate.suites import SHARES

    scale = 100 if result["metric"] in SHARES else 1
    stderr = "" if result["stderr"] is None else f"± {scale * result['stderr']:.2f}"
    return f"{scale * result['value']:.2f}", stderr


def _answer(args: argparse.Namespace, value: dict, lines: list[str]) -> None:
    if args.out:
        from tinyllama_jax.data.durable import write_json

        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), value)
    answer(args, value, lines)


def task_table(value: dict) -> list[str]:
    from tinyllama_jax.evaluate import milestones

    lines = [f"{value['checkpoint']}: step {value['step']}, {value['tokens']:,} tokens; harness {value['harness']}"]
    lines.append(f"  {'task':<24}{'metric':<14}{'shots':>5}{'samples':>9}{'value':>9}")
    for task, result in value["results"].items():
        number, stderr = _value(result)
        counted = f"{result['metric']:<14}{result['shots']:>5}{result['samples']:>9,}"
        lines.append(f"  {task:<24}{counted}{number:>9} {stderr}".rstrip())
    if value["mean"] is not None and len(value["results"]) > 1:
        lines.append(f"  {'mean':<52}{100 * value['mean']:>9.2f}")
    found = {task: 100 * result["value"] for task, result in value["results"].items()}
    return lines + milestones.beside(value["tokens"], found)


def table(value: dict) -> list[str]:
    lines = [f"{value['checkpoint']}: step {value['step']}, {value['tokens']:,} tokens"]
    lines.append(f"  {'domain':<14}{'nats/token':>12}{'bits/byte':>12}{'tokens':>12}")
    for domain, d in value["domains"].items():
        lines.append(f"  {domain:<14}{d['loss']:>12.4f}{d['bits_per_byte']:>12.4f}{d['tokens']:>12,}")
    if "baselines" in value:
        lines.append(f"n-grams fitted on the {value['baselines']['fitted_on_tokens']:,} tokens that the run saw:")
        lines.append(f"  {'domain':<14}{'model':>12}{'bigram':>12}{'unigram':>12}   nats/token")
        for domain, b in value["baselines"]["domains"].items():
            losses = [b[kind]["loss"] for kind in ("model", "bigram", "unigram")]
            verdict = "below both" if losses[0] < min(losses[1:]) else "NOT below both"
            lines.append(f"  {domain:<14}" + "".join(f"{x:>12.4f}" for x in losses) + f"   {verdict}")
    return lines


def score(args: argparse.Namespace) -> None:
    saved.resolve(args.checkpoint)  # before jax is imported
    rows = load_rows(args.tokens)
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import score as scoring
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, args.dtype):
        loaded = load(args.checkpoint, mesh, dtype=args.dtype)
        nll_BT = scoring.score(loaded.params, loaded.model, Execution(), mesh, rows)
    value = {"nll": nll_BT.tolist(), "mean_nll": float(nll_BT.mean(dtype="float64"))}
    per_row = [f"row {i}: {row.mean():.4f}" for i, row in enumerate(nll_BT)]
    answer(args, value, [*per_row, f"mean: {value['mean_nll']:.6f} nats per token over {nll_BT.size} tokens"])
