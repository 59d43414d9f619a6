"""Trained keys and values before every row: what they compute, in whole rows, in a cache and in an engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick
from test_hf import refusal

from tinyllama_jax.attention import attention
from tinyllama_jax.config import Adapter, Execution, Mesh, Start, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.finetune import adapters
from tinyllama_jax.generate.engine import Engine, Request
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.model import prefix, quantized, transformer
from tinyllama_jax.sharding import make_mesh, param_shardings, token_sharding
from tinyllama_jax.train.state import init
from tinyllama_jax.train.step import make_train_step

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
    whole = logits(plain, ids)[:, P:]
    for more in ({}, {"scan_layers": False, "attention": "reference", "remat": "full"}):
        np.testing.assert_allclose(logits(both, ids[:, P:], **more), whole, atol=2e-4)
    assert np.abs(logits(params, ids[:, P:]) - whole).max() > 0.1


def test_rows_of_whole_blocks_stay_so_for_the_kernels(params):
    """Against attention that is told which keys each query sees."""
    length, rows = 128, []
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, heads, 8), np.float32) for heads in (4, 2, 2))
    pair = {name: np.asarray(leaf[0]) for name, leaf in params["layers"]["prefix"].items()}

    def attend(q, k, v):
        rows.append((q.shape[1], k.shape[1], v.shape[1]))
        return attention(q, k, v)

    @jax.jit
    def both(q, k, v):
        keys, values = (jnp.concatenate(p, axis=1) for p in zip(prefix.before(pair, k), (k, v), strict=True))
        seen = jnp.tile(P + jnp.arange(length), (2, 1))
        return prefix.attending(attend, pair)(q, k, v), attention(q, keys, values, q_positions_BT=seen)

    found, expected = both(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert rows == [(256, 256, 256)]


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
    small = jax.jit(lambda p: quantized.serving(p, MODEL, "int8"))(params)
    for i in range(MODEL.layers):
        assert isinstance(small["layers"][i]["mlp"]["up"], quantized.Quantized)
        for name in ("key", "value"):
            np.testing.assert_array_equal(small["layers"][i]["prefix"][name], params["layers"]["prefix"][name][i])


def test_a_prefix_is_trained_and_nothing_else(params):
    """On a mesh; the loss that it begins with is that of whole rows on one device."""
    adapter = Adapter(method="prefix", prefix_tokens=P, base_weights="float32")
    run = replace(quick(), model=MODEL, start=Start(checkpoint="none"), adapter=adapter, seed=1)
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, 8, 17)).astype(np.int32)
    base = jax.tree.map(np.asarray, params | {"layers": prefix.split(params["layers"])[0]})
    mesh = make_mesh(Mesh(replica=2, data=2, tensor=2))
    with jax.set_mesh(mesh):
        frozen = adapters.freeze(jax.device_put(base, param_shardings(base, mesh)), MODEL, "float32")
        state = init(run, mesh) | {"frozen": frozen}
        before = jax.tree.map(np.asarray, (state["params"], frozen))
        step, at = make_train_step(run), token_sharding(mesh, leading=1)
        batch = {"tokens": ids[..., :-1], "targets": ids[..., 1:], "valid": np.ones((1, 8, 16), bool)}
        batch = {name: jax.device_put(np.ascontiguousarray(x), at) for name, x in batch.items()}
        losses = []
        for i in range(12):
            state, metrics = step(state, batch, jnp.float32(0.1), jnp.int32(i))
            losses.append(float(metrics["loss"]))
        after = jax.tree.map(np.asarray, (state["params"], state["frozen"]))
    same = [
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *pair))
        for pair in zip(before, after, strict=True)
    ]
    assert not any(same[0]) and all(same[1])
    assert losses[-1] < losses[0] - 0.3, losses
    both = base | {"layers": base["layers"] | before[0]["layers"]}
    scores = jax.nn.log_softmax(logits(both, ids[0, :, :-1]))
    first = -np.take_along_axis(np.asarray(scores), ids[0, :, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(losses[0], first, rtol=1e-5)


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
