"""How long the command line takes where nothing is computed, and what it imports meanwhile.

    python benchmarks/startup.py --out benchmarks/results/startup.jsonl      # three minutes

Four kinds of commands, each a process of its own as a person would start it:

    import    `import tinyllama_jax`: less than 0.3 s, and none of the heavy modules
    help      `tinyllama --help` and `tinyllama VERB --help`: less than 0.5 s, and none of the heavy modules
    plan      verbs that need no device (plans, fits, tables, data, reports), on small cases that are made here: none
              imports jax or what belongs to it, and none but `report` matplotlib
    refusal   verbs that compute, told of a checkpoint, folder or experiment that is not there: the same

Seconds are of the whole process with the start of Python: processor time (user and system, that of its children too)
and wall clock.  A claim about time is held to the smallest processor time, which other programs on the machine disturb
least.  Prints one JSON object per command; exit status 1 when a claim or a command fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lines import ROOT, emit, origin, spread

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import lab_runs  # noqa: E402
import synthetic_run  # noqa: E402
import synthetic_study  # noqa: E402
from launch_cases import CASES  # noqa: E402

LIMITS = {"import": 0.3, "help": 0.5}  # processor seconds; what a plan computes is not the same for any two
COMPUTING = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow", "torch", "transformers", "libtpu")
DRAWING = ("matplotlib",)
# Of use to some plans, though slow to import: their presence is written down, and promised only of imports and helps.
READING = ("numpy", "scipy", "pandas", "pyarrow", "tokenizers", "sentencepiece", "fsspec", "yaml", "tqdm")
HEAVY = COMPUTING + DRAWING + READING
FORBIDDEN = {"import": HEAVY, "help": HEAVY, "plan": COMPUTING + DRAWING, "refusal": COMPUTING + DRAWING}
PLATFORMS = ("slurm", "gke", "tpu", "sky")
LAWS = ("chinchilla", "isoflop", "repetition", "overtraining", "downstream")


@dataclass(frozen=True)
class Command:
    kind: str  # import, help, plan or refusal
    name: str
    words: tuple[str, ...]  # behind `python`
    draws: bool = False  # a picture, so it needs matplotlib
    status: int = 0  # with which it should end

    @property
    def forbidden(self) -> set[str]:
        return set(FORBIDDEN[self.kind]) - set(DRAWING if self.draws else ())


def tinyllama(kind: str, name: str, *words: object, **more) -> Command:
    return Command(kind, name, ("-m", "tinyllama_jax", *map(str, words)), **more)


def starts() -> list[Command]:
    """The import, every help there is, and what is refused at once."""
    from tinyllama_jax.cli import build_parser

    verbs = build_parser()._subparsers._group_actions[0].choices
    found = [Command("import", "import tinyllama_jax", ("-c", "import tinyllama_jax"))]
    found += [tinyllama("help", f"{verb} --help".strip(), *verb.split(), "--help") for verb in ("", *verbs)]
    wrong = {
        "train": ("nothing:here", "--workdir", "nowhere"),
        "eval": ("nowhere",),
        "score": ("nowhere", "--tokens", "rows.npy"),
        "generate": ("nowhere", "--prompt", "The"),
        "chat": ("nowhere",),
        "serve": ("nowhere",),
        "finetune": ("experiments.finetune:lora", "--base", "nowhere", "--workdir", "nowhere"),
        "finetune merge": ("nowhere", "--out", "ckpt"),
        "export": ("hf", "nowhere", "--out", "hf"),
        "import": ("hf", "nowhere", "--out", "ckpt"),
        "import gguf": ("nowhere", "--out", "ckpt"),
        "inspect": ("nowhere",),
        "report": ("nowhere",),
        "measure": ("nowhere",),
    }
    status = {"train": 2}  # the experiment is a word of the command
    return found + [
        tinyllama("refusal", verb, *verb.split(), *words, status=status.get(verb, 78)) for verb, words in wrong.items()
    ]


def plans(folder: Path) -> list[Command]:
    """Every verb that needs no device, with cases in `folder`; to be run there, in this order."""
    run = synthetic_run.write_run(folder / "run", steps=60, validation_every=20)
    measured = write_measured(folder / "measured")
    isoflop, repeated = synthetic_study.isoflop(), synthetic_study.repetition()
    table = synthetic_study.write_table(folder / "runs.jsonl", [row | {"group": row["name"]} for row in isoflop])
    heads = synthetic_study.write_table(folder / "heads.jsonl", synthetic_study.gqa())
    tables = {law: write_csv(folder / f"{law}.csv", repeated if law == "repetition" else isoflop) for law in LAWS}
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"Tale {i}. " + "Once upon a time there was a fox. " * (i + 1))
    tiny, v1_0, pod = "experiments.smoke:tiny", "experiments.tinyllama:v1_0", "experiments.scaling:isoflop_pod"

    def plan(name: str, *words: object, **more) -> Command:
        """`name` begins with the verb, and what else is in it in small letters are words of the command."""
        return tinyllama("plan", name, *(word for word in name.split() if not word.isupper()), *words, **more)

    return [
        plan("preflight --estimate-only", v1_0, "--target", "a100-40g:2x8", "--json"),
        plan("preflight --estimate-only", "experiments.finetune:qlora", "--target", "a100-40g", "--json"),
        plan("preflight --estimate-only --calibrate RUN", measured, tiny, "--target", "a100-40g:1"),
        *(tinyllama("plan", f"launch --on {on} --dry-run", *CASES[on].words()) for on in PLATFORMS),
        plan("launch prepare --on slurm --dry-run", "--out", "store", "--items", 2),
        plan("launch flags"),
        plan("launch supervise", "--", sys.executable, "-c", "pass"),
        plan("allocate --flops 1e21", "--law", "epoch", "--json"),
        plan("allocate --usd 5000", "--law", "c4", "--target", "h100:8", "--unique", 25e9),
        *(
            plan(f"fit {law}", "--csv", file, "--draws", 20, *(["--error-column", "error"] * (law == "downstream")))
            for law, file in tables.items()
        ),
        plan("fit overtraining --runs TABLE", table, "--draws", 20, "--out", "law.json"),
        plan("allocate --law FILE", "law.json", "--flops", 1e21),
        plan("runs RUN RUN", run, measured),
        plan("runs TABLE", table, "--out", "again.csv", "--json"),
        plan("sweep --dry-run", pod, "--workdir", "s", "--target", "h100:8"),
        plan("prepare plan", text, "--vocab-size", 300, "--window-tokens", 17, "--out", "store"),
        plan("prepare run", "--out", "store", "--workers", 1),
        plan("prepare finalize", "--out", "store"),
        plan("prepare view", "store", "--tokens", 170, "--out", "part"),
        plan("prepare tokenizer", "--base", "store", "--add", "<|im_start|>", "--out", "longer"),
        plan("inspect STORE", "store"),
        plan("inspect PRESET", "tinyllama-1.1b", "--json"),
        plan("inspect MODULE:FUNCTION", v1_0),
        plan("inspect CKPT", write_checkpoint(folder / "checkpoint")),
        plan("report RUN", run, draws=True),
        plan("report TABLE", heads, "--out", "study", draws=True),
    ]


def write_measured(path: Path) -> Path:
    """A run directory from which `preflight` can take the speed of its machine."""
    lab_runs.made(path, info={"devices": {"kind": "NVIDIA A100-SXM4-40GB", "count": 1}})
    steps = [json.loads(line) | {"stage": "basic"} for line in (path / "metrics.jsonl").read_text().splitlines()]
    synthetic_run.lines(path / "metrics.jsonl", steps)
    return path


def write_csv(file: Path, rows: list[dict]) -> Path:
    """A table of runs as another program might have written it, with an error made from the loss."""
    names = ("parameters", "tokens", "unique_tokens", "flops", "loss")
    lines = [f"{','.join(str(row[name]) for name in names)},{1 - 2 * 0.6 ** row['loss']}" for row in rows]
    file.write_text("\n".join([",".join((*names, "error")), *lines]) + "\n")
    return file


def write_checkpoint(path: Path) -> Path:
    """The metadata of a checkpoint under its checksums; `inspect` reads no weights."""
    from tinyllama_jax.configio import to_dict
    from tinyllama_jax.presets import preset
    from tinyllama_jax.train import durable

    path.mkdir()
    (path / "meta.json").write_text(json.dumps({"step": 7, "tokens": 7000, "model": to_dict(preset("t15"))}))
    durable.seal(path)
    return path


def execute(command: Command, folder: Path, *options: str) -> tuple[float, float, str]:
    """-> processor seconds, wall seconds, and what it said to stderr; `options` are of Python itself.

    Raises RuntimeError when it does not end as it should.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *options, *command.words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)  # so that nobody waits for it again
        said.seek(0)
        text = said.read()
    if process.returncode != command.status:
        last = next((line for line in reversed(text.splitlines()) if not line.startswith("import time:")), "")
        raise RuntimeError(f"ended with {process.returncode}, not {command.status}: {last}")
    return used.ru_utime + used.ru_stime, wall, text


