"""The tables of a study's report: ablations with their tests, all runs, and what the numbers came from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from tinyllama_jax.lab.compare import NO_CLAIM, difference, mean
from tinyllama_jax.lab.draw import scientific, si
from tinyllama_jax.lab.page import number as fixed
from tinyllama_jax.lab.page import table
from tinyllama_jax.lab.study_factors import Factor
from tinyllama_jax.lab.study_panels import plain
from tinyllama_jax.lab.study_rows import Row, Study, column, compute, epochs, number, seed

MOST_ROWS = 300  # a page must stay light enough to be mailed
MOST_BLOCKS = 12  # of one factor
PROVENANCE = ("git", "version", "jax", "device_kind", "devices", "experiment", "store", "tokenizer", "order")
MUST_AGREE = ("store", "tokenizer")


def ablation(factor: Factor) -> str:
    """One factor: each value beside the first of its block, with the standard error and p-value of the difference."""
    blocks, several = factor.blocks[:MOST_BLOCKS], len(factor.blocks) > 1
    rows, silent = [], False
    for block in blocks:
        first = block.losses(0)
        for i, (value, members) in enumerate(block.values):
            losses = block.losses(i)
            own = mean(losses.values())
            cells = [escape(block.where) if not i else ""] if several else []
            cells += [escape(value), _range(column(members, "parameters"))]
            cells += [f"{own.value:.4f}{f' ± {own.se:.4f}' if math.isfinite(own.se) else ''}", str(own.n)]
            if not i:
                rows.append([*cells, "–", "–"])
                continue
            gap = difference(first, losses)
            silent |= gap.note == NO_CLAIM
            bar = f" ± {gap.se:.4f}" if math.isfinite(gap.se) else ""
            how = f"{p_value(gap.p)}<br><small>{gap.method}, n = {gap.n}</small>"
            if not math.isfinite(gap.p):
                how = f"–<br><small>{'n = 1' if gap.note == NO_CLAIM else 'no noise'}</small>"
            rows.append([*cells, f"{gap.value:+.4f}{bar}".replace("-", "−"), how])
    header = ["where"] * several + [escape(factor.short), "parameters", "loss ± standard error", "seeds"]
    header += ["difference from the first", "p-value"]
    rest = len(factor.blocks) - len(blocks)
    said = f"<p>{rest} more places are not listed.</p>" if rest else ""
    tests = sum(len(block.values) - 1 for block in factor.blocks)
    if silent:
        said += f"<p>Where n = 1 there is {NO_CLAIM}: such a difference cannot be told from noise.</p>"
    elif tests > 3:
        said += f"<p>{tests} comparisons: one in twenty has p &lt; 0.05 by chance; p is not corrected for that.</p>"
    return table(header, rows, text=(0, 1) if several else (0,)) + said


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def runs(study: Study) -> str:
    """Every run, as far as the page stays light."""
    shown = study.rows[:MOST_ROWS]
    columns = [
        ("parameters", lambda row: si(number(row, "parameters"))),
        ("tokens", lambda row: si(number(row, "tokens"))),
        ("epochs", lambda row: f"{epochs(row):.3g}"),
        ("FLOPs", lambda row: plain(compute(row)) if compute(row) > 0 else "–"),
        ("seed", lambda row: escape(str(seed(row))) if seed(row) is not None else "–"),
        ("loss", lambda row: _with_error(row, "loss")),
        ("best", lambda row: fixed(number(row, "best_loss"), 4)),
        ("training", lambda row: fixed(number(row, "train_loss"), 4)),
        ("tokens/s", lambda row: si(number(row, "tokens_per_s"))),
    ]
    cells = {name: [make(row) for row in shown] for name, make in columns}
    known = {name: values for name, values in cells.items() if name == "loss" or set(values) - {"–", "nan"}}
    if set(known.get("epochs", ["1"])) == {"1"}:
        known.pop("epochs", None)
    body = []
    for i, row in enumerate(shown):
        status = str(row.get("status", ""))
        mark = "" if status in ("finished", "") else f' <small class="bad">{escape(status)}</small>'
        body.append([escape(str(row.get("name", i))) + mark, *(values[i] for values in known.values())])
    rest = len(study.rows) - len(shown)
    said = f"<p>{rest:,} more runs are in the table and not on this page.</p>" if rest else ""
    return table(["run", *known], body) + said


def provenance(study: Study) -> str:
    """What the runs were made with; a warning where they cannot be compared."""
    rows, warnings = [], []
    for name in PROVENANCE:
        found = Counter(str(row[name]) for row in study.rows if row.get(name) is not None)
        if not found:
            continue
        told = ", ".join(
            f"{escape(value[:40])}{f' <small>({n} runs)</small>' if len(found) > 1 else ''}"
            for value, n in found.most_common(6)
        )
        rows.append([name.replace("_", " "), told + (f" and {len(found) - 6} more" if len(found) > 6 else "")])
        if name in MUST_AGREE and len(found) > 1:
            warnings.append(f"{len(found)} different {'token stores' if name == 'store' else 'tokenizers'}")
    text = "".join(
        f'<p class="bad">✗ {escape(warning)} among these runs: their losses per token are not comparable.</p>'
        for warning in warnings
    )
    return text + (table(["", ""], rows, text=(0, 1)) if rows else "")


def optima(found: Sequence[dict]) -> str:
    """The optimum of every budget."""
    rows = [
        [
            plain(best["compute"]),
            f"{si(best['N'])} <small>({si(best['ci95'][0])} to {si(best['ci95'][1])})</small>",
            si(best["D"]),
            f"{best['D'] / best['N']:.3g}",
            f"{best['loss']:.4f}",
        ]
        for best in found
    ]
    return table(["training FLOPs", "best parameters (95 %)", "tokens", "tokens per parameter", "loss"], rows)


def constants(values: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """Fitted numbers with five digits: two cost a third of D* at 4e25 FLOPs."""
    rows = []
    for name, value in values.items():
        low, high = intervals.get(name, (math.nan, math.nan))
        said = f"{_five(low)} to {_five(high)}" if math.isfinite(low) and math.isfinite(high) else "–"
        rows.append([escape(name), _five(value), said])
    return table(["", "fitted", "95 % of the resamples"], rows)


def _five(value: float) -> str:
    return f"{value:.5g}" if 1e-4 <= abs(value) < 1e5 else scientific(value, 4)


def _with_error(row: Row, key: str) -> str:
    value, error = number(row, key), number(row, f"{key}_se")
    return fixed(value, 4) + (f" <small>± {error:.4f}</small>" if math.isfinite(error) else "")


def _range(values) -> str:
    if not len(values) or not all(map(math.isfinite, values)):
        return "–"
    low, high = si(min(values), 4), si(max(values), 4)
    return low if low == high else f"{low} to {high}"
