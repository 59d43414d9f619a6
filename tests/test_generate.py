import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick

from tinyllama_jax.config import Execution, Mesh
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.generate import sample
from tinyllama_jax.generate.score import score
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import make_mesh

MODEL = quick().model


@pytest.fixture(scope="module", params=[1, 8])
def meshed(request):
    mesh = make_mesh(Mesh(), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        params = transformer.init(MODEL, jax.random.key(1))
        yield mesh, jax.tree.map(lambda p: p * 3, params)  # sharper logits, so that greedy choices are not near ties


@jax.jit
def all_logits(params, tokens):
    return transformer.logits(params, tokens, MODEL, Execution())


def greedy_without_cache(params, prompt, count):
    """The whole row anew for every token, padded to one length: causality keeps the padding out of it."""
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.argmax(np.asarray(all_logits(params, jnp.asarray(row)))[0, len(ids) - 1])))
    return ids[len(prompt) :]


def generate(params, prompts, **options):
    options = {"max_new_tokens": 8, "temperature": 0.0} | options
    return sample.generate(params, MODEL, Execution(), prompts, **options)


def test_greedy_generation_with_a_cache_is_that_without(meshed):
    _, params = meshed
    prompts = [[5, 6, 7], [9], [11, 3, 200, 17, 45]]
    assert generate(params, prompts) == [greedy_without_cache(params, p, 8) for p in prompts]


def test_sampling_depends_on_the_seed_and_not_on_the_other_rows(meshed):
    _, params = meshed
    options = {"temperature": 1.0, "min_p": 0.001, "max_new_tokens": 12}
    one = generate(params, [[5, 6]], seed=3, **options)
    assert generate(params, [[5, 6], [7, 8, 9]], seed=3, **options)[0] == one[0]
    assert generate(params, [[5, 6]], seed=4, **options) != one


def test_a_row_ends_with_the_end_token_and_is_reported_as_it_grows(meshed):
    _, params = meshed
    free = generate(params, [[5, 6, 7], [9]])
    end = free[0][2]
    told = {0: [], 1: []}
    ended = generate(params, [[5, 6, 7], [9]], eos_id=end, on_tokens=lambda row, tokens: told[row].extend(tokens))
    for row, answer in enumerate(ended):
        stop = free[row].index(end) + 1 if end in free[row] else len(free[row])
        assert answer == free[row][:stop] == told[row]


def test_a_caller_may_end_a_row(meshed):
    _, params = meshed
    free = generate(params, [[5, 6, 7], [9]])
    ended = generate(params, [[5, 6, 7], [9]], on_tokens=lambda row, tokens: row == 0)
    assert ended[1] == free[1] and len(ended[0]) < 8 and ended[0] == free[0][: len(ended[0])]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "empty"),
        ([], {}, "empty"),
        ([[1] * 60], {}, "context of 64"),
        ([[512]], {}, "vocabulary of 512"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_requests_are_refused(meshed, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(meshed[1], prompts, **options)


def test_scores_are_the_log_probabilities_of_the_logits(meshed):
    mesh, params = meshed
    rows = np.random.default_rng(0).integers(0, MODEL.vocab_size, (5, 20)).astype(np.int32)
    logits = all_logits(params, jnp.asarray(rows[:, :-1]))
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows[:, 1:, None], axis=-1)[..., 0]
    got = score(params, MODEL, Execution(loss_chunk_tokens=13), mesh, rows, rows=2)
    assert got.shape == (5, 19)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3,), np.int32), r"\[batch, time\]"),
        (np.zeros((3, 4), np.float32), "integers"),
        (np.zeros((3, 1), np.int32), "predict nothing"),
        (np.zeros((0, 9), np.int32), "predict nothing"),
        (np.full((1, 4), 512), "token id 512"),
        (np.full((1, 4), -1), "token id -1"),
        (np.zeros((1, 66), np.int32), "context of 64"),
    ],
)
def test_wrong_rows_are_refused(meshed, rows, message):
    mesh, params = meshed
    with pytest.raises(DataError, match=message):
        score(params, MODEL, Execution(), mesh, rows)
