"""What is settled before the first step: the data, the place to continue from, and the run's description."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax

from tinyllama_jax import __version__, configio, flops, programs
from tinyllama_jax.config import Run
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.data.joined import JoinedStore
from tinyllama_jax.data.order import Order
from tinyllama_jax.data.plan import silent
from tinyllama_jax.data.prepare import prepare
from tinyllama_jax.data.store import MANIFEST, TokenStore
from tinyllama_jax.data.views import make_view
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError
from tinyllama_jax.finetune import adapters, base
from tinyllama_jax.finetune import start as beginning
from tinyllama_jax.finetune.store import ExampleStore
from tinyllama_jax.generate.adapted import base_identity
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import checkpoint, rollback, saved
from tinyllama_jax.train.checkpoint import Checkpoints
from tinyllama_jax.train.places import place_of
from tinyllama_jax.train.state import State, init

SAME_NUMBERS = "the numbers would no longer be those of one run"


def say(text: str, peers: Peers = ALONE) -> None:
    """A line for the person at the terminal, from process 0; stdout is for results."""
    if peers.lead:
        print(text, file=sys.stderr, flush=True)


def process_began() -> float:
    """When this process began, in seconds since 1970: its imports are part of what a start costs."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, IndexError, ValueError):  # not Linux
        return time.time()


def keep_programs(run: Run, workdir: Path, peers: Peers = ALONE) -> None:
    """Before anything is compiled: with all runs of these shapes; of a deterministic run in its own directory, for
    there they carry the compiler's choices, which other machines and later days must share."""
    own = workdir / "programs" if run.execution.deterministic else None
    shapes = {name: configio.to_dict(getattr(run, name)) for name in ("model", "execution", "mesh", "optimizer")}
    batches = sorted({stage.batch_tokens for stage in run.curriculum})
    shapes |= {"data": [run.data.sequence_tokens, run.data.document_masking, batches]}
    programs.keep(json.dumps(shapes), own, tidy=peers.lead)


def first_step(tracker, began: float, peers: Peers = ALONE) -> None:
    """Seals the programs and tells how long the first step was waited for."""
    if peers.lead:
        programs.seal()
    found = programs.first_step(began)
    tracker.event("first_step", **found)
    kept = f", {found['programs_found']} programs found compiled" if found["programs_found"] else ""
    say(f"first step after {found['seconds']:.1f} s, of which {found['compile_s']:.1f} s for programs{kept}", peers)


def checkpoint_directory(run: Run, workdir: Path) -> str | Path:
    return run.checkpoint.directory or workdir / "checkpoints"


def open_store(run: Run, workdir: Path, progress=None, peers: Peers = ALONE) -> TokenStore | JoinedStore:
    """The run's token store, made by its recipe when it is missing: by process 0, while the others wait.  With a
    budget of unique tokens the view of it: beside a local store, for all runs that have the same budget, and in the
    run directory where the store is in a bucket.  With a store to replay, the two as one.

    Raises DataError when it is missing without a recipe, damaged, smaller than the budget, or marked otherwise than
    the run asks.
    """
    if peers.lead:
        store = _joined(run, _view(run, _open_store(run, progress), workdir))
        peers.tell("store", store.manifest_sha256)
        return store
    expected = peers.tell("store")
    store = _joined(run, _view(run, _open_store(run, progress), workdir))
    if store.manifest_sha256 != expected:
        raise DataError(f"{store.path}: another token store here than on {peers.names[0]}; share it or copy it again")
    return store


def _open_store(run: Run, progress) -> TokenStore:
    if run.data.examples is not None:
        return ExampleStore.open(run.data.store)
    path, remote = run.data.store, "://" in run.data.store
    if not remote and run.data.recipe is not None and not (Path(path) / MANIFEST).exists():
        say(f"token store {path} does not exist yet: preparing it from {', '.join(run.data.recipe.sources)}")
        prepare(run.data.recipe, path, progress=progress or silent)
    elif not remote and not Path(path).exists():
        raise DataError(
            f"token store {path} does not exist; make it with `tinyllama prepare SOURCE... --out {path}`, or name "
            "another with --set data.store=DIR"
        )
    store = TokenStore.open(path, cache=run.data.cache)
    marks = store.manifest["document_marks"]
    if run.data.document_marks not in ("any", marks):
        raise DataError(
            f"{path}: its documents are marked by {marks!r}, but data.document_marks={run.data.document_marks!r}; "
            f"prepare it again with --document-marks {run.data.document_marks}"
        )
    return store


def _view(run: Run, store: TokenStore, workdir: Path) -> TokenStore:
    if not run.data.unique_tokens:
        return store
    name = f"u{run.data.unique_tokens}-s{run.data.unique_seed}"
    path = workdir / "view" if store.storage.remote else Path(f"{os.path.normpath(run.data.store)}-views") / name
    return TokenStore.open(make_view(store, run.data.unique_tokens, path, seed=run.data.unique_seed))


