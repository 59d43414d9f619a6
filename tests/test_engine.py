"""Continuous batching: requests that come and go get what they would get alone."""

import jax
import numpy as np
import pytest
from quick_experiment import quick

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate.engine import Engine, Request, bucket
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.model import quantized, transformer
from tinyllama_jax.sharding import make_mesh, param_shardings

MODEL = replace(quick().model, head_dim=32, layers=1)  # rows and requests are what is tested, and programs compile
GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, min_p=0.001, repetition_penalty=1.3, seed=7)  # a sort takes long to compile


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        drawn = jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(1))
        yield jax.tree.map(lambda p: p * 3, drawn)


def request(*prompt, new=6, how=GREEDY, stop=()):
    return Request(prompt=prompt, max_new_tokens=new, sampling=how, stop_ids=stop)


def run(engine, requests=()):
    """{number: (tokens, finish)} of what is there and what is added."""
    answers = {engine.add(each): [] for each in requests}
    ends = {}
    for _ in range(200):
        if not engine.busy:
            return {n: (tokens, ends[n]) for n, tokens in answers.items()}
        for piece in engine.step():
            assert piece.number not in ends, "a request ends once"
            answers.setdefault(piece.number, []).extend(piece.tokens)
            if piece.finish:
                ends[piece.number] = piece.finish
    raise AssertionError("the engine does not come to an end")


REQUESTS = [
    request(5, 6, 7),
    request(9, new=11),
    request(11, 3, 200, 17, 45, how=WARM),
    request(*range(40, 75), new=9),
    request(8, 8, how=replace(WARM, seed=8), new=1),
    request(3, how=WARM, new=12),
    request(4, 5, new=40),
]


@pytest.fixture(scope="module")
def alone(params):
    return [run(Engine(params, MODEL, Execution(), rows=1), [each])[0] for each in REQUESTS]


@pytest.mark.parametrize(("rows", "block"), [(2, 1), (3, 4)])
def test_a_request_gets_what_it_would_get_alone(params, alone, rows, block):
    engine = Engine(params, MODEL, Execution(), rows=rows, block=block)
    assert list(run(engine, REQUESTS).values()) == alone
    assert {finish for _, finish in alone} == {"length"} and [len(tokens) for tokens, _ in alone][:2] == [6, 11]
    # Later ones find the rows as those before have left them.
    assert list(run(engine, REQUESTS[:2]).values()) == alone[:2]
    assert not engine.running and not engine.waiting


def test_a_stop_id_ends_a_row_and_its_neighbours_go_on(params, alone):
    free = alone[1][0]
    for block in (1, 4):
        engine = Engine(params, MODEL, Execution(), rows=2, block=block)
        for stop in (free[0], free[4]):
            first, second = run(engine, [request(9, new=11, stop=(511, stop)), REQUESTS[0]]).values()
            assert first == (free[: free.index(stop) + 1], "stop") and second == alone[0]


def test_the_context_is_the_end_unless_it_slides(params):
    whole = request(*range(60), new=30)
    (tokens, finish), _ = run(Engine(params, MODEL, Execution(), rows=2, block=4), [whole, REQUESTS[0]]).values()
    assert (len(tokens), finish) == (4, "length")
    (longer, finish), _ = run(
        Engine(params, MODEL, Execution(), rows=2, block=4, slide=True), [whole, REQUESTS[0]]
    ).values()
    assert (len(longer), finish) == (30, "length") and longer[:4] == tokens
    short = Engine(params, MODEL, Execution(), rows=1, context_tokens=16)
    assert len(run(short, [request(1, 2, 3, new=30)])[0][0]) == 13


def test_a_cancelled_request_frees_its_row(params, alone):
    engine = Engine(params, MODEL, Execution(), rows=1, block=1)
    first, second, third = (engine.add(each) for each in (request(4, 5, new=40), request(6, new=9), REQUESTS[0]))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(77)
    ends = [(p.number, p.finish) for p in engine.step() if p.finish]
    assert sorted(ends) == [(first, "cancelled"), (second, "cancelled")]
    assert run(engine)[third][0] == alone[0][0][2:], "which began in the same step"


@pytest.mark.parametrize("mesh", [Mesh(replica=2, data=2, tensor=2)], ids=str)
def test_on_a_mesh(params, alone, mesh):
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        spread = jax.device_put(jax.tree.map(np.asarray, params), param_shardings(params, mesh))
        engine = Engine(spread, MODEL, Execution(), rows=3, block=2)
        assert list(run(engine, REQUESTS[:2]).values()) == alone[:2]
        heads = "tensor" if mesh.shape["tensor"] > 1 else None
        assert engine._state.cache[0]["k"].sharding.spec[1] == heads


def test_weights_as_they_are_served(params, alone):
    serve = jax.jit(quantized.serving, static_argnums=(1, 2))
    kept = {bits: serve(params, MODEL, bits) for bits in ("dtype", "int8", "int4")}
    assert run(Engine(kept["dtype"], MODEL, Execution(), rows=1), REQUESTS[:1])[0] == alone[0]
    (tokens, _), *_ = run(Engine(kept["int8"], MODEL, Execution(), rows=1), REQUESTS[:1]).values()
    assert len(tokens) == len(alone[0][0])
    read = lambda tree: sum(x.nbytes for x in jax.tree.leaves((tree["layers"], tree["head"])))  # noqa: E731
    nbytes = {bits: read(tree) for bits, tree in kept.items()}
    assert nbytes["int4"] < 0.17 * nbytes["dtype"] and nbytes["int8"] < 0.29 * nbytes["dtype"], "of float32"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(), "empty"),
        (request(512), "token id 512 is outside the model's vocabulary of 512"),
        (request(-1), "token id -1"),
        (request(1, new=0), "at least 1"),
        (request(*[1] * 64), "leaves no room in the context of 64"),
    ],
)
def test_wrong_requests_are_refused(params, wrong, message):
    engine = Engine(params, MODEL, Execution())
    with pytest.raises(ConfigError, match=message):
        engine.add(wrong)
    assert not engine.busy
    with pytest.raises(ConfigError, match="exceed the model's context of 64"):
        Engine(params, MODEL, Execution(), context_tokens=65)
    with pytest.raises(ConfigError, match="rows=0"):
        Engine(params, MODEL, Execution(), rows=0)


def test_buckets():
    assert [bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]
    assert [bucket(n, 6, smallest=1) for n in (0, 1, 2, 3, 5)] == [1, 1, 2, 4, 6]
