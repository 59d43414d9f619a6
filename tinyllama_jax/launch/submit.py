"""Hands rendered jobs to a platform's own client, or says what it would hand over."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.launch import gke, plan, sky, slurm, tpu
from tinyllama_jax.launch.job import Job, ranges, shell

PLATFORMS = ("slurm", "gke", "tpu", "sky")
SUFFIXES = {"slurm": "sbatch", "gke": "yaml", "tpu": "sh", "sky": "yaml"}
INSTALL = {
    "sbatch": "launch from a login node of the cluster, or install Slurm's client (Debian: slurm-client)",
    "kubectl": "install it (https://kubernetes.io/docs/tasks/tools) and choose a cluster that has JobSet",
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and `gcloud auth login`",
    "sky": "pip install 'skypilot[gcp]' into an environment of its own, and `sky check`",
    "bash": "install it",
}
BEFORE = "JOB"  # in a command that is only shown: the id of the job before
CLIENTS = {"slurm": ("sbatch",), "gke": ("kubectl",), "tpu": ("bash", "gcloud"), "sky": ("sky",)}


@dataclass(frozen=True)
class Piece:
    """One file, and the command that submits it.  `after` = the command names the job of the piece before."""

    name: str
    file: str
    text: str
    command: list[str]
    after: bool = False


def platform(name: str) -> str:
    if name not in PLATFORMS:
        raise UsageError(f"--on {name}: not one of {', '.join(PLATFORMS)}{nearest(name, PLATFORMS)}")
    return name


def chained(jobs: list[Job], on: str, folder: str) -> tuple[list[Piece], str]:
    """As `pieces`, of jobs each of which waits for the one before: on SLURM by itself, elsewhere the first is rendered
    and the runs of the others are left for the same command with --runs."""
    found, then = pieces(jobs[0], on, folder)
    later = jobs[1:]
    if on != "slurm":
        left = ranges(tuple(number for job in later for number in job.task_numbers))
        return found, f"the same command with --runs {left}" if left else then
    for job in later:
        file = _file(folder, job.name, on)
        found.append(Piece(job.name, file, slurm.render(job), slurm.command_then(job, file, BEFORE), after=True))
    return found, then


def pieces(job: Job, on: str, folder: str) -> tuple[list[Piece], str]:
    """The rendered files of a job in `folder`, and the command that is left for a person to run afterwards, or ''."""
    if on == "slurm":
        found = [_piece(job.name, on, folder, slurm.render(job), job)]
        if job.then:
            name = f"{job.name}-then"
            file = _file(folder, name, on)
            command = slurm.command_then(job, file, BEFORE)
            found.append(Piece(name, file, slurm.render_then(job), command, after=True))
        return found, ""
    if on == "gke" and (job.then or not job.tasks):
        return [_piece(job.name, on, folder, gke.render(job), job)], ""
    render = {"gke": gke.render, "tpu": tpu.render, "sky": sky.render}[on]
    found = [_piece(each.name, on, folder, render(each), each) for each in plan.alone(job)]
    return found, shell(job.then)


def _piece(name: str, on: str, folder: str, text: str, job: Job) -> Piece:
    file = _file(folder, name, on)
    module = {"slurm": slurm, "gke": gke, "tpu": tpu, "sky": sky}[on]
    return Piece(name, file, text, module.command(job, file))


def _file(folder: str, name: str, on: str) -> str:
    return str(Path(folder) / f"{name}.{SUFFIXES[on]}")


def submit(found: list[Piece], on: str) -> list[dict]:
    """Writes the files and submits them: name, file, command and the platform's id of each.

    Raises ConfigError when a client is missing or refuses; what was submitted before stays, and is named.
    """
    for client in CLIENTS[on]:
        if shutil.which(client) is None:
            raise ConfigError(f"--on {on}: no {client} on this machine: {INSTALL[client]}")
    for piece in found:
        Path(piece.file).parent.mkdir(parents=True, exist_ok=True)
        Path(piece.file).write_text(piece.text)
    done: list[dict] = []
    for piece in found:
        command = piece.command
        if piece.after:
            command = [word.replace(f"afterok:{BEFORE}", f"afterok:{done[-1]['id']}") for word in command]
        if on == "slurm":
            # Slurm's own opinion first, of the whole job: it also refuses what could never be scheduled.
            _call(["sbatch", "--test-only", piece.file], done)
        if on == "tpu":
            done.append(_background(piece, command))
            continue
        said = _call(command, done)
        done.append({"name": piece.name, "file": piece.file, "command": shell(tuple(command)), "id": _id(on, said)})
    return done


def _call(command: list[str], done: list[dict]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = " ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-2:])
        before = f"; submitted before it: {', '.join(entry['id'] for entry in done)}" if done else ""
        raise ConfigError(f"{shell(tuple(command))}: status {result.returncode}: {said}{before}")
    return result.stdout


def _background(piece: Piece, command: list[str]) -> dict:
    """A script that lives as long as the job, in a session of its own, so that the terminal may be closed."""
    log = Path(piece.file).with_suffix(".log")
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return {
        "name": piece.name,
        "file": piece.file,
        "command": shell(tuple(command)),
        "id": f"process {child.pid}",
        "log": str(log),
    }


def _id(on: str, said: str) -> str:
    """The platform's name for what was submitted, from what its client said."""
    if on == "slurm":
        return said.strip().partition(";")[0]
    if on == "gke":
        return said.split()[0] if said.split() else ""
    found = re.search(r"Managed Job ID:\s*(\d+)|[Jj]ob ID:?\s*(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", said))
    return next((group for group in found.groups() if group), "") if found else ""
