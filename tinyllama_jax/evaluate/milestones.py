"""The published results of TinyLlama and its neighbours, as data, to lay beside one's own.

Percent; 0-shot; HellaSwag, OpenBookQA, ARC and PIQA by acc_norm, WinoGrande and BoolQ by acc.  Sources:

    EVAL    EVAL.md and README.md of the TinyLlama repository, branch main
    v1.1    the model card of TinyLlama_v1.1
    gist    a third party's measurement
    paper   arXiv 2401.02385, second-hand: rows whose means are the averages that the paper states
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMMON_SENSE = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")
PROBLEM_SOLVING = ("mmlu", "bbh", "humaneval", "drop")
TITLES = {
    "hellaswag": "HellaSwag",
    "openbookqa": "OBQA",
    "winogrande": "WinoG",
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "mmlu": "MMLU",
    "bbh": "BBH",
    "humaneval": "HumanEval",
    "drop": "DROP",
}


@dataclass(frozen=True)
class Row:
    name: str
    tokens: float  # seen in pretraining; NaN = not stated here
    scores: tuple[float, ...]  # in the order of the table's tasks
    average: float  # as published; NaN = none
    source: str
    note: str = ""  # what is known to be wrong with the row

    @property
    def mean(self) -> float:
        """What the scores recompute to."""
        return sum(self.scores) / len(self.scores)


_NONE = math.nan
_BOOLQ = "BoolQ is 63.21 at 2T and at 2.5T alike, possibly a copy"

# One training run: step, tokens = step * 2,097,152.
TINYLLAMA = (
    Row("50k", 104.9e9, (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30), 46.11, "EVAL"),
    Row("240k", 503.3e9, (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42), 48.28, "EVAL"),
    Row("480k", 1006.6e9, (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91), 50.22, "EVAL"),
    Row("715k", 1499.5e9, (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65), 51.29, "EVAL", "README says 51.28"),
    Row("955k", 2002.8e9, (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67), 51.64, "EVAL", _BOOLQ),
    Row("1195k", 2506.1e9, (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07), 53.86, "EVAL", _BOOLQ),
    Row(
        "1431k",
        3001.0e9,
        (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29),
        52.99,
        "EVAL",
        "the average recomputes to 52.97",
    ),
)
V1_1 = (
    Row("v1.1", 2e12, (61.47, 36.80, 59.43, 32.68, 55.47, 55.99, 73.56), 53.63, "v1.1"),
    Row("v1.1 Math&Code", 2e12, (60.80, 36.40, 60.22, 33.87, 55.20, 57.09, 72.69), 53.75, "v1.1"),
    Row("v1.1 Chinese", 2e12, (58.23, 35.20, 59.27, 31.40, 55.35, 61.41, 73.01), 53.41, "v1.1"),
)
CHAT = (
    Row("Chat v0.1", 503.3e9, (53.81, 32.20, 55.01, 28.67, 49.62, 58.04, 69.64), 49.57, "EVAL"),
    Row("Chat v0.2", 503.3e9, (53.63, 32.80, 54.85, 28.75, 49.16, 55.72, 69.48), 49.20, "EVAL"),
    Row("Chat v0.3", 1006.6e9, (56.81, 34.20, 55.80, 30.03, 53.20, 59.57, 69.91), 51.36, "EVAL"),
    Row("Chat v0.4", 1499.5e9, (58.59, 35.40, 58.80, 30.80, 54.04, 57.31, 71.16), 52.30, "EVAL"),
    Row(
        "Chat v1.0",
        3001.0e9,
        (60.41, 37.20, 59.83, 32.94, 54.34, 60.92, 74.37),
        54.28,
        "gist",
        "the average recomputes to 54.29",
    ),
)
BASELINES = (
    Row("Pythia-1.0B", 300e9, (47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21), 48.30, "EVAL"),
    Row("Pythia-1.4B", 300e9, (52.01, 33.20, 57.38, 28.50, 54.00, 63.27, 70.95), 51.33, "paper"),
    Row("OPT-1.3B", _NONE, (53.65, 33.40, 59.59, 29.44, 50.80, 60.83, 72.36), 51.44, "paper"),
)
# Instruct-Eval: MMLU 5-shot, BBH 3-shot, HumanEval 0-shot, DROP 3-shot.
SOLVED = (
    Row("50k", 104.9e9, (26.45, 28.82, 5.49, 11.42), _NONE, "EVAL"),
    Row("240k", 503.3e9, (26.16, 28.83, 4.88, 12.43), _NONE, "EVAL"),
    Row("480k", 1006.6e9, (24.65, 29.21, 6.10, 13.03), _NONE, "EVAL"),
    Row("715k", 1499.5e9, (24.85, 28.20, 7.93, 14.43), _NONE, "EVAL"),
    Row("955k", 2002.8e9, (25.97, 29.07, 6.71, 13.14), _NONE, "EVAL"),
    Row("1195k", 2506.1e9, (25.92, 29.32, 9.15, 15.45), _NONE, "EVAL"),
    Row("1431k", 3001.0e9, (25.34, 29.65, 9.15, 15.34), 19.87, "paper"),
    Row("Pythia-1.0B", 300e9, (25.70, 28.19, 1.83, 4.25), _NONE, "EVAL"),
)
CHINESE_V1_1_XNLI_ZH = 33.77  # of v1.1 Chinese: the only Chinese score that could be found, second-hand


def nearest(tokens: float, rows: Sequence[Row] = TINYLLAMA) -> Row:
    """The published milestone of the 3T run whose tokens are nearest, by their ratio."""
    return min(rows, key=lambda row: abs(math.log(row.tokens / max(tokens, 1.0))))


def beside(tokens: float, values: Mapping[str, float]) -> list[str]:
    """Lines for one's own scores (percent, by the harness' task names) after `tokens` tokens: a table for common sense
    and one for problem solving, where there are some, with the published milestones nearest to them, the last one and
    Pythia-1.0B.  A missing score is left open."""
    own = {"bbh" if name == "bbh_fewshot" else name: value for name, value in values.items()}
    lines = []
    if own.keys() & set(COMMON_SENSE):
        lines += ["beside what was published, 0-shot:", *_table(tokens, own, COMMON_SENSE, (*TINYLLAMA, BASELINES[0]))]
    if own.keys() & set(PROBLEM_SOLVING):
        lines.append("beside what was published, by Instruct-Eval, which asks and counts otherwise:")
        lines += _table(tokens, own, PROBLEM_SOLVING, SOLVED)
    return lines


def _table(tokens: float, values: Mapping[str, float], tasks: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """rows: the milestones and one other model behind them."""
    own = [values.get(task, math.nan) for task in tasks]
    shown = dict.fromkeys((nearest(tokens, rows[:-1]), *rows[-2:]))
    cells = [("this checkpoint", tokens, own, sum(own) / len(own))]
    for row in shown:
        cells.append((row.name if row is rows[-1] else f"TinyLlama {row.name}", row.tokens, row.scores, row.mean))
    lines = [f"  {'':<18}{'tokens':>9}" + "".join(f"{TITLES[task]:>11}" for task in tasks) + f"{'mean':>8}"]
    for name, seen, scores, mean in cells:
        percents = "".join(f"{_percent(score):>11}" for score in scores)
        lines.append(f"  {name:<18}{amount(seen):>9}{percents}{_percent(mean):>8}")
    return lines + [f"  (TinyLlama {row.name}: {row.note})" for row in shown if row.note]


def amount(tokens: float) -> str:
    """Tokens as the tables of the field write them: 105B, 1.5T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return "" if math.isnan(tokens) else f"{tokens:.0f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"
