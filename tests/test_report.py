import functools
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from synthetic_run import lines, write_run

from tinyllama_jax.errors import DataError
from tinyllama_jax.lab import draw, plots
from tinyllama_jax.lab import report as report_module
from tinyllama_jax.lab.report import write_report
from tinyllama_jax.lab.runs import Run

ALL = {"loss", "validation", "compare", "schedule", "mixture", "norms", "throughput"}


class Page(HTMLParser):
    """Collects tags, and complains about ones that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.open, self.words = text, [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def report(*args, **options):
    path = write_report(*args, **options)
    assert not [p for p in path.parent.rglob(".*")], "a temporary file was left behind"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures with fewer pixels, because drawing them is what takes the time; `complete` has them in full."""
    monkeypatch.setattr(report_module, "png", functools.partial(draw.png, dpi=60))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    hostile = dict(prompt="</blockquote><script>alert(1)</script>", text="& <b>bold</b>")
    run = write_run(root / "main", name="<i>main</i> & co", **hostile)
    other = write_run(root / "other", name="other-run", steps=300, shift=0.1)
    return run, report(run, compare=[other])


def test_the_page_asks_for_nothing_outside_itself(complete):
    _, page = complete
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "a")
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", page.text, re.S).group(1)
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?://|(src|href)\s*=\s*[\"']?//", page.text)
    assert any("default-src 'none'" in a.get("content", "") for _, a in page.tags)


def test_every_plot_is_written_and_shows_something(complete):
    run, page = complete
    written = {path.stem: imread(path) for path in (run / "plots").glob("*.png")}
    assert set(written) == ALL and len(page.images()) == len(ALL)
    for image in written.values():
        height, width = image.shape[:2]
        assert width == 1600 and 500 < height < 1600
        ink = (image[..., :3] < 0.7).any(axis=2)
        assert 0.005 < ink.mean() < 0.6
        edge = np.ones_like(ink)
        edge[3:-3, 3:-3] = False
        assert not ink[edge].any(), "something is cut off at the border of the picture"


def test_what_a_run_wrote_is_escaped(complete):
    _, page = complete
    assert "&lt;i&gt;main&lt;/i&gt; &amp; co" in page.text and "&lt;/blockquote&gt;&lt;script&gt;" in page.text
    assert "<script" not in page.text and "<b>bold" not in page.text
    assert "& <b>bold</b>" in page.words


def test_the_page_tells_the_numbers(complete):
    run, page = complete
    text = " ".join(page.words)
    assert "Below the bigram in 2 of 2 domains" in text and text.count("✓") == 2 and "✗" not in text
    assert f"{Run(run).last_validation('prose'):.3f}" in text
    for told in ("finished", "4.73M", "900 steps, 2 skipped", "8 × NVIDIA H100 80GB HBM3", "271, 640", "more-code",
                 "checkpoint set aside", "other-run", "ramped over", "0.12.12", '"clip_norm": 1.0'):  # fmt: skip
        assert told in text, told


def test_a_model_worse_than_counting_gets_a_cross(tmp_path):
    run = write_run(tmp_path / "r", steps=30, validation_every=10)
    baselines = json.loads((run / "baselines.json").read_text())
    baselines["domains"]["code"]["model"]["loss"] = 9.0
    (run / "baselines.json").write_text(json.dumps(baselines))
    text = " ".join(report(run).words)
    assert "Below the bigram in 1 of 2 domains" in text and text.count("✓") == text.count("✗") == 1


def test_a_run_in_progress_says_how_far_it_is(tmp_path):
    page = report(write_run(tmp_path / "r", steps=400, taken=200))
    text = " ".join(page.words)
    assert "not finished" in text and "33% of" in text and "to come" in text and "done" in text


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_few_steps(tmp_path, steps):
    run = write_run(tmp_path / "r", steps=3, taken=steps, validation_every=1)
    page = report(run)
    assert len(page.images()) == len(ALL) - 1
    for path in (run / "plots").glob("*.png"):
        assert (imread(path)[..., :3] < 0.7).any(axis=2).mean() > 0.003


def test_a_run_that_was_not_compared_with_counting(tmp_path):
    run = write_run(tmp_path / "r", steps=30, validation_every=10)
    (run / "baselines.json").unlink()
    text = " ".join(report(run).words)
    assert "Not yet compared with counting" in text and "bigram loss" not in text
    assert f"{Run(run).last_validation('code'):.3f}" in text


def test_interrupted_checkpoints_are_counted(tmp_path):
    run = write_run(tmp_path / "r", steps=30, validation_every=0)
    kinds = ["writing", "written", "committed"] * 2 + ["writing"]
    lines(run / "events.jsonl", [{"kind": f"checkpoint_{kind}", "step": 5} for kind in kinds])
    assert "2 of 3 checkpoints begun were committed." in " ".join(report(run).words)


