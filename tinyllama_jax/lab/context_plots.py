"""The figures that tell whether a long context works, from what `eval --passkey` and `eval --positions` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tinyllama_jax.evaluate import records
from tinyllama_jax.lab.draw import GREY, INK, PALETTE, STYLE, palette, shorten
from tinyllama_jax.lab.runs import Run
from tinyllama_jax.lab.study_panels import DASHED, DOTTED, WIDTH, grid, key, level, ordered_colors, room

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # treatment -> length -> what was measured

HUES = {"as-trained": INK, "linear": palette(0), "ntk": palette(1), "yarn": palette(2)}
TUNED = ", fine-tuned"  # behind a treatment's name
MOST_PANELS, MOST_NUMBERS, MOST_COLUMNS = 12, 6, 4
SHARES = LinearSegmentedColormap.from_list("shares", ["#f4f6f8", PALETTE[0]])


def figures(value: Mapping[str, Any]) -> dict[str, Figure]:
    """Of one result as evaluate/longer.py makes it; also of several treatments that were joined by their names."""
    trained, about = value["trained_tokens"], value["provenance"]
    made = {}
    with matplotlib.rc_context(STYLE):
        if "passkey" in value:
            made["passkey"] = passkey_figure(value["passkey"], trained, about["passkey"]["choices"])
        if "positions" in value:
            made["positions"] = positions_figure(value["positions"], trained)
    return made


def kept(run: Run, section: str) -> dict[str, Any] | None:
    """The run's result of its newest step that has one."""
    found = [r for r in records.read(run.directory) if r["label"] == section and isinstance(r.get(section), dict)]
    return found[-1] if found else None


def of_run(run: Run, section: str) -> Figure | None:
    value = kept(run, section)
    return figures(value)[section] if value else None


def passkey_figure(found: Found, trained: int, choices: int) -> Figure:
    """Depth by length, a panel for each treatment: the share of keys said and of keys found likeliest, and the margin.

    Up to the length of training all treatments are one, and show what was measured as trained.
    """
    names = list(found)[:MOST_PANELS]
    lengths = sorted({int(length) for at in found.values() for length in at})
    depths = sorted({depth for at in found.values() for cell in at.values() for depth in cell["depths"]}, key=float)
    blocks = [
        ("exact", "keys said, digit by digit, %"),
        ("accuracy", f"keys likelier than {choices - 1} wrong ones, %; chance is {100 / choices:.3g} %"),
        ("margin", "nats by which a key is likelier where it was told than where others were"),
    ]
    highest = max(at["margin"] for cell in found.values() for n in cell.values() for at in n["depths"].values())
    columns = min(MOST_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    left, gap, heading, between = 0.72, 0.28, 0.6, 0.5  # inches
    width = (WIDTH - left - 0.25 - gap * (MOST_COLUMNS - 1)) / MOST_COLUMNS
    width *= 1 if columns > 2 else 1.4
    height = max(0.26 * len(depths), 1.0)
    block_height = heading + rows * height + (rows - 1) * between
    total = len(blocks) * (block_height + between) + 0.1
    figure = Figure(figsize=(WIDTH, total))
    for block, (measure, title) in enumerate(blocks):
        top = total - block * (block_height + between)
        figure.text(0.14 / WIDTH, (top - 0.26) / total, title, weight="bold", size=10, color=INK)
        for i, name in enumerate(names):
            row, column = divmod(i, columns)
            x, y = left + column * (width + gap), top - heading - row * (height + between) - height
            axes = figure.add_axes((x / WIDTH, y / total, width / WIDTH, height / total))
            axes.grid(False)
            axes.set_title(shorten(name, 24), loc="left", size=9, color=INK, pad=4)
            values = np.full((len(depths), len(lengths)), np.nan)
            for j, length in enumerate(lengths):
                cell = found[name].get(str(length))
                if cell is None and length <= trained and TUNED not in name:
                    cell = found.get("as-trained", {}).get(str(length))
                for k, depth in enumerate(depths):
                    if cell is not None and depth in cell["depths"]:
                        values[k, j] = cell["depths"][depth][measure]
            _heat(axes, values, *((1.0, 100, 0) if measure != "margin" else (max(0.5, highest), 1, 2)))
            axes.set_yticks(range(len(depths)), [f"{float(d):g}" for d in depths] if column == 0 else [])
            axes.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths], size=8)
            axes.tick_params(length=0)
            border = sum(n <= trained for n in lengths)
            if 0 < border < len(lengths):
                axes.axvline(border - 0.5, color=INK, lw=1.0, ls=DASHED)
            if column == 0:
                axes.set_ylabel("depth")
            if block == len(blocks) - 1 and row == rows - 1 and column == 0:
                dashed = "; dashed: the length of training" if 0 < border < len(lengths) else ""
                axes.set_xlabel("tokens in the row" + dashed, loc="left")
    return figure


