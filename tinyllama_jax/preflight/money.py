"""Before anything is paid for: how fast, how long, how much.  No jax here, and an answer in milliseconds.

    value = money.estimate(run, "a100-40g:2x8")
    value["days"], value["cost_usd"]["total"]
    money.check(value, 50_000, "experiments.tinyllama:v1_0")

The model is in roofline.py, what it assumes in assumptions.py, what it is calibrated with in anchors.py.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from tinyllama_jax import configio, flops
from tinyllama_jax.config import Run, replace
from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.preflight import anchors, prices, roofline, targets
from tinyllama_jax.preflight import assumptions as assuming
from tinyllama_jax.preflight.anchors import ANCHORS, Calibration
from tinyllama_jax.schedules import Plan, PlannedStage
from tinyllama_jax.terminal import duration

DAY, HOUR = 86_400, 3_600
WARM_UP = 5  # steps after each compilation that a calibration leaves out


def estimate(
    run: Run,
    target: targets.Target | str,
    *,
    price: float | None = None,
    calibration: Calibration | str | None = None,
    assume: list[str] | None = None,
) -> dict[str, Any]:
    """Speed, time and cost of the whole of `run`, over all its stages, on the target.

    price        US dollars per device and hour; None = prices.py's
    calibration  a run directory, an anchor's name, "none" (the roof itself), or None: the nearest anchor
    assume       FIELD=NUMBER for fields of assumptions.Assumptions

    tokens_per_s and tokens_per_s_per_device are means over the run; mfu has both conventions; parts are seconds of
    the mean step, whose sum is step_seconds; the part `calibration` is what the model does not account for.
    A fork counts from its parent's checkpoint on.  Raises UsageError for an unknown target, anchor or assumption,
    ConfigError when the batch or the mesh does not fit the devices, DataError for a run that cannot be read.
    """
    target = targets.parse(target) if isinstance(target, str) else target
    if price is not None and not price > 0:
        raise UsageError(f"--price {price:g}: must be positive")
    if not isinstance(calibration, Calibration):
        calibration = calibrate(calibration, target)
    given = assuming.of(target)
    given = assuming.assume(replace(given, efficiency=calibration.efficiency), assume or [])
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    begin = run.fork.tokens if run.fork else 0
    rows = roofline.of_plan(run, plan.stages, target.count, given)
    stages, seconds, steps, tokens = [], 0.0, 0, 0
    parts = dict.fromkeys((*roofline.PARTS, "calibration"), 0.0)
    for planned, row in zip(plan.stages, rows, strict=True):
        n = _steps_left(planned, begin)
        row["parts"]["calibration"] = row["step_seconds"] * (1 / given.efficiency - 1)
        row["step_seconds"] /= given.efficiency
        row |= {"steps": n, "tokens_per_s": row["batch_tokens"] / row["step_seconds"]}
        stages.append(row)
        seconds, steps, tokens = seconds + n * row["step_seconds"], steps + n, tokens + n * row["batch_tokens"]
        parts = {part: total + n * row["parts"][part] for part, total in parts.items()}
    if not steps:
        raise ConfigError(f"{run.name}: nothing is left to train after the fork at {begin:,} tokens")
    speed, wall = tokens / seconds, seconds / given.goodput
    list_price = prices.of(target.name)
    hourly = list_price.usd if price is None else price
    hours = wall / HOUR * target.count
    peak = given.peak_flops * target.count
    return {
        "target": target.name,
        "devices": target.count,
        "tokens": tokens,
        "tokens_per_s": speed,
        "tokens_per_s_per_device": speed / target.count,
        "mfu": {c: speed * flops.of_run(run, c) / peak for c in ("palm", "causal")},
        "days": wall / DAY,
        "device_hours": hours,
        "cost_usd": {
            "per_device_hour": hourly,
            "total": hours * hourly,
            "price": {"what": "as given"} if price is not None else list_price._asdict(),
            "spot_total": None if price is not None or list_price.spot_usd is None else hours * list_price.spot_usd,
        },
        "step_seconds": seconds / steps,
        "parts": {part: total / steps for part, total in parts.items()},
        "stages": stages,
        "calibration": calibration._asdict(),
        "assumptions": dataclasses.asdict(given),
    }


def _steps_left(stage: PlannedStage, begin: int) -> int:
    done = min(max(begin - stage.start_tokens, 0) // stage.batch_tokens, stage.end_step - stage.start_step)
    return stage.end_step - stage.start_step - done


def calibrate(what: str | None, target: targets.Target) -> Calibration:
    """The one factor: from an anchor's name, a run directory, "none", or None for the target's nearest anchor."""
    if what == "none":
        return Calibration(1.0, "none: the roof that the model draws", "")
    if what is None:
        return ANCHORS[anchors.NEAREST[target.name.partition(":")[0]]].calibration()
    if what in ANCHORS:
        return ANCHORS[what].calibration()
    if not Path(what).is_dir():
        raise UsageError(
            f"--calibrate {what}: neither a run directory nor an anchor{nearest(what, ANCHORS)}; anchors are "
            f"{', '.join(ANCHORS)}; `none` calibrates with nothing"
        )
    return of_run(what)


def of_run(directory: str | Path) -> Calibration:
    """From a measured run: its metrics.jsonl against the model of its own configuration on its own devices.

    The steps with a compilation and the five after each are left out; of the rest the median of each stage counts.
    Raises ConfigError when the devices are none that the model knows, or too few steps are left.
    """
    from tinyllama_jax.lab.runs import Run as Measured

    measured = Measured(directory)
    devices = measured.info.get("devices") or {}
    kind, count = str(devices.get("kind", "")), int(devices.get("count", 0))
    target = _target_of(kind, count, directory)
    run = configio.from_dict(Run, measured.config)
    # The mesh as it was: -1 is what was left then.
    run = replace(run, mesh=replace(run.mesh, **{a: s for a, s in (devices.get("mesh") or {}).items()}))
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    times: dict[str, list[float]] = {}
    skip = WARM_UP
    columns = (measured.column(name) for name in ("stage", "timing.step_s", "timing.compiled"))
    for stage, seconds, compiled in zip(*columns, strict=True):
        skip = WARM_UP if compiled == 1 else skip - 1
        if skip < 0 and seconds > 0:
            times.setdefault(str(stage), []).append(float(seconds))
    rows = roofline.of_plan(run, plan.stages, count, assuming.of(target))
    steps = [(len(t), statistics.median(t), row) for row in rows if (t := times.get(row["name"]))]
    if not steps:
        raise ConfigError(
            f"--calibrate {directory}: no step is left after the first {WARM_UP} of each start; train it further"
        )
    modelled = sum(n * row["step_seconds"] for n, _, row in steps)
    there = sum(n * median for n, median, _ in steps)
    speed = sum(n * row["batch_tokens"] for n, _, row in steps) / there / count
    said = f"{directory}: {speed:,.0f} tokens/s per device on {count} x {kind}, {sum(n for n, _, _ in steps)} steps"
    return Calibration(modelled / there, said, str(directory))


def _target_of(kind: str, count: int, directory: str | Path) -> targets.Target:
    for name, gpu in targets.GPUS.items():
        if gpu.kind == kind:
            each = min(count, targets.GPUS_PER_MACHINE)
            return targets.parse(f"{name}:{count // each}x{each}")
    for name, tpu in targets.TPUS.items():
        if tpu.kind == kind:
            shape = (count, 1, 1)[: tpu.dimensions]
            return targets.Target(f"{name}:{count}", "tpu", kind, count, 0, "", shape)
    known = ", ".join([g.kind for g in targets.GPUS.values()] + [t.kind for t in targets.TPUS.values()])
    raise ConfigError(f"--calibrate {directory}: it ran on {kind or 'unknown devices'}; the model knows {known}")


def refusal(value: dict[str, Any], max_cost: float | None, experiment: str) -> ConfigError | None:
    """Why the estimate is not accepted: it exceeds `max_cost` US dollars."""
    total = value["cost_usd"]["total"]
    if max_cost is None or total <= max_cost:
        return None
    return ConfigError(
        f"{experiment} on {value['target']} is estimated at ${total:,.0f} ({value['days']:.1f} days of "
        f"{value['devices']} devices at ${value['cost_usd']['per_device_hour']:.2f} an hour), more than --max-cost "
        f"{max_cost:,.0f}; train on fewer tokens, choose another target, or raise it"
    )


def check(value: dict[str, Any], max_cost: float | None, experiment: str) -> None:
    """Raises ConfigError when the estimate exceeds `max_cost` US dollars."""
    if refused := refusal(value, max_cost, experiment):
        raise refused


def lines(value: dict[str, Any]) -> list[tuple[str, str]]:
    """The estimate for a person, as rows (label, text)."""
    mfu, cost, total = value["mfu"], value["cost_usd"], value["step_seconds"]
    price = cost["price"]
    rows = [
        (
            "speed",
            f"{value['tokens_per_s_per_device']:,.0f} tokens/s per device, {value['tokens_per_s']:,.0f} in all; MFU "
            f"{100 * mfu['palm']:.1f} % (palm), {100 * mfu['causal']:.1f} % (causal)",
        ),
        ("step", f"{total:.3g} s: " + ", ".join(f"{part} {s:.2g}" for part, s in value["parts"].items())),
        ("time", f"{duration(value['days'] * DAY)} for {value['tokens']:,} tokens"),
        (
            "cost",
            f"${cost['total']:,.0f}: {value['device_hours']:,.0f} device-hours at ${cost['per_device_hour']:.2f} ("
            + ("as given)" if "usd" not in price else f"{price['what']}; {price['source']}, {price['read']})"),
        ),
    ]
    if cost["spot_total"] is not None:
        rows.append(("", f"${cost['spot_total']:,.0f} at the spot price of ${price['spot_usd']:.2f}"))
    calibration = value["calibration"]
    rows.append(("calibrated", f"{calibration['efficiency']:.3f} of the model, by {calibration['source']}"))
    if len(value["stages"]) > 1:
        for stage in (stage for stage in value["stages"] if stage["steps"]):
            text = f"{stage['steps']:,} steps of {stage['step_seconds']:.3g} s, {stage['tokens_per_s']:,.0f} tokens/s"
            rows.append(("stage", f"{stage['name']}: {text}"))
    named = [f"{name}={number:g}" for name, number in value["assumptions"].items()]
    for i in range(0, len(named), 4):
        rows.append(("assuming" if i == 0 else "", ", ".join(named[i : i + 4])))
    return rows
