"""The questions that `tinyllama preflight` answers: does this experiment fit that machine, how long, how much?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinyllama_jax import flops
from tinyllama_jax.config import Run, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.preflight import money, search, sizes, targets
from tinyllama_jax.preflight.targets import GIB
from tinyllama_jax.preflight.worker import Worker, check_installed

CONVENTION = "palm"  # of the FLOPs that are reported: flops.flops_per_token
LESS = "a larger mesh.data, execution.remat=full or more devices need less"


class DoesNotFit(ConfigError):
    """The experiment does not fit the target; the answer has been given in full."""


def preflight(
    run: Run,
    experiment: str,
    target_name: str,
    *,
    as_written: bool,
    say: Callable[[str], None],
    memory: Sequence[int] = (),
) -> tuple[dict[str, Any], DoesNotFit | None]:
    """(the answer, why it does not fit or None).  Sizes are bytes of one device, micro-batches sequences per device.

    bytes_per_device splits the compiler's account of one step, which adds up to `total`:
      state        weights and the optimizer's moments, donated, as the compiler lays them out
      activations  what grows with the sequences of the micro-batch, from two compilations with the same number of
                   micro-batches: the values kept for the backward pass, and the working arrays of the layer at hand
      temporaries  the rest: gradients and their sums, gathered weights, logits of a chunk, tokens, the code

    memory: gigabytes of one device of that kind; the answer then has `memory` too, what fits into each of them.

    Raises UsageError for an unknown target, ConfigError for what cannot be compiled at all.
    """
    target = targets.parse(target_name)
    check_installed(target)
    with Worker(run, target) as worker:
        asked = _Preflight(run, experiment, target, worker, say)
        value, failure = asked.answer(as_written)
        if memory:
            about = asked.about
            candidates = [about["as_written"]] if as_written else about["candidates"]
            value["memory"] = sizes.answers(memory, candidates, value["micro_batch"], asked.measure)
        return value, failure


class _Preflight:
    def __init__(self, run: Run, experiment: str, target: targets.Target, worker: Worker, say: Callable[[str], None]):
        self.run, self.experiment, self.target, self.worker, self.say = run, experiment, target, worker, say
        self.about = worker.description
        self.measured: dict[tuple[int, int], dict[str, Any]] = {}  # (sequences per device, micro-batches) -> account
        attention = self.about["attention"]
        say(
            f"{experiment}: compiling for {self.about['devices']} x {self.about['device_kind']}, "
            f"attention {attention['compiled']} ({attention['why']})"
        )

    def micro_batches(self, rows: int) -> int:
        return self.about["batch_sequences_per_device"] // rows

    def measure(self, rows: int, micro_batches: int | None = None) -> dict[str, Any]:
        key = (rows, micro_batches or self.micro_batches(rows))
        if key not in self.measured:
            account = self.worker.compile(*key)
            account["fits"] = not account["refused"] and account["total"] <= self.target.capacity_bytes
            self.measured[key] = account
            verdict = "fits" if account["fits"] else "does not fit"
            self.say(
                f"  {sequences(rows)} per device: {human(account['total'])} of {human(self.target.capacity_bytes)}, "
                f"{verdict} ({account['seconds']:.0f} s)"
            )
        return self.measured[key]

    def activations(self, rows: int) -> int:
        """Bytes that grow with the sequences, at `rows` of them."""
        micro_batches = self.micro_batches(rows)
        account = self.measure(rows)
        # Accumulated gradients are held whenever there is more than one micro-batch: compare like with like.
        alike = [r for r, m in self.measured if (m > 1) == (micro_batches > 1) and r != rows]
        if alike:
            other = min(alike, key=lambda r: (not self.measure(r)["fits"], abs(r - rows)))
            needs = self.measure(other)["total"]
        else:
            other = rows // 2 or 2
            needs = self.measure(other, micro_batches)["total"]
        slope = (account["total"] - needs) / (rows - other)
        return max(0, min(round(slope * rows), account["total"] - account["state"]))

    def answer(self, as_written: bool) -> tuple[dict[str, Any], DoesNotFit | None]:
        about, capacity = self.about, self.target.capacity_bytes
        written = about["as_written"]
        first = self.measure(written)
        best = written if first["fits"] else None
        if not as_written:

            def total(rows: int) -> tuple[int, bool]:
                account = self.measure(rows)
                return account["total"], account["fits"]

            best, _ = search.largest(about["candidates"], written, capacity, total)
        chosen = written if first["fits"] or as_written else best or about["candidates"][0]
        account = self.measure(chosen)
        activations = self.activations(chosen)
        tokens = about["batch_tokens"]
        step_flops = tokens * flops.of_run(self.run, CONVENTION)
        value = {
            "experiment": self.experiment,
            "target": self.target.name,
            "fits": best is not None,
            "micro_batch": chosen,
            "micro_batch_tokens_per_device": chosen * self.run.data.sequence_tokens,
            "micro_batches": self.micro_batches(chosen),
            "bytes_per_device": {
                "state": account["state"],
                "activations": activations,
                "temporaries": account["total"] - account["state"] - activations,
                "total": account["total"],
            },
            "donated_bytes": account.get("donated"),
            "capacity_bytes": capacity,
            "capacity_note": self.target.advice,
            "headroom_bytes": max(0, capacity - account["total"]),
            "shortfall_bytes": 0 if account["fits"] else max(1, account["total"] - capacity),
            "set": None if first["fits"] or best is None else self.setting(best),
            "as_written": {
                "micro_batch": written,
                "fits": first["fits"],
                "total": first["total"],
                "shortfall_bytes": 0 if first["fits"] else max(1, first["total"] - capacity),
            },
            "devices": about["devices"],
            "device_kind": about["device_kind"],
            "mesh": about["mesh"],
            "stage": about["stage"],
            "collectives": account.get("collectives"),
            "flops_per_step": step_flops,
            "flops_per_step_per_device": step_flops / about["devices"],
            "flops_convention": CONVENTION,
            "attention": about["attention"],
            "remat": self.run.execution.remat,
            "jax": about["jax"],
            "compile_seconds": account["seconds"],
            "compilations": [
                {"micro_batch": rows, "micro_batches": steps}
                | {name: account[name] for name in ("total", "fits", "seconds")}
                for (rows, steps), account in self.measured.items()
            ],
        }
        if not as_written and best is not None:
            value |= {"largest_micro_batch": best, "largest_micro_batch_set": self.setting(best)}
        return value, None if value["fits"] else DoesNotFit(self.refusal(value, as_written))

    def setting(self, rows: int) -> str:
        return f"--set execution.micro_batch_sequences={rows * self.about['shards']}"

    def refusal(self, value: dict[str, Any], as_written: bool) -> str:
        rows = value["micro_batch"]
        what = f"{'as written, ' if as_written else ''}{sequences(rows)} per device"
        cure = f"a smaller execution.micro_batch_sequences, {LESS}" if as_written and rows > 1 else LESS
        need = human(value["bytes_per_device"]["total"])
        return (
            f"{self.experiment} does not fit {self.target.name}: {what} take {need} of "
            f"{human(value['capacity_bytes'])}, {human(value['shortfall_bytes'])} too much; {cure}"
        )


def fitting(run: Run, value: dict[str, Any]) -> Run:
    """The run with the micro-batch of an answer: the one that fits, or its own."""
    if not value["set"]:
        return run
    micro = int(value["set"].rpartition("=")[2])
    return replace(run, execution=replace(run.execution, micro_batch_sequences=micro))


def sequences(n: int) -> str:
    return f"{n} sequence{'s' * (n > 1)}"


def human(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def lines(value: dict[str, Any]) -> list[str]:
    """The answer for a person."""
    parts, written = value["bytes_per_device"], value["as_written"]
    verdict = "fits" if value["fits"] else "does not fit"
    if value["fits"] and not written["fits"]:
        verdict = f"does not fit as written ({human(written['shortfall_bytes'])} too much), but with {value['set']}"
    mesh = " x ".join(f"{name}={size}" for name, size in value["mesh"].items())
    table = [
        ("devices", f"{value['devices']} x {value['device_kind']}, {mesh}"),
        (
            "micro-batch",
            f"{sequences(value['micro_batch'])} ({value['micro_batch_tokens_per_device']:,} tokens) per device, "
            f"{value['micro_batches']} per step of stage {value['stage']!r}",
        ),
    ]
    if value.get("largest_micro_batch", value["micro_batch"]) != value["micro_batch"]:
        table.append(("", f"up to {value['largest_micro_batch']} fit: {value['largest_micro_batch_set']}"))
    split = " + ".join(f"{name} {human(parts[name])}" for name in ("state", "activations", "temporaries"))
    left = human(value["headroom_bytes"]) + " left" if value["fits"] else human(value["shortfall_bytes"]) + " too much"
    table += [
        ("per device", f"{split} = {human(parts['total'])} of {human(value['capacity_bytes'])}, {left}"),
        ("", value["capacity_note"]),
    ]
    attention = value["attention"]
    table.append(("attention", f"{attention['compiled']} (asked: {attention['asked']}; {attention['why']})"))
    table.append(("remat", value["remat"]))
    found = dict(value["collectives"] or {})
    unknown = found.pop("loops_of_unknown_length", 0)
    for i, (kind, row) in enumerate(found.items()):
        text = f"{kind}: {row['per_step']:,} from {row['static']} instructions, {human(row['bytes_per_step'])}"
        table.append(("" if i else "collectives", f"{text} per step and device"))
    if unknown:
        table.append(("", f"{unknown} loops of unknown length counted once"))
    table.append(
        (
            "FLOPs per step",
            f"{value['flops_per_step']:.3e}, {value['flops_per_step_per_device']:.3e} per device "
            f"({value['flops_convention']} convention)",
        )
    )
    seconds = sum(c["seconds"] for c in value["compilations"])
    table.append(
        (
            "compiled",
            f"in {value['compile_seconds']:.1f} s with jax {value['jax']}; {len(value['compilations'])} compilations, "
            f"{seconds:.0f} s",
        )
    )
    for i, row in enumerate(value.get("memory", [])):
        what = f"{human(row['total'])} with {sequences(row['micro_batch'])}"
        verdict_here = "holds it" if row["fits"] else "is too small"
        table.append(
            ("" if i else "memory", f"{row['memory_gb']} GB {verdict_here}: {what} of {human(row['usable_bytes'])}")
        )
    table += money.lines(value["estimate"])
    return [f"{value['experiment']} on {value['target']}: {verdict}"] + [f"  {a:<15} {b}" for a, b in table]


def estimate_lines(value: dict[str, Any]) -> list[str]:
    """The answer for a person when nothing was compiled."""
    table = money.lines(value["estimate"])
    return [f"{value['experiment']} on {value['target']}: not compiled"] + [f"  {a:<15} {b}" for a, b in table]
