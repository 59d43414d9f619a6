"""The options of `launch` and its companions."""

from __future__ import annotations

from tinyllama_jax import verbs_launch

# Verbs of their own behind `launch`, each with a help: an experiment's name has a colon, so none is taken for one.
LAUNCH_STEPS = ("prepare", "flags", "supervise")


def add_launch(verb, settings, as_json) -> None:
    def where(sub) -> None:
        sub.add_argument("--on", required=True, metavar="PLATFORM", help="slurm, gke, tpu (queued resources) or sky")
        sub.add_argument("--name", default="", metavar="NAME", help="of the job (from the run's or the store's name)")
        sub.add_argument("--time", default="", metavar="T", help="limit, such as 90m, 24h or 7d (the platform's)")
        sub.add_argument("--image", default="", metavar="IMAGE", help="container that has Python and this package")
        sub.add_argument(
            "--mount",
            action="append",
            default=[],
            metavar="OUTSIDE:INSIDE",
            help="into the container: a path, on gke a volume claim, on sky a bucket (repeatable)",
        )
        sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job (repeatable)")
        sub.add_argument(
            "--setup",
            action="append",
            default=[],
            metavar="LINE",
            help="shell line before the command, such as 'source .venv/bin/activate' (repeatable)",
        )
        sub.add_argument("--partition", default="", metavar="NAME", help="slurm")
        sub.add_argument("--account", default="", metavar="NAME", help="slurm")
        sub.add_argument("--queue", default="", metavar="NAME", help="gke: Kueue's LocalQueue")
        sub.add_argument("--project", default="", metavar="NAME", help="tpu: the Google Cloud project")
        sub.add_argument("--zone", default="", metavar="ZONE", help="tpu; on sky CLOUD/REGION or CLOUD/REGION/ZONE")
        sub.add_argument("--spot", action="store_true", help="gke, tpu, sky: cheaper, and may be taken away")
        sub.add_argument("--grace", type=int, default=120, metavar="SECONDS", help="to save when asked to stop (120)")
        sub.add_argument(
            "--max-restarts", type=int, default=3, metavar="N", help="failures in a row without a new checkpoint (3)"
        )
        sub.add_argument("--folder", default="runs/launched", metavar="DIR", help="for rendered files (runs/launched)")
        sub.add_argument("--dry-run", action="store_true", help="show the files and the commands, submit nothing")
        as_json(sub)

    sub = verb(
        "launch",
        verbs_launch.launch,
        "run an experiment, or each run of a sweep, on a cluster: `train` under a supervisor that starts it again",
        "tinyllama launch experiments.tinyllama:v1_0 --on slurm --nodes 2 --workdir runs/v1_0 --dry-run\n"
        "  tinyllama launch experiments.tinyllama:v1_0 --on slurm --workdir runs/v1_0 --time 7d --partition a100 \\\n"
        "      --setup 'source .venv/bin/activate'\n"
        "  tinyllama launch experiments.tinyllama:v1_0 --on gke --workdir /runs/v1_0 --image IMAGE \\\n"
        "      --queue research --mount runs-claim:/runs\n"
        "  tinyllama launch experiments.tinyllama:v1_0 --on tpu --target v4:2x2x4 --workdir runs/v1_0 --project P \\\n"
        "      --zone us-central2-b --image IMAGE --set checkpoint.directory=gs://bucket/v1_0\n\n"
        "its companions (each has a --help):\n"
        "  tinyllama launch prepare --out STORE --items N --on PLATFORM\n"
        "  tinyllama launch flags [--profile NAME]\n"
        "  tinyllama launch supervise [--max-restarts N] -- COMMAND...",
    )
    sub.add_argument("experiment", metavar="MODULE:FUNCTION", help="returns a Run, or a list of Runs: run n in DIR/n")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run directory, as the nodes see it")
    sub.add_argument("--runs", default="", metavar="N,M-K", help="of a sweep these, numbered from 0 (all)")
    sub.add_argument("--nodes", type=int, default=None, metavar="N", help="machines (the target's)")
    sub.add_argument(
        "--target",
        default="",
        metavar="MACHINE",
        help="as for `preflight`, such as a100-40g:2x8 or v5e:4x4, or cpu (a100-40g with 8 GPUs a node; tpu: v5e:4x4)",
    )
    sub.add_argument(
        "--processes-per-node",
        choices=("one", "gpus"),
        default="one",
        help="one with all devices of its node, or on slurm one for each GPU (one)",
    )
    sub.add_argument("--profile", default="", metavar="NAME", help="of `launch flags` (the machine's; none = no flags)")
    sub.add_argument(
        "--max-cost", type=float, default=None, metavar="DOLLARS", help="refuse what `preflight` estimates to cost more"
    )
    where(sub)
    settings(sub)

    sub = verb(
        "launch prepare",
        verbs_launch.prepare,
        "make the items of `prepare plan` in N shares on a cluster, and then the manifest",
        "tinyllama launch prepare --out data/slim --items 200 --on slurm --partition cpu",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="the store, as the nodes see it")
    sub.add_argument("--items", type=int, required=True, metavar="N", help="shares, each a task or a job of its own")
    sub.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes, and on slurm cores, of a share (0 = one for each core it is given)",
    )
    sub.add_argument("--target", default="", metavar="MACHINE", help="tpu: the slice (v5e:1x1); elsewhere processors")
    where(sub)

    sub = verb(
        "launch flags",
        verbs_launch.flags,
        "recommended flags of XLA, NCCL and libtpu for a machine, each with its reason and source",
        "tinyllama launch flags --profile h100",
    )
    sub.add_argument("--profile", default="", metavar="NAME", help="one machine's (all)")
    as_json(sub)

    sub = verb(
        "launch supervise",
        verbs_launch.supervise,
        "run a command again by its exit status: 75 always, 2 and 78 never, others a bounded number of times",
        "tinyllama launch supervise --max-restarts 3 --workdir runs/demo -- \\\n"
        "      tinyllama train experiments.smoke:demo --workdir runs/demo",
    )
    sub.add_argument(
        "--on", default="local", metavar="PLATFORM", help="who starts again: local (here), slurm, gke, tpu or sky"
    )
    sub.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="failures in a row without a new checkpoint (3)"
    )
    sub.add_argument("--workdir", default="", metavar="DIR", help="whose checkpoints begin the count anew")
    sub.add_argument("--checkpoints", default="", metavar="DIR", help="where they are (WORKDIR/checkpoints)")
    sub.add_argument("command", nargs="+", metavar="COMMAND", help="behind --")
