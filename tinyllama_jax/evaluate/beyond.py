"""Loss in windows longer than those of training, on the same text at every length.

The held-out text is read in windows of the longest length, and these are cut into shorter ones that begin at every
L-th token: at each length the very same tokens are predicted, once, and only what may be seen before them differs.  (A
packed store has no text in a row that is longer than its windows, and cannot be measured so.)  A store without packing
keeps documents one after another, cut wherever a window ends, so that neighbouring windows are text in a row again:
it need not have been prepared with long windows.  A long window runs across documents, as those of training do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tinyllama_jax.attention.choice import Call, choose
from tinyllama_jax.config import Execution, Model, Run, replace
from tinyllama_jax.data.pipeline import valid_targets
from tinyllama_jax.data.store import TokenStore, Windows
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.evaluate.loss import HeldOut, held_out, summary
from tinyllama_jax.generate.score import score

ROPES = ("as-trained", "linear", "ntk", "yarn")
BINS = 16  # of the position in a window
TOKENS_AT_A_TIME = 8192  # on each device, and one row at least


def stretched(model: Model, rope: str, trained_tokens: int, length: int) -> Model:
    """The model for windows of `length` tokens, its weights those of windows of `trained_tokens`.

    as-trained: angles go on beyond those it was trained with.  linear, ntk, yarn: those of model/rope.py with a factor
    of length / trained_tokens, without fine-tuning.
    """
    model = replace(model, context_tokens=max(length, model.context_tokens))
    if rope == "as-trained":
        return model
    factor = length / trained_tokens
    return replace(model, rope=replace(model.rope, kind=rope, factor=factor, original_context_tokens=trained_tokens))


def suitable(model: Model, ropes: Sequence[str]) -> tuple[list[str], str]:
    """Which of `ropes` (none = all) make sense for the model, and why not the others ('' when none is left out)."""
    asked = list(dict.fromkeys(ropes or ROPES))
    if model.rope.kind == "default":
        return asked, ""
    why = {
        "none": "the model knows no positions (NoPE)",
        "partial": "they would turn the share of each head that was trained without",
    }.get(model.rope.kind, f"the model was trained with {model.rope.kind} already")
    others = [rope for rope in asked if rope != "as-trained"]
    return ["as-trained"] if "as-trained" in asked else [], f"{', '.join(others)} left out: {why}" if others else ""


def text(run: Run, store: TokenStore, sequences: int | None = None) -> HeldOut:
    """Windows of the longest length: `sequences` per domain (0 = all; None = as much text as the run's validation)."""
    length, longest = run.data.sequence_tokens, max(run.evaluation.beyond_tokens)
    if sequences is None:
        sequences = -(-run.evaluation.sequences * length // longest)
    if store.manifest["packing"] != "none" and longest != length:
        raise ConfigError(
            f"{store.path}: its documents were packed into windows of {store.window_tokens} tokens, and no longer text "
            "in a row is left of them; measure on a store prepared without --packing best_fit"
        )
    return held_out(store, longest + 1, sequences)


def cut(windows: Windows, length: int) -> Windows:
    """Windows [N, T+1] as windows [N T/length, length+1], each of which predicts the next `length` tokens."""
    tokens_NT, documents_NT, used_N = windows.tokens_NT, windows.documents_NT, windows.used_N
    starts = np.arange(0, tokens_NT.shape[1] - 1, length)
    places = starts[:, None] + np.arange(length + 1)
    used = np.clip(used_N[:, None] - starts, 0, length + 1).astype(np.int32)
    return Windows(
        tokens_NT[:, places].reshape(-1, length + 1), documents_NT[:, places].reshape(-1, length + 1), used.reshape(-1)
    )


def execution(model: Model, tokens: int, masking: bool = False) -> Execution:
    """How rows of so many tokens are computed without an array of tokens times tokens: what `auto` takes on these
    devices, but for the implementations that make one, in whose place are plain blocks of queries."""
    name, _ = choose("auto", Call(model.head_dim, model.compute_dtype, tokens, ranges=masking))
    return Execution(attention="blocks" if name in ("xla", "reference") else name)


def measure(
    params: Any, run: Run, model: Model, mesh: jax.sharding.Mesh, windows: HeldOut
) -> dict[str, dict[str, dict[str, Any]]]:
    """`at_lengths` of what the run's evaluation asks for, and of the training length.

    windows: from `text`.  model: the one that is computed with, in its dtype.
    """
    trained, evaluation = run.data.sequence_tokens, run.evaluation
    lengths = sorted({trained, *evaluation.beyond_tokens})
    masking = run.data.document_masking
    return at_lengths(
        params, model, mesh, windows, trained=trained, lengths=lengths, ropes=evaluation.beyond_ropes, masking=masking
    )


def at_lengths(
    params: Any,
    model: Model,
    mesh: jax.sharding.Mesh,
    windows: HeldOut,
    *,
    trained: int,
    lengths: Sequence[int],
    ropes: Sequence[str] = (),
    masking: bool = False,
    done: Callable[[str, int, float], object] = lambda rope, length, loss: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{rope: {length: {loss, loss_se, by_position, domains: {name: {loss, loss_se, by_position}}}}}.

    loss: nats per token, mean over domains.  loss_se: standard error over the windows of the longest length, the same
    pieces of text at every length.  by_position: loss in each of BINS equal parts of the window, its mean where every
    part has as many tokens.
    trained: the length of training, up to which all treatments are one, and stand as as-trained only.
    lengths: each divides the longest, which is that of the windows less the one token that is not predicted.
    ropes: as for `suitable`.  masking: documents are hidden from each other.
    done: is told of each rope and length with its loss.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for rope, length in treatments(model, ropes, trained, lengths):
        at = stretched(model, rope, trained, length)
        domains = {name: _loss(params, at, mesh, text, length, masking) for name, text in windows.items()}
        mean = _mean(list(domains.values()))
        found.setdefault(rope, {})[str(length)] = mean | {"domains": domains}
        done(rope, length, mean["loss"])
    return found


def treatments(model: Model, ropes: Sequence[str], trained: int, lengths: Sequence[int]) -> list[tuple[str, int]]:
    """(rope, length) of everything that can differ: up to the length of training all treatments are as-trained.  Only
    of that length alone each is itself, with a factor of one."""
    asked, lengths = suitable(model, ropes)[0], sorted(set(lengths))
    return [(r, n) for r in asked for n in lengths if r == "as-trained" or n > trained or lengths == [trained]]


def _loss(params: Any, model: Model, mesh: jax.sharding.Mesh, text: Windows, length: int, masking: bool) -> dict:
    pieces = cut(text, length)
    rows = max(1, TOKENS_AT_A_TIME // length) * mesh.shape["replica"] * mesh.shape["data"]
    documents = pieces.documents_NT if masking else None
    how = execution(model, length, masking)
    nll_NT = score(params, model, how, mesh, pieces.tokens_NT, rows=rows, documents_BT=documents)
    valid_NT = valid_targets(pieces, masking)
    nll_NT = np.where(valid_NT, nll_NT, 0.0).astype(np.float64)
    whole = len(text.tokens_NT)
    totals = summary(nll_NT.reshape(whole, -1).sum(1), valid_NT.reshape(whole, -1).sum(1), 0)
    bins = np.arange(length) * min(BINS, length) // length
    nll, tokens = (np.bincount(bins, x_NT.sum(0)) for x_NT in (nll_NT, valid_NT))
    by_position = np.divide(nll, tokens, out=np.full(nll.shape, math.nan), where=tokens > 0)
    return {"loss": totals["loss"], "loss_se": totals["loss_se"], "by_position": by_position.tolist()}


def _mean(domains: list[dict]) -> dict[str, Any]:
    n = len(domains)
    return {
        "loss": math.fsum(d["loss"] for d in domains) / n,
        "loss_se": math.hypot(*(d["loss_se"] for d in domains)) / n,
        "by_position": np.mean([d["by_position"] for d in domains], axis=0).tolist(),
    }
