"""The model card: of a whole run as it should read, and what it says where less is known."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from synthetic_run import write_run

from tinyllama_jax.config import Model
from tinyllama_jax.interop.model_card import card, uses

MODEL = Model(vocab_size=512, d_model=64, layers=4, heads=4, kv_heads=2, head_dim=16, d_ff=176, context_tokens=256)
GOLDEN = Path(__file__).parent / "golden" / "model_card.md"
RESULTS = {
    "checkpoint": "runs/made",
    "step": 300,
    "tokens": 1_966_080,
    "results": {"hellaswag": {"metric": "acc_norm", "value": 0.2712, "stderr": 0.0044, "shots": 0}},
    "harness": "0.4.9",
}


@pytest.fixture
def trained(tmp_path):
    """(checkpoint, meta, run directory) of a finished run in three stages whose store is still there."""
    run = write_run(tmp_path / "runs" / "made", steps=300, validation_every=100)
    info = json.loads((run / "run.json").read_text())
    store = tmp_path / "store"
    store.mkdir()
    manifest = {
        "recipe": {
            "sources": ["prose=slimpajama:/home/someone/private/slim", "code=/home/someone/code?text=body"],
            "filters": ["min_chars=200"],
            "tokenizer": "",
        },
        "tokenizer": {"vocab_size": 512},
        "splits": {"train": {"prose": {"documents": 1200}, "code": {"documents": 80}}},
    }
    (store / "manifest.json").write_text(json.dumps(manifest))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    lr = {"kind": "cosine", "peak": 1e-3, "end": 1e-4, "warmup_tokens": 20_000}
    optimizer = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
    data = {"sequence_tokens": 256, "document_masking": False}
    model = {"compute_dtype": "bfloat16"}
    meta = {
        "step": 300,
        "tokens": last["tokens"],
        "fingerprint": "3f9c2a7e51d0",
        "document_marks": "eos",
        "config": info["config"] | {"lr": lr, "optimizer": optimizer, "data": data, "model": model, "seed": 3407},
        "store": {
            "path": str(store),
            "manifest_sha256": hashlib.sha256((store / "manifest.json").read_bytes()).hexdigest(),
            "train_tokens": {"prose": 1_000_000, "code": 200_000},
        },
        "versions": {"tinyllama_jax": "0.1", "jax": "0.12.0"},
    }
    (run / "evaluations").mkdir()
    (run / "evaluations" / "00000300-hellaswag.json").write_text(json.dumps(RESULTS))
    return run / "checkpoints" / "00000300", meta, run


def test_the_card_of_a_run(trained, request):
    checkpoint, meta, _ = trained
    text = card(checkpoint, meta, MODEL, "made-1m", license="apache-2.0", language="en")
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert "/home" not in text and "private" not in text


def head(text):
    _, yaml_text, body = text.split("---\n", 2)
    return yaml.safe_load(yaml_text), body


def test_the_head_is_what_the_hub_reads(trained):
    checkpoint, meta, _ = trained
    values, _ = head(card(checkpoint, meta, MODEL, "x", license="mit", language="en, zh"))
    assert values == {
        "license": "mit",
        "language": ["en", "zh"],
        "datasets": ["cerebras/SlimPajama-627B"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "tinyllama_jax"],
    }
    values, body = head(card(checkpoint, meta, MODEL, "x"))
    assert values["license"] == "unknown" and "language" not in values
    assert "license is not stated" in body and "languages are not stated" in body


def test_only_results_of_this_checkpoint_are_shown(trained):
    checkpoint, meta, run = trained
    text = card(checkpoint, meta | {"step": 200, "tokens": 1_100_000}, MODEL, "x")
    assert "hellaswag" not in text and "No evaluation on downstream tasks" in text
    assert "not the end of the run" in text and "| 200 |" in text and "| 300 |" not in text
    for junk in ("{", "[]", '{"step": 300}', '{"step": 300, "results": {"a": 1}}', '{"step": 300, "results": []}'):
        (run / "evaluations" / "junk.json").write_text(junk)
        text = card(checkpoint, meta, MODEL, "x")
        assert "| hellaswag | 0 | acc_norm | 0.2712 ± 0.0044 |" in text and "junk" not in text


def test_a_store_that_has_changed_says_nothing(trained, tmp_path):
    checkpoint, meta, _ = trained
    (tmp_path / "store" / "manifest.json").write_text('{"recipe": {"sources": ["skypile:/x"]}}')
    values, body = head(card(checkpoint, meta, MODEL, "x"))
    assert "datasets" not in values and "was not found" in body and "1,000,000" in body


def test_what_is_not_recorded_is_said_not_to_be(tmp_path):
    imported = {"step": 0, "tokens": 0, "imported_from": {"format": "hf", "source": "/home/someone/models/SmolLM2"}}
    text = card(tmp_path / "ckpt", imported, MODEL, "x")
    assert "imported (hf, `SmolLM2`)" in text and "not recorded" in text and "/home" not in text
    assert "repeated" not in text and "No evaluation" in text
    text = card(tmp_path / "ckpt", {"step": 7, "tokens": 70}, MODEL, "x")
    assert "How it was trained is not recorded" in text and "What it was trained on is not recorded" in text


def test_commands_can_be_pasted():
    lines = uses("my models/it's", MODEL, "bfloat16")
    assert lines["vllm"] == """vllm serve 'my models/it'"'"'s' --max-model-len 256 --dtype bfloat16"""
    compile(lines["transformers"], "lines", "exec")