def _joined(run: Run, store: TokenStore) -> TokenStore | JoinedStore:
    if not run.data.replay_store:
        return store
    return JoinedStore(store, TokenStore.open(run.data.replay_store, cache=run.data.cache))


def check_resume(run: Run, meta: dict, store: TokenStore, order: Order, *, allow_config_change: bool) -> list[str]:
    """What differs between this run and the checkpoint it would continue; raises ConfigError unless allowed.

    Stages that have not begun at the checkpoint are free to change.
    """
    before = configio.identity(configio.from_dict(Run, meta["config"]), meta["tokens"])
    changes = configio.differences(before, configio.identity(run, meta["tokens"]))
    if meta["store"]["manifest_sha256"] != store.manifest_sha256:
        changes.append(f"token store {store.path}: its content is not what the checkpoint was trained on")
    if (
        run.adapter
        and meta["base"]["leaves_sha256"] != base_identity(saved.resolve(run.start.checkpoint))["leaves_sha256"]
    ):
        changes.append(f"start.checkpoint={run.start.checkpoint}: holds other weights than those that were adapted")
    if not changes and meta["order"] != order.fingerprint(meta["step"]):
        changes.append("the order of the data: its past batches would be others than those that were trained on")
    if changes and not allow_config_change:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise ConfigError(
            f"this run directory was trained with another configuration: {changes[0]}{more}; {SAME_NUMBERS}. Use "
            "another --workdir, put the value back, or insist with --allow-config-change"
        )
    return changes


def sibling(name: str, workdir: Path) -> Path:
    """The run directory beside `workdir` whose run is called `name`.  Raises CheckpointError when there is none."""
    for path in sorted(Path(os.path.abspath(workdir)).parent.glob("*/run.json")):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["name"] == name:
                return path.parent
    raise CheckpointError(
        f"fork.run=@{name}: no run of that name beside {workdir}; train it first, or name a directory with "
        "--set fork.run=DIR"
    )


def fork_checkpoint(run: Run, store: TokenStore, workdir: Path) -> tuple[Path, dict]:
    """The parent's checkpoint that `run.fork` names, and its metadata.

    Raises CheckpointError when the parent has none at those tokens, ConfigError or DataError when its model or
    tokenizer is another one.
    """
    beside = run.fork.run.startswith("@")
    folder = (sibling(run.fork.run[1:], workdir) if beside else Path(run.fork.run)) / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"fork.run={run.fork.run}: no run with checkpoints there; set --set fork.run=DIR")
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.name.isdigit()):
        with contextlib.suppress(CheckpointError):  # a damaged one is as good as none
            meta = checkpoint.read_meta(path)
            found[meta["tokens"]] = (path, meta)
    if run.fork.tokens not in found:
        raise CheckpointError(
            f"{run.fork.run} has no checkpoint at fork.tokens={run.fork.tokens}; it has "
            f"{', '.join(map(str, found)) or 'none'}"
        )
    path, meta = found[run.fork.tokens]
    parent = configio.from_dict(Run, meta["config"])
    changes = configio.differences(configio.to_dict(parent.model), configio.to_dict(run.model))
    if changes:
        raise ConfigError(f"fork of {run.fork.run}: its model is another one: model.{changes[0]}")
    if meta["store"]["tokenizer_sha256"] != store.manifest["tokenizer"]["sha256"]:
        raise DataError(f"fork of {run.fork.run}: it was trained with another tokenizer than that of {store.path}")
    return path, meta


def is_finished(
    run: Run,
    plan: Plan,
    store: TokenStore,
    order: Order,
    checkpoints: Checkpoints,
    *,
    allow_config_change: bool,
) -> bool:
    """Whether the newest checkpoint is the plan's end, or where evaluation.patience ended it, and undamaged, so that
    the run can be used.

    Raises ConfigError if it is of another configuration.
    """
    meta = checkpoints.peek()
    if meta is None:
        return False
    check_resume(run, meta, store, order, allow_config_change=allow_config_change)
    ended = meta.get("ended") == "patience" and run.evaluation.patience > 0
    return (ended or meta["tokens"] == plan.total_tokens) and checkpoints.intact(meta["step"])


