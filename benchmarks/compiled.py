"""What the compilers say of the 1.1B training step for machines that are not here: memory, kernels, the program itself.

    python benchmarks/compiled.py memory --out benchmarks/results/compiled.jsonl
    python benchmarks/compiled.py memory --targets h200 --rows 8 --remat none --layers-as unrolled
    python benchmarks/compiled.py program --out benchmarks/results/compiled.jsonl

Needs the extra `preflight` and no device.  --out adds to the file.  Every compilation is a process of its own.

memory   Two micro-batches of --rows sequences of 2048 tokens a device, TinyLlama-1.1B, state sharded over the devices:
         bytes per device, whether they fit, the compiler's time, the kernels that a step starts (hlo.py), and the
         forecast of preflight, which knows nothing of this program: a model of the shapes, calibrated by the published
         number that is named beside it.  GPUs: all of --rows until one does not fit.  TPUs: one size each, under the
         first policy that fits.  cuDNN cannot be compiled for without its device; `attention` says what stands in.
         kernels.again above 0: XLA finds the program too large, before the device would, and computes values twice; the
         forecast does not know of that.  Nothing is autotuned, so which kernels multiply matrices is not what will run.
program  One H200's program, read: exit status 1 when one of CHECKS does not hold.  --keep FOLDER leaves its text there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hlo
from lines import RESULTS, emit, isolated, origin

from tinyllama_jax.config import Data, Execution, Mesh, Run, Stage, replace
from tinyllama_jax.errors import UserError
from tinyllama_jax.preflight import money, targets
from tinyllama_jax.preflight.worker import ENVIRONMENT, check_installed
from tinyllama_jax.presets import preset

GPUS = ("a100-40g", "a100-80g", "h200")
TPUS = {"v5e:4x4": 4, "v4:2x2x1": 8, "v6e:2x2": 8, "v5p:2x2x1": 16}  # sequences per chip
ROWS = (4, 8, 16, 32)
REMAT = ("save_dots_and_attention", "full", "none")
LAYERS_AS = ("loop", "unrolled")
MICRO_BATCHES = 2  # the fewest that accumulate
PUBLISHED_BATCH = 1024  # sequences in a batch of TinyLlama's
ODD_TOKENS = 1920  # a row's length that divides no dimension of the model: arrays are told apart by their sizes
CHECKS = {
    "scores": "no array holds a number for each pair of tokens of a row",
    "logits": "no array holds a number of each word for more tokens than execution.loss_chunk_tokens",
    "host": "nothing waits for the host",
    "donated": "the new state takes the place of the old",
    "copies": "the update copies no array as large as a matrix of a layer",
    "casts": "a layer's matrices are cast once a step, outside of the loop over micro-batches",
    "deterministic": "with execution.deterministic no scatter sums in an order that changes",
}


def run_of(target: targets.Target, rows: int, remat: str, layers_as: str, **other: Any) -> Run:
    """A step of the 1.1B with `rows` sequences per device and micro-batch.

    other: tokens of a row, layers, sequences of the whole batch, deterministic.
    """
    tokens = other.get("tokens", 2048)
    micro = rows * target.count
    batch = other.get("sequences", MICRO_BATCHES * micro) * tokens
    model = preset("tinyllama-1.1b")
    return Run(
        name="compiled",
        model=replace(model, layers=other.get("layers", model.layers)),
        data=Data(store="none: nothing runs", sequence_tokens=tokens),
        curriculum=(Stage(name="main", tokens=batch, batch_tokens=batch, mixture={"random": 1.0}),),
        execution=Execution(
            remat=remat,
            scan_layers=layers_as == "loop",
            micro_batch_sequences=micro,
            deterministic=other.get("deterministic", False),
        ),
        mesh=Mesh(replica=1, data=-1),
    )


# -- in the process that compiles ----------------------------------------------------------------------------


def memory(run: Run, target: str) -> dict[str, Any]:
    """Bytes per device, whether they fit, seconds, kernels.  What is refused has neither temporaries nor kernels."""
    import jax

    from tinyllama_jax.preflight.step import Compiler, local_bytes, refusal

    parsed = targets.parse(target)
    compiler, capacity = Compiler(run, parsed), parsed.capacity_bytes
    attention = compiler.attention
    with compiler.lowered(run.execution.micro_batch_sequences // parsed.count, MICRO_BATCHES) as (step, state, _):
        state_bytes = local_bytes(state)
        started = time.monotonic(), time.process_time()
        try:
            compiled = step.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (refused := refusal(str(error))):
                raise
            found = {"bytes": {"state": state_bytes, "temporaries": None, "total": refused["total"]}}
            return {"fits": False, **found, "capacity_bytes": refused["capacity_bytes"], "attention": attention}
        seconds, processor = time.monotonic() - started[0], time.process_time() - started[1]
    said = compiled.memory_analysis()
    total = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    total += said.temp_size_in_bytes + said.generated_code_size_in_bytes
    started_kernels = hlo.kernels(hlo.Program(compiled.as_text()))
    return {
        "fits": total <= capacity,
        "bytes": {"state": state_bytes, "temporaries": said.temp_size_in_bytes, "total": total},
        "capacity_bytes": capacity,
        "compile_s": round(seconds, 1),
        "compile_processor_s": round(processor, 1),  # of all threads; other work on the machine does not count
        "kernels": started_kernels,
        "attention": attention,
    }


def program(run: Run, target: str) -> dict[str, Any]:
    """The compiled text, and what `judge` needs to know of the state."""
    import jax

    from tinyllama_jax.preflight.step import Compiler, local_bytes

    parsed = targets.parse(target)
    compiler = Compiler(run, parsed)
    with compiler.lowered(run.execution.micro_batch_sequences // parsed.count, MICRO_BATCHES) as (step, state, _):
        text = step.compile().as_text()
    stacked = [leaf.shape for leaf in jax.tree.leaves(state["params"]["layers"]) if leaf.ndim > 2]
    layers = sorted({math.prod(shape) for shape in stacked} | {math.prod(shape[1:]) for shape in stacked})
    return {"text": text, "state_bytes": local_bytes(state), "layer_sizes": layers, "attention": compiler.attention}


# -- of the program -------------------------------------------------------------------------------------------


def judge(text: str, deterministic: str, run: Run, *, state_bytes: int, layer_sizes: Sequence[int]) -> dict[str, Any]:
    """{"holds": {check: bool}, "found": counts, "lines": {check: instructions objected to}} of a program's text and of
    the same step's with execution.deterministic.

    layer_sizes: numbers of values of a layer's matrices, and of those of all layers in one array.
    """
    cfg, chunk = run.model, run.execution.loss_chunk_tokens
    step, ordered = hlo.Program(text), hlo.Program(deterministic)
    ends = [cfg.vocab_size * cfg.d_model]  # embedding and head
    by_tokens = hlo.logits(step, cfg.vocab_size, ends)
    copied = hlo.copies(step, [*layer_sizes, *ends])
    cast, ends_cast = hlo.casts(step, layer_sizes), hlo.casts(step, ends)
    donated, unordered = hlo.donated_bytes(step), hlo.unordered_scatters(step)
    lines = {
        "scores": hlo.squares(step, run.data.sequence_tokens),
        "logits": [line for tokens, lines in by_tokens.items() if tokens > chunk for line in lines],
        "host": hlo.host_traffic(step),
        "donated": [] if donated >= state_bytes else [f"{donated:,} bytes of {state_bytes:,}"],
        "copies": copied["entry"],
        "casts": cast["loops"] or ([] if cast["entry"] else ["no cast of a layer's matrix at all"]),
        "deterministic": hlo.unordered_scatters(ordered),
    }
    found = {
        "logits_tokens": sorted(by_tokens),
        "state_bytes": state_bytes,
        "donated_bytes": donated,
        "copies_in_loops": len(copied["loops"]),
        "layer_casts": {where: len(instructions) for where, instructions in cast.items()},
        "embedding_and_head_casts": {where: len(instructions) for where, instructions in ends_cast.items()},
        "unordered_scatters": len(unordered),
        "kernels": {name: hlo.kernels(p)["per_step"] for name, p in (("as_is", step), ("deterministic", ordered))},
    }
    return {"holds": {check: not lines[check] for check in CHECKS}, "found": found, "lines": lines}


def programs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    target = targets.parse("h200")
    check_installed(target)
    for layers_as in args.layers_as:
        runs = [
            run_of(
                *(target, 8, "save_dots_and_attention", layers_as),
                tokens=ODD_TOKENS,
                layers=args.layers,
                deterministic=deterministic,
            )
            for deterministic in (False, True)
        ]
        as_is, ordered = (isolated(program, run, target.name) for run in runs)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for name, made in ((layers_as, as_is), (f"{layers_as}-deterministic", ordered)):
                (args.keep / f"{name}.txt").write_text(made["text"])
        judged = judge(
            *(as_is["text"], ordered["text"], runs[0]),
            state_bytes=as_is["state_bytes"],
            layer_sizes=as_is["layer_sizes"],
        )
        yield {**case(runs[0], target, layers_as), **judged, "attention": as_is["attention"]}


# -- of memory ------------------------------------------------------------------------------------------------


def case(run: Run, target: targets.Target, layers_as: str) -> dict[str, Any]:
    return {
        "target": target.name,
        "device": target.kind,
        "devices": target.count,
        "model": "tinyllama-1.1b",
        "layers": run.model.layers,
        "sequence_tokens": run.data.sequence_tokens,
        "rows": run.execution.micro_batch_sequences // target.count,
        "micro_batches": MICRO_BATCHES,
        "remat": run.execution.remat,
        "layers_as": layers_as,
    }


def forecast(target: targets.Target, rows: int, remat: str) -> dict[str, Any]:
    """Tokens per second and device by preflight's model, in the step as compiled and in TinyLlama's batch."""
    value = money.estimate(run_of(target, rows, remat, "loop"), target)
    long = money.estimate(run_of(target, rows, remat, "loop", sequences=PUBLISHED_BATCH), target)
    return {
        "tokens_per_s_per_device": round(value["tokens_per_s_per_device"]),
        "in_a_batch_of_2m": round(long["tokens_per_s_per_device"]),
        "mfu_palm_in_a_batch_of_2m": round(long["mfu"]["palm"], 3),
        "calibrated": {
            "efficiency": round(value["calibration"]["efficiency"], 3),
            "by": value["calibration"]["source"],
        },
    }


def memories(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for target in map(targets.parse, args.targets):
        check_installed(target)
        if target.platform == "tpu":
            rows = TPUS.get(target.name, 4)
            for remat in args.remat:
                yield (line := one(target, rows, remat, "loop", args))
                if line["fits"]:
                    break
        else:
            for layers_as in args.layers_as:
                for remat in args.remat:
                    for rows in sorted(args.rows):
                        yield (line := one(target, rows, remat, layers_as, args))
                        if not line["fits"]:
                            break


def one(target: targets.Target, rows: int, remat: str, layers_as: str, args: argparse.Namespace) -> dict[str, Any]:
    run = run_of(target, rows, remat, layers_as, layers=args.layers)
    known = {} if args.layers != preset("tinyllama-1.1b").layers else {"forecast": forecast(target, rows, remat)}
    return {**case(run, target, layers_as), **isolated(memory, run, target.name), **known}


def main(arguments: Sequence[str] | None = None) -> int:
    def among(known: Sequence[str]):
        def parse(text: str) -> list[str]:
            if wrong := [word for word in text.split(",") if word not in known]:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["memory", "program"])
    parser.add_argument("--targets", type=lambda text: text.split(","), default=[*GPUS, *TPUS], help="as preflight's")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=ROWS)
    parser.add_argument("--remat", type=among(REMAT), default=REMAT)
    parser.add_argument("--layers-as", type=among(LAYERS_AS), default=LAYERS_AS)
    parser.add_argument("--layers", type=int, default=preset("tinyllama-1.1b").layers, help="fewer compile faster")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="program: leave the texts there")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"such as {RESULTS.name}/compiled.jsonl")
    args = parser.parse_args(arguments)
    held = True
    with open(args.out or os.devnull, "a") as file:
        try:
            for line in memories(args) if args.what == "memory" else programs(args):
                emit({"benchmark": "compiled", "what": args.what, **line, **origin()}, file)
                for check in [check for check, holds in line.get("holds", {}).items() if not holds]:
                    held = False
                    print(f"compiled: not so: {CHECKS[check]}: {line['lines'][check][0]}", file=sys.stderr)
        except UserError as error:
            print(f"compiled: {error}", file=sys.stderr)
            return error.exit_status
    return 0 if held else 1


if __name__ == "__main__":
    os.environ |= ENVIRONMENT  # what compiles is a child, which reads it before JAX starts
    sys.exit(main())
