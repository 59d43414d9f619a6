"""The verb `runs`, and fits from the table of runs."""

import json
import math
from pathlib import Path

import pytest
from lab_runs import made, names
from quick_experiment import quick

from tinyllama_jax.cli import main
from tinyllama_jax.config import replace
from tinyllama_jax.lab import table


@pytest.fixture
def study(tmp_path) -> Path:
    """Six runs with known losses, one of which stopped and one of which has another number of heads."""
    for i in range(6):
        model = replace(quick().model, kv_heads=1 if i == 5 else 2)
        made(tmp_path / "s" / str(i), name=f"r{i}", seed=i, model=model, losses=(5.0, 4.0 - i / 10),
             taken=20 if i == 4 else None)  # fmt: skip
    return tmp_path / "s"


def test_the_verb_shows_selects_sorts_and_writes(study, tmp_path, capsys):
    def run(*argv):
        assert main(["runs", str(study), *map(str, argv)]) == 0
        return capsys.readouterr()

    shown = run().out.splitlines()
    assert shown[0].split() == ["name", "status", "N", "D", "epochs", "FLOPs", "loss", "±", "se", "best", "tok/s"]
    assert len(shown) == 7 and shown[1].split()[:4] == ["r0", "finished", "51.36k", "4.096k"]
    assert "4.0000 ± 0.0071" in shown[1] and len({line.index("finished") for line in shown[1:5]}) == 1
    assert names(json.loads(run("--json").out)["runs"]) == [f"r{i}" for i in range(6)]
    assert json.loads(run("--json").out)["runs"] == table.rows([study])
    found = json.loads(run("--json", "--where", "status=finished", "--where", "config.model.kv_heads=2.0").out)["runs"]
    assert names(found) == ["r0", "r1", "r2", "r3"]
    out = run("--sort", "loss", "--columns", "name,loss,config.seed", "--out", tmp_path / "t.csv")
    assert [line.split() for line in out.out.splitlines()[:2]] == [["name", "loss", "config.seed"], ["r5", "3.5", "5"]]
    assert "6 runs" in out.err and table.read(tmp_path / "t.csv")[0] == {"name": "r5", "loss": 3.5, "config.seed": 5}
    run("--out", tmp_path / "t.jsonl")
    assert main(["runs", str(tmp_path / "t.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == table.rows([study])


def test_what_the_verb_is_asked_wrongly(study, tmp_path, capsys):
    for argv, status, said in (
        (["--sort", "los"], 78, "no column 'los' (did you mean 'loss'?)"),
        (["--columns", "name,config.model.kvheads"], 78, "did you mean 'config.model.kv_heads'"),
        (["--where", "statsu=finished"], 78, "did you mean 'status'"),
        (["--where", "status=done"], 78, "no run has status=done; status is finished, unfinished"),
        (["--where", "status"], 2, "expected COLUMN=VALUE"),
        (["--columns", "name,,loss"], 2, "names with commas"),
        (["--out", "t.xlsx"], 2, "ends in .jsonl or .csv"),
        ([str(tmp_path / "none")], 78, "no such run, sweep or table"),
    ):
        assert main(["runs", str(study), *argv]) == status
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert main(["runs"]) == 2


# ---------------------------------------------------------------------------------------------------------
# fits from the table


TRUE = {"A": 30.0, "B": 40.0, "E": 1.0, "alpha": 0.3, "beta": 0.35}


def laws(folder: Path) -> list[dict]:
    """A table of trunks and their branches on an exact surface, and runs that must not be points."""
    found = []
    for i, n in enumerate((1e5, 3e5, 1e6, 3e6)):
        trunk = f"n{i}-trunk"
        for d in (1e6, 4e6, 1.6e7, 6.4e7):
            loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
            found.append({"name": f"n{i}-d{d:.0e}", "group": trunk, "matmul": 2 * n, "status": "finished", "loss": loss,
                          "parameters": n, "tokens": d, "flops": 7 * n * d, "config.fork.run": f"@{trunk}",
                          "config.lr.kind": "wsd", "config.seed": i})  # fmt: skip
        found.append(found[-1] | {"name": trunk, "loss": 9.0, "config.lr.kind": "constant", "config.fork.run": None})
    found.append(found[0] | {"name": "crashed", "status": "unfinished", "loss": 8.0})
    found.append(found[0] | {"name": "oom", "status": "failed", "loss": None})
    found.append(found[0] | {"name": "diverged", "loss": None})
    table.write(found, folder / "t.jsonl")
    return found


def fitted(capsys, *argv) -> dict:
    assert main(["fit", "chinchilla", "--draws", "20", "--json", *map(str, argv)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_fit_takes_the_finished_runs_and_says_what_it_left_out(tmp_path, capsys):
    laws(tmp_path)
    value = fitted(capsys, "--runs", tmp_path / "t.jsonl")
    for name, true in TRUE.items():
        assert value["constants"][name] == pytest.approx(true, rel=1e-4)
    assert value["quality"]["resampled"] == "4 groups", "branches of one trunk share their noise"
    (told,) = (w for w in value["warnings"] if "left out" in w)
    assert "4 trunk of branches that decay (n0-trunk, n1-trunk" in told and "1 unfinished (crashed)" in told
    assert "1 failed (oom)" in told and "1 without a finite loss (diverged)" in told
    same = fitted(capsys, "--csv", tmp_path / "t.jsonl")
    assert same["constants"] == value["constants"] and "16" in str(same["quality"]["resampled"])


def test_text_that_runs_saw_again_does_not_pass_unseen(tmp_path, capsys):
    rows = [row | {"unique_tokens": min(row["tokens"], 2e7)} for row in laws(tmp_path)]
    table.write(rows, tmp_path / "u.jsonl")
    value = fitted(capsys, "--runs", tmp_path / "u.jsonl")
    assert any("4 points saw their text up to 3.2 times" in w for w in value["warnings"])
    table.write([*rows[:-1], rows[-1] | {"unique_tokens": None}], tmp_path / "u.jsonl")  # one whose store is not known
    assert not any("saw their text" in w for w in fitted(capsys, "--runs", tmp_path / "u.jsonl")["warnings"])


def test_any_column_may_be_n_and_rows_may_be_chosen(tmp_path, capsys):
    laws(tmp_path)
    other = fitted(capsys, "--runs", tmp_path / "t.jsonl", "--n-column", "matmul")
    assert other["constants"]["A"] == pytest.approx(TRUE["A"] * 2 ** TRUE["alpha"], rel=1e-3)
    argv = ["fit", "chinchilla", "--runs", str(tmp_path / "t.jsonl")]
    for more, status, said in (
        (["--n-column", "matmull"], 78, "no column 'matmull' (did you mean 'matmul'?)"),
        (["--where", "config.seed=0"], 78, "cannot determine 5 constants"),
        (["--where", "status=failed"], 78, "no run to fit: 1 failed (oom)"),
        (["--d-column", "config.seed"], 78, "config.seed is 0, not a positive number"),
        (["--csv", "x.csv"], 2, "not allowed with"),
    ):
        assert main(argv + more) == status
        assert said in capsys.readouterr().err
    assert main(["fit", "chinchilla"]) == 2 and "--csv --runs is required" in capsys.readouterr().err


def test_a_csv_of_the_table_leaves_out_what_is_not_finished(tmp_path):
    from tinyllama_jax.lab.fit.points import Columns, read_csv

    table.write([row for row in laws(tmp_path) if "trunk" not in row["name"]], tmp_path / "t.csv")
    points = read_csv(tmp_path / "t.csv", Columns(N="parameters"))
    assert len(points) == 16 and points.notes[0] == "2 row(s) of runs that are not finished are left out (line 18, 19)"
    assert points.notes[1] == "1 row(s) without a finite loss are left out (line 20)"
    assert len(read_csv(tmp_path / "t.csv", Columns(N="parameters"), [("status", "unfinished")])) == 1


def test_task_error_is_fitted_from_the_table_too(tmp_path, capsys):
    rows = [{"name": f"r{i}", "status": "finished", "loss": 2 + i / 10,
             "measure.error": 0.85 - 2.1 * math.exp(-0.75 * (2 + i / 10))} for i in range(12)]  # fmt: skip
    table.write([*rows, rows[0] | {"status": "failed", "loss": None}], tmp_path / "t.jsonl")
    argv = ["fit", "downstream", "--runs", tmp_path / "t.jsonl", "--error-column", "measure.error", "--draws", "20"]
    assert main([*map(str, argv), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["constants"]
    assert found["epsilon"] == pytest.approx(0.85, rel=1e-3) and found["gamma"] == pytest.approx(0.75, rel=1e-3)
