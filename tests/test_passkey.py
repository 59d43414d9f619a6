"""Passkey prompts, and how answers to them are scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from quick_experiment import quick

from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate import beyond, passkey, retrieval
from tinyllama_jax.evaluate.passkey import Answer, Prompts
from tinyllama_jax.generate.sample import generate
from tinyllama_jax.generate.score import score
from tinyllama_jax.model import transformer
from tinyllama_jax.sharding import make_mesh

TEXT = f"{passkey.INTRODUCTION}\n{passkey.FILLER}\n{passkey.QUESTION} 12345. " * 20
KINDS = ("sentencepiece", "json", "byte-level", "spelled")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """tokenizer(kind): Llama's form, the same as JSON, GPT-2's form, which joins digits, and one of bytes alone."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def make(kind: str) -> Tokenizer:
        path = folder / kind
        if path.exists():
            return Tokenizer.load(path)
        path.mkdir()
        if kind == "byte-level":
            model = tokenizers.Tokenizer(tokenizers.models.BPE())
            model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            model.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=["<s>", "</s>"],
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            model.train_from_iterator([TEXT, " ".join(map(str, range(0, 99_999, 7)))], trainer)
            model.save(str(path / "tokenizer.json"))
        else:
            text = "\n".join(["zq"] * 9) if kind == "spelled" else TEXT
            train_bpe([text], 262 if kind == "spelled" else 320, path / "tokenizer.model")
            if kind == "json":
                write_tokenizer_json(path / "tokenizer.model", path / "tokenizer.json")
                (path / "tokenizer.model").unlink()
        return Tokenizer.load(path)

    return make


# -- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", ["bos", "eos", "none"])
def test_prompts_are_exact_in_tokens_and_hold_the_key_where_they_should(tokenizer, kind, marks):
    text = tokenizer(kind)
    made, depths = Prompts(text, marks, keys=4, choices=3, seed=7), (0.0, 0.5, 1.0)
    start = {"bos": [text.bos_id], "eos": [text.eos_id], "none": []}[marks]
    for length in (600, 611, 1024):
        prompts = made.at(length, depths)
        assert len(prompts) == 12
        for prompt in prompts:
            assert {len(prompt.tokens) + len(ids) for ids in prompt.answers} == {length}
            assert list(prompt.tokens[: len(start)]) == start
            said = text.decode(prompt.tokens)
            before, needle, after = said.partition("\n" + passkey.NEEDLE.format(key=prompt.key) + "\n")
            assert needle and said.endswith("\n" + passkey.QUESTION), "whole sentences, whatever was cut of the filler"
            assert said.count(prompt.key) == 2 and not any(key in said for key in made.keys if key != prompt.key)
            filler = len(text.encode(before)), len(text.encode(after))
            share = (filler[0] - len(made.start)) / (sum(filler) - len(made.start) - len(made.question))
            assert share == pytest.approx(prompt.depth, abs=0.02)
            assert text.decode([*prompt.tokens, *prompt.answers[0]]) == f"{said} {prompt.key}"
            others = {made.said(ids).strip() for ids in prompt.answers[1:]}
            assert len(others) == 2 and others <= made.keys.keys() - {prompt.key}


def test_keys_are_the_same_at_every_length_and_depth_and_others_of_another_seed(tokenizer):
    text = tokenizer("sentencepiece")
    made = Prompts(text, "bos", keys=5, choices=5, seed=1)
    by_length = [[p.key for p in made.at(length, (0.0, 1.0))] for length in (500, 700)]
    assert by_length[0] == by_length[1] == list(made.keys) * 2
    assert Prompts(text, "bos", keys=5, choices=5, seed=1).keys == made.keys
    assert not Prompts(text, "bos", keys=5, choices=5, seed=2).keys.keys() & made.keys.keys()
    each = [ids for answers in made.keys.values() for ids in answers[1:]]
    assert all(each.count(answers[0]) == 4 for answers in made.keys.values()), "as often wrong as every other"


