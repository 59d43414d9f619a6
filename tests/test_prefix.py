"""Trained keys and values before every row: what they compute, in whole rows, in a cache and in an engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick
from test_hf import refusal

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.engine import Engine, Request
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.model import prefix, quantized, transformer
from tinyllama_jax.sharding import make_mesh, param_shardings, token_sharding

MODEL, P = replace(quick().model, layers=2), 5


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        drawn = jax.tree.map(lambda p: p * 3, jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(1)))
        yield with_prefix(drawn)


def with_prefix(params, tokens=P):
    shape = (MODEL.layers, tokens, MODEL.kv_heads, MODEL.head_dim)
    key, value = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    return params | {"layers": params["layers"] | {"prefix": {"key": key, "value": value}}}


def logits(params, ids, **execution):
    run = jax.jit(lambda p, x: transformer.logits(p, x, MODEL, Execution(**execution)))
    return np.asarray(run(params, jnp.asarray(ids)))


def test_keys_that_tokens_would_have_are_those_tokens(params, monkeypatch):
    """A prefix of the keys and values of real tokens, turned as at 0 .. P - 1, is these tokens."""
    plain = params | {"layers": {name: part for name, part in params["layers"].items() if name != "prefix"}}
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, P + 7)).astype(np.int32)
    from tinyllama_jax.model import cached

    _, cache = cached.prefill(plain, jnp.asarray(ids[:, :P]), MODEL, Execution(), jnp.asarray([P - 1]))
    taken = {n: jnp.stack([of[n[0]][0].swapaxes(0, 1) for of in cache]) for n in ("key", "value")}
    both = plain | {"layers": plain["layers"] | {"prefix": taken}}
    assert prefix.tokens(both) == P and prefix.tokens(plain) == 0
    for more in ({}, {"scan_layers": False}, {"attention": "reference"}, {"remat": "full"}):
        np.testing.assert_allclose(logits(both, ids[:, P:], **more), logits(plain, ids)[:, P:], atol=2e-4)
    assert np.abs(logits(params, ids[:, P:]) - logits(plain, ids)[:, P:]).max() > 0.1


def test_an_engine_goes_on_behind_a_prefix_as_whole_rows_do(params):
    prompts = [(5, 6, 7), tuple(range(40, 73)), (9,)]
    engine = Engine(params, MODEL, Execution(), rows=2)
    for prompt in prompts:
        engine.add(Request(prompt=prompt, max_new_tokens=8, sampling=Sampling(temperature=0)))
    answers = {number: [] for number in range(len(prompts))}
    while engine.busy:
        for piece in engine.step():
            answers[piece.number] += piece.tokens
    for number, prompt in enumerate(prompts):
        row = [*prompt, *answers[number]]
        best = logits(params, [row + [0] * (48 - len(row))])[0].argmax(-1)[len(prompt) - 1 : len(row) - 1]
        assert len(answers[number]) == 8 and best.tolist() == answers[number]


def test_what_serves_keeps_the_prefix_as_it_is(params):
    small = quantized.serving(params, MODEL, "int8")
    for i in range(MODEL.layers):
        assert isinstance(small["layers"][i]["mlp"]["up"], quantized.Quantized)
        for name in ("key", "value"):
            np.testing.assert_array_equal(small["layers"][i]["prefix"][name], params["layers"]["prefix"][name][i])


def test_on_a_mesh_logits_and_gradients_are_the_same(params):
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (8, 16)).astype(np.int32)

    def value(trained, base, x):
        tree = base | {"layers": base["layers"] | {"prefix": trained}}
        return jnp.sum(jax.nn.log_softmax(transformer.logits(tree, x, MODEL, Execution()))[..., 0])

    trained = params["layers"]["prefix"]
    base = params | {"layers": {name: part for name, part in params["layers"].items() if name != "prefix"}}
    one, of_one = jax.jit(jax.value_and_grad(value))(trained, base, jnp.asarray(ids))
    mesh = make_mesh(Mesh(replica=2, data=2, tensor=2))
    host = jax.tree.map(np.asarray, (trained, base))
    with jax.set_mesh(mesh):
        placed = jax.device_put(host[1], param_shardings(host[1], mesh))
        x = jax.device_put(ids, token_sharding(mesh))
        whole = jax.device_put(host[0], jax.sharding.NamedSharding(mesh, jax.P(None, None, None, None)))
        many, of_many = jax.jit(jax.value_and_grad(value))(whole, placed, x)
        np.testing.assert_allclose(many, one, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max()), of_many, of_one)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(of_one)) > 0


def test_what_cannot_be_is_refused(params):
    ids = jnp.zeros((8, 16), jnp.int32)
    call = lambda: transformer.hidden(params, ids, MODEL, Execution(), documents_BT=ids)  # noqa: E731
    refusal(ConfigError, call, "document_masking=false", "packing=single")
    refusal(ConfigError, lambda: Engine(params, MODEL, Execution(), slide=True), "--slide")
    refusal(ConfigError, lambda: prefix.refuse(params, "cannot fly", "walk"), "adapter.method=prefix", "cannot fly")
    mesh = make_mesh(Mesh(replica=4, context=2))
    with jax.set_mesh(mesh):
        host = jax.tree.map(np.asarray, params)
        x = jax.device_put(np.zeros((8, 16), np.int32), token_sharding(mesh))
        refusal(ConfigError, lambda: transformer.hidden(host, x, MODEL, Execution()), "mesh.context=1")
