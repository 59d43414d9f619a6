"""The ablation changes one thing at a time, and nothing that would make it another computation."""

import dataclasses
import typing

import pytest

from experiments import effectiveness
from tinyllama_jax.config import Execution

LISTS = {name: getattr(effectiveness, name)() for name in ("gpu", "tpu", "cpu")}
CHOICES = {name: set(typing.get_args(hint)) for name, hint in typing.get_type_hints(Execution).items()}


def changes(base, run) -> dict:
    fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name not in ("name", "execution")}
    assert fields == {name: getattr(base, name) for name in fields}  # the same work on the same batch
    return {
        f.name: getattr(run.execution, f.name)
        for f in dataclasses.fields(Execution)
        if getattr(run.execution, f.name) != getattr(base.execution, f.name)
    }


@pytest.mark.parametrize("name", LISTS)
def test_one_setting_differs_from_the_base_and_every_remat_policy_is_there(name):
    base, *others = LISTS[name]
    changed = [changes(base, run) for run in others]
    assert all(len(change) == 1 for change in changed), changed
    assert len({str(c) for c in changed}) == len(changed) == len({r.name for r in LISTS[name]}) - 1
    assert {c["remat"] for c in changed if "remat" in c} | {base.execution.remat} == CHOICES["remat"]
    assert sum("scan_layers" in c for c in changed) == 1
    chunk = next(c["loss_chunk_tokens"] for c in changed if "loss_chunk_tokens" in c)
    tokens = base.curriculum[0].batch_tokens
    assert base.execution.loss_chunk_tokens < tokens < chunk


def test_every_attention_is_measured_where_it_runs():
    def attentions(name):
        return {run.execution.attention for run in LISTS[name]}

    assert attentions("gpu") == {"auto", "reference", "xla", "cudnn", "triton", "hopper"}
    assert attentions("tpu") == {"auto", "reference", "xla", "splash", "tpu"}
    everywhere = attentions("gpu") | attentions("tpu") | attentions("cpu")
    assert everywhere == {a for a in CHOICES["attention"] if not a.startswith("interpret:")}
    assert attentions("cpu") == {"reference", "blocks", "xla"}
