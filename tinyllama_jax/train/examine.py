"""What a run is asked while it trains: its loss on held-out windows, and texts; and which step was the best so far.

Best is the lowest mean loss over the domains that are not replayed, at a step that has a checkpoint.  All of it follows
from the validations in the records, which a resumed run continues, so there is no state of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from tinyllama_jax.config import Execution, Run
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.distributed import Peers
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.evaluate.loss import Validator, held_out
from tinyllama_jax.finetune import adapters
from tinyllama_jax.finetune.pairs import PairValidator
from tinyllama_jax.generate.chat import Message
from tinyllama_jax.generate.load import prompt_tokens
from tinyllama_jax.generate.sample import generate
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import best
from tinyllama_jax.train.state import State


class Examiner:
    """done: the step that the run continues from, whose records have been cut back to it."""

    def __init__(self, run: Run, plan: Plan, store, pipeline: Pipeline, mesh, done: int, workdir: Path, peers: Peers):
        self.run, self.plan, self.tokenizer = run, plan, store.tokenizer()
        asked = run.evaluation
        windows = held_out(store, run.data.sequence_tokens + 1, asked.sequences)
        how = {"batch_sequences": asked.batch_sequences, "peers": peers}
        how["barrier_seconds"] = run.checkpoint.barrier_seconds
        if run.preference:
            self.validator = PairValidator(windows, run.model, run.execution, mesh, run.preference, **how)
        else:
            how |= {"document_masking": run.data.document_masking}
            self.validator = Validator(windows, self.tokenizer.token_bytes(), run.model, run.execution, mesh, **how)
        self.seen, self.seen_after = pipeline.first(asked.seen_sequences) if asked.seen_sequences else ({}, 0)
        marks = store.manifest["document_marks"]
        self.prompts = [prompt_tokens(self.tokenizer, marks, prompt) for prompt in asked.prompts]
        self.questions, self.chat = [], None
        if asked.questions:
            if run.data.examples is None:
                raise ConfigError("evaluation.questions are asked in the template of examples; this run has text only")
            self.chat = store.chat()
            self.questions = [list(self.chat.ids([Message("user", text)])) for text in asked.questions]
        for name, given in (("prompts", self.prompts), ("questions", self.questions)):
            if run.model.context_tokens <= max(map(len, given), default=0):  # better now than at the first stage's end
                raise ConfigError(
                    f"evaluation.{name}: one fills the model's context of {run.model.context_tokens} tokens"
                )
        before = best.losses(workdir, until=done) if peers.lead else []
        self.losses: list[tuple[int, float]] = peers.tell("losses so far", before)

    def _params(self, state: State) -> Any:
        if self.run.adapter is None:
            return state["params"]
        return adapters.attach(state["frozen"], state["params"], self.run.model, self.run.adapter)

    def validate(self, state: State, at: int) -> dict:
        """The line for validation.jsonl, without what the clock says."""
        params = self._params(state)
        record = {"step": at, "tokens": self.plan.tokens_at(at), "domains": self.validator(params)}
        if self.seen and at >= self.seen_after:
            record["seen"] = self.validator(params, self.seen)
        self.losses.append((at, best.mean_loss(record)))
        return record

    @property
    def improved(self) -> bool:
        """Whether the last validation was better than all before it."""
        (_, last), earlier = self.losses[-1], [loss for _, loss in self.losses[:-1]]
        return last < min(earlier, default=math.inf)

    @property
    def exhausted(self) -> bool:
        """Whether evaluation.patience validations in a row were no better than one before them."""
        return best.waited(self.losses) >= self.run.evaluation.patience > 0

    def samples(self, state: State, at: int, *, border: bool) -> list[dict]:
        """Lines for samples.jsonl: questions answered at each validation, prompts continued at a stage's end."""
        prompts = list(zip(self.run.evaluation.prompts, self.prompts, strict=True)) if border else []
        questions = list(zip(self.run.evaluation.questions, self.questions, strict=True))
        given = prompts + questions
        if not given:
            return []
        asked, room = self.run.evaluation, self.run.model.context_tokens - max(len(ids) for _, ids in given)
        answers = generate(
            self._params(state),
            self.run.model,
            Execution(),
            [ids for _, ids in given],
            max_new_tokens=min(asked.sample_tokens, room),
            temperature=asked.sample_temperature,
            top_p=asked.sample_top_p,
            seed=self.run.seed,
            eos_id=self.tokenizer.eos_id,
        )
        lines = []
        for place, ((text, ids), answer) in enumerate(zip(given, answers, strict=True)):
            line = {"step": at, "tokens": self.plan.tokens_at(at), "prompt": text}
            if place < len(prompts):
                # Decoded together: a continuation decoded alone loses the space that it may begin with.
                line["text"] = self.tokenizer.decode(ids + answer).removeprefix(text)
            else:
                line |= {"text": self._answer(answer), "chat": True}
            lines.append(line)
        return lines

    def _answer(self, ids: list[int]) -> str:
        ends = [place for place, token in enumerate(ids) if token in self.chat.stop_ids]
        text = self.tokenizer.decode(ids[: ends[0]] if ends else ids)
        for stop in self.chat.stop:
            text = text.partition(stop)[0]
        return text.strip()


def peak_memory() -> dict[str, int]:
    """{"peak_memory_bytes": the most that a device of this process has held so far}; {} on devices that do not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}
