"""This project's training step against PyTorch's on the same device: the same numbers first, then their speeds.

    python benchmarks/versus_torch.py --device cpu --preset cpu --precision fp32 --rounds 3 --minimum 0.75
    python benchmarks/versus_torch.py --device cuda --preset tinyllama-1.1b --torch-python torch/bin/python
    python benchmarks/versus_torch.py --peer their_script.py --experiment experiments.speed:cpu

Ours are the Runs of an experiment, measured as train_step.py does; theirs is torch_peer.py, or a script with its
options and fields, once for each `--peer-options` and micro-batch of ours.  Each measurement is a process of its own,
one at a time.

proof   both take the same steps from the same weights with the same tokens, and agree on the losses and the norms of
        the gradients; every timed run of the peer starts from these too, and so says that it still computes the same
sweep   every configuration once, ours and theirs by turns (round 0)
rounds  the fastest of each side against each other, every other round in reverse order

The last line holds `ratio`: our best run's tokens per second over the peer's best.  Beside it stand the ratio of the
fastest steps, which other programs disturb least, the ratio round by round, that at equal micro-batches, and on a CPU
that of tokens per second of processor time.  More than 1 is always: ours is faster.

Exit status 1 when the two disagree, nothing was measured, or the ratio is below `--minimum`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
import train_step
from lines import ROOT, emit, isolated, origin, spread

from tinyllama_jax import mesh_rules
from tinyllama_jax.config import Mesh, Run, replace
from tinyllama_jax.errors import ConfigError, UserError
from tinyllama_jax.interop.hf import write_hf
from tinyllama_jax.sharding import computing, make_mesh, replicated
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train.step import make_train_step, put_batch

PEER = ROOT / "benchmarks" / "torch_peer.py"
# Words such as KEY=VALUE are its environment.  OpenMP's threads wait for each other in a loop, which is best on cores
# that nobody else uses, and takes the time away from what they wait for on others.
PASSIVE = "OMP_WAIT_POLICY=passive"
PEER_OPTIONS = {
    "cpu": (
        "--compile none",
        f"{PASSIVE} --compile none",
        "--compile default",
        f"{PASSIVE} --compile default",
        f"{PASSIVE} --compile default --loss chunked",
    ),
    "cuda": ("--compile default", "--compile default --loss chunked", "--compile-scope block --loss chunked"),
}
DTYPE = {"fp32": "float32", "autocast": "bfloat16", "bf16-master": "bfloat16"}  # ours of each of the peer's
TOLERANCE = {"fp32": (1e-5, 1e-4), "autocast": (1e-2, 1e-2), "bf16-master": (1e-2, 1e-2)}  # of loss, gradients' norm
PROOF_STEPS = 3
PROVEN = ("loss_first", "grad_norm_first", "loss_last", "grad_norm_last")


# --- ours


def rows_of(run: Run) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step."""
    sequences = run.curriculum[0].batch_tokens // run.data.sequence_tokens
    accumulation = mesh_rules.accumulation_steps(run, sequences)
    return sequences // accumulation, accumulation


def first_steps(run: Run, folder: Path, windows: np.ndarray) -> dict:
    """Losses and norms of the first steps on windows [B, T+1]; leaves the weights they start from, and the windows."""
    ones = np.ones((len(windows), windows.shape[1] - 1), bool)
    batch = {"tokens": windows[:, :-1], "targets": windows[:, 1:], "valid": ones}
    mesh, found = make_mesh(run.mesh, jax.devices()[:1]), []
    with computing(mesh, run.model.compute_dtype):
        state, program = train_state.init(run, mesh), make_train_step(run)
        if not folder.exists():
            write_hf(state["params"], run.model, folder, shard_bytes=1 << 62)
            (folder / "windows.json").write_text(json.dumps(windows.tolist()))
        for index in range(PROOF_STEPS):
            placed = put_batch(batch, rows_of(run)[1], mesh, documents=False)
            # The rate is the one that train_step.py and torch_peer.py take.
            rate_and_step = jax.device_put((np.float32(1e-4), np.int32(index)), replicated(mesh))
            state, metrics = program(state, placed, *rate_and_step)
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return dict(zip(PROVEN, (*found[0], *found[-1]), strict=True))


