"""What a study's rows have to say: sections of words, figures and tables, each there only if the rows support it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from tinyllama_jax.lab import study_plots as plots
from tinyllama_jax.lab import study_plots_ablation as ablation_plots
from tinyllama_jax.lab import study_plots_repetition as repetition_plots
from tinyllama_jax.lab import study_plots_scaling as scaling_plots
from tinyllama_jax.lab import study_tables as tables
from tinyllama_jax.lab.fit.result import missed
from tinyllama_jax.lab.page import table
from tinyllama_jax.lab.study_factors import factors
from tinyllama_jax.lab.study_fits import DRAWS, Repetition, one_recipe, profiles, repetitions, surface
from tinyllama_jax.lab.study_panels import plain
from tinyllama_jax.lab.study_rows import ONE_EPOCH, Study, epochs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FACTORS = 12
SMALL = "Runs far smaller than what one wants to know about: where a line is dashed it is extrapolated."


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file without suffix, and its caption: what is seen, and with what caveat."""

    name: str
    figure: Figure
    caption: str


@dataclass
class Section:
    heading: str
    parts: list[str | Picture] = field(default_factory=list)  # HTML and figures in the order of the page
    findings: list[str] = field(default_factory=list)  # sentences for the top of the page


def sections(study: Study, *, draws: int = DRAWS) -> list[Section]:
    """All that the study supports, in the order of the page."""
    made = [
        _compute(study),
        _isoflop(study, draws),
        _surface(study, draws),
        _repetition(study, draws),
        _ablations(study),
        _serving(study),
        _beyond(study),
        _overlay(study),
        Section("All runs", [tables.runs(study)]),
        Section("Provenance", [tables.provenance(study)]),
    ]
    return [section for section in made if section and any(section.parts)]


def _compute(study: Study) -> Section | None:
    figure = plots.styled(lambda: plots.compute_figure(study))
    if figure is None:
        return None
    caption = (
        "Points: where each run ended; thin lines: its validation on the way, where it was measured. The "
        "envelope is the lower convex hull of the end points. The middle of a run whose learning rate has yet to fall "
        "is not what a run of that length would reach, so curves take no part in it."
    )
    return Section("Loss against compute", [Picture("compute", figure, caption)])


def _isoflop(study: Study, draws: int) -> Section | None:
    found = profiles(study, draws)
    if found is None:
        return None
    section = Section("The best size at each budget")
    caption = (
        "Each colour is one compute budget; the parabola is fitted within a factor of four around its lowest point, "
        "the diamond is its vertex and the bar its 95 % interval. Hollow budgets have no optimum and are left out; "
        "unfinished runs are grey rings and never fitted."
    )
    section.parts.append(Picture("isoflop", plots.styled(lambda: scaling_plots.isoflop_figure(found, study)), caption))
    left_out = [(plain(found.budgets[i].compute), why) for i, why in found.left_out.items()]
    section.parts += [_paragraph(f"{budget} FLOPs has no optimum: {why}") for budget, why in left_out]
    section.parts += [_paragraph(one_recipe(study.fresh)[1]), _paragraph(_seen_again(study))]
    if found.fit is None:
        section.parts.append(_paragraph(f"No power law: {found.failure}."))
        return section
    a, (low, high) = found.fit.constants["N"], found.fit.ci95["N"]
    section.findings.append(f"The best number of parameters grows as C^{a:.3f} (95 %: {low:.3f} to {high:.3f}).")
    caption = (
        "Optima with their intervals and the power law through them; the band is 95 % of the resamples. Dashed: beyond "
        f"the largest budget, up to ten times. {SMALL}"
    )
    section.parts.append(Picture("optima", plots.styled(lambda: scaling_plots.optima_figure(found)), caption))
    section.parts.append(tables.optima(found.fit.derived["optima"]))
    if held := found.fit.quality["held_out"]:
        section.parts.append(_paragraph(f"Fitted without the largest budget the law says {missed(held)}"))
    section.parts += _warnings(w for w in found.fit.warnings if "left out" not in w)
    return section


def _seen_again(study: Study) -> str:
    passes = [each for each in map(epochs, study.fresh) if each > ONE_EPOCH]
    runs = "1 run" if len(passes) == 1 else f"{len(passes)} runs"
    return f"{runs} saw the text up to {max(passes):.3g} times; all of it counts as new" if passes else ""


