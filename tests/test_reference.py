import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import write_run

from tinyllama_jax.cli import main
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.lab import reference
from tinyllama_jax.lab.reference import Curve


def falling(tokens, shift=0.0, slower=1.0):
    return 2.5 + 4.0 * (1 + tokens / slower / 1e5) ** -0.5 + shift


def curve(name="x", points=400, end=1e6, **more):
    tokens = np.linspace(end / points, end, points)
    return Curve(name, tokens, falling(tokens, **more))


def write_csv(path, header, rows):
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_a_constant_difference_is_found_everywhere():
    found = reference.compare(curve(shift=0.05), curve("other", points=90))
    value = found.as_json()
    for name in ("mean_difference", "mean_absolute_difference", "largest_absolute_difference", "final_difference"):
        assert value[name] == pytest.approx(0.05, abs=3e-3)
    assert value["lag_percent"] > 0, "a higher loss needs more tokens"


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.25])
def test_the_lag_is_how_many_more_tokens_the_same_loss_takes(slower):
    found = reference.compare(curve(slower=slower), curve("other", points=150))
    assert found.as_json()["lag_percent"] == pytest.approx(100 * (slower - 1), abs=1.0)


def test_curves_that_share_no_loss_have_no_lag():
    found = reference.compare(curve(shift=20.0), curve("other"))
    assert found.as_json()["lag_percent"] is None and "no stretch" in "\n".join(found.lines())


def test_only_common_tokens_are_compared():
    found = reference.compare(curve(end=5e5), curve("other", end=1e6, points=100))
    assert found.tokens[0] == 1e4 and found.tokens[-1] == 5e5
    with pytest.raises(DataError, match="no tokens in common: it has 2,000,000"):
        reference.compare(curve(), Curve("late", np.array([2e6, 3e6]), np.array([3.0, 2.9])))


@settings(max_examples=30)
@given(st.integers(5, 60), st.floats(2e4, 3e5))
def test_a_straight_line_stays_where_it_is(points, window):
    tokens = np.sort(np.random.default_rng(points).uniform(0, 1e6, points))
    at = np.linspace(tokens[0], tokens[-1], 50)
    inside = at < at[-1] - window / 2
    smoothed = reference.smooth(tokens, 3 - tokens / 1e6, at, window)
    np.testing.assert_allclose(smoothed[inside], (3 - at / 1e6)[inside], atol=1e-9)


def test_both_are_smoothed_alike_however_dense_they_are():
    rng = np.random.default_rng(0)
    dense = curve(points=20_000)
    noisy = Curve("noisy", dense.tokens, dense.loss + 0.1 * rng.normal(size=len(dense.loss)))
    found = reference.compare(noisy, curve("other", points=200))
    assert np.abs(found.difference[20:]).max() < 0.02


def test_tokens_are_sorted_and_those_that_are_the_same_averaged(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["tokens", "loss"], [(300, 2), (100, 4), (200, 3), (200, 5), (400, "")])
    found = reference.read(path)
    assert found.tokens.tolist() == [100, 200, 300] and found.loss.tolist() == [4, 4, 2] and found.name == "a"


@pytest.mark.parametrize(
    ("header", "tokens"),
    [(["Step", "mistral-7 - train/loss"], [512, 1024]), (["Train/Tokens", "loss"], [1, 2]),
     (["iteration", "lm loss"], [512, 1024]), (["loss", "num_tokens", "step"], [2.5, 2.4])],
)  # fmt: skip
def test_usual_names_are_found(tmp_path, header, tokens):
    rows = [(1, 2.5), (2, 2.4)] if len(header) == 2 else [(2.5, 2.5, 7), (2.4, 2.4, 8)]
    found = reference.read(write_csv(tmp_path / "a.csv", header, rows), batch_tokens=512)
    assert found.tokens.tolist() == sorted(tokens) and set(found.loss) == {2.5, 2.4}


def test_columns_can_be_named(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["tokens", "when", "nll"], [(1, 10, 3.0), (2, 20, 2.0)])
    named = reference.parse_columns("step=when,loss=nll")
    assert reference.read(path, named, 100).tokens.tolist() == [1000, 2000]
    named = reference.parse_columns("tokens=when,loss=nll")
    assert reference.read(path, named).tokens.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("header", "columns", "said"),
    [
        (["a", "b"], "", "no column of loss is known by its name .there are: a, b."),
        (["a", "loss"], "", "no column of tokens or steps"),
        (["step", "loss"], "", "counts steps; --reference-batch-tokens"),
        (["tokens", "loss"], "tokens=token", "no column 'token' .did you mean 'tokens'"),
    ],
)
def test_a_wrong_column_is_one_line(tmp_path, header, columns, said):
    path = write_csv(tmp_path / "a.csv", header, [(1, 2.0), (2, 1.0)])
    with pytest.raises(DataError, match=said) as error:
        reference.read(path, reference.parse_columns(columns))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("rows", [[], [(1, 2.0)], [(5, 2.0), (5, 1.0)], [("x", 2.0), (1, "nan")]])
def test_a_curve_needs_two_points(tmp_path, rows):
    with pytest.raises(DataError, match="a curve needs two"):
        reference.read(write_csv(tmp_path / "a.csv", ["tokens", "loss"], rows))


def test_files_that_are_no_csv(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        reference.read(tmp_path / "nowhere.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00tokens")
    with pytest.raises(DataError, match="no CSV in UTF-8"):
        reference.read(tmp_path / "b.csv")


@pytest.mark.parametrize("text", ["tokens", "loss=", "seconds=x", "tokens=a,step=b"])
def test_wrong_reference_columns(text):
    with pytest.raises(UsageError, match="--reference-columns"):
        reference.parse_columns(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "r", steps=200, validation_every=0, extras=False)


def test_the_verb_draws_and_measures(run, tmp_path, capsys):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [(r["step"], r["tokens"], r["loss"] - 0.25) for r in records[::3]]
    path = write_csv(tmp_path / "export.csv", ["Step", "tokens", "<b>loss</b>"], rows)
    command = ["report", str(run), "--reference", str(path), "--reference", str(path)]
    assert main([*command, "--reference-columns", "loss=<b>loss</b>", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["references"]) == 2
    assert value["references"][0]["mean_difference"] == pytest.approx(0.25, abs=0.03)
    assert (run / "plots" / "reference.png").stat().st_size > 5000
    page = (run / "report.html").read_text()
    assert "Against a curve from elsewhere" in page and "+0.2" in page and "http:" not in page


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--reference-batch-tokens", "5"], 2, "say how to read a --reference"),
        (["--reference-columns", "loss=a"], 2, "say how to read a --reference"),
        (["--out", "x"], 2, "--out goes with a sweep or a table"),
        (["--reference", "nowhere.csv"], 78, "nowhere.csv: cannot be read"),
    ],
)
def test_wrong_commands_are_one_line(run, capsys, more, status, said):
    assert main(["report", str(run), *more]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_comparing_curves_needs_neither_jax_nor_matplotlib():
    code = "import sys, tinyllama_jax.lab.reference, tinyllama_jax.lab.compare; "
    code += "sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