def own_row(run: Run, steps: int) -> dict:
    """One measurement of ours with the peer's names."""
    line = train_step.attempt(run, steps)
    micro, accumulation = rows_of(run)
    row = {"side": "ours", "configuration": run.name, "micro_batch": micro, "accum": accumulation}
    row |= {"error": line.pop("failed", None) or line.pop("skipped", None), "seq": run.data.sequence_tokens}
    if row["error"] is None:
        row |= {"tok_s": line["tokens_per_s"]["median"], "params": line["parameters"], "mfu": line.get("mfu_palm")}
    return row | line


# --- theirs


class Peer:
    """The other script in its Python."""

    def __init__(self, args: argparse.Namespace):
        """Raises ConfigError when it cannot even say what its options are."""
        self.command = [args.torch_python, str(args.peer)]
        self.common = ["--device", args.device, "--preset", args.preset, "--precision", args.precision]
        done = self._run(["--help"])
        if done.returncode:
            raise ConfigError(f"{shlex.join(self.command)} --help ended with: {self._last(done.stderr)}")
        self.loads = "--load " in done.stdout  # else there is no proof

    def _run(self, words: Sequence[str], settings: Iterable[str] = ()) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= dict(setting.split("=", 1) for setting in settings)
        return subprocess.run([*self.command, *words], env=environment, capture_output=True, text=True)

    def _last(self, text: str) -> str:
        return (text.strip().splitlines() or ["nothing"])[-1]

    def row(self, options: str, rows: tuple[int, int], folder: Path, *, steps: int, warmup: int = 5) -> dict:
        """One measurement, or why there is none as `error`."""
        counts = {"micro-batches": rows[0], "accum": rows[1], "steps": steps, "warmup": warmup}
        settings = [word for word in options.split() if "=" in word and not word.startswith("-")]
        words = [*self.common, *(word for word in options.split() if word not in settings)]
        words += [f"--{name}={count}" for name, count in counts.items()]
        done = self._run(words + (["--load", str(folder)] if self.loads else []), settings)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found = [line for line in found if line["bench"] == "train"]
        row = {"side": "peer", "configuration": options, "micro_batch": rows[0], "accum": rows[1], "error": None}
        if len(found) != 1:
            return row | {"error": f"{len(found)} lines; {self._last(done.stderr)}"}
        row |= {key: value for key, value in found[0].items() if key not in ("command", "date")}
        if "tok_s" in row and not isinstance(row["step_ms"], dict):
            row["step_ms"] = {"median": row["step_ms"], "min": row["step_ms_min"], "max": row["step_ms_max"]}
        return row


# --- what is made of both


def differences(ours: dict, theirs: dict, precision: str) -> dict:
    """Relative differences of what both sides say of PROVEN, and whether they agree."""
    found = {key: abs(theirs[key] / ours[key] - 1) for key in PROVEN if key in theirs and key in ours}
    loss, norm = TOLERANCE[precision]
    agree = all(value <= (loss if key.startswith("loss") else norm) for key, value in found.items())
    return {"agree": agree and bool(found), "relative": {key: float(f"{x:.3g}") for key, x in found.items()}}


def fastest_step(row: dict) -> float:
    """Tokens per second of the fastest single step."""
    return 1e3 * row["micro_batch"] * row["accum"] * row["seq"] / row["step_ms"]["min"]


def per_processor_second(row: dict) -> float:
    return row["micro_batch"] * row["accum"] * row["seq"] / row["cpu_s"]