def test_a_window_that_is_too_short_is_refused_and_the_shortest_is_not(tokenizer):
    made = Prompts(tokenizer("sentencepiece"), "bos", keys=2, choices=2)
    with pytest.raises(ConfigError, match="window of 60 tokens cannot hold the prompt, which .* takes (\\d+)") as said:
        made.at(60, (0.0, 1.0))
    least = int(str(said.value).partition("takes ")[2].partition(";")[0])
    first, last = made.at(least, (0.0, 1.0))[::2]
    assert first.tokens != last.tokens and len(first.tokens) == least - made.answer_tokens
    with pytest.raises(ConfigError, match="cannot hold"):
        made.at(least - 1, (0.0, 1.0))
    with pytest.raises(ConfigError, match=r"depths \[2.0\] must lie in \[0, 1\]"):
        made.at(600, (2.0,))


def test_a_tokenizer_that_cannot_write_digits_is_refused(tmp_path):
    words = sorted({*TEXT} - {*"0123456789"})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    model.decoder = tokenizers.decoders.Fuse()
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="the tokenizer cannot write digits: \\d{5} becomes"):
        Prompts(Tokenizer.load(tmp_path), "bos")
    with pytest.raises(ConfigError, match="5 choices among 4 keys"):
        Prompts(Tokenizer.load(tmp_path), "bos", keys=4, choices=5)


# -- scoring -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 8], ids=["one device", "eight"])
def mesh(request):
    mesh = make_mesh(Mesh(), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield mesh


def test_answers_are_what_whole_rows_and_greedy_generation_say(tokenizer, mesh):
    text = tokenizer("byte-level")
    model = replace(quick().model, layers=1, vocab_size=text.vocab_size, context_tokens=512)
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 3, transformer.init(model, key)))(jax.random.key(1))
    made = Prompts(text, "bos", keys=3, choices=3)
    assert made.answer_tokens > 1
    prompts = made.at(240, (0.0, 1.0))
    found = retrieval.answers(params, model, mesh, prompts, lambda ids: ",".join(map(str, ids)))
    rows = np.array([[*prompt.tokens, *ids] for prompt in prompts for ids in prompt.answers])
    nll = score(params, model, Execution(), mesh, rows)[:, -made.answer_tokens :].sum(1).reshape(len(prompts), -1)
    np.testing.assert_allclose([answer.log_likelihoods for answer in found], -nll, rtol=1e-4)
    if mesh.size > 1:
        return
    said = generate(
        params, model, Execution(), [p.tokens for p in prompts], max_new_tokens=made.answer_tokens + 1, temperature=0
    )
    assert [answer.said for answer in found] == [",".join(map(str, ids)) for ids in said]
    with pytest.raises(DataError, match="rows of 240 tokens exceed the model's context of 64"):
        retrieval.answers(params, replace(model, context_tokens=64), mesh, prompts, str)


def copying(tokens_BT, last_B):
    """Logits of a model that says what followed the last three tokens where they were before, and else has no idea."""
    at_BT = jnp.arange(tokens_BT.shape[1])[None]
    same_BT = at_BT < last_B[:, None]
    for back in range(3):
        here_B = jnp.sum(jnp.where(at_BT == last_B[:, None] - back, tokens_BT, 0), axis=1)
        same_BT &= jnp.roll(tokens_BT, back, axis=1) == here_B[:, None]
    following_BT = jnp.roll(tokens_BT, -1, axis=1)
    hits_BV = jnp.sum(jnp.where(same_BT[..., None], following_BT[..., None] == jnp.arange(400), False), axis=1)
    return 20.0 * (hits_BV > 0)


