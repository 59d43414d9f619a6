"""Reports in a browser: nothing is wrong on the console, nothing is asked for, every figure is there and fits."""

import io
import re
import subprocess
from html import unescape

import pytest
import synthetic_study
from browser import HOW_TO, Browser, chromium
from cannot import cannot
from matplotlib.image import imread
from synthetic_run import write_run

from tinyllama_jax.lab import study
from tinyllama_jax.lab.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        cannot(HOW_TO)
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of a run, and one of a study with nearly every section."""
    root = tmp_path_factory.mktemp("reports")
    run = write_report(write_run(root / "run", name="a run & <b>more</b>"))
    rows = [*synthetic_study.isoflop(), *synthetic_study.gqa(), *synthetic_study.rope()]
    rows += synthetic_study.repetition(decays=(0.1,))
    table = synthetic_study.write_table(root / "study" / "study.jsonl", rows)
    synthetic_study.write_directories(root / "study", rows)
    return {"run": run, "study": study.write_study(table, table.parent, draws=50, dpi=80)}


@pytest.mark.parametrize("width", [1280, 760, 375])
@pytest.mark.parametrize("name", ["run", "study"])
def test_a_report_opens(browser, pages, name, width):
    look = browser.open(pages[name], width=width)
    assert look.problems == []
    assert look.requests == [pages[name].resolve().as_uri()]
    assert look.title == {"run": "a run & <b>more</b>", "study": "study"}[name]
    plots = list((pages[name].parent / "plots").glob("*.png"))
    assert len(look.images) == len(plots) >= 6
    assert all(decoded and wide > 400 and high > 100 for _, decoded, wide, high in look.images), look.images
    assert look.overflow <= 0 and look.outside == [], "the page is wider than the window"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_seen(browser, pages, scheme):
    browser.open(pages["study"], scheme=scheme)
    picture = imread(io.BytesIO(browser.screenshot()))[..., :3]
    ground = picture[2, 2]
    assert (ground.mean() > 0.9) == (scheme == "light")
    assert 0.02 < (abs(picture - ground).max(axis=2) > 0.3).mean() < 0.6


def test_a_page_with_faults_is_noticed(browser, tmp_path):
    """The test above would see what it looks for."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:\"><title>bad</title>"
        "<img src='data:image/png;base64,AAAA'><img src='missing.png'><table width=3000><tr><td>wide</table>"
        "<script>console.log(1)</script>"
    )
    look = browser.open(page)
    assert any("missing.png" in problem or "img-src" in problem for problem in look.problems)
    assert any("script" in problem for problem in look.problems)
    assert [wide for _, _, wide, _ in look.images] == [0, 0]
    assert look.overflow > 0 and "TABLE" in look.outside


def test_the_dumped_page_is_the_written_one(browser, pages, tmp_path):
    """Nothing on the page changes itself: what Chromium holds after loading is what was written."""
    dumped = subprocess.run(
        [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        + [f"--user-data-dir={tmp_path}", pages["run"].resolve().as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert dumped.returncode == 0 and "CONSOLE" not in dumped.stderr

    def text(page: str) -> list[str]:
        return unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)).split()

    assert text(dumped.stdout) == text(pages["run"].read_text())
