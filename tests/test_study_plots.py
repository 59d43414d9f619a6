"""The figures of a study: what is drawn, what is left out, and what it is called."""

import numpy as np
import synthetic_study as made

from tinyllama_jax.lab import study_panels, study_plots, study_plots_ablation, study_plots_repetition
from tinyllama_jax.lab.study_rows import Study


def study(rows):
    return Study("s", rows, made.Path("nowhere"))


def test_what_is_not_drawn_is_named(tmp_path):
    rows = [made.row(f"run-{i:02d}", 1e5, 1e6, 3.0 - i / 100, seed=i) for i in range(30)]
    made.write_directories(tmp_path, rows)
    figure, said = study_plots.overlay_figure(Study("s", rows, tmp_path))
    assert figure is not None and said.startswith("24 of 30 runs are drawn") and said.count("run-") == 6


def test_what_was_measured_before_the_first_step_is_no_line_on_a_logarithmic_axis(tmp_path):
    rows = [made.row(f"run-{i}", 1e5, 1e6 * 10**i, 3.0 - i / 10) for i in range(3)]
    made.write_directories(tmp_path, rows)
    figure, _ = study_plots.overlay_figure(Study("s", rows, tmp_path))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and len(axes.lines) >= 3
    assert all((line.get_xdata() > 0).all() for line in axes.lines[:3])


def test_text_that_hardly_came_again_makes_no_section_about_repetition():
    rows = made.isoflop()
    for each in rows:
        each |= {"epochs": 1.4, "best_loss": each["loss"]}
    assert study_plots_repetition.gap_figure(study(rows)) is None
    rows[0]["epochs"] = 3.0
    assert study_plots_repetition.gap_figure(study(rows)) is not None


def test_variants_are_named_by_what_is_unusual_in_them():
    found = study_plots_ablation.variants(study(made.rope()).finished)
    labels = [each.label for each in found]
    assert len(set(labels)) == len(labels) == 4, labels
    assert labels[0] == "rope.kind default" and "rope.kind none" in labels, labels
    assert all("theta" not in label for label in labels if "rope.kind none" in label)


def test_the_envelope_is_the_lower_convex_hull():
    flops = np.array([1e12, 1e12, 2e12, 4e12, 4.05e12, 8e12, 16e12])
    loss = np.array([3.2, 3.0, 2.9, 2.5, 2.6, 2.4, 2.7])
    hull = study_plots.envelope(flops, loss)
    assert hull[:, 1].tolist() == [3.0, 2.5, 2.4], "2.9 lies above the line, 2.7 is behind the lowest"


def test_ticks_are_round_and_few():
    assert study_panels.nice_ticks(1e12, 1e14, 7) == [1e12, 2e12, 5e12, 1e13, 2e13, 5e13, 1e14]
    for low, high in ((1.0, 1.2), (3.1e12, 3.6e12), (1.0, 1e9), (0.02, 4.0)):
        ticks = study_panels.nice_ticks(low, high, 6)
        assert 2 <= len(ticks) <= 6 and low <= min(ticks) and max(ticks) <= high
    assert [study_panels.plain(x) for x in (1e12, 2.5e13, 0)] == ["1e12", "2.5e13", "0"]


def test_the_pareto_front():
    spots = [(1, 3.0), (2, 2.9), (2, 3.1), (3, 3.2)]
    assert study_plots_ablation.pareto(spots, more_is_better=True) == [(3, 3.2), (2, 2.9)]
    assert study_plots_ablation.pareto(spots, more_is_better=False) == [(1, 3.0), (2, 2.9)]


def test_a_common_beginning_of_names_is_left_out():
    assert study_plots.without_common(["gqa-kv8-s0", "gqa-kv8-s1"]) == ["s0", "s1"]
    assert study_plots.without_common(["a-b", "c-b"]) == ["a-b", "c-b"] and study_plots.without_common(["x"]) == ["x"]