def test_a_run_without_validation(tmp_path):
    page = report(write_run(tmp_path / "r", steps=50, validation_every=0))
    assert "No validation was recorded." in page.words and len(page.images()) == len(ALL) - 2


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "r", steps=50, taken=0, validation_every=0)
    (run / "metrics.jsonl").unlink()
    page = report(run)
    assert "no steps yet" in page.words and page.images() == []


@pytest.mark.parametrize("bad", [(5, 6, 40), tuple(range(1, 51))])
def test_losses_that_are_not_finite(tmp_path, bad):
    run = write_run(tmp_path / "r", steps=50, validation_every=10, bad_loss=bad)
    page = report(run)
    assert f"{len(bad)} steps without a finite loss." in " ".join(page.words)
    assert len(page.images()) == len(ALL) - 1


def test_a_run_directory_with_nothing_but_a_name(tmp_path):
    (tmp_path / "run.json").write_text('{"name": null, "plan": null, "devices": ["cpu", "cpu"]}')
    lines(tmp_path / "metrics.jsonl", [{"step": s, "tokens": 100 * s, "loss": 3.0 - s / 100} for s in range(1, 60)])
    page = report(tmp_path)
    assert tmp_path.name in page.words and "2 × cpu" in page.words and len(page.images()) == 2


def test_runs_of_one_name_are_told_apart():
    class Named:
        def __init__(self, name, directory):
            self.name, self.directory = name, type("Path", (), {"name": directory})

    runs = [Named("a", "x"), Named("b", "y"), Named("a", "z")]
    assert plots.unique_names(runs) == ["a (x)", "b", "a (z)"]


def test_an_interrupted_report_leaves_the_earlier_one(tmp_path, monkeypatch):
    run = write_run(tmp_path / "r", steps=20, validation_every=0)
    before = write_report(run).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before and not list(run.rglob(".*"))


def test_running_mean_ignores_a_spike_and_does_not_reach_over_a_border():
    values = np.concatenate([np.full(500, 3.0), np.full(500, 1.0)])
    values[200] = 50.0
    values[700] = np.nan
    smoothed = draw.smooth(values, [500])
    assert smoothed[199:202] == pytest.approx([3.0] * 3)
    assert smoothed[499] == pytest.approx(3) and smoothed[500] == pytest.approx(1)
    assert np.isnan(smoothed[700]) and smoothed[701] == pytest.approx(1)
    assert 1 < draw.smooth(values)[500] < 3


def test_running_mean_is_unbiased_where_the_loss_falls_and_ends_on_the_last_half_window():
    falling = np.linspace(10, 0, 800)
    np.testing.assert_allclose(draw.smooth(falling)[:780], falling[:780], atol=1e-9)
    assert draw.smooth(falling)[-1] == pytest.approx(falling[-11:].mean())


def test_labels_are_moved_apart_and_no_further_than_needed():
    places = draw._spread(np.array([0.1, 0.5, 0.51, 0.9]), 0.1)
    assert np.diff(places).min() >= 0.1 - 1e-12
    assert places == pytest.approx([0.1, 0.455, 0.555, 0.9])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.6, "1k"), (1234567, "1.23M"), (12_500, "12.5k"), (300e9, "300B"), (3e12, "3T"),
     (123_456, "123k"), (0.5e6, "500k"), (float("nan"), "–")],
)  # fmt: skip
def test_si(value, text):
    assert draw.si(value) == text


def test_scientific():
    assert [draw.scientific(v) for v in (4e-4, 2.5e-5, 0.0, 1e3)] == ["4×10⁻⁴", "2.5×10⁻⁵", "0", "1×10³"]


def test_reading_and_reporting_do_without_jax():
    code = "import sys, tinyllama_jax.lab.report, tinyllama_jax.evaluate.ngram; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pictures_of_few_colours_look_as_drawn():
    """The bands of a filled surface stay apart, and no pixel is far off, not even of a single point."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    x, y = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 60))
    axes.contourf(x, y, np.hypot(x, y), levels=30, cmap="viridis")
    axes.plot(0.5, 0.5, "o", color="#ff00ff", ms=4)
    kept, whole = io.BytesIO(draw.png(figure, dpi=100)), io.BytesIO()
    figure.savefig(whole, format="png", dpi=100)
    found, drawn = (np.asarray(Image.open(file).convert("RGB"), int) for file in (kept, whole))
    assert np.abs(found - drawn).max() <= 24
    assert len(kept.getvalue()) < 0.6 * len(whole.getvalue())
    colours, counts = np.unique(drawn.reshape(-1, 3), axis=0, return_counts=True)
    for colour in colours[np.argsort(-counts)[:30]]:
        assert (found[(drawn == colour).all(-1)] == colour).all(), colour
