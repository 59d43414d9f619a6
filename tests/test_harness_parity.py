"""Our answers to lm-evaluation-harness beside those of its own Hugging Face backend, request by request."""

import jax
import local_tasks
import pytest
from lm_eval.models.huggingface import HFLM

from tinyllama_jax.config import Mesh
from tinyllama_jax.evaluate import harness
from tinyllama_jax.evaluate.harness_model import Model
from tinyllama_jax.evaluate.harness_tasks import load_tasks
from tinyllama_jax.evaluate.suites import expand
from tinyllama_jax.generate.load import load
from tinyllama_jax.interop.hf import write_hf
from tinyllama_jax.sharding import computing, make_mesh

pytestmark = pytest.mark.parity

NAMES = tuple(f"local_{name}" for name in local_tasks.TASKS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(ours, theirs) of all tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = load_tasks(expand(",".join(NAMES)), include_path=[str(local_tasks.write(folder / "tasks"))])
    model, params = local_tasks.checkpoint(folder / "checkpoint")
    files = [folder / "tokenizer.model"]
    exported = write_hf(jax.device_get(params), model, folder / "hf", tokenizer_files=files)
    mesh = make_mesh(Mesh())
    with computing(mesh, "float32"):
        loaded = load(str(folder / "checkpoint"), mesh, dtype="float32")
        ours = harness.evaluate(Model(loaded, mesh, batch_rows=8), tasks)
    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4)
    return ours, harness.evaluate(theirs, tasks)


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_that_of_the_hugging_face_backend(answers, name):
    ours, theirs = (each["samples"][name] for each in answers)
    assert len(ours) == len(theirs) == 14
    texts = set()
    for a, b in zip(ours, theirs, strict=True):
        assert a["arguments"] == b["arguments"] and a["doc"] == b["doc"]
        for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
            if isinstance(y, str):
                assert x == y
                texts.add(y)
            elif isinstance(y, tuple):
                assert x[0] == pytest.approx(y[0], abs=1e-4) and x[1] == y[1]
            else:
                assert x == pytest.approx(y, abs=1e-4)
        for metric in b["metrics"]:
            assert a[metric] == pytest.approx(b[metric], abs=1e-4), metric
    assert len(texts) > 7 or name != "local_answers", "the model says something, and not always the same"


def test_every_metric_is_that_of_the_hugging_face_backend(answers):
    ours, theirs = answers
    assert ours["all"].keys() == theirs["all"].keys() == set(NAMES)
    for name, metrics in theirs["all"].items():
        for key, value in metrics.items():
            assert ours["all"][name][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert ours["results"].keys() == set(NAMES)
    assert ours["results"]["local_choices"]["metric"] == "acc_norm" and ours["results"]["local_choices"]["shots"] == 1
    assert ours["mean"] is None, "word perplexity is no share"
