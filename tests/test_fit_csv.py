"""Tables as strangers have them: each is read right, or answered with one line that says what is wrong with it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax.cli import main
from tinyllama_jax.lab.fit import chinchilla
from tinyllama_jax.lab.fit.points import Columns, read_csv

TRUE = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
N, D = (x.ravel() for x in np.meshgrid([3e7, 1e8, 4e8, 2e9], [1e9, 6e9, 4e10], indexing="ij"))
LOSS = chinchilla.loss(TRUE, N, D)
PLAIN = "params,tokens,loss\n" + "".join(f"{n:.0f},{d:.4e},{x:.9f}\n" for n, d, x in zip(N, D, LOSS, strict=True))


def compute_and(name: str, values) -> str:
    rows = zip(6 * N * D, values, LOSS, strict=True)
    return f"FLOPs,{name},val_loss\n" + "".join(f"{c:.12e},{v:.12e},{x:.9f}\n" for c, v, x in rows)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", " , ").encode(),
        PLAIN.replace("params", "Model Size").replace("tokens", "Training Tokens").encode(),
        (PLAIN + "\n\n1e9,2e10,nan\n1e9,2e10,\n1e9,2e10,NA\n1e9,2e10,inf\n").encode(),
        PLAIN.replace("loss\n", 'loss,"a, note"\n').encode(),
        compute_and("N", N).encode(),
        compute_and("D", D).encode(),
    ],
    ids="plain bom crlf semicolons tabs spaces other-names without-loss quoted without-D without-N".split(),
)
def test_the_same_constants_from_every_way_to_write_them(tmp_path, capsys, content):
    (tmp_path / "runs.csv").write_bytes(content)
    assert main(["fit", "chinchilla", "--csv", str(tmp_path / "runs.csv"), "--draws", "2", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["constants"] == pytest.approx(TRUE, rel=1e-3)
    if content.startswith(b"FLOPs,N"):
        assert "D is in no column and is taken as C / (6 N)" in value["warnings"]
    if b"NA" in content:
        assert "4 row(s) without a finite loss are left out (line 16, 17, 18, 19)" in value["warnings"]


@pytest.mark.parametrize(
    "content, said",
    [
        (PLAIN + "1e9,,3\n", "line 14: tokens is '', not a positive number"),
        (PLAIN + "nan,2e10,3\n", "line 14: params is 'nan', not a positive number"),
        (PLAIN + "1e9,2e10,-3\n", "line 14: loss is '-3', not a positive number"),
        (PLAIN + "1.1B,2e10,3\n", "line 14: params is '1.1B', not a positive number"),
        (PLAIN + "0,2e10,3\n", "line 14: params is '0', not a positive number"),
        (PLAIN + "1,1e9,2e10,3\n", "line 14: 4 cells for 3 columns; quote what has a comma in it"),
        ("\n".join(PLAIN.splitlines()[:4]), "3 points cannot determine 5 constants: 6 could"),
        ("params,tokens,loss\n" + "".join(f"1e9,{d}e9,3.{d}\n" for d in range(1, 9)), "only 1 distinct value(s) of N"),
        ("", "is empty; a header and a row for each run are needed"),
        ("params,tokens,loss\n", "has no row"),
        ("params,tokens,loss,loss\n1,2,3,4\n", "'loss' names two columns"),
        ("flops,loss\n1e20,3\n", "no column 'parameters' (there are: flops, loss)"),
        ("params,tokens,lost\n1,2,3\n", "no column 'loss'"),
        (b"\xff\xfe\x00p", "is no CSV in UTF-8"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "runs.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["fit", "chinchilla", "--csv", str(path)]) == 78
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_copies_are_said(tmp_path):
    (tmp_path / "runs.csv").write_text(PLAIN + PLAIN.partition("\n")[2])
    points = read_csv(tmp_path / "runs.csv", Columns())
    assert len(points) == 24 and points.notes[0].startswith("12 row(s) repeat another exactly")


def test_a_hundred_thousand_rows_are_read(tmp_path):
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7, 10, 100_000), 10 ** rng.uniform(9, 12, 100_000)
    rows = zip(n, d, chinchilla.loss(TRUE, n, d), strict=True)
    (tmp_path / "runs.csv").write_text(
        "params,tokens,loss\n" + "".join(f"{a:.6e},{b:.6e},{c:.6f}\n" for a, b, c in rows)
    )
    points = read_csv(tmp_path / "runs.csv", Columns())
    assert len(points) == 100_000 and len(points.some(2000)) == 2000
    assert points.span()["N"] == [points.N.min(), points.N.max()]
    theta_P = chinchilla.Surface().best(points.some(100))
    assert chinchilla.Surface().constants(theta_P) == pytest.approx(TRUE, rel=1e-2)


# What every fit promises to say with --json.
@pytest.mark.parametrize("law", ["chinchilla", "isoflop", "repetition", "overtraining"])
def test_the_answer_has_the_documented_keys_and_the_file_the_resamples(tmp_path, capsys, law):
    path, out = tmp_path / "runs.csv", tmp_path / "fit.json"
    path.write_text(table_of(law))
    argv = ["fit", law, "--csv", str(path), "--draws", "5", "--json", "--out", str(out)]
    assert main(argv + (["--base", "c4"] if law == "repetition" else [])) == 0
    value, kept = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert {"constants", "objective", "ci95", "derived", "warnings", "data"} <= set(value) and "draws" not in value
    assert {key: kept[key] for key in value} == value and all(len(drawn) == 5 for drawn in kept["draws"].values())
    assert value["data"]["points"] == path.read_text().count("\n") - 1
    constants, extra = {
        "chinchilla": ({"A", "B", "E", "alpha", "beta"}, set()),
        "isoflop": ({"N", "D"}, {"exponents", "optima"}),
        "repetition": ({"R_D", "R_N", "A", "B", "E", "alpha", "beta"}, set()),
        "overtraining": ({"a", "b", "E", "eta"}, set()),
    }[law]
    assert set(value["constants"]) == constants and extra <= set(value)
    if law == "isoflop":
        assert set(value["exponents"]) == {"N", "D"} and {"compute", "N", "D", "loss"} <= set(value["optima"][0])
    assert not list(tmp_path.glob(".*")), "written under another name and renamed"


def table_of(law: str) -> str:
    if law == "isoflop":
        c, n = (x.ravel() for x in np.meshgrid(np.geomspace(1e18, 1e20, 3), np.geomspace(0.3, 3, 7), indexing="ij"))
        n *= np.sqrt(c / 120)
        return "params,tokens,flops,loss\n" + "".join(
            f"{a},{b / 6 / a},{b},{x}\n" for a, b, x in zip(n, c, chinchilla.loss(TRUE, n, c / 6 / n), strict=True)
        )
    rows = zip(N, D, np.where(np.arange(12) % 2, D / 7, D), LOSS, strict=True)
    return "params,tokens,unique_tokens,loss\n" + "".join(f"{n},{d},{u},{x}\n" for n, d, u, x in rows)


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text(PLAIN)
    argv = ["fit", "chinchilla", "--csv", str(tmp_path / "runs.csv"), "--draws", "2"]
    assert main([*argv, "--out", str(tmp_path / "none" / "fit.json")]) == 78
    err = capsys.readouterr().err
    assert "--out" in err and "cannot be written: No such file" in err and err.count("\n") == 1


def made_runs() -> str:
    """tests/data/made_runs.csv, the README's: four budgets of seven sizes on a published surface, noise of 0.3 %."""
    rng = np.random.default_rng(7)
    c, off = (x.ravel() for x in np.meshgrid(np.geomspace(1e17, 1e20, 4), np.geomspace(0.25, 4, 7), indexing="ij"))
    n = off * np.sqrt(c / 120)
    loss = chinchilla.loss(TRUE, n, c / 6 / n) * np.exp(0.003 * rng.normal(size=len(n)))
    rows = zip(n, c / 6 / n, c, loss, strict=True)
    return "params,tokens,flops,loss\n" + "".join(f"{a:.4e},{b:.4e},{f:.0e},{x:.5f}\n" for a, b, f, x in rows)


def test_the_readmes_table_is_made_of_a_published_surface():
    assert (Path(__file__).parent / "data" / "made_runs.csv").read_text() == made_runs()
