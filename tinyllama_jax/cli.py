"""The command line: verbs, their options, and what a failure looks like from outside.

Exit status: 0 done; 1 crash; 2 the command text is wrong; 75 stopped after saving, start again; 78 configuration,
data, or it does not fit; 128 + n killed by signal n.  Numbers go to stdout (one JSON object with --json), everything
else to stderr.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from tinyllama_jax import __version__, verbs
from tinyllama_jax.cli_chat import add_chat
from tinyllama_jax.cli_evaluate import add_evaluate
from tinyllama_jax.cli_finetune import FINETUNE_STEPS, add_finetune
from tinyllama_jax.cli_generate import add_generate
from tinyllama_jax.cli_interop import add_interop
from tinyllama_jax.cli_lab import FIT_STEPS, add_allocate, add_fit
from tinyllama_jax.cli_launch import LAUNCH_STEPS, add_launch
from tinyllama_jax.cli_measure import add_measure
from tinyllama_jax.cli_prepare import PREPARE_STEPS, add_prepare
from tinyllama_jax.cli_runs import add_runs
from tinyllama_jax.cli_serve import add_serve
from tinyllama_jax.cli_sweep import add_sweep
from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import UserError

# Verbs of two words.
STEPS = {"prepare": PREPARE_STEPS, "launch": LAUNCH_STEPS, "fit": FIT_STEPS, "finetune": FINETUNE_STEPS}
# Errors of the machine that the user can mend: disk full, no permission, a file where a folder should be, ...
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class _Parser(argparse.ArgumentParser):
    """One line instead of a page of usage when the command text is wrong."""

    def error(self, message: str):
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tinyllama",
        description="Pretrain TinyLlama-class language models in JAX: on a laptop, on a pod, with the same commands.",
        epilog="A run lives in one directory; every verb that reads takes that directory, RUN@STEP, or a checkpoint.",
    )
    parser.add_argument("--version", action="version", version=f"tinyllama_jax {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, function, summary: str, example: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(function=function)
        return sub

    def settings(sub) -> None:
        sub.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a field of the configuration, such as lr.peak=1e-3 (repeatable)",
        )
        sub.add_argument(
            "--experiment-path",
            action="append",
            default=[],
            metavar="DIR",
            help="also look for experiment modules here; the current directory is always searched",
        )

    def as_json(sub) -> None:
        sub.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")

    def dtype(sub) -> None:
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute in (float32)")

    def several(sub) -> None:
        group = sub.add_argument_group("several processes", "found from Slurm, Open MPI, GKE or TPU when not given")
        group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="where process 0 can be reached")
        group.add_argument("--processes", type=int, default=0, metavar="N", help="how many train together")
        group.add_argument("--process", type=int, default=-1, metavar="I", help="which of them this is, from 0")

    sub = verb(
        "demo",
        verbs.demo,
        "prepare text, train a small TinyLlama through three stages, evaluate it, let it write, report",
        "tinyllama demo --workdir runs/demo",
    )
    sub.add_argument("--experiment", default="experiments.smoke:demo", metavar="MODULE:FUNCTION")
    sub.add_argument("--workdir", default="runs/demo", metavar="DIR", help="run directory (runs/demo)")
    settings(sub)
    as_json(sub)

    add_prepare(verb, as_json)

    sub = verb(
        "train",
        verbs.train,
        "train an experiment in a run directory, or continue it",
        "tinyllama train experiments.smoke:tiny --workdir runs/tiny --set lr.peak=1e-3",
    )
    sub.add_argument("experiment", metavar="MODULE:FUNCTION")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run directory; resumes what it holds")
    sub.add_argument(
        "--allow-config-change",
        action="store_true",
        help="continue although fields that decide the numbers differ from the checkpoint's",
    )
    several(sub)
    settings(sub)

    add_finetune(verb, settings, as_json, several)
    add_sweep(verb, settings, as_json)

    sub = verb(
        "preflight",
        verbs.preflight,
        "compile an experiment's training step for machines that are not here: does it fit, how long, how much",
        "tinyllama preflight experiments.tinyllama:v1_0 --target a100-40g:2x8 --json\n"
        "  tinyllama preflight experiments.finetune:qlora --target a100-40g --memory 40,24,16,8,4",
    )
    sub.add_argument("experiment", metavar="MODULE:FUNCTION", help="a run, or a recipe for fine-tuning")
    sub.add_argument(
        "--base", default="tinyllama-1.1b", metavar="PRESET|CKPT", help="of a recipe: its base (tinyllama-1.1b)"
    )
    sub.add_argument(
        "--memory", default="", metavar="GB[,GB...]", help="also say which of these sizes of one device hold the step"
    )
    sub.add_argument(
        "--target",
        required=True,
        metavar="MACHINE",
        help="a100-40g, a100-80g, h100 or h200, with :GPUS or :MACHINESxGPUS; v4, v5e, v5p or v6e with the slice's "
        "shape, such as v5e:4x4 or v4:2x2x4",
    )
    sub.add_argument(
        "--as-written",
        action="store_true",
        help="do not look for the largest micro-batch that fits; exit with 78 when the experiment's own does not",
    )
    sub.add_argument(
        "--estimate-only", action="store_true", help="compile nothing: speed, days and cost from the shapes, at once"
    )
    sub.add_argument(
        "--calibrate",
        metavar="RUN|ANCHOR|none",
        help="a measured run, or a published one of preflight/anchors.py (the nearest to the target)",
    )
    sub.add_argument("--price", type=float, metavar="USD", help="per device and hour (a dated list price)")
    sub.add_argument("--max-cost", type=float, metavar="USD", help="exit with 78 when the run would cost more")
    sub.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="replace one of the assumptions that are printed, such as network_bandwidth=6.25e9 (repeatable)",
    )
    settings(sub)
    as_json(sub)

    add_launch(verb, settings, as_json)
    add_runs(verb, as_json)
    add_fit(verb, as_json)
    add_allocate(verb, as_json)
    add_measure(verb, as_json)

    sub = verb(
        "report",
        verbs.report,
        "write report.html and plots/*.png for a run, a sweep or a table of runs",
        "tinyllama report runs/demo --compare runs/other\n  tinyllama report runs/isoflop\n"
        "  tinyllama report runs/demo --reference wandb_export.csv --json",
    )
    sub.add_argument("run", metavar="RUN|SWEEP|TABLE.jsonl")
    sub.add_argument("--out", default="", metavar="DIR", help="of a sweep or a table: where the report goes")
    sub.add_argument("--compare", action="append", default=[], metavar="RUN", help="overlay another run's loss")
    sub.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="FILE.csv",
        help="lay a curve from elsewhere beside the run's, and measure the difference (repeatable)",
    )
    sub.add_argument(
        "--reference-columns",
        default="",
        metavar="tokens=NAME,loss=NAME",
        help="its columns, or step=NAME (usual names are found)",
    )
    sub.add_argument("--reference-batch-tokens", type=int, default=0, metavar="N", help="tokens in each of its steps")
    as_json(sub)

    add_evaluate(verb, as_json, dtype)
    add_generate(verb, as_json, dtype)
    add_chat(verb, as_json, dtype)
    add_serve(verb, as_json, dtype)
    add_interop(verb, as_json)

    sub = verb(
        "inspect",
        verbs.inspect,
        "what a preset, experiment, run or checkpoint (shapes, parameters, FLOPs) or a token store (text) holds",
        "tinyllama inspect tinyllama-1.1b --json",
    )
    sub.add_argument("what", metavar="PRESET|RUN|CKPT|MODULE:FUNCTION|STORE")
    sub.add_argument("--sequence-tokens", type=int, default=0, help="for the FLOPs (0 = the model's context)")
    sub.add_argument("--verify", action="store_true", help="of a store: check every byte against the manifest")
    sub.add_argument("--samples", type=int, default=2, metavar="N", help="of a store: random windows decoded (2)")
    sub.add_argument("--seed", type=int, default=0, help="of a store: which windows (0)")
    settings(sub)
    as_json(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[1:2] and argv[1] in STEPS.get(argv[0], ()):
        argv[:2] = [" ".join(argv[:2])]
    parser = build_parser()
    known = parser._subparsers._group_actions[0].choices
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        print(f"tinyllama: no verb {argv[0]!r}{nearest(argv[0], known)}; see tinyllama --help", file=sys.stderr)
        return 2
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version end with 0, a wrong command text with 2
        return int(stop.code or 0)
    try:
        args.function(args)
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"tinyllama {args.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"tinyllama {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        print(f"tinyllama {args.verb}: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 78
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        traceback.print_exc(limit=-1)
        print(
            f"tinyllama {args.verb}: the device's memory does not hold this: a smaller "
            "execution.micro_batch_sequences, execution.remat=full or more devices need less",
            file=sys.stderr,
        )
        return 78
