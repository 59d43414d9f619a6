"""The command line is quick where nothing is computed: no jax in plans and refusals, helps in a moment.

What a process really imports is watched here; who may import whom is in test_layering.py.
"""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import startup

from tinyllama_jax import weights
from tinyllama_jax.config import replace
from tinyllama_jax.model import transformer
from tinyllama_jax.presets import PRESETS, preset

PATIENCE = 2  # times the promised seconds: other test processes share the cores
STARTS = {f"{command.kind} {command.name}": command for command in startup.starts()}


@pytest.mark.parametrize("name", STARTS)
def test_imports_helps_and_refusals_are_light_and_quick(name, tmp_path):
    command = STARTS[name]
    assert startup.failures(command, startup.measure(command, tmp_path, 0), factor=PATIENCE) == []


@pytest.mark.slow
def test_no_plan_imports_jax_and_none_but_reports_matplotlib(tmp_path):
    wrong = {}
    for command in startup.plans(tmp_path):
        line = startup.measure(command, tmp_path, 0)
        if failed := startup.failures(command, line):
            wrong[command.name] = failed
    assert wrong == {}
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "part/manifest.json").exists()


def test_every_verb_is_a_plan_or_a_refusal(tmp_path):
    """A new verb must be put somewhere."""
    from tinyllama_jax.cli import build_parser

    verbs = set(build_parser()._subparsers._group_actions[0].choices)
    measured = [c.words[2:4] for c in [*STARTS.values(), *startup.plans(tmp_path)] if c.kind in ("plan", "refusal")]
    covered = {words[0] for words in measured} | {" ".join(words) for words in measured}
    assert verbs - covered == {"demo"}, "which is `train` and `report`"


def test_what_breaks_a_promise_is_said(tmp_path):
    command = startup.Command("plan", "heavy", ("-c", "import matplotlib.colors"))
    line = startup.measure(command, tmp_path, 1)
    assert "matplotlib" in line["imported"] and "numpy" in line["imported"] and line["wall_s"]["n"] == 1
    assert startup.failures(command, line) == ["imports matplotlib"]
    drawing = startup.Command("plan", "heavy", command.words, draws=True)
    assert startup.failures(drawing, line) == []
    slow = {"imported": ["numpy"], "processor_s": {"min": 0.61}}
    help_ = startup.Command("help", "--help", ())
    assert startup.failures(help_, slow) == ["imports numpy", "takes 0.61 s, more than 0.5"]
    assert startup.failures(help_, slow, factor=PATIENCE) == ["imports numpy"]
    failing = startup.Command("plan", "none", ("-m", "tinyllama_jax", "fly"))
    failed = startup.measure(failing, tmp_path, 1)
    assert startup.failures(failing, failed) == failed["failed"]
    assert "ended with 2, not 0: tinyllama: no verb 'fly'" in failed["failed"][0]


def leaves(model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape, from the real init, in the order of jax's trees."""
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert {leaf.dtype.name for _, leaf in flat} == {"float32"}
    return {tuple(str(key.key) for key in path): leaf.shape for path, leaf in flat}


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_without_jax_are_those_of_the_weights(tied):
    """Every size is another number here, so that no axis passes for another."""
    model = replace(preset("tinyllama-1.1b"), tied_embeddings=tied, head_dim=48, d_model=1088, vocab_size=31_999)
    sizes = [model.layers, model.d_model, model.heads, model.kv_heads, model.head_dim, model.d_ff, model.vocab_size]
    assert len(set(sizes)) == 7
    assert list(weights.shapes(model).items()) == list(leaves(model).items())
    assert (("head", "kernel") in weights.shapes(model)) is not tied


def test_the_presets_shapes_are_those_of_their_weights():
    for name in PRESETS:
        assert weights.shapes(preset(name)) == leaves(preset(name)), name