def begin(
    run: Run,
    plan: Plan,
    store: TokenStore,
    order: Order,
    checkpoints: Checkpoints,
    target: State,
    mesh,
    workdir: Path,
    peers: Peers = ALONE,
    *,
    allow_config_change: bool,
) -> tuple[int, State, str, dict | None]:
    """(steps done, state, how, what it is based on): the newest good checkpoint, else the fork's parent or the start's
    weights, else fresh weights."""
    if run.start is not None:
        beginning.check(run, store.tokenizer())
    frozen = {"frozen": base.frozen(run, mesh, peers)} if run.adapter else {}
    restored = checkpoints.restore(
        target, accept=lambda meta: check_resume(run, meta, store, order, allow_config_change=allow_config_change)
    )
    if restored is not None:
        step, state, meta = restored
        return plan.step_at(meta["tokens"]), state | frozen, f"resumed at step {step}", meta.get("base")
    if run.fork is not None:
        path, _ = fork_checkpoint(run, store, workdir)
        step = plan.step_at(run.fork.tokens)
        if step == plan.total_steps:
            raise ConfigError(f"fork.tokens={run.fork.tokens} is the end of the curriculum; nothing is left to train")
        parent = checkpoint.load(path, target, peers=peers, barrier_seconds=run.checkpoint.barrier_seconds)
        return step, parent, f"forked from {path} at step {step}", None
    if run.start is None:
        return 0, init(run, mesh), "started from fresh weights", None
    based_on, name = base_identity(saved.resolve(run.start.checkpoint)), run.start.checkpoint
    if run.adapter is not None:
        return 0, init(run, mesh) | frozen, f"started with a fresh adapter of {name}", based_on
    return 0, init(run, mesh, beginning.weights(run, mesh, peers)), f"started from {name}", based_on


def first_params(run: Run, mesh, state: State, done: int, peers: Peers = ALONE):
    """The model's parameters at the start of a run that is now at step `done`, with this state."""
    if run.adapter is None:
        return beginning.weights(run, mesh, peers) if done else state["params"]
    trained = init(run, mesh)["params"] if done else state["params"]
    return adapters.attach(state["frozen"], trained, run.model, run.adapter)


def checkpoint_meta(run: Run, store: TokenStore, based_on: dict | None) -> dict:
    """What every checkpoint of a run says of itself, whatever its step."""
    return {
        "name": run.name,
        "fingerprint": configio.fingerprint(run),
        "config": configio.to_dict(run),
        "store": store_identity(store),
        "document_marks": store.manifest["document_marks"],
        "versions": versions(),
    } | ({"base": based_on} if based_on else {})


def go_back(run: Run, workdir: Path, failed: rollback.TooManySkips, peers: Peers) -> int:
    """The step to go back to; the checkpoints after it are set aside under another name, none is deleted."""
    to = None
    if peers.lead:
        place = place_of(checkpoint_directory(run, workdir))
        to = rollback.target(place.steps(), failed)
        for later in [step for step in place.steps() if step > to]:
            place.set_aside(later, "left")
    return peers.tell("back to", to)


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
    return {"tinyllama_jax": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def revision() -> str:
    """The commit that this code is checked out at, with -dirty when it was changed since; '' when it is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def describe(run: Run, plan: Plan, store: TokenStore, mesh, experiment: str) -> dict:
    """run.json: everything that a reader of the run directory needs to know."""
    return {
        "name": run.name,
        "experiment": experiment,
        "fingerprint": configio.fingerprint(run),
        "config": configio.to_dict(run),
        "plan": {
            "total_steps": plan.total_steps,
            "total_tokens": plan.total_tokens,
            "stages": [
                {
                    "name": s.name,
                    "start_step": s.start_step,
                    "end_step": s.end_step,
                    "start_tokens": s.start_tokens,
                    "end_tokens": s.end_tokens,
                    "batch_tokens": s.batch_tokens,
                }
                for s in plan.stages
            ],
        },
        "model": {
            "parameters": flops.parameter_counts(run.model),
            "trained_parameters": flops.trained_parameters(run),
            "train_flops_per_token": {c: flops.of_run(run, c) for c in ("palm", "causal")},
        },
        "store": store_identity(store),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
        },
        "versions": versions(),
        "git": revision(),
    }


def end_early(run: Run, workdir: Path, step: int, plan: Plan, peers: Peers) -> None:
    """Says that no more steps are planned, to the person and in run.json."""
    say(
        f"{run.evaluation.patience} validations without a better one: ended at step {step} of {plan.total_steps}", peers
    )
    if peers.lead:
        known = json.loads((workdir / "run.json").read_text())
        write_json(workdir / "run.json", known | {"ended": {"step": step, "why": "patience"}})


def store_identity(store: TokenStore | JoinedStore) -> dict:
    return {
        "path": store.location,  # found again from any directory
        **({"replay": store.replay.location} if isinstance(store, JoinedStore) else {}),
        "manifest_sha256": store.manifest_sha256,
        "tokenizer_sha256": store.manifest["tokenizer"]["sha256"],
        "train_tokens": {domain: entry["tokens"] for domain, entry in store.manifest["splits"]["train"].items()},
    }
