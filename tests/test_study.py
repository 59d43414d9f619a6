import functools
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_study as made
from matplotlib.image import imread
from synthetic_run import write_run
from test_report import Page

from tinyllama_jax.cli import main
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.lab import (
    study_sections,
    study_tables,
)
from tinyllama_jax.lab.runs import is_study
from tinyllama_jax.lab.study import read_study, write_study
from tinyllama_jax.lab.study_factors import factors
from tinyllama_jax.lab.study_fits import one_recipe, profiles, repetitions, surface
from tinyllama_jax.lab.study_rows import Study

report = functools.partial(write_study, draws=30, dpi=50)


@pytest.fixture
def no_surface(monkeypatch):
    """Chinchilla's surface takes the longest, and not every test is about it."""
    monkeypatch.setattr(study_sections, "surface", lambda *_: (None, ""))


def study(rows):
    return Study("s", rows, made.Path("nowhere"))


def plots(page):
    return {path.stem for path in (page.parent / "plots").glob("*.png")}


def words(page):
    return " ".join(" ".join(Page(page.read_text(encoding="utf-8")).words).split())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A study with every section, its run directories at hand, and hostile names."""
    folder = tmp_path_factory.mktemp("s")
    rows = [*made.isoflop(), *made.repetition(passes=(1, 4, 16), decays=(0.1,)), *made.gqa(), *made.rope(2)]
    rows[2] |= {"name": "<script>alert(1)</script>", "status": "unfinished"}
    table = made.write_table(folder / "<i>all of it.jsonl", rows)
    made.write_directories(folder, rows)
    return rows, report(table, folder)


def test_every_figure_is_drawn_from_the_rows(everything):
    _, page = everything
    expected = {"compute", "isoflop", "optima", "surface", "residuals", "pairs", "epochs", "laws", "profile", "gap"}
    assert plots(page) == expected | {"serving", "beyond", "position", "overlay"}
    for path in (page.parent / "plots").glob("*.png"):
        image = imread(path)
        ink = (image[..., :3] < 0.7).any(axis=2)
        assert image.shape[1] == 400 and 0.005 < ink.mean() < 0.6, path
        edge = np.ones_like(ink)
        edge[1:-1, 1:-1] = False
        assert not ink[edge].any(), f"something is cut off at the border of {path.stem}"


def test_the_page_asks_for_nothing_and_escapes_what_it_was_given(everything):
    _, path = everything
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "a", "iframe", "link rel=stylesheet", "b", "i"} & {tag for tag, _ in page.tags} - {"i"}
    assert "&lt;script&gt;" in page.text and "<script" not in page.text and "<i>all" not in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.images())
    assert any("default-src 'none'" in a.get("content", "") for _, a in page.tags)
    assert not re.search(r"https?://|url\(|@import", page.text) and not list(path.parent.rglob(".*"))


def test_every_figure_has_a_caption(everything):
    text = everything[1].read_text()
    captions = re.findall(r"<figure>.*?<figcaption>(.*?)</figcaption>", text, re.S)
    assert len(captions) == len(plots(everything[1])) and min(map(len, captions)) > 60


def test_the_numbers_are_told(everything):
    rows, page = everything
    text = words(page)
    assert f"{len(rows) - 1} of {len(rows)} runs finished" in text
    for told in ("The best number of parameters grows as C^", "without the largest budget the law says N*",
                 "without the largest budget predicts its loss", "a29e616",
                 "model.kv_heads", "paired, n = 3", "model.rope.kind", "condition number is that of"):  # fmt: skip
        assert told in text, told


def test_profiles_find_the_law_that_made_them():
    found = profiles(study(made.isoflop(noise=0.0005)), draws=100)
    low, high = found.fit.ci95["N"]
    expected = made.TRUE["beta"] / (made.TRUE["alpha"] + made.TRUE["beta"])
    assert found.fit.constants["N"] == pytest.approx(expected, abs=0.02) and low < high
    assert found.left_out == {} and len(found.optima) == 4


def test_a_budget_whose_lowest_size_is_at_the_edge_is_left_out_and_said(tmp_path, no_surface):
    rows = made.isoflop(noise=0.0, spread=1.8)
    for i, row in enumerate(rows[:5]):
        row["loss"] = 3.0 - 0.1 * i
    found = profiles(study(rows), draws=20)
    assert list(found.left_out) == [0] and "edge" in found.left_out[0] and sorted(found.optima) == [1, 2, 3]
    page = report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert "1e12 FLOPs has no optimum: its lowest loss is at the edge" in words(page)


def test_text_seen_once_and_a_half_counts_as_new_and_is_said(tmp_path, no_surface):
    rows = made.isoflop()
    once = profiles(study(rows), draws=20)
    rows[0]["epochs"], rows[1]["epochs"] = 1.2, 1.45
    assert profiles(study(rows), draws=20).fit.constants == once.fit.constants
    page = report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert "2 runs saw the text up to 1.45 times" in words(page)
    rows[2]["epochs"] = 1.6
    assert rows[2] not in study(rows).fresh


def test_unfinished_runs_change_no_fit():
    rows = made.isoflop()
    lost = [made.row("lost", 3e5, 5e5, 9.0, status="unfinished"), made.row("failed", 3e5, 5e5, 0.1, status="failed")]
    fits = [profiles(study(each), draws=20).fit.constants for each in (rows, rows + lost)]
    assert fits[0] == fits[1]
    assert study(rows + lost).fresh == study(rows).fresh and len(study(rows + lost).unfinished) == 2
    assert factors(study(rows + lost).finished) == factors(study(rows).finished)


def test_few_sizes_or_one_budget_make_no_profiles(tmp_path, no_surface):
    assert profiles(study(made.isoflop(sizes=2))) is None
    assert profiles(study(made.isoflop(budgets=(1e12,)))) is None
    three = profiles(study(made.isoflop(sizes=3)), draws=20)
    assert three.fit is None and "sizes in the window" in three.left_out[0]
    page = report(made.write_table(tmp_path / "t.jsonl", made.isoflop(sizes=3)), tmp_path / "out")
    assert "isoflop" in plots(page) and "optima" not in plots(page) and "No power law" in words(page)


def test_the_surface_is_that_which_made_the_runs_and_predicts_the_largest_budget():
    found, said = surface(study(made.isoflop(noise=1e-4)), 30)
    assert said == "" and found.fit.constants["alpha"] == pytest.approx(made.TRUE["alpha"], abs=0.02)
    assert found.held_out_N.sum() == 5
    held = found.held_out_N
    np.testing.assert_allclose(found.without_N[held], found.points.L[held], rtol=0.004)
    assert surface(study(made.isoflop()[:7]), 30) == (None, "")


def test_one_recipe_is_fitted_where_several_were_tried():
    rows = made.isoflop()
    others = [row | {"config.optimizer.beta2": 0.99, "loss": row["loss"] + 0.5} for row in rows[:6]]
    rows = [row | {"config.optimizer.beta2": 0.95} for row in rows]
    kept, said = one_recipe([*others, *rows])
    assert kept == rows and said == "Only runs with optimizer.beta2 = 0.95 are fitted."


def test_repetition_is_fitted_for_each_weight_decay():
    rows = made.repetition(passes=(1, 4, 16))
    first, second = repetitions(study(rows), draws=10)
    assert (first.weight_decay, second.weight_decay) == (0.1, 1.0)
    assert set(first.laws) == {"effective", "penalty", "saturating"}
    assert first.found.constants["R_D"] < second.found.constants["R_D"]
    predicted = first.loss("effective", 2e5, 4e6, 1e6)
    measured = next(r["loss"] for r in rows if r["name"] == "repeat-n2e+05-u1e+06-e4-wd0.1")
    assert float(predicted) == pytest.approx(measured, rel=0.02)


def test_repetition_of_one_size_is_drawn_and_the_missing_law_said(tmp_path, no_surface):
    rows = made.repetition(sizes=(2e5,))
    page = report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert {"epochs", "gap"} <= plots(page) and "laws" not in plots(page)
    assert "no law is fitted: 3 runs of one epoch do not determine the surface" in words(page)


def test_a_constant_that_is_not_identified_is_said_to_be_so(tmp_path, no_surface):
    rows = made.repetition(passes=(1, 1.5, 2), decays=(1.0,))
    text = words(report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out"))
    assert "is not identified by these runs" in text and "do not identify the constant" in text
    assert "R_D* is not identified by these runs" in text


def test_a_factor_is_compared_among_runs_that_are_equal_otherwise():
    found = {factor.fields: factor for factor in factors(made.gqa())}
    factor = found.pop(("model.kv_heads",))
    assert found == {}, "the size of the model is no ablation"
    assert [block.where for block in factor.blocks] == ["N = 661k", "N = 3.52M"]
    assert [value for value, _ in factor.blocks[0].values] == ["8", "4", "1"]
    assert set(factor.blocks[0].losses(0)) == {0, 1, 2}
    fields = {factor.fields for factor in factors(made.rope())}
    assert fields == {("model.rope.kind",), ("model.rope.theta",)}
    assert factors(made.isoflop()) == []


def test_fields_that_change_together_are_one_factor_and_matched_variants_are_listed():
    def arm(kv, d_ff, seed, loss):
        more = {"config.model.kv_heads": kv, "config.model.d_ff": d_ff}
        return made.row(f"kv{kv}-f{d_ff}-s{seed}", 500_000 + 100 * kv, 4e6, loss, seed=seed, **more)

    matched = [arm(kv, f, s, 3.0 + 0.01 * s) for kv, f in ((8, 512), (2, 560)) for s in (0, 1)]
    (factor,) = factors(matched)
    assert factor.fields == ("model.kv_heads", "model.d_ff")
    assert [value for value, _ in factor.blocks[0].values] == ["8, 512", "2, 560"]
    shape = [arm(2, 512, s, 3.1 + 0.01 * s) for s in (0, 1)]
    both = factors([*matched, *shape])
    values = [[value for value, _ in factor.blocks[0].values] for factor in both]
    assert values == [["8", "2"], ["560", "512"]]


def test_a_curriculum_is_compared_by_shares_not_by_lengths():
    def staged(stages, seed):
        row = made.row(f"{len(stages)}-{seed}", 5e5, 4e6, 3.0 - 0.1 * len(stages) + 0.01 * seed, seed=seed)
        row = {k: v for k, v in row.items() if not k.startswith("config.curriculum")}
        for i, (name, share) in enumerate(stages):
            stage = {"name": name, "tokens": int(share * 4e6), "batch_tokens": 1024, "mixture.prose": 1.0}
            row |= {f"config.curriculum.{i}.{key}": value for key, value in stage.items()}
        return row

    arms = [[("main", 1.0)], [("base", 0.8), ("cooldown", 0.2)]]
    (factor,) = factors([staged(stages, seed) for stages in arms for seed in (0, 1)])
    assert factor.fields == ("curriculum",)
    assert factor.blocks[0].values[1][0] == "base 80% (prose 100%) → cooldown 20% (prose 100%)"


def test_one_seed_makes_no_claim():
    (factor,) = factors(made.gqa(seeds=1))
    html = study_tables.ablation(factor)
    assert (
        "one seed: no standard error, no claim" in html
        and "paired" not in html
        and "±" not in html.split("</thead>")[1]
    )
    (factor,) = factors(made.gqa(seeds=2))
    assert "paired, n = 2" in study_tables.ablation(factor)


def test_different_stores_are_not_comparable(tmp_path):
    rows = made.gqa(seeds=1)
    assert "not comparable" not in study_tables.provenance(study(rows))
    rows[0]["store"] = "ffff"
    said = study_tables.provenance(study(rows))
    assert "2 different token stores among these runs: their losses per token are not comparable" in said


def test_a_table_of_many_runs_counts_the_rest():
    rows = [made.row(f"r{i}", 1e5, 1e6, 3.0) for i in range(310)]
    html = study_tables.runs(study(rows))
    assert html.count("<tr>") == 301 and "10 more runs are in the table" in html


def test_rows_of_nothing_but_names(tmp_path):
    rows = [{"name": "a"}, {"name": "b", "status": "failed", "loss": None}, {"status": "unfinished", "loss": 3}]
    page = report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert "1 failed" in words(page) and plots(page) == set()


@pytest.mark.parametrize("seed", range(4))
def test_tables_with_holes(tmp_path, seed, no_surface):
    """Whatever a table lacks, its report is written."""
    rng = np.random.default_rng(seed)
    rows = [*made.isoflop()[::2], *made.repetition(decays=(0.1,))[::3], *made.gqa(2), *made.rope(1)]
    rows = [{k: v for k, v in row.items() if rng.random() > 0.15} for row in rows]
    assert "runs finished" in words(report(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no run in it"), ('{"name": 1}\n[]\n', "line 2: is not a JSON object"), ("{", "line 1: is not JSON")],
)
def test_a_damaged_table_is_one_line(tmp_path, text, said):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(DataError, match=said) as error:
        read_study(tmp_path / "t.jsonl")
    assert "\n" not in str(error.value)


def test_what_is_nowhere_is_said_to_be_nowhere(capsys):
    assert main(["report", "nowhere", "--out", "x"]) == 78
    assert "nowhere: no such run directory" in capsys.readouterr().err


def test_the_verb_takes_sweeps_and_tables(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    table = made.write_table(sweep / "runs.jsonl", made.rope(1)[:2])
    assert is_study(sweep) and is_study(table) and not is_study(tmp_path)
    assert main(["report", str(sweep), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(sweep / "report.html")}
    assert main(["report", str(table), "--out", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "report.html").is_file()
    for more, said in (([], "--out DIR says where"), (["--compare", "x"], "--compare goes with a run")):
        assert main(["report", str(table), *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UsageError):
        write_study(table)


@pytest.mark.slow
def test_thirty_runs_with_two_hundred_resamples_take_seconds(tmp_path):
    rows = [*made.isoflop(), *made.gqa()[:10]]
    begin = time.process_time()
    write_study(made.write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    assert time.process_time() - begin < 25


def test_a_report_of_a_study_does_without_jax(everything, tmp_path):
    shutil.copy(next(everything[1].parent.glob("*.jsonl")), tmp_path / "t.jsonl")
    code = f"""import sys
