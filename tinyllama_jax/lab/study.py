"""The report of a study, that is of many runs: one HTML page that needs nothing beside itself, and its figures.

What it shows is chosen from the rows of the runs table, not from the study's name: budgets of several sizes make
isoFLOP profiles, repeated data makes the laws of repetition, fields that differ between equal runs make ablations.
The page has the style and the content security policy of a run's report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from tinyllama_jax import __version__
from tinyllama_jax.errors import DataError, UsageError
from tinyllama_jax.lab import table
from tinyllama_jax.lab.draw import png, si
from tinyllama_jax.lab.page import PAGE, duration, picture, write_page
from tinyllama_jax.lab.study_fits import DRAWS
from tinyllama_jax.lab.study_panels import plain
from tinyllama_jax.lab.study_rows import Study, column, compute, number
from tinyllama_jax.lab.study_sections import Picture, Section, sections


def read_study(source: str | Path) -> Study:
    """A sweep directory or a runs table.  DataError where it is neither or has no run."""
    source = Path(source)
    if not source.is_dir():
        return Study(source.stem, _read(source), source.parent)
    kept = source / "runs.jsonl"
    try:
        rows = table.rows([source])
    except DataError:
        if not kept.exists():
            raise
        rows = _read(kept)  # the table of a sweep whose runs are elsewhere
    return Study(source.resolve().name, rows, source)


def _read(path: Path) -> list[dict]:
    rows = table.read(path)
    if not rows:
        raise DataError(f"{path}: has no run in it; `tinyllama runs` writes a runs table")
    return rows


def write_study(source: str | Path, out: str | Path | None = None, *, draws: int = DRAWS, dpi: int = 200) -> Path:
    """Write `report.html` and `plots/*.png` into `out` (a sweep's own directory where it is None); the page's path.

    draws: resamples of the fits.  Both page and plots are written under temporary names and renamed.  UsageError for a
    table without `out`, DataError where there is nothing to read or no place to write to.
    """
    source = Path(source)
    if out is None and not source.is_dir():
        raise UsageError(f"{source}: --out DIR says where the report of a table goes")
    study = read_study(source)
    made = sections(study, draws=draws)
    pictures = (part for section in made for part in section.parts if isinstance(part, Picture))
    images = {each.name: png(each.figure, dpi=dpi) for each in pictures}
    return write_page(Path(source if out is None else out), render(study, made, images), images)


def render(study: Study, made: Sequence[Section], images: dict[str, bytes]) -> str:
    """The page as text; `images` are PNGs by the names of the sections' pictures."""
    findings = [sentence for section in made for sentence in section.findings]
    body = [_head(study)]
    if findings:
        body.append("<h2>In short</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in findings) + "</ul>")
    for section in made:
        body.append(f"<h2>{escape(section.heading)}</h2>")
        body += [_figure(part, images[part.name]) if isinstance(part, Picture) else part for part in section.parts]
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    footer = f"tinyllama_jax {escape(__version__)} · written {written}"
    return PAGE.substitute(title=escape(study.name), body="\n".join(filter(None, body)), footer=footer)


def _figure(part: Picture, image: bytes) -> str:
    return picture(image, escape(part.name), escape(part.caption))


def _head(study: Study) -> str:
    done, all_runs = len(study.finished), len(study.rows)
    failed = sum(row.get("status") == "failed" for row in study.rows)
    state = f'<span class="state {"good" if done == all_runs else "open"}">{done} of {all_runs} runs finished</span>'
    state += f' <span class="bad">{failed} failed</span>' if failed else ""
    share = 100 * done / all_runs
    bar = f'<div class="progress"><i style="width:{share:.1f}%"></i></div>' if 0 < share < 100 else ""
    return f"<header><h1>{escape(study.name)}</h1><p>{state}</p>{bar}</header>" + _tiles(study)


def _tiles(study: Study) -> str:
    rows = study.rows
    own = [compute(row) * _share(row) for row in rows]
    best = min(study.finished, key=lambda row: number(row, "loss"), default=None)
    kinds = sorted({str(row["device_kind"]) for row in rows if row.get("device_kind")})
    different = len({row.get("seed") for row in rows} - {None})
    seeds = f"{different} seeds" if different > 1 else ""
    tiles = [
        ("parameters", _span(column(rows, "parameters")), ""),
        ("tokens", _span(column(rows, "tokens")), ""),
        ("training FLOPs", plain(float(np.nansum(own))) if np.nansum(own) > 0 else "–", "of all runs together"),
        ("lowest loss", f"{number(best, 'loss'):.4f}" if best else "–", str(best.get("name", "")) if best else ""),
        ("time in runs", duration(float(np.nansum(column(rows, "seconds")))), seeds),
        ("device", ", ".join(kinds) or "–", ""),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd{' class=long' if len(value) > 16 else ''}>{escape(value)}</dd>"
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _share(row) -> float:
    """Of its tokens, the share that the run trained itself: a fork continues another."""
    share = number(row, "own_tokens") / number(row, "tokens")
    return share if 0 < share <= 1 else 1.0


def _span(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return "–"
    low, high = si(float(values.min())), si(float(values.max()))
    return low if low == high or math.isclose(values.min(), values.max()) else f"{low} to {high}"
