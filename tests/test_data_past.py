"""The data of a run that continues: its past stays as it was, its future may be changed."""

import json
import shutil

import pytest
from quick_experiment import quick_command

from tinyllama_jax import configio
from tinyllama_jax.cli import main
from tinyllama_jax.config import Run
from tinyllama_jax.data import order
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.views import make_view
from tinyllama_jax.schedules import Plan
from tinyllama_jax.train import checkpoint


@pytest.fixture
def half(finished, tmp_path):
    """A run stopped at the first stage border, at step 4 of 16."""
    workdir = tmp_path / "half"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 4:
            shutil.rmtree(path)
    assert checkpoint.read_meta(checkpoint.resolve(str(workdir)))["step"] == 4
    return workdir


def losses(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.skip_ranges=[[1,3]]", "skip_ranges"),
        ("data.shuffle_block_windows=4", "shuffle_block_windows"),
        ("data.epochs=replay", "epochs"),
        ('curriculum.basic.mixture={"prose":0.5,"code":0.5}', "mixture"),
        ("seed=5", "seed"),
    ],
)
def test_another_past_is_refused(capsys, half, small_store, setting, words):
    before = (half / "metrics.jsonl").read_bytes()
    assert main(quick_command(small_store, half, setting)) == 78
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinyllama")]
    assert len(said) == 1 and words in said[0] and "--allow-config-change" in said[0]
    assert (half / "metrics.jsonl").read_bytes() == before


def test_another_order_of_the_same_configuration_is_refused(capsys, half, small_store, monkeypatch):
    """As when the program that continues shuffles otherwise than the one that began."""
    permute = order.permute
    monkeypatch.setattr(order, "permute", lambda index, size, keys: permute((index + 1) % size, size, keys))
    assert main(quick_command(small_store, half)) == 78
    assert "order of the data" in capsys.readouterr().err


def test_another_future_is_accepted(half, small_store, finished):
    whole = losses(finished)
    settings = ("data.skip_ranges=[[9,11]]", 'curriculum.cooldown.mixture={"prose":0.9,"code":0.1}')
    assert main(quick_command(small_store, half, *settings)) == 0
    now = losses(half)
    assert now[:8] == whole[:8] and not set(now[8:]) & set(whole[8:]) and len(now) == len(whole)


def test_skipped_batches_move_what_follows_and_nothing_else(half, small_store, finished):
    assert main(quick_command(small_store, half, "data.skip_ranges=[[9,11]]")) == 0
    now, whole = losses(half), losses(finished)
    assert now[:9] == whole[:9] and now[9] != whole[9]


def test_resuming_between_epochs_of_a_view_is_exact(small_store, tmp_path):
    """A view of 40 windows is passed several times in 128; the run is taken up again in the middle of a pass."""
    view = make_view(TokenStore.open(small_store), {"prose": 24 * 33, "code": 16 * 33}, tmp_path / "view", seed=1)
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(quick_command(view, whole)) == 0
    run = configio.from_dict(Run, json.loads((whole / "run.json").read_text())["config"])
    pipeline = Pipeline(TokenStore.open(view), run.data, Plan(run.curriculum, 32), run.seed, vocab_size=512)
    assert 1 < pipeline.order.epoch(4)["prose"] < 2 < pipeline.order.epoch(16)["prose"]
    shutil.copytree(whole, again)
    for path in (again / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 4:
            shutil.rmtree(path)
    assert main(quick_command(view, again)) == 0
    assert losses(again) == losses(whole) and len(losses(whole)) == 16
