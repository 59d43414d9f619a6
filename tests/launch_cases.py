"""Jobs that several tests render: what is committed in launch/, and names that a shell would take apart."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import dataclass

from tinyllama_jax.cli import main

IMAGE = "registry.example/tinyllama_jax"
ODD = 'it\'s a $(date) `id` "quoted" {brace} & #hash \\ end'


@dataclass(frozen=True)
class Case:
    on: str
    argv: str  # of `launch`, as one would type it
    committed: str = ""  # the file in launch/ that shows it

    def words(self) -> list[str]:
        return ["launch", *shlex.split(self.argv), "--on", self.on, "--dry-run", "--json"]


V1_0 = "experiments.tinyllama:v1_0"
CASES = {
    "slurm": Case(
        "slurm",
        f"{V1_0} --nodes 2 --workdir runs/v1_0 --time 7d --partition a100 --setup 'source .venv/bin/activate'",
        "slurm.sbatch",
    ),
    # The test's nodes have one processor each, which is one process.
    "slurm-gpus": Case(
        "slurm", f"{V1_0} --workdir runs/v1_0 --processes-per-node gpus --target h100:2x1 --set mesh.data=2"
    ),
    "slurm-image": Case("slurm", f"{V1_0} --nodes 2 --workdir /runs/v1_0 --image {IMAGE}:gpu --mount /scratch:/runs"),
    "slurm-prepare": Case("slurm", "prepare --out data/slim --items 200 --workers 1"),
    "slurm-odd": Case(
        "slurm",
        f"experiments.smoke:tiny --target cpu --workdir {shlex.quote(ODD)} --env {shlex.quote('ODD=' + ODD)} "
        "--set 'tracking.wandb_project=a b; c'",
    ),
    "gke": Case(
        "gke",
        f"{V1_0} --nodes 2 --workdir /runs/v1_0 --image {IMAGE}:gpu --queue research --mount runs:/runs "
        "--set data.store=/runs/data/slimpajama-starcoder",
        "gke-jobset.yaml",
    ),
    "gke-tpu": Case(
        "gke",
        f"{V1_0} --target v4:2x2x2 --workdir /runs/v1_0 --image {IMAGE}:tpu --spot --time 24h "
        "--set checkpoint.directory=gs://my-bucket/v1_0",
    ),
    "gke-prepare": Case("gke", f"prepare --out /runs/slim --items 5 --image {IMAGE}:tpu --mount runs:/runs"),
    "gke-odd": Case(
        "gke",
        f"experiments.smoke:tiny --target cpu --workdir {shlex.quote(ODD)} --env {shlex.quote('ODD=' + ODD)} "
        f"--image {IMAGE}:gpu --mount runs:/runs",
    ),
    "tpu": Case(
        "tpu",
        f"{V1_0} --target v4:2x2x2 --workdir /runs/v1_0 --image {IMAGE}:tpu --project my-project "
        "--zone us-central2-b --mount /mnt/disks/runs:/runs --set data.store=gs://my-bucket/slimpajama-starcoder "
        "--set data.cache=/runs/cache --set checkpoint.directory=gs://my-bucket/v1_0 "
        "--set execution.micro_batch_sequences=64",
        "tpu-queued-resource.sh",
    ),
    "tpu-odd": Case(
        "tpu",
        f"experiments.smoke:tiny --target v5e:2x2 --workdir {shlex.quote(ODD)} --env {shlex.quote('ODD=' + ODD)} "
        "--setup 'cd code' --project p --zone z --time 2h --spot",
    ),
    "sky": Case(
        "sky",
        f"{V1_0} --nodes 2 --workdir /runs/v1_0 --spot --mount s3://my-bucket/runs:/runs "
        "--set data.store=/runs/data/slimpajama-starcoder",
        "skypilot.yaml",
    ),
    "sky-odd": Case(
        "sky",
        f"experiments.smoke:tiny --target cpu --workdir {shlex.quote(ODD)} --env {shlex.quote('ODD=' + ODD)} "
        f"--image {IMAGE}:gpu",
    ),
}


TINY = ("launch", "experiments.smoke:tiny", "--target", "cpu", "--workdir", "run", "--json")


def answer(capsys, *argv) -> dict:
    """What the command line answers with --json."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return json.loads(capsys.readouterr().out)


def render(name: str) -> list[str]:
    """The files of a case."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(CASES[name].words()) == 0
    return [job["text"] for job in json.loads(output.getvalue())["jobs"]]
