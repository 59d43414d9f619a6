"""The table of runs: each column against what lies in the run's files, and what becomes of runs that went wrong."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from lab_runs import made, names
from quick_experiment import quick
from synthetic_run import lines, write_run

from tinyllama_jax import configio, flops
from tinyllama_jax.config import Fork, LearningRate, replace
from tinyllama_jax.errors import DataError
from tinyllama_jax.lab import table


def test_a_real_run_is_what_its_files_say(finished, small_store):
    row = table.row(finished)
    records, validations, events = (
        [json.loads(line) for line in (finished / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "validation", "events")
    )
    newest = max((finished / "checkpoints").iterdir(), key=lambda p: p.name if p.name.isdigit() else "")
    meta = json.loads((newest / "meta.json").read_text())
    info = json.loads((finished / "run.json").read_text())

    # width 32, two layers, four heads and two key-value heads of eight, three matrices of 32 x 64; no weight is tied
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert row["non_embedding"] == 2 * (block + 2 * 32) + 32
    assert row["matmul"] == 2 * block + 512 * 32
    assert row["parameters"] == row["non_embedding"] + 2 * 512 * 32
    tokens = records[-1]["tokens"]
    assert row["tokens"] == row["planned_tokens"] == row["own_tokens"] == tokens == meta["tokens"]
    assert row["flops_6nd"] == 6 * row["parameters"] * tokens
    assert row["flops_palm"] == (6 * row["matmul"] + 12 * 2 * 32 * 32) * tokens
    assert row["flops"] == (6 * row["matmul"] + 6 * 2 * 32 * 32) * tokens
    assert row["flops_palm"] == records[-1]["flops"]

    trained = json.loads((small_store / "manifest.json").read_text())["splits"]["train"]
    unique = trained["prose"]["tokens"] + trained["code"]["tokens"]
    assert row["unique_tokens"] == unique and row["epochs"] == max(1, tokens / unique)
    assert row["tokens_per_parameter"] == tokens / row["parameters"]
    assert row["steps"] == len(records) == records[-1]["step"] and row["status"] == "finished"
    assert (row["batch_tokens"], row["sequence_tokens"], row["lr"], row["seed"]) == (256, 32, 1e-2, 3407)
    assert row["weight_decay"] == 0.1 and row["name"] == row["group"] == "quick"

    last = validations[-1]["domains"]
    assert row["loss"] == pytest.approx((last["prose"]["loss"] + last["code"]["loss"]) / 2, rel=1e-12)
    assert row["loss_se"] == pytest.approx(math.hypot(last["prose"]["loss_se"], last["code"]["loss_se"]) / 2, rel=1e-12)
    means = {v["tokens"]: statistics.mean(d["loss"] for d in v["domains"].values()) for v in validations}
    assert row["best_loss"] == pytest.approx(min(means.values())) and row["best_loss"] <= row["loss"]
    assert row["best_loss_tokens"] == min(means, key=means.get)
    for domain, found in last.items():
        for name in ("loss", "loss_se", "bits_per_byte"):
            assert row[f"{name}.{domain}"] == found[name]
    assert not [name for name in row if name.startswith(("seen_loss.", "gap."))], "none was measured"
    share = round(0.05 * len(records))
    assert share == 1 and row["train_loss"] == records[-1]["loss"]

    speeds = [r["timing"]["tokens_per_s"] for r in records if not r["timing"].get("compiled")]
    assert 0 < len(speeds) < len(records) and row["tokens_per_s"] == pytest.approx(statistics.median(speeds))
    begun = next(e for e in events if e["kind"] == "start")
    ended = datetime.fromisoformat(events[-1]["time"]).timestamp()
    lived = ended - datetime.fromisoformat(begun["time"]).timestamp() + begun["seconds"]
    assert row["seconds"] == pytest.approx(lived, abs=0.1)
    steps = sum(r["timing"]["step_s"] for r in records)
    assert 0 < row["goodput"] < steps / row["seconds"] < 1, "what compiles does not train"

    assert row["store"] == meta["store"]["manifest_sha256"] and row["tokenizer"] == meta["store"]["tokenizer_sha256"]
    assert (
        row["order"] == meta["order"]
        and row["fingerprint"] == meta["fingerprint"]
        and row["git"] == (info["git"] or None)
    )
    assert row["experiment"] == "quick_experiment:quick" and row["jax"] == info["versions"]["jax"]
    assert row["devices"] == 8 and row["device_kind"] == info["devices"]["kind"]
    assert (
        row["config.model.kv_heads"] == 2 and row["config.model.rope.kind"] == info["config"]["model"]["rope"]["kind"]
    )
    assert row["config.curriculum.1.mixture.code"] == 0.5 and row["config.evaluation.prompts.0"] == "The"
    assert list(row)[: len(table.BEFORE_DOMAINS)] == list(table.BEFORE_DOMAINS) and set(table.FIXED) < set(row)
    json.dumps(row, allow_nan=False)


def test_no_jax_is_imported():
    code = "import sys, tinyllama_jax.lab.table, tinyllama_jax.lab.fit.points; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tinyllama_jax.lab.row" in loaded and not {"jax", "flax", "pandas", "matplotlib"} & set(loaded)


def test_a_run_that_stopped_midway_is_not_finished(tmp_path):
    row = table.row(made(tmp_path / "r", taken=17))  # of 24; validated at 8 and 16
    assert row["status"] == "unfinished" and row["steps"] == 17 and row["loss"] == row["best_loss"] == 4.0
    assert row["tokens"] == row["best_loss_tokens"] + 256 < row["planned_tokens"] and row["tokens"] == 8 * 128 * 2 + 256
    assert table.row(made(tmp_path / "r"))["status"] == "finished"
    kept = (tmp_path / "r" / "validation.jsonl").read_text().splitlines()
    (tmp_path / "r" / "validation.jsonl").write_text("\n".join(kept[:2]))
    row = table.row(tmp_path / "r")
    assert (row["status"], row["loss"]) == ("unfinished", 4.0), "killed while it was measured for the last time"
    (tmp_path / "r" / "validation.jsonl").unlink()
    (tmp_path / "r" / "metrics.jsonl").unlink()
    row = table.row(tmp_path / "r")
    assert row["status"] == "unfinished" and row["tokens"] == row["steps"] == 0
    assert row["loss"] is row["train_loss"] is row["tokens_per_s"] is row["seconds"] is row["epochs"] is None


def test_the_lowest_validation_and_losses_that_are_not_finite(tmp_path):
    row = table.row(made(tmp_path / "up", losses=(5.0, 3.0, 3.5)))
    assert (row["loss"], row["best_loss"], row["best_loss_tokens"]) == (3.5, 3.0, 8 * 128 * 2)
    assert row["loss_se"] == row["best_loss_se"] == pytest.approx(math.sqrt(2) * 0.01 / 2)
    assert (row["loss.prose"], row["loss.code"], row["bits_per_byte.code"]) == (4.0, 3.0, 1.75)
    row = table.row(made(tmp_path / "nan", losses=(5.0, 4.0, math.nan)))
    assert row["loss"] is None and row["loss.prose"] is None and row["best_loss"] == 4.0
    row = table.row(made(tmp_path / "null", losses=(5.0, 4.0, 3.0), se=None))
    assert row["loss"] == 3.0 and row["loss_se"] is row["best_loss_se"] is None
    row = table.row(made(tmp_path / "never", losses=(math.nan, math.nan, math.inf)))
    assert row["loss"] is row["best_loss"] is row["best_loss_tokens"] is None and row["status"] == "finished"


def test_seen_text_peak_memory_measures_and_skipped_steps(tmp_path):
    run = made(tmp_path / "r")
    record = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    record["seen"] = {"prose": {"loss": 3.1, "loss_se": 0.1, "tokens": 9}}
    record["timing"] = {"seconds": 1.0, "peak_memory_bytes": 12345}
    lines(run / "validation.jsonl", [record])
    (run / "measures.json").write_text('{"decode": {"b1": {"c128": {"tokens_per_s": 17.5}}}, "list": [1, NaN]}')
    records = [{"step": s, "tokens": s, "loss": float(s), "timing": {}} for s in range(1, 41)]
    records[-1]["loss"] = None
    lines(run / "metrics.jsonl", records)
    row = table.row(run)
    assert row["seen_loss.prose"] == 3.1 and row["gap.prose"] == pytest.approx(3.5 - 3.1)
    assert "gap.code" not in row and "seen_loss.code" not in row
    assert row["peak_memory_bytes"] == 12345
    assert row["measure.decode.b1.c128.tokens_per_s"] == 17.5
    assert row["measure.list.0"] == 1 and row["measure.list.1"] is None
    assert row["train_loss"] == 39.0, "of the last two steps one was skipped"


def test_a_fork_saw_what_its_parent_saw(tmp_path):
    begin = 8 * 128
    row = table.row(made(tmp_path / "r", fork=Fork(run="@trunk", tokens=begin)))
    whole = table.row(made(tmp_path / "whole"))
    assert row["tokens"] == whole["tokens"] and row["own_tokens"] == whole["tokens"] - begin and row["group"] == "trunk"
    assert row["flops"] == whole["flops"] and row["flops_6nd"] == whole["flops_6nd"]
    waiting = table.row(made(tmp_path / "waits", taken=8, fork=Fork(run="@trunk", tokens=begin)))
    assert waiting["tokens"] == begin and waiting["own_tokens"] == 0 and waiting["status"] == "unfinished"


def test_a_piecewise_rate_has_its_highest_point(tmp_path):
    lr = LearningRate(kind="piecewise", peak=9.0, end=0.0, points=((0, 1e-3), (100, 2e-3), (900, 0.0)))
    assert table.row(made(tmp_path / "r", lr=lr))["lr"] == 2e-3


def store_of(folder: Path, **tokens) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(
        json.dumps({"splits": {"train": {k: {"tokens": n} for k, n in tokens.items()}}})
    )
    return folder


def test_unique_tokens_are_of_the_sources_that_are_used(tmp_path):
    from hashlib import sha256

    store = store_of(tmp_path / "store", prose=1000, code=500, other=10**6)
    info = {"path": str(store), "manifest_sha256": sha256((store / "manifest.json").read_bytes()).hexdigest()}
    first, *rest = quick().curriculum
    without = (replace(first, mixture={"prose": 1.0, "other": 0.0}), *rest)
    row = table.row(made(tmp_path / "a", info={"store": info}, curriculum=without))
    assert row["unique_tokens"] == 1500 and row["epochs"] == row["tokens"] / 1500 > 2
    wide = store_of(tmp_path / "wide", prose=10**6, code=0)
    row = table.row(made(tmp_path / "b", info={"store": {"path": str(wide)}}))
    assert row["unique_tokens"] == 10**6 and row["epochs"] == 1
    row = table.row(made(tmp_path / "c", info={"store": info | {"manifest_sha256": "0" * 64}}))
    assert row["unique_tokens"] is row["epochs"] is None, "another store lies there now"
    row = table.row(made(tmp_path / "d", info={"store": info | {"path": str(tmp_path / "gone")}}))
    assert row["unique_tokens"] is None
    row = table.row(
        made(tmp_path / "e", info={"store": info | {"train_tokens": {"prose": 300, "code": 20, "other": 7}}})
    )
    assert row["unique_tokens"] == 320, "as recorded by a run on a part of it"
    config = configio.to_dict(quick())
    config["data"]["unique_tokens"] = 640
    assert table.row(made(tmp_path / "f", info={"store": info, "config": config}))["unique_tokens"] == 640


def test_what_another_version_wrote_is_taken_as_recorded(tmp_path):
    run = write_run(tmp_path / "r", steps=40, validation_every=10)  # its config is no Run
    row = table.row(run)
    assert row["parameters"] == 4_732_160 and row["matmul"] is None and row["status"] == "finished"
    assert row["flops_palm"] == 31_000_000 * row["tokens"] and row["flops"] == 28_500_000 * row["tokens"]
    assert row["loss"] is not None and row["loss_se"] is None and row["devices"] == 8


def sweep(folder: Path, count: int = 12, failed=(), started=None) -> Path:
    runs = [replace(quick(), name=f"s{i}", seed=i) for i in range(count)]
    for i, run in enumerate(runs[:started]):
        if i not in failed:
            made(folder / str(i), run)
    listed = [{"name": run.name, "fingerprint": configio.fingerprint(run), "directory": str(i)}
              for i, run in enumerate(runs)]  # fmt: skip
    folder.mkdir(exist_ok=True)
    why = {str(i): "status 78: out of memory" for i in failed}
    (folder / "sweep.json").write_text(json.dumps({"experiment": "x:y", "runs": listed, "failed": why}))
    (folder / "logs").mkdir()
    return folder


def test_a_sweep_is_read_in_its_order_with_what_failed(tmp_path, capsys):
    folder = sweep(tmp_path / "sweep", failed=(3, 4), started=11)
    made(folder / "4", quick(), name="s4", seed=4, taken=9)
    found = table.rows([folder])
    assert names(found) == ["s0", "s1", "s2", *(f"s{i}" for i in range(4, 11)), "s3"], "s11 has not begun"
    status = {row["name"]: row["status"] for row in found}
    assert status["s3"] == status["s4"] == "failed" and status["s10"] == "finished"
    alone = found[-1]
    assert alone["loss"] is None and alone["fingerprint"] and alone["directory"] == str(folder / "3")
    assert table.columns([alone]) == list(table.FIXED)
    made(folder / "4", quick(), name="s4", seed=4)
    assert table.row(folder / "4")["status"] == "finished", "it was mended since"
    made(tmp_path / "single", name="alone", seed=99)
    made(tmp_path / "deep" / "one", name="deep", seed=98)
    assert {"alone", "deep", "s0", "s10"} <= set(names(table.rows([tmp_path])))
    assert capsys.readouterr().err == ""


def test_from_inside_of_the_run(tmp_path, monkeypatch):
    folder = sweep(tmp_path / "sweep", 2)
    made(folder / "1", name="s1", seed=1, taken=5)
    (folder / "sweep.json").write_text('{"failed": {"1": "lost"}}')
    monkeypatch.chdir(folder / "1")
    assert table.row(".")["status"] == "failed"


def test_damaged_directories_are_named_once_and_left_out(tmp_path, capsys):
    folder = sweep(tmp_path / "sweep", 8)
    (folder / "1" / "run.json").write_text("{")
    (folder / "2" / "run.json").write_text('{"plan": {"total_steps": "many"}}')
    (folder / "3" / "run.json").unlink()
    (folder / "4" / "run.json").write_text("[]")
    assert names(table.rows([folder])) == ["s0", "s5", "s6", "s7"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "4 damaged" in said and "and 1 more" in said and str(folder / "1") in said
    for i, match in ((1, "not valid JSON"), (2, "not as `train` writes"), (3, "no run.json"), (4, "no JSON object")):
        with pytest.raises(DataError, match=match):
            table.row(folder / str(i))
    with pytest.raises(DataError, match="not valid JSON"):
        table.rows([folder / "1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run there"):
        table.rows([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such run, sweep or table"):
        table.rows([tmp_path / "none"])


JUNK = {"null": None, "below": -1, "text": "x", "list": [[1, 2]], "group": {"a": 1}, "huge": 10**400, "half": "\ud800"}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_whatever_stands_in_run_json_ends_in_a_row_or_in_a_line(tmp_path, junk):
    path = made(tmp_path / "r") / "run.json"
    whole, refused = path.read_text(), 0
    parts = json.loads(whole)
    for at in [(k,) for k in parts] + [(k, i) for k, v in parts.items() if isinstance(v, dict) for i in v]:
        changed = json.loads(whole)
        (changed if len(at) == 1 else changed[at[0]])[at[-1]] = junk
        path.write_text(json.dumps(changed))
        try:
            found = table.rows([tmp_path])
        except DataError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        table.write(found, tmp_path / "t.jsonl")
        table.write(found, tmp_path / "t.csv")
        assert table.read(tmp_path / "t.jsonl")[0]["steps"] == 24 and table.read(tmp_path / "t.csv")
    assert refused > 0 or junk is None


def test_a_run_counts_once(tmp_path, capsys):
    first = made(tmp_path / "first", taken=17)
    assert len(table.rows([first, first, tmp_path])) == 1 and capsys.readouterr().err == ""
    made(tmp_path / "second")
    os.utime(tmp_path / "second" / "metrics.jsonl", (1e9, 1e9))
    (kept,) = table.rows([first, tmp_path / "second"])
    assert kept["directory"] == str(tmp_path / "second"), "finished, although it is older"
    assert "there twice" in capsys.readouterr().err
    made(tmp_path / "third")
    (kept,) = table.rows([tmp_path / "third", tmp_path / "second"])
    assert kept["directory"] == str(tmp_path / "third"), "newer"
    made(tmp_path / "other", seed=1)
    assert len(table.rows([tmp_path])) == 2
    table.write(table.rows([first]), tmp_path / "old.jsonl")
    made(first)
    for paths in ([tmp_path / "old.jsonl", first], [first, tmp_path / "old.jsonl"]):
        (kept,) = table.rows(paths)
        assert kept["status"] == "finished", "the directory knows better than a table of it"


def test_rows_of_one_trunk_share_a_group(tmp_path):
    folder = tmp_path / "sweep"
    trunk = replace(quick(), name="trunk", lr=LearningRate(kind="constant", peak=1e-2, end=1e-2))
    made(folder / "0", trunk)
    made(folder / "1", name="a", fork=Fork(run="@trunk", tokens=1024))
    made(folder / "2", name="b", fork=Fork(run="@a", tokens=2048))
    made(folder / "3", name="c", fork=Fork(run=str(folder / "0"), tokens=1024))
    made(folder / "4", name="lone")
    groups = {row["name"]: row["group"] for row in table.rows([folder])}
    assert groups == {"trunk": "trunk", "a": "trunk", "b": "trunk", "c": "trunk", "lone": "lone"}
    # The same sweep with another seed has trunks of the same names that share nothing with these.
    made(tmp_path / "again" / "0", trunk, seed=5)
    made(tmp_path / "again" / "1", name="a", seed=5, fork=Fork(run="@trunk", tokens=1024))
    found = table.rows([folder, tmp_path / "again"])
    first, second = ({row["group"] for row in found if Path(row["directory"]).parent.name == at and
                      row["name"] in ("trunk", "a", "b", "c")} for at in ("sweep", "again"))  # fmt: skip
    assert len(first) == len(second) == 1 and first != second and all(g.startswith("trunk (") for g in first | second)
    table.write(found, tmp_path / "all.jsonl")
    assert [r["group"] for r in table.rows([tmp_path / "all.jsonl"])] == [r["group"] for r in found]


def test_reading_runs_takes_little_more_than_parsing_their_lines(tmp_path):
    """200 runs of 2,000 steps in a few seconds; here fewer, against a bare parse on the machine as it is."""
    once = write_run(tmp_path / "0", steps=2000, extras=False)
    for i in range(1, 5):
        (tmp_path / str(i)).mkdir()
        for name in ("run.json", "metrics.jsonl", "validation.jsonl"):
            os.link(once / name, tmp_path / str(i) / name)
        changed = json.loads((once / "run.json").read_text()) | {"fingerprint": str(i)}
        (tmp_path / str(i) / "run.json").unlink()
        (tmp_path / str(i) / "run.json").write_text(json.dumps(changed))

    def seconds(function) -> float:
        before = time.process_time()
        function()
        return time.process_time() - before

    def parse():
        for i in range(5):
            for line in (tmp_path / str(i) / "metrics.jsonl").open():
                json.loads(line)

    bare = min(seconds(parse) for _ in range(3))
    assert len(table.rows([tmp_path])) == 5
    assert min(seconds(lambda: table.rows([tmp_path])) for _ in range(3)) < 4 * bare


def test_counts_follow_the_configuration_where_none_are_recorded(tmp_path):
    row, model = table.row(made(tmp_path / "r")), quick().model
    assert row["parameters"] == flops.parameter_counts(model)["total"]
    assert row["flops"] == flops.flops_per_token(model, 32, "causal") * row["tokens"]
