"""What a user can get wrong: one clear line that names it, the right exit status, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick_experiment import quick_command as quick

from tinyllama_jax.cli import main


def files_of(path: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"}


def fails(capsys, argv, status, *words):
    """Runs `argv`; it must end with `status`, or one of them, and one line that holds all `words`."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) in (status if isinstance(status, tuple) else (status,))
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("tinyllama")]
    assert len(said) == 1, captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    for word in words:
        assert str(word) in said[0], said[0]


COMMANDS = {
    "unknown verb": (["trian"], 2, "trian", "did you mean 'train'"),
    "no verb": ([], 2, "VERB"),
    "unknown option": (["train", "experiments.smoke:tiny", "--workdir", "x", "--wrkdir", "y"], 2, "--wrkdir"),
    "missing option": (["train", "experiments.smoke:tiny"], 2, "--workdir"),
    "unknown experiment module": (["train", "experiments.smok:tiny", "--workdir", "x"], 2, "experiments.smok"),
    "unknown experiment function": (["train", "experiments.smoke:tine", "--workdir", "x"], 2, "did you mean 'tiny'"),
    "unknown key": (
        ["train", "experiments.smoke:tiny", "--workdir", "x", "--set", "lr.peek=1"],
        2,
        "did you mean 'peak'",
    ),
    "wrong type": (["train", "experiments.smoke:tiny", "--workdir", "x", "--set", "seed=often"], 2, "takes int"),
    "contradiction": (
        ["train", "experiments.smoke:tiny", "--workdir", "x", "--set", "model.kv_heads=3"],
        78,
        "does not divide",
    ),
    "batch that is no whole number of sequences": (
        ["train", "experiments.smoke:tiny", "--workdir", "x", "--set", "curriculum.basic.batch_tokens=1000"],
        78,
        "batch_tokens=1000",
    ),
    "store that nobody can make": (["train", "experiments.tinyllama:v1_1", "--workdir", "x"], 78, "tinyllama prepare"),
    "unknown preset": (["inspect", "tinyllama-1b"], 78, "did you mean 'tinyllama-1.1b'"),
    "no such run": (["generate", "runs/nowhere", "--prompt", "x"], 78, "runs/nowhere"),
    "no such run to report": (["report", "runs/nowhere"], 78, "runs/nowhere"),
    "no such corpus": (["prepare", "nowhere.jsonl", "--out", "store"], 78, "nowhere.jsonl"),
    "import of nothing": (["import", "hf", "nowhere", "--out", "ckpt"], 78, "nowhere"),
    "unknown format": (["import", "ggml", "x", "--out", "y"], 2, "ggml"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command(case, capsys, tmp_path, monkeypatch):
    argv, status, *words = COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, status, *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"], "nothing half-written"


def test_corpora_that_cannot_be_prepared(capsys, tmp_path):
    prepare = ["prepare", "--out", tmp_path / "store", "--vocab-size", "300"]
    (tmp_path / "empty").mkdir()
    fails(capsys, [*prepare, tmp_path / "empty"], 78, tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("")
    fails(capsys, [*prepare, tmp_path / "blank.txt"], 78, "blank")
    (tmp_path / "one.txt").write_text("a single document, however long it may be\n" * 200)
    fails(capsys, [*prepare, tmp_path / "one.txt"], 78, "one")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    fails(capsys, [*prepare, tmp_path / "latin1.txt"], 78, "latin1.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    fails(capsys, [*prepare, tmp_path / "bad.jsonl"], 78, "bad.jsonl", "2")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "two.jsonl").write_text('{"text": "first text"}\n{"text": "second text"}\n')
    fails(
        capsys, [*prepare, tmp_path / "two.jsonl", "--tokenizer", tmp_path / "tokenizer.model"], 78, "tokenizer.model"
    )
    fails(capsys, [*prepare, tmp_path / "two.jsonl", "--vocab-size", "9000"], 78, "vocab")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.vocab_size=100", ("vocabulary of 512", "100")),
        ('curriculum.basic.mixture={"pros":1}', ("'pros'", "prose")),
        ("data.document_marks=bos", ("'eos'", "bos")),
        ("mesh.data=3", ("mesh.data=3", "8 device")),
        ("execution.micro_batch_sequences=4", ("micro-batch of 4", "8 devices")),
        ("execution.attention=flash9", ("flash9",)),
        (f'evaluation.prompts=["{"word " * 60}"]', ("evaluation.prompts", "context of 64")),
    ],
)
def test_a_run_that_cannot_start(capsys, small_store, tmp_path, setting, words):
    status = 2 if "attention" in setting else 78
    fails(capsys, quick(small_store, tmp_path / "run", setting), status, *words)
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_sequence_longer_than_the_text(capsys, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} short text about very little, but some of it. " * 6)
    (tmp_path / "texts").mkdir()
    for name in ("a", "b", "c"):
        shutil.move(tmp_path / f"{name}.txt", tmp_path / "texts" / f"{name}.txt")
    store = tmp_path / "store"
    words = ["--vocab-size", "290", "--window-tokens", "33"]
    assert main(["prepare", f"prose={tmp_path / 'texts'}", "--out", str(store), *words]) == 0
    short = ["model.context_tokens=4096", "data.sequence_tokens=4096", "curriculum.basic.batch_tokens=32768"]
    both = ['curriculum.continual={"name":"continual","tokens":32768,"batch_tokens":32768,"mixture":{"prose":1}}']
    both += ['curriculum.cooldown={"name":"cooldown","tokens":32768,"batch_tokens":32768,"mixture":{"prose":1}}']
    fails(capsys, quick(store, tmp_path / "run", *short, *both), 78, "prose", "window of 4097")


def test_a_damaged_store(capsys, small_store, tmp_path):
    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(small_store, copy)
        change(copy)
        return copy

    def shard(store):
        return next(p for p in sorted(store.rglob("*.bin")) if "train" in str(p) and "prose" in str(p))

    def truncate(store):
        os.truncate(shard(store), shard(store).stat().st_size - 2)

    def flip(store):
        data = bytearray(shard(store).read_bytes())
        for place in range(0, len(data), 64):  # in every window, whichever the run reads
            data[place] ^= 1
        shard(store).write_bytes(bytes(data))

    def other_tokenizer(store):
        path = next(store.rglob("tokenizer.model"))
        path.write_bytes(path.read_bytes() + b"\0")

    for change, words in [
        (truncate, (".bin",)),
        (lambda s: shard(s).unlink(), (".bin",)),
        (flip, (".bin",)),
        (lambda s: (s / "manifest.json").write_text("{"), ("manifest.json",)),
        (lambda s: (s / "manifest.json").unlink(), ("manifest.json",)),
        (other_tokenizer, ("tokenizer",)),
    ]:
        fails(capsys, quick(damaged(change), tmp_path / "run"), 78, *words)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_an_existing_store_of_another_recipe_is_not_overwritten(capsys, small_store):
    before = files_of(small_store)
    fails(capsys, ["prepare", "python", "--out", small_store, "--vocab-size", "512"], 78, small_store, "--out")
    assert files_of(small_store) == before


def test_resuming_under_another_configuration_is_refused(capsys, finished, small_store):
    before = files_of(finished)
    fails(capsys, quick(small_store, finished, "lr.peak=0.5"), 78, "lr.peak: 0.01 -> 0.5", "--allow-config-change")
    fails(capsys, quick(small_store, finished, "model.d_ff=65"), 78, "model.d_ff")
    assert files_of(finished) == before
    assert main([str(a) for a in quick(small_store, finished, "execution.remat=full")]) == 0, "not part of the identity"


def test_a_store_with_other_text_is_not_taken_for_the_same(capsys, finished, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number} about something else entirely\n" * 30)
    texts = tmp_path / "texts"
    argv = ["prepare", f"prose={texts}", f"code={texts}", "--out", tmp_path / "store", "--vocab-size", "300"]
    assert main([str(a) for a in argv]) == 0
    os.rename(tmp_path / "store", tmp_path / "other")
    (tmp_path / "x").mkdir()
    os.rename(tmp_path / "other", tmp_path / "x" / "store")
    fails(capsys, quick(tmp_path / "x" / "store", finished), 78, "trained with another configuration")


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(capsys, finished, small_store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    newest, before = sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())[-1:-3:-1]
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip_a_bit(largest)
    with open(workdir / "run.json") as file:
        total = json.load(file)["plan"]["total_steps"]
    capsys.readouterr()
    assert main([str(a) for a in quick(small_store, workdir)]) == 0  # that of a run which had ended
    said = capsys.readouterr().err
    assert f"{newest.name}.corrupt" in said and f"resumed at step {int(before.name)}" in said
    assert [p.name for p in newest.parent.glob("*.corrupt*")]
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, total + 1))
    assert [m["loss"] for m in metrics] == [m["loss"] for m in whole]


