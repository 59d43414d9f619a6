"""`import` and `export` as a whole: options that a format has not, what is said, a foreign tokenizer kept."""

import json

import pytest
from foreign_models import CHAT, GENERATION, SPECIAL, write_tokenizer
from test_hf import GQA, assert_same_bits, random_params, refusal

from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.errors import UsageError
from tinyllama_jax.generate.load import prompt_tokens
from tinyllama_jax.interop import formats, hf, hf_tokenizer

MODEL = replace(GQA, vocab_size=512)


def ended(capsys, *words):
    """(exit status, stdout, stderr) of a command."""
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a model and a byte-level tokenizer that puts no BOS first."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    hf.write_hf(random_params(MODEL), MODEL, folder)
    write_tokenizer(folder, auto_map={"AutoTokenizer": ["run_me.Tokenizer", None]})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "run_me.Model"}}))
    (folder / "run_me.py").write_text("raise SystemExit('this must not run')")
    return folder


def test_a_foreign_model_and_its_tokenizer_come_out_as_they_went_in(foreign, tmp_path, capsys):
    status, _, said = ended(capsys, "import", "hf", foreign, "--out", tmp_path / "ckpt")
    assert status == 0 and "auto_map" in said and "not run" in said
    meta = json.loads((tmp_path / "ckpt/meta.json").read_text())
    assert meta["document_marks"] == "none"
    command = ["export", "hf", tmp_path / "ckpt", "--out", tmp_path / "out", "--shard-size", "20KB", "--json"]
    status, said, _ = ended(capsys, *command)
    use = json.loads(said)["use"]
    assert status == 0 and use["vllm"] == f"vllm serve {tmp_path}/out --max-model-len 64 --dtype float32"
    assert use["transformers"].count("\n") == 1 and compile(use["transformers"], "lines", "exec")
    assert "How they were trained is not recorded" in (tmp_path / "out/README.md").read_text()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    model, params = hf.read_hf(tmp_path / "out")
    assert model == MODEL
    assert_same_bits(params, random_params(MODEL))
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (foreign / name).read_bytes(), name
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (settings["chat_template"], settings["add_bos_token"]) == (CHAT, False)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == GENERATION
    assert "auto_map" not in settings
    ids = json.loads((tmp_path / "out/config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in ids


@pytest.mark.parametrize(("post_processor", "marks"), [("none", "none"), ("byte_level", "none"), ("bos", "bos")])
def test_marks_are_what_the_foreign_tokenizer_does(post_processor, marks, tmp_path):
    write_tokenizer(tmp_path, post_processor=post_processor, add_bos_token=marks == "none")  # which means nothing
    files, found, notes = hf_tokenizer.find(tmp_path)
    assert (found, notes) == (marks, ()) and len(files) == 5
    assert hf_tokenizer.find(tmp_path.parent)[:2] == ((), "bos")
    one = SPECIAL[0]  # begins and ends a text, as in many
    write_tokenizer(tmp_path, post_processor=post_processor, bos=one, eos_token=one)
    assert hf_tokenizer.find(tmp_path)[1] == marks


def test_marks_of_a_sentencepiece_model_go_by_its_settings(tmp_path):
    train_bpe([CHAT, "some more text of the usual kind"], 290, tmp_path / "tokenizer.model")
    assert hf_tokenizer.find(tmp_path)[1] == "bos"
    for adds in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
        assert hf_tokenizer.find(tmp_path)[1] == ("bos" if adds else "none")


def test_a_tokenizer_that_cannot_be_used_is_left_out_and_said(tmp_path):
    write_tokenizer(tmp_path, bos="<|nowhere|>")
    files, _, notes = hf_tokenizer.find(tmp_path)
    assert files == () and "left out" in notes[0] and "<|nowhere|>" in notes[0]
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    files, _, notes = hf_tokenizer.find(tmp_path)
    assert files == () and "given twice" in notes[0]


def test_an_option_of_another_format_is_refused(foreign, tmp_path, capsys):
    for words, said in (
        (["export", "hf", "nowhere", "--layout", "litgpt"], "--layout is an option of the format litgpt"),
        (["export", "meta", "nowhere", "--shard-size", "1GB"], "--shard-size is an option of the format hf"),
        (["import", "hf", foreign, "--context-tokens", "64"], "--context-tokens is an option of the format meta"),
    ):
        status, out, err = ended(capsys, *words, "--out", tmp_path / "out")
        assert status == 2 and out == "" and said in err
    refusal(UsageError, lambda: formats.chosen("meta", "writes", {"layout": "litgpt", "dtype": None}), "--layout")
    assert formats.chosen("hf", "writes", {"layout": None, "dtype": "float16"}) == {"dtype": "float16"}


def test_every_format_says_what_it_is_and_takes_its_options():
    import inspect

    for name, format in formats.FORMATS.items():
        assert format.what and (format.read or format.write), name
        for function, options in ((format.read, format.reads), (format.write, format.writes)):
            if function:
                keywords = inspect.signature(function).parameters.values()
                named = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY}
                assert named == set(options), name
                assert all(p.default is not p.empty for p in keywords if p.kind is p.KEYWORD_ONLY), name


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
@pytest.mark.parametrize(("marks", "start"), [("bos", "bos"), ("both", "bos"), ("eos", "eos"), ("none", "none")])
def test_an_exported_tokenizer_begins_a_text_as_the_documents_began(marks, start, kind, tmp_path):
    import tokenizers

    if kind == "sentencepiece":
        file = train_bpe([CHAT, "some more text of the usual kind"], 290, tmp_path / "tokenizer.model")
    else:
        file = write_tokenizer(tmp_path / "own") / "tokenizer.json"
    ours = Tokenizer.load(file)
    (tmp_path / "out").mkdir()
    hf_tokenizer.write(ours.files, tmp_path / "out", MODEL, marks)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert fast.encode("some text").ids == prompt_tokens(ours, marks, "some text")
    assert hf_tokenizer.find(tmp_path / "out")[1] == start
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is (start == "bos")


def test_a_text_between_special_tokens_is_text(foreign):
    tokenizer = Tokenizer.load(foreign)
    assert 1 not in tokenizer.encode("<|im_start|>user") and tokenizer.decode(tokenizer.encode("é 12")) == "é 12"
