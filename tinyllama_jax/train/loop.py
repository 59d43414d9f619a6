"""The training loop: one function, read from top to bottom.

Step t is dispatched, then batch t+1 is fetched while the device works, then the metrics of step t-1 are read; so the
host never waits for the step it has just started.  What is due (validation, checkpoints, stage ends) follows from
the tokens seen, so that a resumed run does what the uninterrupted one would have done.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import jax
import numpy as np

from tinyllama_jax import attention, configio, flops
from tinyllama_jax.config import Execution, Run
from tinyllama_jax.data.durable import write_json
from tinyllama_jax.data.order import Order
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.errors import ConfigError, Preempted
from tinyllama_jax.evaluate.loss import Validator, held_out
from tinyllama_jax.generate.load import prompt_tokens
from tinyllama_jax.generate.sample import generate
from tinyllama_jax.schedules import Plan, learning_rate
from tinyllama_jax.sharding import computing, make_mesh, replicated
from tinyllama_jax.train import health, start, step, track
from tinyllama_jax.train import state as train_state
from tinyllama_jax.train.checkpoint import Checkpoints


def train(run: Run, workdir: Path, *, experiment: str = "", allow_config_change: bool = False, progress=None) -> None:
    """Trains `run` in `workdir`, continuing from its newest good checkpoint if there is one.

    Returns when the curriculum is complete (at once if it already was).  Raises Preempted after SIGTERM or SIGINT,
    once everything is saved, and UserError for what the user can mend.
    """
    with health.claim(workdir), health.StopSignal() as stop:
        tracker = None

        def checkpoint_event(kind: str, at: int) -> None:
            if tracker is not None:
                tracker.event(f"checkpoint_{kind}", step=at)

        plan = Plan(run.curriculum, run.data.sequence_tokens)
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep_temporary=run.checkpoint.keep_temporary, on_event=checkpoint_event
        )
        store = start.open_store(run, progress)
        pipeline = Pipeline(
            store,
            run.data,
            plan,
            run.seed,
            vocab_size=run.model.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if start.is_finished(run, plan, store, pipeline.order, checkpoints, allow_config_change=allow_config_change):
            start.say(f"{workdir}: finished at step {plan.total_steps}; nothing left to do")
            return
        mesh = make_mesh(run.mesh)
        step.check_batches(run, plan, mesh)
        # Weights and two moments in float32; a new checkpoint is complete before the one it replaces is removed.
        health.check_space(workdir, 2 * 3 * 4 * flops.parameter_counts(run.model)["total"])
        with computing(mesh, run.model.compute_dtype):
            name, reason = attention.choose(run.execution.attention, attention.Call.of(run))
            target = train_state.abstract(run, mesh)
            done, state, how = start.begin(
                run, plan, store, pipeline.order, checkpoints, target, mesh, allow_config_change=allow_config_change
            )
            write_json(workdir / "run.json", start.describe(run, plan, store, mesh, experiment))
            tracker = track.Tracker(workdir, run, plan, resume_step=done)
            try:
                tracker.event("start", how=how, step=done)
                tracker.event("attention", implementation=name, reason=reason)
                start.say(f"attention: {name} ({reason})")
                start.say(f"{workdir}: {how}; {plan.total_steps - done} steps to go")
                with checkpoints, contextlib.closing(pipeline.iterate(done, plan.total_steps)) as batches:
                    _steps(run, plan, store, batches, pipeline.order, mesh, state, done, checkpoints, tracker, stop)
            finally:
                tracker.close()


def _steps(run, plan, store, batches, order, mesh, state, done, checkpoints, tracker, stop) -> None:
    """From `done` steps to the end of the plan."""
    train_step = step.make_train_step(run)
    rate = learning_rate(run.lr, plan)
    tokenizer = store.tokenizer()
    validator = Validator(
        held_out(store, run.data.sequence_tokens + 1, run.evaluation.sequences),
        tokenizer.token_bytes(),
        run.model,
        run.execution,
        mesh,
        batch_sequences=run.evaluation.batch_sequences,
        document_masking=run.data.document_masking,
    )
    prompts = [prompt_tokens(tokenizer, store.manifest["document_marks"], p) for p in run.evaluation.prompts]
    room = run.model.context_tokens - max(map(len, prompts), default=0)
    if room < 1:  # better now than at the first stage's end
        raise ConfigError(f"evaluation.prompts: one fills the model's context of {run.model.context_tokens} tokens")
    describe = _Describe(run, plan, order)
    scalar = replicated(mesh)

    def fetch() -> tuple[dict, float]:
        """The next batch on the devices, and the seconds that the data made us wait."""
        before = time.perf_counter()
        index, batch = next(batches)
        waited = time.perf_counter() - before
        accumulation = step.accumulation_steps(run, plan.at_step(index).batch_sequences)
        return step.put_batch(batch, accumulation, mesh, documents=run.data.document_masking), waited

    def read_metrics() -> None:
        """Waits for the step in flight and writes its line; stops the run if it has diverged."""
        nonlocal pending, last
        if pending is None:
            return
        index, metrics, waited, first = pending
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        tracker.step(describe(index, metrics, rate, seconds=now - last, waited=waited, compiled=first))
        pending, last = None, now
        health.check_skips(metrics["consecutive_skips"], run.optimizer.max_skips, index + 1)

    def validate(at: int) -> None:
        before = time.perf_counter()
        domains = validator(state["params"])
        tracker.validation(
            {
                "step": at,
                "tokens": plan.tokens_at(at),
                "domains": domains,
                "timing": {"seconds": time.perf_counter() - before},
            }
        )

    def sample(at: int) -> None:
        if not prompts:
            return
        answers = generate(
            state["params"],
            run.model,
            Execution(),
            prompts,
            max_new_tokens=min(run.evaluation.sample_tokens, room),
            temperature=run.evaluation.sample_temperature,
            top_p=run.evaluation.sample_top_p,
            seed=run.seed,
            eos_id=tokenizer.eos_id,
        )
        for prompt, ids, answer in zip(run.evaluation.prompts, prompts, answers, strict=True):
            # Decoded together: a continuation decoded alone loses the space that it may begin with.
            text = tokenizer.decode(ids + answer).removeprefix(prompt)
            tracker.sample({"step": at, "tokens": plan.tokens_at(at), "prompt": prompt, "text": text})

    def save(at: int, *, permanent: bool, blocking: bool) -> None:
        tracker.sync()  # the lines up to this step are on disk before the checkpoint that vouches for them
        meta = {
            "step": at,
            "tokens": plan.tokens_at(at),
            "stage": plan.at_step(at - 1).name,
            "name": run.name,
            "fingerprint": configio.fingerprint(run),
            "config": configio.to_dict(run),
            "store": start.store_identity(store),
            "order": order.fingerprint(at),
            "document_marks": store.manifest["document_marks"],
            "versions": start.versions(),
        }
        checkpoints.save(at, state, meta, permanent=permanent, blocking=blocking, tokenizer_files=tokenizer.files)

    pending, last = None, time.perf_counter()
    saved_at = time.monotonic()
    if done == 0:
        validate(0)
    batch, waited = fetch()
    compiled_shapes = set()
    for index in range(done, plan.total_steps):
        stage, now = plan.at_step(index), index + 1
        before_tokens, tokens = plan.tokens_at(index), plan.tokens_at(now)
        first = batch["tokens"].shape not in compiled_shapes
        compiled_shapes.add(batch["tokens"].shape)
        lr, number = jax.device_put((np.float32(rate(tokens)), np.int32(index)), scalar)
        state, metrics = train_step(state, batch, lr, number)
        in_flight = (index, metrics, waited, first)
        if now < plan.total_steps:
            batch, waited = fetch()
        read_metrics()  # of the step before
        pending = in_flight

        border = now == stage.end_step
        asked_to_stop = stop.requested
        due_validation = border or _passes(before_tokens, tokens, run.evaluation.every_tokens)
        permanent = (
            border
            or _passes(before_tokens, tokens, run.checkpoint.permanent_tokens)
            or any(before_tokens < mark <= tokens for mark in run.checkpoint.permanent_at_tokens)
        )
        temporary = (
            (run.checkpoint.temporary_steps and now % run.checkpoint.temporary_steps == 0)
            or (run.checkpoint.temporary_seconds and time.monotonic() - saved_at > run.checkpoint.temporary_seconds)
            or asked_to_stop
        )
        if due_validation or permanent or temporary:
            read_metrics()
            if due_validation:
                validate(now)
            if border:
                sample(now)
                tracker.event("stage_end", stage=stage.name, step=now, tokens=tokens)
            if permanent or temporary:
                save(now, permanent=permanent, blocking=border or asked_to_stop)
                saved_at = time.monotonic()
            last = time.perf_counter()  # the pause does not count as the next step's time
        if asked_to_stop and now < plan.total_steps:
            tracker.event("stopped", step=now, signal=stop.name)
            raise Preempted(f"stopped by {stop.name} at step {now}; all saved, start again with the same command")
    checkpoints.wait()
    tracker.event("finished", step=plan.total_steps)


def _passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return bool(every) and after // every > before // every


class _Describe:
    """Turns a step's raw metrics into its line in metrics.jsonl.  Whatever the clock decides is under `timing`."""

    def __init__(self, run: Run, plan: Plan, order: Order):
        self.run, self.plan, self.order = run, plan, order
        length = run.data.sequence_tokens
        self.flops = {c: flops.flops_per_token(run.model, length, c) for c in ("palm", "causal")}
        device_peak = run.tracking.peak_flops_per_device or flops.peak_flops(jax.devices()[0].device_kind)
        self.peak = device_peak * jax.device_count() if device_peak else None

    def __call__(self, index: int, metrics: dict, rate, *, seconds: float, waited: float, compiled: bool) -> dict:
        stage, tokens = self.plan.at_step(index), self.plan.tokens_at(index + 1)
        before, after = self.order.counts(index), self.order.counts(index + 1)
        speed = stage.batch_tokens / seconds
        timing = {"time": time.time(), "step_s": seconds, "data_wait_s": waited, "tokens_per_s": speed}
        if compiled:
            timing["compiled"] = True  # this step's time includes compilation
        if self.peak:
            timing |= {f"mfu_{c}": speed * f / self.peak for c, f in self.flops.items()}
        return {
            "step": index + 1,
            "tokens": tokens,
            "loss": metrics["loss"],
            **({"z_loss": metrics["z_loss"]} if "z_loss" in metrics else {}),  # with optimizer.z_loss
            "lr": rate(tokens),
            "grad_norm": metrics["grad_norm"],
            "param_norm": metrics["param_norm"],
            "skipped": int(metrics["skipped"]),
            "valid_tokens": int(metrics["valid_tokens"]),
            "stage": stage.name,
            "batch_tokens": stage.batch_tokens,
            "mixture": {s: (after[s] - before[s]) / stage.batch_sequences for s in after},
            "epoch": self.order.epoch(index + 1),
            "flops": self.flops["palm"] * tokens,
            "timing": timing,
        }