def _surface(study: Study, draws: int) -> Section | None:
    found, said = surface(study, draws)
    if found is None:
        return Section("Chinchilla's surface", [_paragraph(f"Not fitted: {said}.")]) if said else None
    section, fit = Section("Chinchilla's surface"), found.fit
    law = "<p>L = E + A / N<sup>α</sup> + B / D<sup>β</sup>, Huber loss of log losses, from {} runs; {} resamples.</p>"
    section.parts += [law.format(len(found.points), fit.quality.get("resamples", draws)), _paragraph(said)]
    section.parts.append(_paragraph(_seen_again(study)))
    caption = (
        "Contours of the fitted loss, the runs it was fitted to, and for each budget the best of both (6 N D = C). "
        f"Dashed beyond the largest budget. {SMALL}"
    )
    section.parts.append(Picture("surface", plots.styled(lambda: scaling_plots.surface_figure(found, study)), caption))
    section.parts.append(tables.constants(fit.constants, fit.ci95))
    held = fit.quality.get("held_out") or {}
    error = ""
    if held.get("points", 0) > 0:
        error = (
            f" A fit without them misses them by {held['mean_relative_error']:.2%} on average "
            f"({held['largest_relative_error']:.2%} at most), at {held['compute_ratio']:.2g} times the compute."
        )
        section.findings.append(
            f"A surface fitted without the largest budget predicts its loss to {held['mean_relative_error']:.2%}."
        )
    caption = (
        "Measured over fitted loss; a trend along an axis means that the law's form is wrong there. Below right: "
        f"squares are the largest budget, orange and hollow where it was held out of the fit.{error}"
    )
    section.parts.append(Picture("residuals", plots.styled(lambda: scaling_plots.residuals_figure(found)), caption))
    pairs = plots.styled(lambda: scaling_plots.pairs_figure(found))
    if pairs is not None:
        caption = (
            "Each point is one resample of the runs (those of one trunk together), the red lines are the fit. Where "
            "points lie along a ridge only a combination of the two constants is known: do not quote one of them "
            "alone. The condition number is that of the correlations; 1 would be independent."
        )
        section.parts.append(Picture("pairs", pairs, caption))
    section.parts += _warnings(fit.warnings)
    return section


def _repetition(study: Study, draws: int) -> Section | None:
    found = repetitions(study, draws)
    gap = plots.styled(lambda: repetition_plots.gap_figure(study))
    if not found and gap is None:
        return None
    section = Section("Repeated data")
    figure, said = None, ""
    if found:

        def make() -> Figure | None:
            nonlocal said
            figure, said = repetition_plots.epochs_figure(found, study)
            return figure

        figure = plots.styled(make)
    if figure is not None:
        caption = (
            "Final validation loss against passes over the same text. Dotted: if every repeat were as good as new "
            "text; dashed: if repeats were worth nothing. What repetition costs depends on the regularisation: it "
            f"holds for the weight decay that stands above. {said}"
        )
        section.parts.append(Picture("epochs", figure, caption.strip()))
    fitted = [each for each in found if each.found is not None]
    section.parts += [
        _paragraph(f"{_decay(each)}no law is fitted: {each.failure}.") for each in found if each.found is None
    ]
    for i, each in enumerate(fitted):
        section.parts += _law(each, "" if len(fitted) == 1 else f"-{i + 1}", section)
    if gap is not None:
        caption = (
            "Left: loss on fresh text less loss on text it was trained on, at the end. Right: what was lost between "
            "the best validation and the last: above 0 the run went on for too long."
        )
        if not any(k.startswith("gap.") for row in study.finished for k in row):
            caption = "What was lost between the best validation and the last: above 0 the run went on for too long."
        section.parts.append(Picture("gap", gap, caption))
    return section


