"""The words, the style and the small parts of a report, and how it is written; `report.py` and `study.py` fill it."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from tinyllama_jax.errors import DataError

# name of the figure -> (heading, caption), in the order of the page
CAPTIONS = {
    "loss": (
        "Loss",
        "Training loss: each step thin, running mean thick (without the extreme tenths of each window). Circles: "
        "validation. Dashed: bigram, dotted: unigram baseline. Vertical lines: stage borders. The first hundredth of "
        "the run may leave the picture at the top.",
    ),
    "validation": (
        "Validation by domain",
        "The same windows each time. Bits per byte do not depend on the tokenizer, nats per token do.",
    ),
    "preference": (
        "Preferences",
        "Rewards are beta times the log-ratio of an answer to the weights at the start (arXiv 2305.18290). Training: "
        "each step thin, running mean thick; circles: held-out pairs.",
    ),
    "compare": ("Against other runs", "Training loss smoothed as above; this run in black."),
    "reference": (
        "Against a curve from elsewhere",
        "Training loss over the same tokens, both as running means over the same window; below, the run less the "
        "reference. Losses per token compare only where tokenizer and data are the same.",
    ),
    "schedule": ("Schedule", "As applied, step by step."),
    "mixture": (
        "Mixture",
        "Realised, not planned: counted in the batches, running mean. An epoch is one pass over all training windows "
        "of a source.",
    ),
    "norms": (
        "Norms",
        "Global L2 norms in float32; the gradient's before clipping.",
    ),
    "throughput": (
        "Throughput",
        "Each step thin, running mean thick. Steps that compile or save are slower.",
    ),
    "evaluations": ("Downstream", "By lm-evaluation-harness; the metric of each task is in the table below."),
    "positions": (
        "Long windows, by position",
        "Held-out loss in sixteenths of the window, the same text at every length, from <code>eval --positions</code>; "
        "linear, ntk and yarn turn the positions of the trained weights. A rise behind the dashed line is what fails.",
    ),
    "passkey": (
        "Passkey retrieval",
        "A number told once in filler, asked for at the end of the row, from <code>eval --passkey</code>. Depth: the "
        "share of the filler before it. Said: the likeliest tokens are the number's digits and no digit more.",
    ),
}

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1f2328; --soft: #59636e; --line: #e1e4e8; --ground: #ffffff; --panel: #f6f8fa;
  --good: #0a6b4b; --bad: #b3300a; --open: #0a5ca8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ec; --soft: #9aa4ae; --line: #30363d; --ground: #161616; --panel: #202122;
    --good: #4cc79a; --bad: #ff8a66; --open: #6cb6ff;
  }
  /* The figures are drawn on white: turn lightness round and keep the hues. */
  figure img { filter: invert(0.93) hue-rotate(180deg) brightness(1.25); }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 880px; padding: 40px 24px 32px; color: var(--ink); background: var(--ground);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; font-size: 18px; }
h3 { margin: 24px 0 6px; font-size: 15px; overflow-wrap: anywhere; }
.notes { margin: 10px 0; padding-left: 20px; color: var(--soft); font-size: 14px; }
figure + figure { margin-top: 18px; }
p { margin: 8px 0; }
header p { color: var(--soft); }
.state { font-weight: 600; margin-right: 6px; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.progress { height: 4px; border-radius: 2px; background: var(--line); overflow: hidden; }
.progress i { display: block; height: 100%; background: var(--open); }
.parts { display: flex; gap: 1px; height: 18px; margin: 12px 0; border-radius: 4px; overflow: hidden; }
.parts i { display: block; height: 100%; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 2px; }
.tiles {
  display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px; margin: 22px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
}
.tiles div { padding: 12px 16px 14px; background: var(--ground); min-width: 0; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 22px; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.tiles dd.long { font-size: 16px; line-height: 1.4; padding: 3px 0; }
.tiles small { color: var(--soft); }
figure { margin: 0 -14px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin: 2px 14px 0; color: var(--soft); font-size: 13.5px; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; text-align: left; vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; }
td { vertical-align: top; overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
td small { color: var(--soft); }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); }
blockquote, pre {
  margin: 10px 0; padding: 12px 16px; background: var(--panel); border-radius: 8px; font-size: 13px; line-height: 1.5;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
pre { max-height: 600px; overflow: auto; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(2, 1fr); } body { padding: 24px 16px; } }
@media print { body { max-width: none; padding: 0; } figure, table, blockquote { break-inside: avoid; } }
</style>
</head>
<body>
$body
<footer>$footer</footer>
</body>
</html>
""")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)) -> str:
    """A table of cells that are HTML already; the columns in `text` are set left, numbers right."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = ("" if i in text else ' class="n"' for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if any(header) else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(row(r, "td") for r in rows)}</tbody></table></div>'


def picture(image: bytes, name: str, caption: str) -> str:
    """A figure with its caption; the PNG lies inside the page.  Both texts are HTML already."""
    source = "data:image/png;base64," + base64.b64encode(image).decode()
    return f'<figure><img src="{source}" alt="{name}"><figcaption>{caption}</figcaption></figure>'


def duration(seconds: float) -> str:
    """Seconds in the two largest units that it takes: "3 h 12 min"."""
    if not seconds > 0:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (n, _) in enumerate(parts) if n), len(parts) - 1)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n) or f"{seconds:.2g} s"


def clock(value: Any) -> str:
    """A time as seconds since 1970 or in ISO 8601, to the second, in UTC where it says where it is."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return "" if value is None else str(value)
    return f"{time.astimezone(UTC) if time.tzinfo else time:%Y-%m-%d %H:%M:%S}"


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def write_page(folder: Path, page: str, images: dict[str, bytes]) -> Path:
    """Write folder/report.html and folder/plots/NAME.png, each under a temporary name and renamed; the page's path.

    Raises DataError where that cannot be done.
    """
    path = folder / "report.html"
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            _write(folder / "plots" / f"{name}.png", image)
        _write(path, page.encode())
    except OSError as error:
        raise DataError(f"{folder}: the report cannot be written there ({error.strerror})") from None
    return path


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same directory, then rename: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