def test_a_run_that_was_killed_after_its_last_save_gets_its_last_line(capsys, finished, small_store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    events = workdir / "events.jsonl"
    *before, last = events.read_text().splitlines(keepends=True)
    assert json.loads(last)["kind"] == "finished"
    events.write_text("".join(before) + last[:9])
    for _ in range(2):
        assert main([str(a) for a in quick(small_store, workdir)]) == 0
        assert "nothing left to do" in capsys.readouterr().err
        *same, end = events.read_text().splitlines(keepends=True)
        assert same == before and json.loads(end) | {"time": 0} == json.loads(last) | {"time": 0}


def test_when_every_checkpoint_is_damaged_nothing_starts_over(capsys, finished, small_store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints").iterdir():
        flip_a_bit(max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert main([str(a) for a in quick(small_store, workdir)]) == 78
    assert "every checkpoint is damaged" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_questions_that_a_checkpoint_cannot_answer(capsys, finished, tmp_path):
    np.save(tmp_path / "floats.npy", np.zeros((2, 4)))
    np.save(tmp_path / "ids.npy", np.full((2, 4), 9999, np.int32))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY nonsense")
    fails(capsys, ["score", finished, "--tokens", tmp_path / "floats.npy"], 78, "integers")
    fails(capsys, ["score", finished, "--tokens", tmp_path / "ids.npy"], 78, "9999", "vocabulary of 512")
    fails(capsys, ["score", finished, "--tokens", tmp_path / "broken.npy"], 78, "broken.npy")
    fails(capsys, ["score", finished, "--tokens", tmp_path / "nowhere.npy"], 78, "nowhere.npy")
    fails(capsys, ["generate", finished, "--prompt", "a", "--max-new-tokens", "1000"], 78, "context of 64")
    fails(capsys, ["generate", f"{finished}@999", "--prompt", "a"], 78, "999")
    fails(capsys, ["eval", finished, "--sequence-tokens", "128"], 78, "context of 64")
    fails(capsys, ["eval", finished, "--corpus", tmp_path / "nowhere.txt"], 78, "nowhere.txt")
    fails(capsys, ["import", "hf", tmp_path, "--out", tmp_path / "ckpt"], 78, "config.json")


def test_a_fork_of_what_is_not_there(capsys, finished, small_store, tmp_path):
    forked = [f"fork.run={finished}", "fork.tokens=64"]
    fails(capsys, quick(small_store, tmp_path / "a", *forked), 78, "no checkpoint at fork.tokens=64")
    missing = [f"fork.run={tmp_path / 'none'}", "fork.tokens=64"]
    fails(capsys, quick(small_store, tmp_path / "b", *missing), 78, "no run with checkpoints")
    tokens = json.loads((finished / "run.json").read_text())["plan"]["stages"][0]["end_tokens"]
    end = json.loads((finished / "run.json").read_text())["plan"]["total_tokens"]
    whole = [f"fork.run={finished}", f"fork.tokens={end}"]
    fails(capsys, quick(small_store, tmp_path / "d", *whole), 78, "nothing is left to train")
    other = [f"fork.run={finished}", f"fork.tokens={tokens}", "model.d_ff=128"]
    fails(capsys, quick(small_store, tmp_path / "c", *other), 78, "model.d_ff")


def test_places_that_cannot_be_written(capsys, small_store, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(capsys, quick(small_store, tmp_path / "file" / "run"), 78, "file")
    fails(capsys, quick(small_store, tmp_path / "file"), 78, "file")
    fails(capsys, quick(small_store, "/proc/run"), 78, "/proc/run")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def tiny_disk(mount):
    return mount("size=1800k")


def test_a_disk_with_too_little_room_is_refused_before_training(capsys, small_store, tiny_disk):
    fails(capsys, quick(small_store, tiny_disk / "run", "model.d_ff=2048"), 78, "MiB free", "two checkpoints need")
    assert not (tiny_disk / "run" / "metrics.jsonl").exists()


def test_a_run_that_diverges_stops_and_says_where(capsys, small_store, tmp_path):
    wild = ["lr.peak=1e30", "lr.end=0", "lr.warmup_tokens=0", "optimizer.max_skips=3"]
    capsys.readouterr()
    assert main(quick(small_store, tmp_path / "run", *wild)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinyllama")]
    assert len(said) == 1 and "diverged: the last 3 steps" in said[0] and "lr.peak" in said[0]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records[-3:]] == [1, 1, 1] and records[-1]["grad_norm"] is None


def test_a_full_disk(capsys, finished, small_store, tiny_disk, tmp_path):
    """The run stops with one line; what was complete stays so, and with room again it ends as it would have."""
    workdir = tiny_disk / "run"
    # 1 if a save or a record met the full disk, which a launcher tries again; 78 if a file of the start did.
    fails(capsys, quick(small_store, workdir), (1, 78), "o space left")
    fails(capsys, ["prepare", "python", "--out", tiny_disk / "store"], 78, "o space left")
    assert not (tiny_disk / "store" / "manifest.json").exists()
    assert not [p for p in tiny_disk.rglob("*") if ".tmp-" in p.name]
    roomy = tmp_path / "run"
    shutil.copytree(workdir, roomy)
    assert main([str(a) for a in quick(small_store, roomy)]) == 0
    whole = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [json.loads(line)["loss"] for line in (roomy / "metrics.jsonl").read_text().splitlines()] == whole


def test_two_processes_do_not_share_a_run_directory(capsys, finished, small_store):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom tinyllama_jax.train import health\n"
            "with health.claim(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()",
            str(finished),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        fails(capsys, quick(small_store, finished), 78, f"process {holder.pid}")
    finally:
        holder.communicate("")
