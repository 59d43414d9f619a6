"""Passkey prompts, how answers to them are scored, and the options of `eval` for long contexts."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import tokenizers
from matplotlib.image import imread
from quick_experiment import quick

from experiments import extend, smoke
from tinyllama_jax import verbs_context
from tinyllama_jax.cli import main
from tinyllama_jax.config import Execution, Mesh, replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe, write_tokenizer_json
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.evaluate import beyond, passkey, retrieval
from tinyllama_jax.evaluate.passkey import Answer, Prompts
from tinyllama_jax.finetune.resolve import run_of
from tinyllama_jax.generate.sample import generate
from tinyllama_jax.generate.score import score
from tinyllama_jax.lab import context_plots
from tinyllama_jax.lab.draw import png
from tinyllama_jax.lab.report import write_report
from tinyllama_jax.model import transformer
from tinyllama_jax.presets import preset
from tinyllama_jax.schedules import Plan
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
    prompts = made.at(190, (0.0, 1.0))
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
    with pytest.raises(DataError, match="rows of 190 tokens exceed the model's context of 64"):
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


# -- the verb ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(finished, tmp_path):
    """A finished run of one's own, trained in windows of 32 tokens."""
    return shutil.copytree(finished, tmp_path / "run")


def said(capsys, *argv, status=0):
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == status
    return capsys.readouterr()


def test_passkeys_of_a_run_are_kept_added_to_and_drawn(own, tmp_path, capsys):
    words = [own, "--passkey", "260", "--keys", "3", "--choices", "2", "--depths", "0,1", "--json"]
    value = json.loads(said(capsys, *words, "--rope", "as-trained", "--plots", tmp_path / "p").out)
    assert value["trained_tokens"] == 32 and value["provenance"]["passkey"]["chance"] == 0.5
    cell = value["passkey"]["as-trained"]["260"]
    assert list(cell["depths"]) == ["0", "1"] and len(cell["depths"]["0"]["said"]) == 3
    assert cell["margin"] == pytest.approx(np.mean([at["margin"] for at in cell["depths"].values()]))
    assert imread(tmp_path / "p" / "passkey.png").shape[1] == 1600
    [file] = (own / "evaluations").glob("*-passkey.json")
    assert json.loads(file.read_text())["passkey"] == value["passkey"]
    more = json.loads(said(capsys, *words, "--rope", "ntk").out)
    assert more["passkey"] == value["passkey"] | {"ntk": more["passkey"]["ntk"]}, "same conditions: added"
    assert more["passkey"]["ntk"]["260"]["margin"] != cell["margin"]
    shown = said(capsys, *words[:-1], "--rope", "ntk", "--seed", "5").out
    assert "one is the likeliest of 2 by chance in 50.0 %" in shown and "ntk              260" in shown
    assert list(json.loads(file.read_text())["passkey"]) == ["ntk"], "other keys: replaced"


def test_loss_by_position_is_what_measure_says_of_a_run(own, tmp_path, capsys):
    words = [own, "--positions", "32,64", "--rope", "as-trained,yarn", "--sequences", "2"]
    value = json.loads(said(capsys, *words, "--plots", tmp_path, "--json").out)
    assert main(["measure", str(own), "--beyond", "64", "--rope", "as-trained,yarn", "--sequences", "2"]) == 0
    assert value["positions"] == json.loads((own / "measures.json").read_text())["beyond"]
    assert list(value["positions"]["yarn"]) == ["64"] and list(value["positions"]["as-trained"]) == ["32", "64"]
    assert imread(tmp_path / "positions.png").shape[1] == 1600
    page = write_report(own).read_text()
    assert "Long windows, by position" in page and (own / "plots" / "positions.png").exists()
    words = [own, "--positions", "32", "--sequences", "2", "--every-tokens", "2000"]
    along = json.loads(said(capsys, *words, "--json").out)["evaluations"]
    assert len(along) > 1 and [e["new"] for e in along].count(False) == 1, "the newest has one"
    assert "as-trained 32: " in said(capsys, *words).out


def test_loss_by_position_of_a_checkpoint_from_elsewhere(tmp_path, capsys):
    checkpoint = tiny_checkpoint.make(tmp_path, context_tokens=64)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    words = [checkpoint, "--positions", "64,128", "--corpus", f"foxes={tmp_path}/text", "--rope", "linear"]
    value = json.loads(said(capsys, *words, "--json").out)
    assert value["trained_tokens"] == 64, "its context" and list(value["positions"]["linear"]) == ["128"]
    assert list(value["positions"]["linear"]["128"]["domains"]) == ["foxes"]
    assert "name some with --corpus" in said(capsys, checkpoint, "--positions", "64", status=78).err
    assert "128: 48 does not divide it" in said(capsys, checkpoint, "--positions", "48,128", status=78).err