from tinyllama_jax.lab.study import read_study
from tinyllama_jax.lab.study_sections import sections
from tinyllama_jax.lab.study_rows import Study
found = read_study({str(tmp_path / "t.jsonl")!r})
sections(Study("s", found.rows[:3], found.folder), draws=5)
sys.exit("jax" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fields_and_their_values_stand_in_one_order():
    rates = [
        made.row(f"x{times}", 5e5, 4e6, 3.0, **{"config.lr.end": 1e-3 * times, "config.lr.peak": 1e-2 * times})
        for times in (1, 2)
    ]
    (factor,) = factors(rates)
    assert factor.fields == ("lr.peak", "lr.end") and factor.blocks[0].values[1][0] == "0.02, 0.002"


def test_a_trunk_at_a_constant_rate_is_no_point_of_a_law():
    rows = made.isoflop()
    trunk = made.row("trunk", 3e5, 5e5, 0.5, group="trunk", **{"config.lr.kind": "constant"})
    branch = made.row("branch", 3e5, 5e5, 2.9, group="trunk", **{"config.fork.run": "@trunk"})
    found = study([*rows, trunk, branch])
    assert [row["name"] for row in found.fitted[-2:]] == [rows[-1]["name"], "branch"]
    assert len(found.finished) == len(rows) + 2


def test_a_sweep_is_read_from_its_runs_and_else_from_its_table(tmp_path):
    """From the run directories where they are there, from runs.jsonl where they have been taken away."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="no run there"):
        read_study(sweep)
    made.write_table(sweep / "runs.jsonl", made.gqa(1))
    assert len(read_study(sweep).rows) == 6
    write_run(sweep / "0", name="quick", steps=30, validation_every=10)
    (row,) = read_study(sweep).rows
    assert row["name"] == "quick" and row["loss"] > 0
    text = words(report(sweep))
    assert "1 of 1 runs finished" in text and "quick" in text
