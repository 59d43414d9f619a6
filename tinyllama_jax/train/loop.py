"""The training loop: one function, read from top to bottom.

Step t is dispatched, then batch t+1 is fetched while the device works, then the metrics of step t-1 are read; so the
host never waits for the step it has just started.  What is due (validation, checkpoints, stage ends) follows from
the tokens seen, so that a resumed run does what the uninterrupted one would have done.

Every process of a run goes through here in the same way.  What only a clock or a signal can tell (stop, save now) is
asked for by any of them with its next step and decided for all in that step's metrics (ballot.py); process 0 alone
writes the records.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax import attention, mesh_rules
from tinyllama_jax.config import Run, replace
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.data.plan import silent
from tinyllama_jax.distributed import ALONE, Peers
from tinyllama_jax.errors import CheckpointError, Preempted
from tinyllama_jax.finetune.reference import references
from tinyllama_jax.schedules import Plan, learning_rate
from tinyllama_jax.sharding import computing, make_mesh, place, row_share
from tinyllama_jax.train import ballot, best, health, rollback, start, step, track
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train.alerts import Alerts
from tinyllama_jax.train.ballot import Wants
from tinyllama_jax.train.checkpoint import Checkpoints
from tinyllama_jax.train.examine import Examiner, peak_memory
from tinyllama_jax.train.notice import Notice
from tinyllama_jax.train.profile import Profile
from tinyllama_jax.train.record import Record
from tinyllama_jax.train.save_policy import SaveFailed, Saver
from tinyllama_jax.train.watchdog import Watchdog


def train(
    run: Run,
    workdir: Path,
    *,
    experiment: str = "",
    allow_config_change: bool = False,
    progress=None,
    peers: Peers = ALONE,
) -> None:
    """Trains `run` in `workdir`, continuing from its newest good checkpoint if there is one.

    peers: the processes that train it together, all on one shared `workdir`.
    Returns when the curriculum is complete (at once if it already was).  Raises Preempted after SIGTERM or another
    notice (notice.py), once everything is saved, and UserError for what the user can mend.
    """
    claimed = health.claim(workdir) if peers.lead else contextlib.nullcontext()
    with claimed:
        peers.tell("run directory claimed")
        with Notice(workdir) as stop, Watchdog(run.health.watchdog_seconds, peers) as watchdog:
            began = start.process_began()
            while True:
                rollbacks = peers.tell("rollbacks", rollback.read(workdir) if peers.lead else None)
                try:
                    _train(
                        rollback.applied(run, rollbacks),
                        workdir,
                        experiment,
                        allow_config_change,
                        progress,
                        peers,
                        stop,
                        watchdog,
                        began,
                    )
                    return
                except rollback.TooManySkips as failed:
                    if len(rollbacks) >= run.health.max_rollbacks:
                        raise health.diverged(failed, len(rollbacks)) from None
                    back = {"from": failed.step, "to": start.go_back(run, workdir, failed, peers)}
                    if peers.lead:
                        rollback.write(workdir, [*rollbacks, back])
                        start.say(
                            f"{failed}: back to step {back['to']}, and past the batches of steps {back['to']} to "
                            f"{failed.step} ({len(rollbacks) + 1} of health.max_rollbacks={run.health.max_rollbacks})"
                        )
                    peers.tell("rolled back")
                    began = time.time()


def _train(run, workdir, experiment, allow_config_change, progress, peers, stop, watchdog, began) -> None:
    tracker = None

    def checkpoint_event(kind: str, at: int) -> None:
        if tracker is not None:
            tracker.event(f"checkpoint_{kind}", step=at)

    start.keep_programs(run, workdir, peers)
    plan = Plan(run.curriculum, run.data.sequence_tokens)
    checkpoints = Checkpoints(
        start.checkpoint_directory(run, workdir),
        keep_temporary=run.checkpoint.keep_temporary,
        on_event=checkpoint_event,
        peers=peers,
        barrier_seconds=run.checkpoint.barrier_seconds,
    )
    watchdog.patient("preparing the data")
    store = start.open_store(run, workdir, progress, peers)
    watchdog.at("building the data order", slow=True)
    mesh = make_mesh(run.mesh)
    mesh_rules.check(run, plan.stages, mesh.shape)
    share, shares = row_share(mesh, peers.index)
    placed = {"vocab_size": run.model.vocab_size, "process_index": share, "process_count": shares}
    pipeline = Pipeline(store, run.data, plan, run.seed, **placed)
    order = pipeline.order
    if start.is_finished(run, plan, store, order, checkpoints, allow_config_change=allow_config_change):
        last = checkpoints.peek()["step"]
        start.say(f"{workdir}: finished at step {last}; nothing left to do", peers)
        if peers.lead:
            track.ensure_finished(workdir, last)
        return
    with computing(mesh, run.model.compute_dtype):
        name, reason = attention.choose(run.execution.attention, attention.Call.of(run))
        target = train_state.abstract(run, mesh)
        # A new checkpoint is complete before the one it replaces is removed.
        if peers.lead and not run.checkpoint.directory:
            size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
            health.check_space(workdir, 2 * size)
        watchdog.at("restoring", slow=True)
        restoring = time.monotonic()
        done, state, how, based_on = start.begin(
            run, plan, store, order, checkpoints, target, mesh, workdir, peers, allow_config_change=allow_config_change
        )
        if run.preference:
            first = functools.partial(start.first_params, run, mesh, state, done, peers)
            watchdog.patient("log-probabilities of all pairs before training")
            base = based_on["leaves_sha256"]
            store = references(store, run, first, mesh, workdir, base=base, peers=peers, progress=progress or silent)
            pipeline = Pipeline(store, run.data, plan, run.seed, **placed)
        restore_s = time.monotonic() - restoring if how.startswith("resumed") else 0.0
        if peers.lead:
            write_json(workdir / "run.json", start.describe(run, plan, store, mesh, experiment))
        tracker = track.Tracker(workdir, run, plan, resume_step=done) if peers.lead else track.Silence()
        try:
            tracker.event("start", how=how, step=done, seconds=time.time() - began, restore_s=restore_s)
            tracker.event("attention", implementation=name, reason=reason)
            start.say(f"attention: {name} ({reason})", peers)
            start.say(f"{workdir}: {how}; {plan.total_steps - done} steps to go", peers)
            # One process traces its devices; a trace of every process would be the same picture many times.
            tracking = run.tracking if peers.lead else replace(run.tracking, profile_steps=0)
            with (
                checkpoints,
                contextlib.closing(pipeline.iterate(done, plan.total_steps)) as batches,
                contextlib.closing(Profile(tracking, workdir / "profile")) as profile,
            ):
                _steps(
                    *(run, workdir, plan, store, batches, pipeline, mesh, state, done, began, based_on),
                    *(checkpoints, tracker, profile, peers, stop, watchdog),
                )
        finally:
            tracker.close()


def _steps(
    run, workdir, plan, store, batches, pipeline, mesh, state, done, began, based_on,
    checkpoints, tracker, profile, peers, stop, watchdog,
) -> None:  # fmt: skip
    """From `done` steps to the end of the plan."""
    options = step.compiler_options(run)
    train_step = ballot.with_wants(step.make_train_step(run), mesh, peers, run.checkpoint.barrier_seconds, options)
    rate = learning_rate(run.lr, plan)
    examiner = Examiner(run, plan, store, pipeline, mesh, done, workdir, peers)
    order, meta = pipeline.order, start.checkpoint_meta(run, store, based_on)
    describe = Record(run, plan, order)
    alerts = Alerts(run.health, max_skips=run.optimizer.max_skips)

    def fetch() -> tuple[dict, float]:
        """The next batch on the devices, and the seconds that the data made us wait."""
        before = time.perf_counter()
        index, batch = next(batches)
        waited = time.perf_counter() - before
        accumulation = mesh_rules.accumulation_steps(run, plan.at_step(index).batch_sequences)
        return step.put_batch(batch, accumulation, mesh, documents=run.data.document_masking), waited

    def read_metrics() -> None:
        """Waits for the step in flight and writes its line; stops the run if it has diverged."""
        nonlocal pending, last, decided
        if pending is None:
            return
        index, metrics, wants, waited, first = pending
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        decided = ballot.read(wants)
        now = time.perf_counter()
        watchdog.took(now - last)
        record = describe(index, metrics, rate, seconds=now - last, waited=waited, compiled=first)
        tracker.step(record)
        if index == done:
            start.first_step(tracker, began, peers)
        for alert in alerts.step(record):
            tracker.alert(alert)
        pending, last = None, now
        if metrics["consecutive_skips"] >= run.optimizer.max_skips:
            raise rollback.TooManySkips(index + 1, int(metrics["consecutive_skips"]))

    def validate(at: int) -> None:
        before = time.perf_counter()
        watchdog.at(f"validation at step {at}", slow=True)
        record = examiner.validate(state, at)
        seconds = time.perf_counter() - before
        tracker.validation(record | {"timing": {"seconds": seconds} | peak_memory()})
        tracker.event("evaluated", step=at, seconds=seconds)

    def sample(at: int, border: bool) -> None:
        before = time.perf_counter()
        watchdog.at(f"samples at step {at}", slow=True)
        lines = examiner.samples(state, at, border=border)
        for line in lines:
            tracker.sample(line)
        if lines:
            tracker.event("evaluated", step=at, seconds=time.perf_counter() - before)

    def write(at: int, permanent: bool, blocking: bool) -> None:
        before = time.perf_counter()
        watchdog.at(f"saving step {at}", slow=True)
        tracker.sync()  # the lines up to this step are on disk before the checkpoint that vouches for them
        of_step = {"step": at, "tokens": plan.tokens_at(at), "stage": plan.at_step(at - 1).name}
        of_step |= {"order": order.fingerprint(at)} | ({"ended": "patience"} if ended else {})
        if run.evaluation.keep_best:
            checkpoints.best = best.best(examiner.losses)
        items = {item: state[item] for item in ("params", "optimizer")}
        files = store.tokenizer_files if run.data.examples else examiner.tokenizer.files
        checkpoints.save(at, items, meta | of_step, permanent=permanent, blocking=blocking, tokenizer_files=files)
        tracker.event("saved", step=at, seconds=time.perf_counter() - before)

    def warn(at: int, text: str) -> None:
        tracker.event("save_failed", step=at, error=text)
        start.say(f"checkpoint: {text}", peers)

    saver = Saver(run.checkpoint, write, warn)

    def wants() -> Wants:
        """What this process asks of all; the clock is process 0's."""
        return Wants(stop=stop.requested, save=peers.lead and saver.due(), failed=checkpoints.failed)

    pending, last, decided, now, ended = None, time.perf_counter(), Wants(), done, False
    if done == 0:
        validate(0)
        sample(0, border=False)
        last = time.perf_counter()
    batch, waited = fetch()
    compiled_shapes = set()
    for index in range(done, plan.total_steps):
        stage, now = plan.at_step(index), index + 1
        before_tokens, tokens = plan.tokens_at(index), plan.tokens_at(now)
        first = batch["tokens"].shape not in compiled_shapes
        compiled_shapes.add(batch["tokens"].shape)
        watchdog.at(f"step {now}", slow=first)
        lr, number = place((np.float32(rate(tokens)), np.int32(index)), mesh)
        last += profile.before(index - done)
        state, metrics, asked = train_step(state, batch, lr, number, wants)
        last += profile.after(metrics)
        in_flight = (index, metrics, asked, waited, first)
        if now < plan.total_steps:
            batch, waited = fetch()
        read_metrics()  # of the step before
        pending = in_flight
        asked = wants() if peers.count == 1 else decided

        if asked.failed:  # in the background, in some process
            try:
                checkpoints.wait()
            except CheckpointError as error:
                saver.failure(now, error)
        border = now == stage.end_step
        due_validation = border or _passes(before_tokens, tokens, run.evaluation.every_tokens)
        permanent = (
            border
            or _passes(before_tokens, tokens, run.checkpoint.permanent_tokens)
            or any(before_tokens < mark <= tokens for mark in run.checkpoint.permanent_at_tokens)
        )
        every = run.checkpoint.temporary_steps
        temporary = asked.save or asked.stop or (every and now % every == 0)
        if due_validation or permanent or temporary:
            read_metrics()
            if due_validation:
                validate(now)
                ended = examiner.exhausted
                temporary = temporary or (run.evaluation.keep_best and examiner.improved)
                sample(now, border=border or ended)
            if border:
                tracker.event("stage_end", stage=stage.name, step=now, tokens=tokens)
            if permanent or temporary or ended:
                saver.save(now, permanent=permanent or ended, essential=border or asked.stop or ended)
            last = time.perf_counter()  # the pause does not count as the next step's time
        if ended:
            break
        if asked.stop and now < plan.total_steps:
            why = next(filter(None, peers.gather("stop", stop.name)), "another process")
            tracker.event("stopped", step=now, signal=why)
            raise Preempted(f"stopped by {why} at step {now}; all saved, start again with the same command")
    watchdog.at("ending", slow=True)
    try:
        checkpoints.wait()
    except CheckpointError as error:
        raise SaveFailed(str(error)) from error
    if now < plan.total_steps:
        start.end_early(run, workdir, now, plan, peers)
    tracker.event("finished", step=now)


def _passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return bool(every) and after // every > before // every