@pytest.mark.parametrize(
    "words, status, line",
    [
        (["--passkey", "64,no"], 2, "--passkey 64,no: lengths in tokens"),
        (["--positions", "0"], 2, "--positions 0: lengths in tokens"),
        (["--passkey", "64", "--positions", "64"], 2, "--passkey and --positions are evaluations of their own"),
        (["--passkey", "64", "--tasks", "piqa"], 2, "--tasks and --passkey are evaluations of their own"),
        (["--passkey", "64", "--corpus", "x"], 2, "--corpus goes not with --passkey"),
        (["--passkey", "64", "--rope", "alibi"], 2, "--rope alibi: choose of as-trained, linear, ntk, yarn"),
        (["--passkey", "64", "--choices", "11"], 2, "--choices 11: must be at least 2 and at most --keys 10"),
        (["--passkey", "64", "--depths", "0,2"], 2, "--depths 0,2: shares of the filler"),
        (["--positions", "64", "--keys", "3"], 2, "--keys goes with --passkey"),
        (["--rope", "yarn"], 2, "--rope goes with --passkey or --positions"),
        (["--passkey", "64", "--every-tokens", "9", "--plots", "x"], 2, "--plots is of one checkpoint"),
        (["--positions", "16", "--rope", "yarn"], 2, "--rope yarn: up to the 32 tokens of training there is only"),
        (["--passkey", "64"], 78, "a window of 64 tokens cannot hold the prompt"),
    ],
)
def test_what_makes_no_sense_is_one_line(finished, capsys, words, status, line):
    lines = said(capsys, finished, *words, status=status).err.strip().splitlines()
    assert line in lines[-1]


def test_the_treatments_of_the_verb_are_those_that_are_measured():
    assert verbs_context.ROPES == beyond.ROPES


@pytest.mark.parametrize(
    "name, kind, factor, steps, sequences, tokens",
    [
        ("linear_8k", "linear", 4, 1000, 64, 8192),
        ("linear_16k", "linear", 8, 1000, 128, 16_384),
        ("ntk_8k", "ntk", 8, 400, 64, 8192),
        ("ntk_16k", "ntk", 16, 400, 64, 16_384),
        ("yarn_8k", "yarn", 4, 400, 64, 8192),
        ("yarn_16k", "yarn", 8, 400, 64, 16_384),
        ("cpu_as_trained", "default", 1, 100, 8, 1024),
        ("cpu_linear", "linear", 4, 100, 8, 1024),
        ("cpu_ntk", "ntk", 8, 100, 8, 1024),
        ("cpu_yarn", "yarn", 4, 100, 8, 1024),
    ],
)
def test_the_recipes_say_what_the_papers_do(name, kind, factor, steps, sequences, tokens):
    recipe, small = getattr(extend, name)(), name.startswith("cpu")
    base = smoke.demo().model if small else preset("tinyllama-1.1b")
    run = run_of(replace(recipe, base="base"), base, "store", {"text": 10**9})
    [stage] = Plan(run.curriculum, run.data.sequence_tokens).stages
    assert (run.data.sequence_tokens, run.model.context_tokens) == (tokens, tokens)
    assert (stage.end_step, stage.batch_tokens) == (steps, sequences * tokens)
    assert (run.model.rope.kind, run.model.rope.factor) == (kind, factor)
    if kind != "default":
        assert run.model.rope.original_context_tokens == base.context_tokens
    assert run.lr.kind == "constant" and (run.optimizer.beta2, run.optimizer.weight_decay) == (0.95, 0)
    if not small:
        assert run.lr.peak == 2e-5 and run.lr.warmup_tokens == 20 * stage.batch_tokens


# -- figures -----------------------------------------------------------------------------------------------


def cell(value: float, depths=("0", "0.5", "1")) -> dict:
    at = {"exact": value, "accuracy": value, "margin": 9 * value - 1}
    return at | {"depths": {depth: at for depth in depths}}


@pytest.mark.parametrize("names", [1, 7])
def test_figures_show_something_and_nothing_is_cut_off(names, tmp_path):
    ropes = ["as-trained", "linear", "ntk", "yarn", *(f"{rope}, fine-tuned" for rope in ("linear", "ntk", "yarn"))]
    lengths = (256, 512, 1024)
    trained = 256 if names > 1 else 1024
    curve = np.linspace(3, 4, 16)
    value = {
        "trained_tokens": trained,
        "passkey": {r: {str(n): cell(0.1 * i) for i, n in enumerate(lengths)} for r in ropes[:names]},
        "positions": {r: {str(n): {"by_position": [*curve[:-1], None]} for n in lengths} for r in ropes[:names]},
        "provenance": {"passkey": {"choices": 10}},
    }
    for name, figure in context_plots.figures(value).items():
        path = Path(tmp_path / f"{name}.png")
        path.write_bytes(png(figure))
        image = imread(path)
        ink = (image[..., :3] < 0.7).any(axis=2)
        assert image.shape[1] == 1600 and 400 < image.shape[0] < 3000 and 0.003 < ink.mean() < 0.6
        edge = np.ones_like(ink)
        edge[3:-3, 3:-3] = False
        assert not ink[edge].any(), "something is cut off at the border of the picture"


def test_up_to_the_trained_length_every_treatment_shows_what_was_measured_as_trained():
    found = {"as-trained": {"256": cell(0.9), "512": cell(0.1)}, "yarn": {"512": cell(0.4)}}
    figure = context_plots.figures(
        {"trained_tokens": 256, "passkey": found, "provenance": {"passkey": {"choices": 10}}}
    )["passkey"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["as-trained", "yarn"] * 3
    yarn = [text.get_text() for text in figure.axes[1].texts]
    assert yarn == ["90", "40"] * 3
