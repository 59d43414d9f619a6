"""Speculative decoding gives what plain decoding gives: the same tokens when greedy, the same distribution when not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_experiment import quick
from scipy import stats

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.generate import sample, sampling, speculative, speculative_check, speculative_round
from tinyllama_jax.generate import speculative_rule as rule
from tinyllama_jax.generate.load import Loaded
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import make_mesh

MODEL = replace(quick().model, layers=1)
SMALL = replace(MODEL, vocab_size=16, d_model=16, heads=2, kv_heads=1, d_ff=32)
SHORT = replace(MODEL, context_tokens=48)  # a draft of a shorter context guesses no further than it reaches
GREEDY = Sampling(temperature=0)


def loaded(model, seed, scale=3.0):
    """Random weights, larger so that logits are peaked."""
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * scale, transformer.init(model, key)))(jax.random.key(seed))
    return Loaded(None, model, params, {})


def perturbed(of, seed, size):
    """The same model with other weights by `size` of their own spread."""
    draw = np.random.default_rng(seed)
    noisy = lambda p: p + (size * np.std(p) * draw.standard_normal(p.shape)).astype(np.float32)  # noqa: E731
    return replace(of, params=jax.tree.map(lambda p: jax.device_put(noisy(np.asarray(p)), p.sharding), of.params))


def on(devices):
    return jax.set_mesh(make_mesh(Mesh(), jax.devices()[:devices]))


@pytest.fixture(scope="module")
def pair():
    with on(1):
        target = loaded(MODEL, 1)
        yield target, perturbed(replace(target, model=SHORT), 2, 0.02)


def ragged(rows, longest, seed=0, vocab=MODEL.vocab_size):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, draw.integers(1, longest + 1)).tolist() for _ in range(rows)]


def plain(target, prompts, **options):
    options = {"max_new_tokens": 24, "temperature": 0.0, "rows": len(prompts)} | options
    return sample.generate(target.params, target.model, Execution(), prompts, **options)


def speculate(target, draft, prompts, **options):
    return speculative.speculate(
        target, draft, prompts, **{"max_new_tokens": 24, "how": GREEDY, "rows": len(prompts)} | options
    )


# -- greedy: the same tokens -------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_plain_decoding(pair):
    target, draft = pair
    prompts = ragged(200, 40)
    found = speculate(target, draft, prompts)
    assert found.answers == plain(target, prompts)
    assert 0.2 < found.acceptance_rate < 0.8 and found.rounds < found.tokens / 2
    assert found.accepted <= found.judged <= found.proposed and found.overlap == found.accepted and found.variance == 0


def test_a_draft_that_is_the_target_is_always_right(pair):
    target, _ = pair
    found = speculate(target, replace(target, model=SHORT), ragged(200, 20), max_new_tokens=25)
    assert found.accepted == found.proposed == 200 * 20
    assert found.tokens_per_round == 5 and found.calls == 5


def test_a_hopeless_draft_changes_nothing_but_the_number_of_rounds(pair):
    target, _ = pair
    prompts = ragged(200, 40)
    found = speculate(target, loaded(SHORT, 9), prompts)
    assert found.answers == plain(target, prompts) and found.acceptance_rate < 0.05


def test_rows_end_where_they_should_and_are_told_in_order(pair):
    target, draft = pair
    prompts = ragged(200, 40)
    free = speculate(target, draft, prompts).answers
    ends = {free[0][2], free[1][5], free[2][0]}  # behind one, two or more tokens of a round
    told = [[] for _ in prompts]
    found = speculate(target, draft, prompts, stop_ids=ends, on_tokens=lambda row, new: told[row].extend(new))
    assert told == found.answers
    for answer, whole in zip(found.answers, free, strict=True):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
        assert answer == whole[:stop]
    assert found.rounds < 200 * found.calls
    few = []
    speculate(target, draft, prompts[:1] * 200, on_tokens=lambda row, new: few.append(row) or row != 3)
    assert few.count(0) == 1 and few.count(3) == 24, "a listener that answers True has heard enough"


def test_prompts_wait_for_their_turn(pair):
    """200 rows at a time, whether there are as many or not."""
    target, draft = pair
    prompts = ragged(220, 40)
    later = speculate(target, draft, prompts, rows=200).answers[200:]
    assert later == speculate(target, draft, prompts[200:] + prompts[:180]).answers[:20]


def test_the_context_is_used_to_its_end_and_never_left(pair):
    target, draft = pair
    prompts = [p + [1] * (40 - len(p)) for p in ragged(200, 40)]
    found = speculate(target, draft, prompts)
    assert found.answers == plain(target, prompts)
    # What was proposed lies within the draft's 48 tokens, or is the one behind them.
    assert found.proposed < 200 * 5 * 9 and found.calls >= 1 + 64 - 49
    with pytest.raises(ConfigError, match="context of 64"):
        speculate(target, draft, [[1] * 41])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {"rows": 1}, "empty"),
        ([[]], {}, "empty"),
        ([[512]], {}, "vocabulary of 512"),
        ([[1]], {"draft_tokens": 0}, "least"),
    ],
)
def test_wrong_requests_are_refused(pair, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        speculate(*pair, prompts, **options)


@pytest.mark.slow
def test_a_draft_with_a_larger_vocabulary():
    with on(1):
        target, draft = loaded(SMALL, 1), loaded(replace(SMALL, vocab_size=24), 1)
        prompts = ragged(30, 20, vocab=16)
        found = speculate(target, draft, prompts, max_new_tokens=20, draft_tokens=2)
        assert found.answers == plain(target, prompts, max_new_tokens=20)


# -- sampled: the same distribution ------------------------------------------------------------------------

ROWS, PROMPT = 17_000, (3, 14, 4)
HOWS = {
    "temperature": Sampling(temperature=1.2, seed=5),
    "filters": Sampling(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=6),
}


def exact(target, how):
    """float64 [V, V, V]: the probability of each three tokens behind PROMPT, from whole rows without a cache."""
    V = target.model.vocab_size
    pairs = np.stack(np.meshgrid(np.arange(V), np.arange(V), indexing="ij"), -1).reshape(-1, 2)
    tokens = np.concatenate([np.tile(PROMPT, (V * V, 1)), pairs], axis=1).astype(np.int32)
    logits_BTV = transformer.logits(target.params, jnp.asarray(tokens), target.model, Execution())
    rows, uses = sampling.rows([how] * V * V)
    p = []
    for at in range(3):
        length = len(PROMPT) + at
        seen = np.zeros((V * V, V), bool)
        np.put_along_axis(seen, tokens[:, :length], True, axis=1)
        logits_BV = sampling.penalized(logits_BTV[:, length - 1], seen, jnp.asarray(rows.repetition_penalty))
        filtered = sampling.filtered(logits_BV, sampling.Rows(*map(jnp.asarray, rows)), uses)
        p.append(np.asarray(jax.nn.softmax(filtered), np.float64).reshape(V, V, V))
    return p[0][0, 0][:, None, None] * p[1][:, 0][:, :, None] * p[2]


def chance(answers, p):
    """The smallest p-value of chi-square tests: all three tokens jointly, and each by itself."""
    counts = np.zeros(p.shape)
    np.add.at(counts, tuple(np.array(answers).T), 1)
    values = []
    for others in ((), (1, 2), (0, 2), (0, 1)):
        seen, wanted = counts.sum(others).ravel(), p.sum(others).ravel() / p.sum() * counts.sum()
        if seen[wanted == 0].any():
            return 0.0  # what cannot be
        rare = wanted < 5
        seen, wanted = (np.append(x[~rare], x[rare].sum()) for x in (seen, wanted))
        seen, wanted = seen[wanted > 0], wanted[wanted > 0]
        values.append(stats.chisquare(seen, wanted).pvalue)
    return min(values)


@pytest.fixture(scope="module")
def small():
    """The draft lacks the last three tokens: it proposes none of them, and reads them as others."""
    with on(1):
        target = loaded(SMALL, 1, scale=2.0)
        draft = perturbed(target, 2, 0.7)
        fewer = {
            "embed": {"embedding": draft.params["embed"]["embedding"][:13]},
            "head": {"kernel": draft.params["head"]["kernel"][:, :13]},
        }
        yield target, replace(draft, model=replace(SMALL, vocab_size=13), params=draft.params | fewer)


def draw(small, name, prompts=((PROMPT,) * ROWS), **changes):
    how = replace(HOWS[name], **changes)
    return speculate(*small, prompts, max_new_tokens=3, draft_tokens=2, how=how)


@pytest.fixture(scope="module")
def drawn(small):
    return {name: draw(small, name) for name in HOWS}


@pytest.mark.parametrize("name", HOWS)
def test_sampled_tokens_are_distributed_as_the_targets(small, drawn, name):
    found, value = drawn[name], chance(drawn[name].answers, exact(small[0], HOWS[name]))
    assert 0.1 < found.acceptance < 0.8 and value > 1e-4
    told = speculative_check.sampled(small[0], [PROMPT] * 300, replace(found, answers=found.answers[:300]), HOWS[name])
    assert told["accepted"]["holds"] and told["likelihood"]["holds"]


@pytest.mark.slow
def test_a_wrong_rule_is_found_out(small, monkeypatch):
    monkeypatch.setattr(rule, "accepts", lambda u, p, q: u >= 0)
    speculative_round.functions.cache_clear()
    found = draw(small, "temperature")
    speculative_round.functions.cache_clear()
    assert found.acceptance == 1 and chance(found.answers, exact(small[0], HOWS["temperature"])) < 1e-9
    how = HOWS["temperature"]
    told = speculative_check.sampled(small[0], [PROMPT] * 300, replace(found, answers=found.answers[:300]), how)
    assert not told["accepted"]["holds"] and not told["likelihood"]["holds"]


def test_a_row_draws_by_its_stream_and_not_by_the_other_rows(small, drawn):
    alike = drawn["temperature"].answers
    assert len(set(map(tuple, alike[:100]))) > 20
    assert draw(small, "temperature", [PROMPT] * 100 + [(7,)] * (ROWS - 100)).answers[:100] == alike[:100]
    assert draw(small, "temperature", stream=50).answers[:50] == alike[50:100]


def test_what_the_papers_predict():
    assert rule.expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert rule.expected_tokens(1, 4) == 5 and rule.expected_tokens(0, 4) == 1
    # arXiv 2211.17192, table 1: alpha 0.8, gamma 5, c = 0 gives 3.69.
    assert rule.expected_speed_up(0.8, 5, 0) == pytest.approx(3.69, abs=0.005)
    assert rule.expected_speed_up(0.6, 2, 0.05) == pytest.approx((1 + 0.6 + 0.36) / 1.1)
