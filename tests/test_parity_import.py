"""Models as they come from elsewhere: imported, used and exported again as transformers has them.

Nine query heads and three of keys, tied embeddings, theta 100000, a byte-level tokenizer that puts no BOS first, a chat
template, sharded files; random weights, in float32.
"""

import json

import jax
import numpy as np
import pytest
from foreign_models import CHAT, GENERATION, TEXTS, write_tokenizer
from test_hf import assert_same_bits, random_params

from tinyllama_jax import config, sharding
from tinyllama_jax.cli import main
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.data.tokenizer import Tokenizer, train_bpe
from tinyllama_jax.generate import sample
from tinyllama_jax.generate.load import load, prompt_tokens
from tinyllama_jax.interop import hf, hf_tokenizer
from tinyllama_jax.model import transformer

pytestmark = pytest.mark.parity

SMOL = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.04,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "small": {"vocab_size": 500, "num_hidden_layers": 2, "intermediate_size": 256},
    "49152": {"vocab_size": 49_152, "num_hidden_layers": 1, "intermediate_size": 1536},
}


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("size", SIZES)
def test_imported_used_and_exported_as_it_was(size, tmp_path, capsys):
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    source, out = write_tokenizer(tmp_path / "theirs"), tmp_path / "out"
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOL, **SIZES[size])).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.generation_config = transformers.GenerationConfig(**GENERATION)
    theirs.save_pretrained(source, max_shard_size="3MB" if size == "small" else "50MB")
    files = sorted(source.glob("*.safetensors"))
    assert len(files) > 1 and (source / "model.safetensors.index.json").exists()
    before = (source / "generation_config.json").read_bytes()

    run("import", "hf", source, "--out", tmp_path / "ckpt")
    with jax.set_mesh(sharding.make_mesh(config.Mesh(replica=1, data=1), jax.devices()[:1])):
        loaded = load(str(tmp_path / "ckpt"), jax.sharding.get_mesh())
        assert loaded.marks == "none"
        tokenizer = loaded.tokenizer()
        prompt = prompt_tokens(tokenizer, loaded.marks, "def main(argv):\n    for name in os.listdir(path):\n")
        reference = transformers.AutoTokenizer.from_pretrained(source)
        assert prompt == reference(tokenizer.decode(prompt)).input_ids
        ids = np.array([prompt], np.int32)
        placed = jax.device_put(ids, sharding.batch_sharding(jax.sharding.get_mesh()))
        run_model = jax.jit(lambda p, t: transformer.logits(p, t, loaded.model, Execution()))
        logits = np.asarray(run_model(loaded.params, placed))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
        assert expected.std() > 0.3 and np.abs(logits - expected).max() <= 1e-4
        continued = sample.generate(
            loaded.params, loaded.model, Execution(), [prompt], max_new_tokens=32, temperature=0.0
        )
    with torch.no_grad():
        answer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, suppress_tokens=None
        )
    best = np.sort(expected[0, -1])[-2:]
    assert best[1] - best[0] > 1e-3  # the first choice is no tie
    expected_ids = answer[0, len(prompt) :].tolist()
    assert not {0, 2} & set(continued[0]), "else transformers would have been kept from its choice"
    assert continued[0] == expected_ids

    run("export", "hf", tmp_path / "ckpt", "--out", out, "--shard-size", "3MB" if size == "small" else "50MB")
    assert len(list(out.glob("*.safetensors"))) > 1
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(torch.from_numpy(ids).long()).logits.numpy(), expected)
    assert (out / "generation_config.json").read_bytes() == before
    assert again.generation_config.eos_token_id == [0, 2]
    kept = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Hello"}]
    asked = [t.apply_chat_template(messages, tokenize=False) for t in (kept, reference)]
    assert asked[0] == asked[1] == "<|im_start|>user\nHello<|im_end|>\n"
    assert (out / "chat_template.jinja").read_text() == CHAT
    named = json.loads((out / "special_tokens_map.json").read_text())
    assert named["bos_token"] == "<|im_start|>"
    for text in (*TEXTS, "<|im_start|>user"):
        assert kept(text).input_ids == reference(text).input_ids, text
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("words", [["meta"], ["litgpt"], ["litgpt", "--layout", "tinyllama"]], ids=" ".join)
def test_torch_formats_by_their_commands(words, tmp_path, capsys):
    """Both ways through the command line: every bit, and the prompt's ids, are as before."""
    model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=48, context_tokens=64)
    hf.write_hf(random_params(model), model, tmp_path / "hf", tokenizer_files=[])
    write_tokenizer(tmp_path / "hf")
    run("import", "hf", tmp_path / "hf", "--out", tmp_path / "ckpt")
    run("export", words[0], tmp_path / "ckpt", "--out", tmp_path / "out", *words[1:], "--json")
    options = ["--context-tokens", "64"] if words[0] == "meta" else []
    run("import", words[0], tmp_path / "out", "--out", tmp_path / "again", *options)
    run("export", "hf", tmp_path / "again", "--out", tmp_path / "back")
    back_model, back = hf.read_hf(tmp_path / "back")
    assert back_model == model
    assert_same_bits(random_params(model), back)
    if words[0] == "litgpt":  # Meta's code takes only SentencePiece's or its own vocabularies
        assert (tmp_path / "back/chat_template.jinja").read_text() == CHAT
    else:
        assert "holds no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("post_processor", ["none", "byte_level", "bos"])
@pytest.mark.parametrize("more", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=["", "add", "add_not"])
def test_prompts_have_the_ids_of_their_own_tokenizer(post_processor, kind, more, tmp_path):
    import transformers

    write_tokenizer(tmp_path, post_processor=post_processor, tokenizer_class=kind, **more)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    files, marks, notes = hf_tokenizer.find(tmp_path)
    assert notes == () and marks == ("bos" if post_processor == "bos" else "none")
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert prompt_tokens(ours, marks, text) == theirs(text).input_ids, text


@pytest.mark.parametrize("more", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=["", "add", "add_not"])
def test_a_sentencepiece_model_alone_goes_by_add_bos_token(more, tmp_path):
    import transformers

    train_bpe(TEXTS, 400, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | more))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    _, marks, _ = hf_tokenizer.find(tmp_path)
    ours = Tokenizer.load(tmp_path)
    if not more:  # true by default, says transformers' documentation, and version 4 did so; 5.24 does not
        assert marks == "bos"
        return
    assert prompt_tokens(ours, marks, "Once upon a time") == theirs("Once upon a time").input_ids


@pytest.mark.parametrize("marks", ["bos", "both", "eos", "none"])
def test_an_exported_tokenizer_begins_a_text_as_the_documents_began(marks, tmp_path):
    import transformers

    file = train_bpe(TEXTS, 400, tmp_path / "tokenizer.model")
    model = Model(vocab_size=512, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=48, context_tokens=64)
    hf.write_hf(random_params(model), model, tmp_path / "out", tokenizer_files=[file], marks=marks)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text).input_ids == prompt_tokens(Tokenizer.load(file), marks, text), text
