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
from tinyllama_jax.config import Mesh, Run
from tinyllama_jax.errors import ConfigError, DataError, UsageError, UserError
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

    started, workdir = time.monotonic(), Path(args.workdir)
    args.allow_config_change, args.coordinator, args.processes, args.process = False, "", 1, -1
    train(args)
    value = measure(str(workdir), baselines=True)
    page = write_report(workdir)
    minutes = (time.monotonic() - started) / 60
    value |= {"report": str(page), "minutes": minutes}
    script = Path(sys.executable).with_name("tinyllama")  # as it can be typed here, environment active or not
    program = os.path.relpath(script) if script.exists() else "tinyllama"
    lines = _table(value)
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


def import_(args: argparse.Namespace) -> None:
    from tinyllama_jax.interop.hf import read_hf

    out, source = Path(args.out), Path(args.source)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out")
    model, params = read_hf(source)
    from tinyllama_jax.train.checkpoint import save_params

    files = [source / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")]
    meta = {
        "step": 0,
        "tokens": 0,
        "name": source.resolve().name,
        "model": configio.to_dict(model),
        "document_marks": "bos",  # Llama's tokenizers put BOS before a text
        "imported_from": {"format": "hf", "source": str(source)},
    }
    save_params(out, params, meta, tokenizer_files=[f for f in files if f.is_file()])
    value = {"checkpoint": str(out), "parameters": _count(params)}
    answer(args, value, [f"{out}: {value['parameters']:,} parameters"])


def export(args: argparse.Namespace) -> None:
    _resolve(args.checkpoint)
    from tinyllama_jax.generate.load import load
    from tinyllama_jax.interop.hf import write_hf
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        loaded = load(args.checkpoint, mesh)
        folder = loaded.path / "tokenizer"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        write_hf(loaded.params, loaded.model, Path(args.out), dtype=args.dtype, tokenizer_files=files)
    value = {"directory": args.out, "parameters": _count(loaded.params)}
    answer(args, value, [f"{args.out}: {value['parameters']:,} parameters in {args.dtype}, from {loaded.path}"])


def _resolve(checkpoint: str) -> Path:
    """The directory of a checkpoint; raises CheckpointError, before jax is imported, when there is none."""
    from tinyllama_jax.train import saved

    return saved.resolve(checkpoint)


def _count(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


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


def evaluate(args: argparse.Namespace) -> None:
    _resolve(args.checkpoint)
    from tinyllama_jax.evaluate.measure import measure

    value = measure(
        args.checkpoint,
        corpus=args.corpus,
        sequences=args.sequences,
        sequence_tokens=args.sequence_tokens,
        baselines=args.baselines,
        dtype=args.dtype,
    )
    answer(args, value, _table(value))


def _table(value: dict) -> list[str]:
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


def _load_rows(path: str):
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--tokens {path}: not a readable .npy file ({str(error).splitlines()[0]})") from error


def score(args: argparse.Namespace) -> None:
    _resolve(args.checkpoint)
    rows = _load_rows(args.tokens)
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


def generate(args: argparse.Namespace) -> None:
    _resolve(args.checkpoint)
    rows = None if args.tokens is None else _load_rows(args.tokens)
    if rows is not None and (rows.ndim != 2 or rows.dtype.kind not in "iu"):
        raise DataError(f"--tokens {args.tokens}: must be integers [batch, time], not {rows.dtype} {list(rows.shape)}")
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample
    from tinyllama_jax.generate.load import load, prompt_tokens
    from tinyllama_jax.sharding import computing, make_mesh

    mesh = make_mesh(Mesh())
    with computing(mesh, args.dtype):
        loaded = load(args.checkpoint, mesh, dtype=args.dtype)
        try:
            tokenizer = loaded.tokenizer()
        except UserError:
            if rows is None:
                raise
            tokenizer = None  # ids in, ids out
        if rows is None:
            prompts = [prompt_tokens(tokenizer, loaded.marks, text) for text in args.prompt]
        else:
            prompts = rows.tolist()
        stream = None
        if not args.json and len(prompts) == 1 and tokenizer is not None:
            stream = _Stream(tokenizer, prompts[0])
        answers = sample.generate(
            loaded.params,
            loaded.model,
            Execution(),
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            eos_id=tokenizer.eos_id if tokenizer and not args.ignore_eos else None,
            on_tokens=stream,
        )
    # Decoded behind the prompt: a continuation decoded alone loses the space that it may begin with.
    texts = [
        tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt)) if tokenizer else None
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    if args.json:
        print(json.dumps({"tokens": answers, "text": texts, "prompt_tokens": prompts}))
    elif stream is not None:
        print()
    else:
        shown = args.prompt if rows is None else [""] * len(prompts)
        for i, row in enumerate(answers):
            print(f"[{i}] {shown[i]}{texts[i]}" if tokenizer else f"[{i}] {row}")


class _Stream:
    """Prints a prompt and what follows as it grows; waits while a character's bytes are incomplete."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer, self.ids, self.printed = tokenizer, list(prompt), 0

    def __call__(self, emitted: list[int | None]) -> None:
        if emitted[0] is None:
            return
        self.ids.append(emitted[0])
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


def preflight(args: argparse.Namespace) -> None:
    from tinyllama_jax.preflight import money, verb

    run = resolved(args)
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
    value, failure = verb.preflight(run, args.experiment, args.target, as_written=args.as_written, say=say)
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
    answer(args, value, lines)