@pytest.fixture
def copier(monkeypatch):
    """Its cache is the text itself, in slots as the real one's."""

    def prefill(params, tokens_BT, cfg, execution, last_B):
        return copying(tokens_BT, last_B), ({"k": tokens_BT[:, None, :, None]},)

    def decode(params, tokens_BT, cfg, cache, positions_BT):
        held_BT, logits = cache[0]["k"][:, 0, :, 0], []
        for i in range(tokens_BT.shape[1]):
            here_BT = jnp.arange(held_BT.shape[1])[None] == positions_BT[:, i, None]
            held_BT = jnp.where(here_BT, tokens_BT[:, i, None], held_BT)
            logits.append(copying(held_BT, positions_BT[:, i]))
        return jnp.stack(logits, axis=1), ({"k": held_BT[:, None, :, None]},)

    monkeypatch.setattr(retrieval.cached, "prefill", prefill)
    monkeypatch.setattr(retrieval.cached, "decode", decode)
    retrieval._program.cache_clear()
    yield
    retrieval._program.cache_clear()


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_model_that_copies_finds_the_key_and_none_where_it_is_not_told(tokenizer, kind, copier, monkeypatch):
    model = replace(quick().model, vocab_size=400, context_tokens=600)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    made = Prompts(tokenizer(kind), "bos", keys=4, choices=4, seed=3)
    with jax.set_mesh(mesh):
        prompts = made.at(600, (0.25, 0.75))
        found = passkey.summary(prompts, retrieval.answers({}, model, mesh, prompts, made.said))
        assert (found["exact"], found["accuracy"]) == (1.0, 1.0) and found["margin"] > 5
        assert found["depths"]["0.75"]["said"][0][1].strip().startswith(prompts[0].key)
        monkeypatch.setattr(passkey, "NEEDLE", "The grass is green, as I said.")
        prompts = made.at(600, (0.25, 0.75))  # of the same shape
        found = passkey.summary(prompts, retrieval.answers({}, model, mesh, prompts, made.said))
        assert found["exact"] == 0 and found["accuracy"] == 0.25, "chance: all are as likely as the other"
        assert found["margin"] == pytest.approx(0, abs=1e-4)


def test_what_a_model_likes_by_itself_is_no_retrieval():
    """One key is likelier than all others in any case: chance, and no margin."""
    prompts = [
        passkey.Prompt(0.5, str(i), (), tuple(((i + j) % 3,) for j in range(3))) for i in range(3)
    ]  # keys 0, 1, 2
    likes = np.array([-1.0, -5.0, -9.0])
    answers = [Answer(np.array([likes[ids[0]] for ids in p.answers]), f" {p.key}4") for p in prompts]
    found = passkey.summary(prompts, answers)
    assert found["accuracy"] == pytest.approx(1 / 3) and found["margin"] == found["margin_se"] == 0
    assert found["exact"] == 0, "another number begins with the key"
    told = [Answer(a.log_likelihoods + [2.0, 0, 0], f" {p.key}. Or 7") for p, a in zip(prompts, answers, strict=True)]
    found = passkey.summary(prompts, told)
    assert found["margin"] == pytest.approx(2) and found["exact"] == 1 and found["accuracy"] == pytest.approx(1 / 3)


def test_up_to_the_length_of_training_there_is_one_treatment():
    model = quick().model
    assert beyond.treatments(model, (), 1024, (256, 512)) == [("as-trained", 256), ("as-trained", 512)]
    beyond_it = [("as-trained", 256), ("as-trained", 512), ("yarn", 512)]
    assert beyond.treatments(model, ("as-trained", "yarn"), 256, (512, 256)) == beyond_it
    assert beyond.treatments(model, ("yarn",), 256, (256,)) == [("yarn", 256)], "a factor of one"
    assert beyond.treatments(model, ("yarn",), 1024, (256, 512)) == []


def test_long_rows_are_computed_without_a_square(mesh):
    how = beyond.execution(quick().model, 16_384)
    assert how.attention == "blocks"
    assert beyond.execution(quick().model, 16_384, masking=True).attention == "blocks"
