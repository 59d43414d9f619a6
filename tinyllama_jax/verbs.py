"""What each verb does.

Heavy imports happen inside, behind a look at what is easily wrong, so that `--help`, plans and wrong commands answer at
once: benchmarks/startup.py measures that, tests/test_startup.py holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tinyllama_jax import configio, verbs_data
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.terminal import Progress, answer, say


def resolved(args: argparse.Namespace) -> Run:
    return configio.override(configio.load_experiment(args.experiment, args.experiment_path), args.settings)


# -- making ------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    from tinyllama_jax import distributed

    run = resolved(args)
    where = distributed.place(args.coordinator, args.processes, args.process)
    with distributed.joined(where, peer_seconds=run.health.peer_seconds) as peers:
        from tinyllama_jax.train.loop import train

        with Progress() as progress:
            train(
                run,
                Path(args.workdir),
                experiment=args.experiment,
                allow_config_change=args.allow_config_change,
                progress=progress,
                peers=peers,
            )


def demo(args: argparse.Namespace) -> None:
    from tinyllama_jax.evaluate.measure import measure
    from tinyllama_jax.lab.report import write_report
    from tinyllama_jax.verbs_evaluate import table

    started, workdir = time.monotonic(), Path(args.workdir)
    args.allow_config_change, args.coordinator, args.processes, args.process = False, "", 1, -1
    train(args)
    value = measure(str(workdir), baselines=True)
    page = write_report(workdir)
    minutes = (time.monotonic() - started) / 60
    value |= {"report": str(page), "minutes": minutes}
    script = Path(sys.executable).with_name("tinyllama")  # as it can be typed here, environment active or not
    program = os.path.relpath(script) if script.exists() else "tinyllama"
    lines = table(value)
    last = value["step"]
    for sample in map(json.loads, (workdir / "samples.jsonl").read_text().splitlines()):
        if sample["step"] == last:
            lines += ["", f"-- {sample['prompt']!r} goes on:", sample["prompt"] + sample["text"]]
    lines += [
        "",
        f"Trained, evaluated and reported in {minutes:.1f} minutes.  Now look at, or try:",
        f"  {page}",
        f'  {program} generate {workdir} --prompt "def main(" --max-new-tokens 64',
        f"  {program} inspect {workdir}",
        f"  {program} export hf {workdir} --out {workdir}/hf",
    ]
    answer(args, value, lines)


# -- reading -----------------------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> None:
    from tinyllama_jax.lab import reference
    from tinyllama_jax.lab.runs import Run as RunDirectory
    from tinyllama_jax.lab.runs import is_study

    columns = reference.parse_columns(args.reference_columns)
    if not args.reference and (columns or args.reference_batch_tokens):
        raise UsageError("--reference-columns and --reference-batch-tokens say how to read a --reference FILE.csv")
    if args.reference_batch_tokens < 0:
        raise UsageError(f"--reference-batch-tokens {args.reference_batch_tokens}: must be above 0")
    if is_study(args.run):
        of_runs = {"--compare": args.compare, "--reference": args.reference}
        for option, given in of_runs.items():
            if given:
                raise UsageError(f"{option} goes with a run; {args.run} holds many")
        from tinyllama_jax.lab.study import write_study

        page = write_study(args.run, args.out or None)
        answer(args, {"report": str(page)}, [str(page)])
        return
    run, batch_tokens = RunDirectory(args.run), args.reference_batch_tokens
    if args.out:
        raise UsageError(f"--out goes with a sweep or a table; the report of a run is written into {args.run}")
    curves = [reference.read(path, columns, batch_tokens) for path in args.reference]
    from tinyllama_jax.lab.report import against, write_report

    page = write_report(run, compare=[Path(p) for p in args.compare], references=curves)
    compared = against(run, curves)
    value = {"report": str(page)} | ({"references": [each.as_json() for each in compared]} if compared else {})
    answer(args, value, [str(page), *(line for each in compared for line in each.lines())])


def preflight(args: argparse.Namespace) -> None:
    from tinyllama_jax.preflight import money, recipes, sizes, targets, verb

    memory = sizes.parse(args.memory) if args.memory else []
    if memory and targets.parse(args.target).count > 1:
        raise UsageError(f"--memory says what one device holds, and --target {args.target} is more than one")
    run = recipes.resolved(args.experiment, args.experiment_path, args.settings, args.base)
    asked = {"price": args.price, "calibration": args.calibrate, "assume": args.assume}
    # Before any compiler is asked: what is too dear, or cannot be spread over the devices, need not be compiled.
    estimate = money.estimate(run, args.target, **asked)
    too_dear = money.refusal(estimate, args.max_cost, args.experiment)
    if args.estimate_only or too_dear:
        value = {"experiment": args.experiment, "target": args.target, "estimate": estimate}
        answer(args, value, verb.estimate_lines(value))
        if too_dear:
            raise too_dear
        return
    value, failure = verb.preflight(
        run, args.experiment, args.target, as_written=args.as_written, say=say, memory=memory
    )
    # With the micro-batch that fits, which need not be the experiment's own.
    value["estimate"] = money.estimate(verb.fitting(run, value), args.target, **asked)
    answer(args, value, verb.lines(value))
    if failure:
        raise failure


def inspect(args: argparse.Namespace) -> None:
    if verbs_data.is_store(args.what):
        verbs_data.inspect_store(args)
        return
    from tinyllama_jax import flops, weights
    from tinyllama_jax.presets import PRESETS, preset
    from tinyllama_jax.train import saved

    value: dict = {"what": args.what}
    if args.what in PRESETS:
        model = preset(args.what)
    elif ":" in args.what and not Path(args.what).exists():
        args.experiment = args.what
        run = resolved(args)
        model = run.model
        value |= {"fingerprint": configio.fingerprint(run), "config": configio.to_dict(run)}
    elif Path(args.what.rpartition("@")[0] or args.what).exists():
        path = saved.resolve(args.what)
        meta = saved.read_meta(path)
        model = saved.model_of(meta)
        value |= {"checkpoint": str(path)} | {k: v for k, v in meta.items() if k not in ("checkpoint", "model")}
    else:
        hint = configio.nearest(args.what, PRESETS) or f" (presets: {', '.join(PRESETS)})"
        raise ConfigError(f"{args.what!r} is no preset, experiment, run or checkpoint{hint}")
    length = args.sequence_tokens or model.context_tokens
    value |= {
        "model": configio.to_dict(model),
        "shapes": {".".join(path): list(shape) for path, shape in weights.shapes(model).items()},
        "parameters": flops.parameter_counts(model),
        "sequence_tokens": length,
        "train_flops_per_token": {c: flops.flops_per_token(model, length, c) for c in flops.CONVENTIONS},
    }
    lines = [args.what] + [f"  {name:<28} {shape}" for name, shape in value["shapes"].items()]
    lines += [f"  parameters, {name}: {n:,}" for name, n in value["parameters"].items()]
    lines += [
        f"  training FLOPs per token at {length} tokens, {c}: {n:,}" for c, n in value["train_flops_per_token"].items()
    ]
    if "step" in value:
        lines.append(f"  step {value['step']}, {value['tokens']:,} tokens, checkpoint {value['checkpoint']}")
        if adapter := saved.adapter_of(value):
            beside = value.get("base", {}).get("checkpoint", "?")
            lines.append(f"  it holds adapters alone ({adapter.method}), beside the weights of {beside}")
    answer(args, value, lines)
