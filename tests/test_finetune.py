"""`finetune` from a small base: every kind of recipe, resumed exactly, its best step kept, its answers usable."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_store
from quick_experiment import quick_command

from tinyllama_jax.cli import main
from tinyllama_jax.train import best, saved

HERE = str(Path(__file__).parent)
SMALL = (
    "sequence_tokens=63",
    "batch_sequences=8",
    "compute_dtype=float32",
    "evaluation.sequences=8",
    "evaluation.batch_sequences=8",
    "evaluation.sample_tokens=4",
    "execution.micro_batch_sequences=0",
    "execution.remat=none",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of 24 steps."""
    folder = tmp_path_factory.mktemp("base")
    store = small_store.make(folder)
    assert main(quick_command(store, folder / "base", "curriculum.cooldown.batch_tokens=256")) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Questions whose answers repeat them: something to learn in few steps."""
    file = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    words = ["file", "name", "list", "class", "value", "string", "object", "module"]
    rows = [
        {"messages": [
            {"role": "user", "content": f"{a} {b}?"},
            {"role": "assistant", "content": f"{b} {a}."},
        ]}
        for a in words for b in words
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["file", "name", "list", "class", "value", "string", "object", "module"]
    rows = [{"prompt": f"{a} {b}?", "chosen": "list.", "rejected": "object."} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def finetune(recipe: str, base, data, workdir: Path, *settings: str) -> int:
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return main(["finetune", recipe, "--base", str(base), "--data", str(data), "--workdir", str(workdir), *words])


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def without_clock(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "timing"} for record in records]


def last_step(run: Path) -> int:
    return saved.read_meta(saved.resolve(run))["step"]


LORA = (
    "adapter.rank=4",
    "epochs=6",
    "lr_peak=1e-2",
    "evaluations=3",
    "examples.template=zephyr",
    "examples.loss_on=assistant",
    'questions=["file name?"]',
)


def test_lora_learns_answers_and_keeps_its_best_step(base, chats, tmp_path, capsys):
    run = tmp_path / "lora"
    assert finetune("experiments.finetune:lora", base, chats, run, *LORA) == 0
    losses = dict(best.losses(run))
    assert losses[0] > 4 and min(losses.values()) < losses[0] - 1, losses
    assert saved.read_meta(saved.resolve(f"{run}@best"))["step"] == min(losses, key=losses.get)
    meta = saved.read_meta(saved.resolve(run))
    names = set(meta["checkpoint"]["leaves"]["params"])
    assert all(name.endswith((".a", ".b")) for name in names) and "head.kernel.a" in names
    samples = lines(run, "samples")
    assert {s["step"] for s in samples} == set(losses) and all(s["chat"] for s in samples)
    # The adapter's checkpoint is an ordinary model to everything that reads one.
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "The", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["eval", f"{run}@best", "--sequences", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["domains"]["chat"]["loss"]
    assert found == pytest.approx(min(losses.values()), abs=1e-4), "the loss of its own held-out examples"
    assert main(["finetune", "merge", f"{run}@best", "--out", str(tmp_path / "merged")]) == 0
    assert "layers.attention.query" in saved.read_meta(tmp_path / "merged")["checkpoint"]["leaves"]["params"]
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Fine-tuning" in page and "lora, rank 4" in page


def test_a_run_that_was_cut_off_goes_on_exactly(base, chats, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = (*LORA, "epochs=2", "adapter.dropout=0.1", "adapter.base_weights=int8")
    settings += ("checkpoint.temporary_steps=3", "checkpoint.keep_temporary=9")
    assert finetune("experiments.finetune:qlora", base, chats, whole, *settings) == 0
    shutil.copytree(whole, cut)
    steps = sorted(int(path.name) for path in (cut / "checkpoints").iterdir() if path.name.isdigit())
    assert len(steps) >= 3
    for step in steps[1:]:
        shutil.rmtree(cut / "checkpoints" / f"{step:08d}")
    assert finetune("experiments.finetune:qlora", base, chats, cut, *settings) == 0
    for name in ("metrics", "validation", "samples"):
        assert without_clock(lines(cut, name)) == without_clock(lines(whole, name)), name
    prints = [saved.read_meta(saved.resolve(run))["checkpoint"]["leaves"] for run in (whole, cut)]
    assert prints[0] == prints[1]


def test_another_base_under_the_same_name_is_refused(base, chats, tmp_path, capsys):
    moved, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, moved)
    settings = (*LORA, "epochs=1", "evaluations=1")
    assert finetune("experiments.finetune:lora", moved, chats, run, *settings) == 0
    shutil.rmtree(moved / "checkpoints" / f"{last_step(moved):08d}")
    assert finetune("experiments.finetune:lora", moved, chats, run, *settings) == 78
    assert "another" in capsys.readouterr().err.splitlines()[-1]


def test_all_weights_learn_and_patience_ends_the_run(base, chats, tmp_path):
    run = tmp_path / "full"
    settings = ("epochs=40", "evaluations=20", "patience=2", "lr_kind=constant", "lr_peak=3e-2", "lr_end=0")
    settings += ("examples.template=chatml", "examples.loss_on=assistant", "examples.packing=best_fit")
    settings += ("document_masking=true", "questions=[]")
    assert finetune("experiments.finetune:full", base, chats, run, *settings) == 0
    info = json.loads((run / "run.json").read_text())
    measured = best.losses(run)
    assert best.waited(measured) == 2, "it ended with the second validation in a row that was no better"
    assert info["ended"] == {"step": measured[-1][0], "why": "patience"}
    assert measured[-1][0] < info["plan"]["total_steps"]
    before = (run / "metrics.jsonl").read_bytes()
    assert finetune("experiments.finetune:full", base, chats, run, *settings) == 0
    assert (run / "metrics.jsonl").read_bytes() == before, "it is finished"


def test_preferences_are_learned(base, pairs, tmp_path):
    run = tmp_path / "dpo"
    settings = ("epochs=6", "lr_peak=1e-3", "evaluations=2", "examples.template=v0_1", "examples.empty_system=false")
    settings += ("questions=[]", "examples.longest_prompt_tokens=16")
    assert finetune("experiments.chat:chat_v1_0_dpo", base, pairs, run, *settings) == 0
    records, validations = lines(run, "metrics"), lines(run, "validation")
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-3), "policy and reference are the same"
    assert abs(records[0]["margin"]) < 1e-3 and records[-1]["margin"] > 0.05
    first, last = (next(iter(v["domains"].values())) for v in (validations[0], validations[-1]))
    assert last["accuracy"] > 0.7 > first["accuracy"] and last["loss"] < first["loss"]
    assert main(["report", str(run)]) == 0
    assert (run / "plots" / "preference.png").exists()


def test_text_with_replay(base, tmp_path):
    store, run = base.parent / "store", tmp_path / "more"
    module = tmp_path / "more_text.py"
    module.write_text(
        "from tinyllama_jax.finetune.recipe import FineTune, Text\n"
        "def more():\n"
        f"    text = Text(mixture={{'code': 1.0}}, tokens=6 * 8 * 32, replay_store={str(store)!r}, replay_share=0.25)\n"
        "    return FineTune(name='more', text=text, evaluations=2)\n"
    )
    words = ["--experiment-path", str(tmp_path), "--base", str(base), "--data", str(store), "--workdir", str(run)]
    settings = [w for s in ("sequence_tokens=32", *SMALL[1:]) for w in ("--set", s)]
    assert main(["finetune", "more_text:more", *words, *settings]) == 0
    records = lines(run, "metrics")
    assert len(records) == 6 and records[0]["loss"] < 6, "the base's weights, not fresh ones"
    shares = records[-1]["mixture"]
    assert shares["code"] == 0.75 and sum(v for k, v in shares.items() if k.startswith("replay/")) == 0.25
    assert {"code", "replay/prose"} <= lines(run, "validation")[-1]["domains"].keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        (("sequence_tokens=128",), "sequence_tokens=128 exceeds the base's context of 64"),
        (('adapter.targets=["attention.qery"]',), "matches no matrix (did you mean 'attention.query'?)"),
        (("warmup_steps=1000", "warmup_share=0"), "warming up takes 1000 steps and the whole run"),
    ],
)
def test_wrong_recipes_end_in_one_line(base, chats, tmp_path, capsys, changes, message):
    assert finetune("experiments.finetune:lora", base, chats, tmp_path / "run", *LORA, *changes) == 78
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tinyllama finetune: ") and message in error


def test_a_foreign_base_learns_from_documentation(base, tmp_path):
    """Of a Hugging Face directory, TINYLLAMA_HF_BASE=DIR if there is one, else the base as it is exported."""
    folder = os.environ.get("TINYLLAMA_HF_BASE")
    if not folder:
        folder = str(tmp_path / "hf")
        assert main(["export", "hf", str(base), "--out", folder]) == 0
    assert main(["import", "hf", folder, "--out", str(tmp_path / "imported")]) == 0
    run, settings = tmp_path / "run", ("adapter.rank=4", "epochs=0.5", "lr_peak=3e-3", "evaluations=2", "questions=[]")
    settings += ("examples.template=none", "examples.loss_on=assistant")
    assert finetune("experiments.finetune:lora", tmp_path / "imported", "docstrings:optax", run, *settings) == 0
    losses = [loss for _, loss in best.losses(run)]
    assert losses[-1] < losses[0] - 0.1, "on questions and answers that were held out"
