"""Speculative decoding gives what plain decoding gives: the same tokens when greedy, the same distribution when not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick
from scipy import stats

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import sample, speculative
from tinyllama_jax.generate import speculative_rule as rule
from tinyllama_jax.generate.load import Loaded
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import make_mesh

MODEL = quick().model


def loaded(model, seed, scale=3.0):
    """Random weights, larger so that logits are peaked."""
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * scale, transformer.init(model, key)))(jax.random.key(seed))
    return Loaded(None, model, params, {})


def perturbed(of, seed, size):
    """The same model with other weights by `size` of their own spread."""
    leaves, tree = jax.tree.flatten(of.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [p + size * jnp.std(p) * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return Loaded(None, of.model, jax.tree.unflatten(tree, noisy), {})


@pytest.fixture(scope="module", params=[1, 8])
def pair(request):
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[: request.param])):
        target = loaded(MODEL, 1)
        yield target, perturbed(target, 2, 0.02)


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        yield


def ragged(rows, longest, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, MODEL.vocab_size, draw.integers(1, longest + 1)).tolist() for _ in range(rows)]


def plain(target, prompts, **options):
    options = {"max_new_tokens": 24, "temperature": 0.0} | options
    return sample.generate(target.params, target.model, Execution(), prompts, **options)


def speculate(target, draft, prompts, **options):
    options = {"max_new_tokens": 24, "temperature": 0.0} | options
    return speculative.speculate(target, draft, prompts, **options)


def test_greedy_answers_are_those_of_plain_decoding(pair):
    target, draft = pair
    prompts = ragged(200, 40)
    found = speculate(target, draft, prompts)
    assert found.answers == plain(target, prompts)
    assert 0.2 < found.acceptance_rate < 0.9
