"""Verbs about other machines: `launch`, `launch prepare`, `launch flags`, `launch supervise`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import UsageError
from tinyllama_jax.terminal import answer, say

# Options that mean something on some platforms only: elsewhere they are refused, not ignored.
ONLY_ON = {
    "partition": ("slurm",),
    "account": ("slurm",),
    "queue": ("gke",),
    "project": ("tpu",),
    "zone": ("tpu", "sky"),
    "spot": ("gke", "tpu", "sky"),
}
UNITS = {"m": 60, "h": 3600, "d": 86400}


def launch(args: argparse.Namespace) -> None:
    from tinyllama_jax.launch import flags, machine, plan, submit

    on = submit.platform(args.on)
    machines = machine.parse(args.target, args.nodes, on)
    if args.processes_per_node == "gpus" and machines.platform != "gpu":
        raise UsageError(f"--processes-per-node gpus: {machines.target} has none")
    options = _options(args, on) | {"machine": machines}
    chosen = flags.profile(args.profile or machines.kind)
    options["environment"] = _environment(args.env, flags.environment(chosen))
    options["processes"] = {"one": "node", "gpus": "device"}[args.processes_per_node]
    options["name"] = args.name or _name(args.experiment.partition(":")[2])
    chosen = numbers("--runs", args.runs)
    jobs, runs = plan.training(args.experiment, args.workdir, args.settings, args.experiment_path, chosen, **options)
    found = plan.estimates(runs, machines) if args.dry_run or args.max_cost is not None else []
    plan.check_cost(args.experiment, found, machines, args.max_cost)
    cost = {"cost_usd": sum(value["cost_usd"]["total"] for value in found), "estimates": found} if found else {}
    _submit(args, jobs, on, cost, plan.estimate_lines(found))


def prepare(args: argparse.Namespace) -> None:
    from tinyllama_jax.launch import machine, plan, submit

    on = submit.platform(args.on)
    if args.target and on != "tpu":
        raise UsageError(f"--target {args.target}: `launch prepare --on {on}` takes machines without devices")
    if args.workers < 0:
        raise UsageError(f"--workers {args.workers}: must be 0 (all cores) or more")
    machines = machine.parse(args.target or ("v5e:1x1" if on == "tpu" else "cpu"), None, on)
    options = _options(args, on) | {"machine": machines, "environment": _environment(args.env, {})}
    options["name"] = args.name or _name(f"prepare-{Path(args.out).name}")
    _submit(args, [plan.preparing(args.out, args.items, args.workers, **options)], on)


def flags(args: argparse.Namespace) -> None:
    from tinyllama_jax.launch.flags import PROFILES, STALE, environment, profile

    names = [args.profile] if args.profile else list(PROFILES)
    value: dict = {"profiles": {}, "stale": STALE}
    lines = []
    for name in names:
        chosen = profile(name)
        value["profiles"][name] = {"environment": environment(chosen), "flags": [vars(flag) for flag in chosen]}
        lines += [f"{name}:" if chosen else f"{name}: the defaults"]
        for flag in chosen:
            dashes = "" if flag.variable == flag.name else f"{flag.variable} --"
            lines += [f"  {dashes}{flag.name}={flag.value}", f"      {flag.reason}", f"      {flag.source}"]
    answer(args, value, lines)


def supervise(args: argparse.Namespace) -> None:
    from tinyllama_jax.launch.supervise import PLATFORMS, Supervisor

    if args.on not in PLATFORMS:
        raise UsageError(f"--on {args.on}: not one of {', '.join(PLATFORMS)}{nearest(args.on, PLATFORMS)}")
    if args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: must be 0 or more")
    options = {"on": args.on, "max_restarts": args.max_restarts, "workdir": args.workdir}
    sys.exit(Supervisor(args.command, checkpoints=args.checkpoints, **options).run())


def seconds(text: str) -> int:
    """90m, 24h or 7d in seconds, '' as 0.  Raises UsageError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text)
    if text and not found:
        raise UsageError(f"--time {text}: write it as 90m, 24h or 7d")
    return int(found[1]) * UNITS[found[2]] if found else 0


def numbers(option: str, text: str) -> list[int] | None:
    """0,4-6 as 0, 4, 5, 6; None for ''.  Raises UsageError for anything else."""
    found = []
    for word in text.split(",") if text else []:
        first, dash, last = word.partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(last) >= int(first))):
            raise UsageError(f"{option} {text}: write it as 0,4-6")
        found += range(int(first), int(last or first) + 1)
    return found or None


def _options(args: argparse.Namespace, on: str) -> dict:
    """The fields of a Job that options name."""
    for option, platforms in ONLY_ON.items():
        if getattr(args, option) and on not in platforms:
            raise UsageError(f"--{option} is for --on {' or '.join(platforms)}; leave it out for {on}")
    if args.mount and not args.image and on in ("slurm", "tpu"):
        raise UsageError("--mount: only a container has mounts; name its --image too")
    mounts = []
    for mount in args.mount:
        outside, separator, inside = mount.rpartition(":")
        if not separator or not outside or not inside.startswith("/"):
            raise UsageError(f"--mount {mount}: write it as OUTSIDE:INSIDE with an absolute path inside")
        mounts.append((outside, inside))
    return {
        "image": args.image,
        "mounts": tuple(mounts),
        "setup": tuple(args.setup),
        "seconds": seconds(args.time),
        "grace_seconds": args.grace,
        "max_restarts": args.max_restarts,
        **{option: getattr(args, option) for option in ONLY_ON},
    }


def _environment(given: list[str], profile: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The profile's variables, then the user's, which win."""
    from tinyllama_jax.launch.flags import check

    own = {}
    for word in given:
        name, separator, value = word.partition("=")
        if not separator:
            raise UsageError(f"--env {word}: write it as NAME=VALUE")
        own[name] = value
    check(own)
    return tuple((profile | own).items())


def _name(text: str) -> str:
    """A job's name from another one, such as v1-0 from v1_0."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:40].rstrip("-")


def _submit(
    args: argparse.Namespace, jobs: list, on: str, more: dict | None = None, estimated: Sequence[str] = ()
) -> None:
    """Shows or submits the jobs, and answers: with `more` in JSON, after the lines `estimated` for a person."""
    from tinyllama_jax.launch import submit
    from tinyllama_jax.launch.job import shell

    found, then = submit.chained(jobs, on, args.folder)
    value: dict = {"name": jobs[0].name, "on": on, "dry_run": args.dry_run, **(more or {})}
    lines = list(estimated)
    if args.dry_run:
        value["jobs"] = [
            {"name": p.name, "file": p.file, "command": shell(tuple(p.command)), "id": None, "text": p.text}
            for p in found
        ]
        for entry in value["jobs"]:
            lines += [f"# {entry['file']}", entry["text"], f"# submitted with: {entry['command']}"]
    else:
        value["jobs"] = submit.submit(found, on)
        lines += [f"{entry['name']}: {entry['id']}, from {entry['file']}" for entry in value["jobs"]]
    first = value["jobs"][0]
    value |= {"file": first["file"], "command": first["command"], "job_id": first["id"], "then": then}
    answer(args, value, lines)
    if then:
        say(f"when all of them are done, once: {then}")