def ratios(rows: Iterable[dict]) -> dict:
    """Ours over the peer's, from all rows that were measured; empty when a side has none."""
    measured = [row for row in rows if row["error"] is None]
    sides = {side: [row for row in measured if row["side"] == side] for side in ("ours", "peer")}
    if not all(sides.values()):
        return {}

    def over(key, condition=lambda row: True) -> float | None:
        ours, peer = (max((key(row) for row in side if condition(row)), default=None) for side in sides.values())
        return round(ours / peer, 4) if ours and peer else None

    def speed(row: dict) -> float:
        return row["tok_s"]

    sizes = sorted({row["micro_batch"] for row in measured})
    by_round = [over(speed, lambda row, n=n: row["round"] == n) for n in sorted({row["round"] for row in measured})[1:]]
    by_round = [ratio for ratio in by_round if ratio]
    timed = all(row.get("cpu_s") for row in measured)
    return {
        "ratio": over(speed),
        "ratio_fastest_step": over(fastest_step),
        "ratio_by_round": spread(by_round) if by_round else None,
        "ratio_equal_micro_batch": {str(n): over(speed, lambda row, n=n: row["micro_batch"] == n) for n in sizes},
        "ratio_per_processor_second": over(per_processor_second) if timed else None,
        **{f"best_{name}": max(side, key=speed)["configuration"] for name, side in sides.items()},
        **{f"tok_s_{name}": max(map(speed, side)) for name, side in sides.items()},
    }


