"""Batches of the run: the order decides which windows, the store gives their tokens, grain reads ahead.

There is no loader state: batch t is computed from t.  One background thread is enough: a core reads more than fifty
million tokens a second, and grain's pool of threads makes that less.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import grain
import numpy as np

from tinyllama_jax.config import Data
from tinyllama_jax.data.order import Order
from tinyllama_jax.data.store import Split, TokenStore, Windows
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan

Batch = dict[str, np.ndarray]
READ_AHEAD_BATCHES = 2
PART_ROWS = 64


class Pipeline:
    """The batches of a run for one of `process_count` hosts.

    Every host takes a contiguous block of the rows of each batch: together the hosts see the same rows in the same
    order, however many they are.
    vocab_size: the model's; a store with more ids than that is refused.
    Raises ConfigError when a mixture names a source that the store lacks, a source fills no window, the store's
    vocabulary exceeds the model's, or a batch cannot be divided among the hosts.
    """

    def __init__(
        self,
        store: TokenStore,
        data: Data,
        plan: Plan,
        seed: int,
        *,
        vocab_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ConfigError(f"process {process_index} of {process_count} does not exist; check the launcher")
        self.plan, self.window_tokens, self.masking = plan, data.sequence_tokens + 1, data.document_masking
        _check(store, plan, vocab_size, process_count)
        self.process_index, self.process_count = process_index, process_count
        names = {name for planned in plan.stages for name in (*planned.stage.mixture, *planned.ramp_from)}
        splits = {name: store.split("train", name) for name in names}
        windows = {name: _windows(name, splits[name], self.window_tokens) for name in names}
        self.order = Order(
            plan,
            windows,
            seed,
            data.epochs,
            block_windows=data.shuffle_block_windows,
            skip_ranges=data.skip_ranges,
        )
        self._splits = [splits[name] for name in self.order.sources]

    def batch(self, step: int) -> Batch:
        """This host's rows of batch `step` (0-based): a pure function of (config, seed, step).

        tokens, targets int32 [B, T]: the window without its last and without its first token.
        documents int32 [B, T]: which document of the window each input token belongs to, counted from 0.
        positions int32 [B, T]: the place of each input token, in its document with document masking, else in the
        window (then read-only and one row in memory).  For models that know positions as such; RoPE does not.
        valid bool [B, T]: whether the target counts.  Padding does not, and with document masking neither does a target
        in another document than its input token.
        reference float32 [B, 2], of pairs only: log-probabilities of both answers before training.
        Raises DataError when the store's bytes are damaged, IndexError outside the run.
        """
        shape = self.plan.at_step(step).batch_sequences // self.process_count, self.window_tokens - 1
        batch = {name: np.empty(shape, np.int32) for name in ("tokens", "targets", "documents")}
        batch["positions"] = np.empty(shape, np.int32) if self.masking else positions(batch["documents"], False)
        batch["valid"] = np.empty(shape, bool)
        for rows, windows in self.windows(step):
            batch["tokens"][rows] = windows.tokens_NT[:, :-1]
            batch["targets"][rows] = windows.tokens_NT[:, 1:]
            batch["documents"][rows] = windows.documents_NT[:, :-1]
            batch["valid"][rows] = valid_targets(windows, self.masking)
            if windows.reference_N2 is not None:
                batch.setdefault("reference", np.empty((shape[0], 2), np.float32))[rows] = windows.reference_N2
            if self.masking:
                batch["positions"][rows] = positions(windows.documents_NT[:, :-1], True)
        return batch

    def windows(self, step: int) -> Iterator[tuple[np.ndarray, Windows]]:
        """This host's rows of batch `step` as the store has them, one token longer: (rows of the host's batch [n],
        windows [n, T+1]), in parts small enough for the processor's caches."""
        rows = self.plan.at_step(step).batch_sequences // self.process_count
        start = self.process_index * rows
        source, window = self.order.rows(step, start, start + rows)
        for index in np.unique(source):
            mine = np.flatnonzero(source == index)
            for part in np.split(mine, range(PART_ROWS, mine.size, PART_ROWS)):
                yield part, self._splits[index].read(window[part], self.window_tokens)

    def first(self, count: int) -> tuple[dict[str, Windows], int]:
        """The first `count` different windows of each source in the order of the first stage, all of a source that has
        fewer, and the number of steps after which every one of them was trained on.  The same on every host."""
        stage = self.plan.stages[0]
        wanted = {
            index: min(count, split.windows(self.window_tokens))
            for index, (name, split) in enumerate(zip(self.order.sources, self._splits, strict=True))
            if stage.stage.mixture.get(name, 0) > 0
        }
        found: dict[int, dict[int, None]] = {index: {} for index in wanted}  # sets that keep their order
        step = stage.start_step
        while step < stage.end_step and any(len(found[index]) < n for index, n in wanted.items()):
            source, window = self.order.rows(step, 0, stage.batch_sequences)
            for index, seen in found.items():
                seen |= dict.fromkeys(window[source == index].tolist())
            step += 1
        windows = {
            self.order.sources[index]: self._splits[index].read(
                np.array(list(seen)[: wanted[index]]), self.window_tokens
            )
            for index, seen in found.items()
            if seen
        }
        return windows, step

    def iterate(self, start_step: int, stop_step: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for start_step <= step < stop_step, read ahead by one thread.

        What fails in the thread is raised here as itself.  Close it (`.close()`) when leaving early, which ends the
        thread; it closes itself at its end.
        """
        if not 0 <= start_step <= stop_step <= self.plan.total_steps:
            raise IndexError(f"steps {start_step}:{stop_step} lie outside the run's {self.plan.total_steps}")
        return self._read_ahead(start_step, stop_step)

    def _read_ahead(self, start_step: int, stop_step: int) -> Iterator[tuple[int, Batch]]:
        if start_step == stop_step:  # grain refuses an empty source
            return
        steps = grain.MapDataset.source(_Steps(self, start_step, stop_step))
        unthreaded = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        ahead = grain.experimental.ThreadPrefetchIterDataset(unthreaded, prefetch_buffer_size=READ_AHEAD_BATCHES)
        iterator = iter(ahead)
        try:
            yield from iterator
        finally:
            iterator.close()


def valid_targets(windows: Windows, document_masking: bool) -> np.ndarray:
    """Which targets of windows [N, T+1] count: bool [N, T].  Not the padding; with document masking, not those in
    another document than the token before; of examples, only what is to be learned."""
    tokens, documents_NT = windows.tokens_NT.shape[1], windows.documents_NT
    shape = len(documents_NT), tokens - 1
    valid = documents_NT[:, 1:] == documents_NT[:, :-1] if document_masking else np.ones(shape, bool)
    padded = np.flatnonzero(windows.used_N < tokens)
    valid[padded] &= np.arange(1, tokens) < windows.used_N[padded, None]
    if windows.learned_NT is not None:
        valid &= windows.learned_NT[:, 1:]
    return valid


def positions(documents_NT: np.ndarray, document_masking: bool) -> np.ndarray:
    """Places of tokens int32 [N, T]: in their document with document masking, else in the row."""
    if not document_masking:
        return np.broadcast_to(np.arange(documents_NT.shape[1], dtype=np.int32), documents_NT.shape)
    begins = np.ones(documents_NT.shape, bool)
    np.not_equal(documents_NT[:, 1:], documents_NT[:, :-1], out=begins[:, 1:])
    begin = np.flatnonzero(begins)
    place = np.arange(documents_NT.size, dtype=np.int32)
    place -= np.repeat(begin.astype(np.int32), np.diff(begin, append=documents_NT.size))
    return place.reshape(documents_NT.shape)


class _Steps:
    """Random-access source for grain: item i is (step, batch) of step start + i."""

    def __init__(self, pipeline: Pipeline, start: int, stop: int):
        self._pipeline, self._start, self._stop = pipeline, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        step = self._start + int(index)
        return step, self._pipeline.batch(step)

    def __repr__(self) -> str:
        return f"batches {self._start}:{self._stop}"


def _check(store: TokenStore, plan: Plan, vocab_size: int, process_count: int) -> None:
    if store.vocab_size > vocab_size:
        raise ConfigError(
            f"the store {store.path} has a vocabulary of {store.vocab_size}, model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {store.vocab_size}"
        )
    for planned in plan.stages:
        for name in (*planned.stage.mixture, *planned.ramp_from):
            if name not in store.domains:
                near = difflib.get_close_matches(name, store.domains, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, store.domains))}"
                raise ConfigError(f"stage {planned.name!r}: the store {store.path} has no source {name!r}; {hint}")
        if planned.batch_sequences % process_count:
            raise ConfigError(
                f"stage {planned.name!r}: {planned.batch_sequences} sequences per batch cannot be divided among "
                f"{process_count} processes; change batch_tokens or the number of processes"
            )


def _windows(name: str, split: Split, window_tokens: int) -> int:
    windows = split.windows(window_tokens)
    if windows < 1:
        raise ConfigError(
            f"source {name!r} has {split.tokens} training tokens, fewer than one window of {window_tokens} "
            f"(data.sequence_tokens + 1); shorten data.sequence_tokens or add data"
        )
    return windows