def _heat(axes, values: np.ndarray, highest: float, scale: float, digits: int) -> None:
    """A map from 0 to `highest`, with its numbers times `scale` while there is room, and a dash where there is none."""
    axes.imshow(np.ma.masked_invalid(values), cmap=SHARES, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    if values.shape[1] > MOST_NUMBERS:
        return
    for (k, j), value in np.ndenumerate(values):
        said = f"{scale * value:.{digits}f}" if np.isfinite(value) else "–"
        dark = value > 0.55 * highest
        axes.text(j, k, said, ha="center", va="center", size=8, color="white" if dark else INK)


def positions_figure(found: Found, trained: int) -> Figure:
    """Loss over the position in the window: of several treatments a panel for each length beyond that of training, of
    a single one a line for each length."""
    lengths = sorted({int(length) for at in found.values() for length in at})
    if len(found) == 1:
        [(name, at)] = found.items()
        look = dict(zip(lengths, ordered_colors(len(lengths)), strict=True))
        texts = [f"window of {n:,}" for n in lengths]
        figure, [axes] = grid(
            [f"loss by position: {name}"], columns=1, height=3.0, right=room([*texts, "trained length"])
        )
        heights = [_curve(axes, at[str(n)], n, color=look[n]) for n in lengths]
        entries = [(text, {"color": look[n]}) for text, n in zip(texts, lengths, strict=True)]
        _finish([axes], [heights], [max(lengths)], trained, entries)
        return figure
    shown = [n for n in lengths if n > trained][-MOST_PANELS:] or lengths[-1:]
    names = list(found)
    columns = min(2, len(shown))
    shorter = f"window of {trained:,}"
    figure, panels = grid(
        [f"loss by position, window of {n:,}" for n in shown],
        columns=columns,
        height=2.4 if columns == 2 else 3.0,
        right=room([*names, shorter, "trained length"]),
        gap=0.65,
    )
    whole = found.get("as-trained", {}).get(str(trained))
    both = any(TUNED in name for name in names) and not all(TUNED in name for name in names)
    looks = {
        name: {"color": _hue(name, i), "ls": DOTTED if both and TUNED not in name else "-"}
        for i, name in enumerate(names)
    }
    all_heights = []
    for axes, n in zip(panels, shown, strict=True):
        heights = [_curve(axes, found[name][str(n)], n, **looks[name]) for name in names if str(n) in found[name]]
        if whole and n > trained:
            heights.append(_curve(axes, whole, trained, color=GREY, lw=2.6, alpha=0.5))
        all_heights.append(heights)
    entries = [(name, looks[name]) for name in names]
    if whole and max(shown) > trained:
        entries.append((shorter, {"color": GREY, "lw": 2.6, "alpha": 0.5}))
    _finish(panels, all_heights, shown, trained, entries, columns)
    return figure


def _curve(axes, cell: Mapping[str, Any], length: int, **look) -> np.ndarray:
    """Draws the loss of each part of the window at its middle; -> the losses."""
    losses = np.array([np.nan if x is None else x for x in cell["by_position"]], float)
    edges = np.linspace(0, length, len(losses) + 1)
    axes.plot((edges[1:] + edges[:-1]) / 2, losses, **{"lw": 1.5, **look})
    return losses


def _finish(panels, heights: Sequence, lengths: Sequence[int], trained: int, entries: list, columns: int = 1) -> None:
    for axes, length in zip(panels, lengths, strict=True):
        level(axes, np.concatenate([curve for those in heights for curve in those]))  # one scale for all panels
        axes.set_xlim(0, length)
        axes.set_xlabel("position in the window, tokens", loc="left")
        if 0 < trained < length:
            axes.axvline(trained, color=INK, lw=0.9, ls=DASHED)
    if trained < max(lengths):
        entries = [*entries, ("trained length", {"color": INK, "ls": DASHED, "lw": 0.9})]
    key(panels[columns - 1], entries)


def _hue(name: str, index: int) -> str:
    return HUES.get(name.removesuffix(TUNED)) or palette(index)


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"