def imported(said: str) -> set[str]:
    """The packages that were imported, from what `-X importtime` wrote."""
    return {name.partition(".")[0] for name in re.findall(r"^import time: .*\| +([\w.]+)$", said, re.MULTILINE)}


def measure(command: Command, folder: Path, runs: int) -> dict:
    """One line of the results: `runs` timed ones after one that tells what it imports and leaves its bytecode.

    Without timed ones the first is timed as well, though Python was slowed down by its account of the imports.
    """
    line: dict = {"kind": command.kind, "name": command.name}
    try:
        *first, said = execute(command, folder, "-X", "importtime")
        times = [execute(command, folder)[:2] for _ in range(runs)] or [first]
    except RuntimeError as error:
        return line | {"failed": [str(error)]}
    line |= {"processor_s": spread([t[0] for t in times]), "wall_s": spread([t[1] for t in times])}
    return line | {"imported": [name for name in HEAVY if name in imported(said)]}


def failures(command: Command, line: dict, *, factor: float = 1.0) -> list[str]:
    """What of the claims does not hold of a line; `factor` is the patience with the machine."""
    if "failed" in line:
        return line["failed"]
    failed = [f"imports {name}" for name in line["imported"] if name in command.forbidden]
    limit, took = factor * LIMITS.get(command.kind, float("inf")), line["processor_s"]["min"]
    return failed + ([f"takes {took:.2f} s, more than {limit:g}"] if took > limit else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each command (5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the lines to this file")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: at least 1")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    about = {"benchmark": "startup", "machine": machine, **origin()}
    failed, lines = 0, []
    with tempfile.TemporaryDirectory() as name:
        for command in [*starts(), *plans(Path(name))]:
            line = measure(command, Path(name), args.runs)
            line["failed"] = failures(command, line)
            lines.append(about | line)
            emit(lines[-1])
            for text in line["failed"]:
                print(f"startup: {command.name}: {text}", file=sys.stderr)
            failed += len(line["failed"])
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
