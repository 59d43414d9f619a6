"""Log-likelihoods of continuations against plain sums over all logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quick_experiment import quick

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import DataError
from tinyllama_jax.evaluate import likelihood
from tinyllama_jax.evaluate.likelihood import LAST_TOKENS, bucket, log_likelihoods, rows_of
from tinyllama_jax.loss import token_nll_and_best
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import BATCH, make_mesh

MODEL = replace(quick().model, context_tokens=40, compute_dtype="float32")
RNG = np.random.default_rng(0)


def ids(count: int) -> list[int]:
    return RNG.integers(0, MODEL.vocab_size, count).tolist()


def test_requests_that_differ_in_their_last_token_share_a_row():
    context = ids(10)
    choices = list(range(LAST_TOKENS + 3))
    rows = rows_of(
        [(context, [7, c]) for c in choices]
        + [(context[:4], [context[4]]), (context[:9], [*context[9:], 7, 2 * LAST_TOKENS])],
        40,
    )
    assert [len(row.inputs) for row in rows] == [11, 11, 4]
    assert [len(row.last) for row in rows] == [LAST_TOKENS, 4, 1]
    assert sorted(ask[0] for row in rows for ask in row.asks) == list(range(LAST_TOKENS + 5))
    assert rows[0].asks[0] == (0, 2, 0), "and the split into context and continuation may differ"
    assert {bucket(n, 300) for n in range(1, 301)} == {32, 64, 128, 256, 300}


def test_the_context_is_cut_from_the_left_and_continuations_are_not():
    (row,) = rows_of([(list(range(50)), [60, 61, 62])], 40)
    assert row.inputs == (*range(12, 50), 60, 61) and row.last == [62]
    for pairs, words in [
        ([([1], [])], "continuation without tokens"),
        ([([], [1])], "context without tokens"),
        ([([1], [2]), ([1], [3] * 41)], "request 1: a continuation of 41 tokens exceeds the model's context of 40"),
    ]:
        with pytest.raises(DataError, match=words):
            rows_of(pairs, 40)


def test_log_likelihoods_and_greediness_are_those_of_all_logits():
    mesh = make_mesh(Mesh(), jax.devices())
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params = jax.tree.map(lambda p: p * 3, transformer.init(MODEL, jax.random.key(1)))

        @jax.jit
        def log_p(params, tokens_BT):
            return jax.nn.log_softmax(transformer.logits(params, tokens_BT, MODEL, Execution()))

        # Continuations that are greedy up to a place.
        whole = np.asarray([ids(41) for _ in range(8)], np.int32)
        for t in range(36, 41):
            whole[:3, t] = np.asarray(log_p(params, jnp.asarray(whole[:, :40])))[:3, t - 1].argmax(-1)
        whole[0, 40] = (whole[0, 40] + 1) % MODEL.vocab_size
        logs_BTV = np.asarray(log_p(params, jnp.asarray(whole[:, :40])))
        pairs, expected = [], []
        for row, log_TV in zip(whole.tolist(), logs_BTV, strict=True):
            for split, end in ((1, 2), (20, 33), (36, 41), (40, 41), (3, 38)):
                chosen = log_TV[np.arange(split - 1, end - 1), row[split:end]]
                greedy = bool((log_TV[split - 1 : end - 1].argmax(-1) == row[split:end]).all())
                pairs.append((row[:split], row[split:end]))
                expected.append((float(chosen.sum()), greedy))
        assert {greedy for _, greedy in expected} == {True, False} and expected[2][1] is False
        told, compiled = [], likelihood._program(MODEL, Execution())
        found = log_likelihoods(params, MODEL, Execution(), mesh, pairs, batch_rows=6, on_rows=told.append)
        assert compiled._cache_size() == 2, "32 and 40 tokens"
        assert sum(told) == len(pairs)
        np.testing.assert_allclose([f.log_likelihood for f in found], [e for e, _ in expected], atol=2e-5, rtol=1e-6)
        assert [f.greedy for f in found] == [greedy for _, greedy in expected]
        # A context that is cut counts as if it had begun later.
        long = [(ids(30) + pairs[3][0], pairs[3][1]), pairs[3]]
        a, b = log_likelihoods(params, MODEL, Execution(), mesh, long, batch_rows=6)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)
        with pytest.raises(DataError, match="outside the model's vocabulary"):
            log_likelihoods(params, MODEL, Execution(), mesh, [([1], [MODEL.vocab_size])])


def test_the_best_token_is_found_where_the_vocabulary_lies_on_several_devices():
    mesh = make_mesh(Mesh(replica=2, tensor=2), jax.devices())
    x, w = RNG.normal(size=(8, 3, 4)).astype(np.float32), RNG.normal(size=(4, 10)).astype(np.float32)
    logits = x @ w
    targets = np.where(RNG.random((8, 3)) < 0.5, logits.argmax(-1), logits.argsort(-1)[..., -2])
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
        arguments = put(x, BATCH, None, None), put(w, "data", "tensor"), put(targets, BATCH, None)
        nll, best = jax.jit(partial(token_nll_and_best, chunk_tokens=4))(*arguments)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(best, targets == logits.argmax(-1))