def compare(runs: list[Run], peer: Peer, args: argparse.Namespace, folder: Path, say) -> list[str]:
    """Proof, sweep and rounds, each line through `say`; -> what failed."""
    rows, expected = [], {}
    largest = max(runs, key=lambda run: run.curriculum[0].batch_tokens)
    batch = train_step.batch_of(largest, largest.curriculum[0].batch_tokens // largest.data.sequence_tokens)
    windows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)

    def prove(run: Run, options: str) -> bool:
        """Whether this Run takes the steps that the peer takes; what it computed is held against later rows."""
        micro, accumulation = rows_of(run)
        ours = isolated(first_steps, run, folder, windows[: micro * accumulation])
        theirs = peer.row(options, rows_of(run), folder, steps=PROOF_STEPS - 1, warmup=0) if peer.loads else {}
        verdict = differences(ours, theirs, args.precision) if peer.loads else {"agree": None}
        expected[micro, accumulation] = {key: ours[key] for key in PROVEN if key.endswith("first")}
        about = {"bench": "proof", "configuration": run.name, "peer_configuration": options, "steps": PROOF_STEPS}
        reason = theirs.get("error") if peer.loads else "the peer has no option --load"
        say({**about, **verdict, "ours": ours, "peer": {k: theirs.get(k) for k in PROVEN}, "error": reason})
        return verdict["agree"] is not False

    def measured(side: str, what: Run | str, size: tuple[int, int], round_: int) -> dict:
        if side == "ours":
            row = own_row(what, args.steps)
        else:
            row = peer.row(what, size, folder, steps=args.steps)
            if peer.loads and size in expected and row["error"] is None:
                row |= {"proof": differences(expected[size], row, args.precision)}
                if not row["proof"]["agree"]:
                    row["error"] = f"starts with other numbers than ours: {row['proof']['relative']}"
        rows.append({"bench": "train", "round": round_, **row})
        say(rows[-1])
        return rows[-1]

    if not prove(runs[0], "--compile none"):
        return ["the two sides do not compute the same; nothing was timed"]
    sizes = list(dict.fromkeys(map(rows_of, runs)))
    ours = [("ours", run, rows_of(run)) for run in runs]
    theirs = [("peer", options, size) for size in sizes for options in args.peer_options]
    turns = [side[i] for i in range(max(len(ours), len(theirs))) for side in (ours, theirs) if i < len(side)]
    swept = [(job, measured(*job, 0)) for job in turns]
    finalists = []
    for side in ("ours", "peer"):
        there = [(job, row) for job, row in swept if row["side"] == side and row["error"] is None]
        if not there:
            return [f"nothing of the {'peer' if side == 'peer' else 'own'} side was measured"]
        finalists.append(max(there, key=lambda pair: fastest_step(pair[1]))[0])
    counts = {row["side"]: row["params"] for row in rows if row["error"] is None}
    if counts["ours"] != counts["peer"]:
        return [f"the models differ: {counts['ours']} parameters here, {counts['peer']} there"]
    if finalists[0][1] is not runs[0] and not prove(finalists[0][1], "--compile none"):
        return [f"{finalists[0][1].name} does not compute what the peer does"]
    for round_ in range(1, args.rounds + 1):
        for job in finalists if round_ % 2 else finalists[::-1]:
            measured(*job, round_)
    found = ratios(rows)
    proven = None if not peer.loads else all(row.get("proof", {"agree": True})["agree"] for row in rows)
    say({"bench": "versus_torch", **found, "proven": proven, "rounds": args.rounds, "minimum": args.minimum})
    failed = [] if proven is not False else ["a timed run of the peer starts with other numbers than ours"]
    if args.minimum is not None and found["ratio"] < args.minimum:
        failed.append(f"the ratio is {found['ratio']}, at least {args.minimum} is asked for")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", help="the peer's model (cpu on a CPU, tinyllama-1.1b on a GPU)")
    parser.add_argument("--precision", choices=list(DTYPE), help="the peer's (fp32 on a CPU, autocast on a GPU)")
    parser.add_argument("--experiment", metavar="MODULE:FUNCTION", help="our Runs (experiments.speed:cpu or :gpu)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in each of our Runs")
    parser.add_argument("--peer", type=Path, default=PEER, metavar="FILE", help="torch_peer.py, or one like it")
    parser.add_argument(
        "--peer-options", action="append", metavar="TEXT", help="one configuration of the peer's; repeatable"
    )
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="the Python that has PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="of the fastest against each other (3)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run (20)")
    parser.add_argument("--minimum", type=float, metavar="RATIO", help="exit status 1 when the ratio is below")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    args = parser.parse_args(arguments)
    on_cpu = args.device == "cpu"
    args.preset = args.preset or ("cpu" if on_cpu else "tinyllama-1.1b")
    args.precision = args.precision or ("fp32" if on_cpu else "autocast")
    args.peer_options = args.peer_options or PEER_OPTIONS[args.device]
    args.experiment = args.experiment or f"experiments.speed:{'cpu' if on_cpu else 'gpu'}"
    if args.rounds < 1 or args.steps < 1:
        parser.error("--rounds and --steps must be positive")
    # Of the processes to come: with a GPU's plugin installed JAX would look for one, without it take the CPU.
    os.environ["JAX_PLATFORMS"] = args.device
    try:
        runs = [replace(r, mesh=Mesh(replica=1, data=1)) for r in train_step.runs_of(args.experiment, args.set)]
        for run in runs:
            if run.model.compute_dtype != DTYPE[args.precision]:
                wanted = f"{args.precision} is for model.compute_dtype={DTYPE[args.precision]}"
                raise ConfigError(f"{run.name}: model.compute_dtype is {run.model.compute_dtype}; --precision {wanted}")
        peer = Peer(args)
        with tempfile.TemporaryDirectory(prefix="versus-torch-") as folder:
            with args.out.open("w") if args.out else open(os.devnull, "w") as file:
                common = {"experiment": args.experiment, "preset": args.preset, "precision": args.precision, **origin()}
                failed = compare(runs, peer, args, Path(folder) / "weights", lambda line: emit(line | common, file))
    except UserError as error:
        print(f"versus_torch: {error}", file=sys.stderr)
        return error.exit_status
    for text in failed:
        print(f"versus_torch: {text}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