def _law(each: Repetition, suffix: str, section: Section) -> list[str | Picture]:
    parts: list[str | Picture] = []
    laws = plots.styled(lambda: repetition_plots.laws_figure(each))
    if laws is not None:
        caption = (
            "Three laws fitted to the same runs: effective data (Muennighoff et al.) can only fall; the penalty and "
            "the saturating law may rise again."
        )
        parts.append(Picture(f"laws{suffix}", laws, _decay(each) + caption))
    rows = []
    for name, row in each.found.quality["compared"].items():
        errors = [row.get(what, {}).get("mean_relative_error", math.nan) for what in ("most_epochs", "largest_budget")]
        told = [f"{error:.2%}" if math.isfinite(error) else "–" for error in errors]
        rows.append([name, str(row["constants"]), f"{row['r2']:.4f}", *told])
    header = ["law", "constants", "R²", "error where most epochs are left out", "and the largest budget"]
    parts.append(table(header, rows))
    profile = plots.styled(lambda: repetition_plots.profile_figure(each))
    doubtful = [warning for warning in each.found.warnings if "not identified" in warning]
    if profile is not None:
        caption = (
            "How much worse the fit becomes, in twice the log likelihood, when one constant is held and the other is "
            "fitted again. Shaded: where it is as good, at 95 % (below the red line)."
        )
        caption += " Shading up to the edge: these runs do not identify the constant." if doubtful else ""
        parts.append(Picture(f"profile{suffix}", profile, _decay(each) + caption))
    parts.append(tables.constants(each.found.constants, each.found.ci95))
    parts += _warnings(each.found.warnings)
    r_d = each.found.constants["R_D"]
    if not any("R_D" in warning for warning in doubtful):
        section.findings.append(f"{_decay(each)}repeats lose their worth with R_D* = {r_d:.3g}.")
    else:
        section.findings.append(f"{_decay(each)}R_D* is not identified by these runs.")
    return parts


def _ablations(study: Study) -> Section | None:
    found = factors(study.finished)
    if not found:
        return None
    section = Section("Ablations")
    section.parts.append(
        "<p>Runs that are equal but for one field and the seed. The first value of each table is what the others are "
        "compared with: seed by seed where seeds match (paired t-test), by Welch's test otherwise.</p>"
    )
    for factor in found[:MOST_FACTORS]:
        section.parts.append(f"<h3>{escape(factor.name)}</h3>" + tables.ablation(factor))
    if len(found) > MOST_FACTORS:
        section.parts.append(_paragraph(f"{len(found) - MOST_FACTORS} more fields vary and are not listed."))
    return section


def _serving(study: Study) -> Section | None:
    figure = plots.styled(lambda: ablation_plots.serving_figure(study))
    if figure is None:
        return None
    caption = (
        "Mean loss over the seeds with its standard error, against what the variant costs to serve. On the front no "
        "other variant is better in both. Speeds hold for the device, batch and context that were measured; the "
        "cache's bytes hold everywhere."
    )
    return Section("Loss against what serving costs", [Picture("serving", figure, caption)])


def _beyond(study: Study) -> Section | None:
    section = Section("Beyond the length of training")
    figure = plots.styled(lambda: ablation_plots.beyond_figure(study))
    if figure is not None:
        caption = (
            "Mean loss over windows of each length, standard error over the seeds; the dashed line is the length of "
            "training. A low mean beyond it does not show that the far text is used: look at the loss by position."
        )
        section.parts.append(Picture("beyond", figure, caption))
    figure = plots.styled(lambda: ablation_plots.position_figure(study))
    if figure is not None:
        caption = "Loss by position in the longest window, mean over the seeds. A rise behind the dashed line is what the method fails to extend."  # noqa: E501
        section.parts.append(Picture("position", figure, caption))
    return section


def _overlay(study: Study) -> Section | None:
    said = ""

    def make() -> Figure | None:
        nonlocal said
        figure, said = plots.overlay_figure(study)
        return figure

    figure = plots.styled(make)
    if figure is None:
        return None
    caption = f"One colour for runs that differ in their seeds only. The beginning may leave the picture. {said}"
    return Section("The runs over each other", [Picture("overlay", figure, caption.strip())])


def _warnings(warnings: Iterable[str]) -> list[str]:
    items = "".join(f"<li>{escape(_sentence(warning))}</li>" for warning in warnings)
    return [f'<ul class="notes">{items}</ul>'] if items else []


def _paragraph(text: str) -> str:
    return f"<p>{escape(_sentence(text))}</p>" if text else ""


def _sentence(text: str) -> str:
    text = text.rstrip(".")
    return text[:1].upper() + text[1:] + "."


def _decay(each: Repetition) -> str:
    return f"Weight decay {each.weight_decay:g}: " if math.isfinite(each.weight_decay) else ""
