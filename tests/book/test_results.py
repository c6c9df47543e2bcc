"""Figures of results hold the numbers that they are given, each where a reader looks for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from covidseg.book import figures, results
from covidseg.evaluation.experiments import Line
from covidseg.evaluation.metrics import NAMES

SIDE = 20


@pytest.fixture
def lung() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[2:18, 2:18] = True
    return mask


@pytest.fixture
def lesion() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[5:10, 5:10] = True
    return mask


def line(title: str, *dice: float, interval: tuple[float, float] = (0.1, 0.3)) -> Line:
    micro = np.array([[value, 0.1, 0.1, 0.1, 0.9] for value in dice])
    seeds = tuple(range(len(dice)))
    return Line(title, title, seeds, micro, np.array(dice), interval, np.full(len(dice), np.nan), None, None)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_drawing_does_not_load_the_training_code() -> None:
    code = "import sys; import covidseg.book.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_stage_bars_hold_the_figures_of_the_rows() -> None:
    half, empty = dict.fromkeys(NAMES, 0.5), dict.fromkeys(NAMES)
    rows = [{"name": "one", "micro": half, "macro": empty}, {"name": "two", "micro": half, "macro": half}]
    figure = results.stage_bars(rows)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5] * 6
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["one", "two"]
    assert "micro" in figure.axes[0].get_xlabel()
    macro = results.stage_bars(rows, average="macro")
    assert [bar.get_width() for bar in macro.axes[0].patches] == [0.0, 0.5] * 3


def test_grid_has_a_row_for_each_system_and_a_column_for_each_slice(lung: np.ndarray, lesion: np.ndarray) -> None:
    image, heat = np.zeros((SIDE, SIDE)), lesion.astype(float)
    figure = results.system_grid([image] * 2, [lung] * 2, [lesion] * 2, ["a", "b"],
                                 {"mask": [lesion, lesion & False], "map": [heat, heat]},
                                 {"mask": ["0.50", "0.00"]})
    panels = np.array(figure.axes[:6]).reshape(3, 2)
    assert [panel.get_title() for panel in panels.flat] == ["a", "b", "", "", "", ""]
    assert texts(figure) == ["0.50", "0.00"]
    assert [panel.get_ylabel() for panel in panels.flat] == ["slice and truth", "", "mask", "", "map", ""]
    colors = [{to_hex(c).upper() for part in panel.collections for c in np.atleast_2d(part.get_edgecolor())}
              for panel in panels.flat]
    truth, found = figures.COLORS["truth"], figures.COLORS["prediction"]
    assert colors == [{truth}, {truth}, {truth, found}, {truth}, {truth}, {truth}]
    assert (panels[2, 0].images[1].get_alpha()[~lung] == 0).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "prediction"]
    assert plt.get_fignums() == []


def test_grid_of_maps_alone_names_no_prediction(lung: np.ndarray, lesion: np.ndarray) -> None:
    figure = results.system_grid([lesion * 1.0], [lung], [lesion], ["a"], {"map": [lesion * 1.0]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth"]


def test_intervals_seeds_and_published_figures_stand_in_their_rows() -> None:
    figure = results.interval_plot([line("first", 0.2, 0.25), line("second", 0.6, interval=(0.5, 0.7))],
                                   {"second": 0.74})
    bar, dots, _, dot, published = figure.axes[0].lines
    assert tuple(bar.get_xdata()) == (0.1, 0.3)
    assert dots.get_xdata().tolist() == [0.2, 0.25]
    assert dots.get_ydata().tolist() == [0, 0]
    assert (dot.get_xdata().tolist(), dot.get_ydata().tolist()) == ([0.6], [1])
    assert (list(published.get_xdata()), list(published.get_ydata())) == ([0.74], [1])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["first", "second"]
    assert len(results.interval_plot([line("first", 0.2)]).axes[0].lines) == 2, "nothing published"


def test_reliability_diagram_leaves_out_empty_bins() -> None:
    sums = np.array([[10.0, 20, 100], [0, 0, 0], [8, 5, 10]])  # sum of p, lesion, pixels
    left, right = results.reliability_diagram({"ours": sums, "masks": sums}).axes
    diagonal, first, second = left.lines
    assert first.get_xdata() == pytest.approx([0.1, 0.8])
    assert first.get_ydata() == pytest.approx([0.2, 0.5])
    assert [diagonal.get_label(), first.get_label(), second.get_label()] == ["calibrated", "ours", "masks"]
    assert right.patches[0].get_data().values.tolist() == [100, 0.5, 10]


def test_size_table_shows_every_bin() -> None:
    figure = results.size_table({"a": np.array([0.1, 0.2, np.nan]), "b": np.array([0.7, 0.8, np.nan])},
                                [100, 2000], np.array([1, 12, 0]))
    panel = figure.axes[0]
    assert texts(figure) == ["0.10", "0.20", "–", "0.70", "0.80", "–"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in panel.get_xticklabels()] == [
        "below 100\n1 slice", "100 to 2,000\n12 slices", "from 2,000\n0 slices"]


def test_operating_curves_run_through_the_counts() -> None:
    counts = np.array([[10, 90, 0, 0], [8, 8, 2, 82], [0, 0, 10, 90]])
    figure = results.operating_curves({"a": counts, "b": 2 * counts}, {"a": counts[1]}, {"paper": (0.85, 0.65)})
    panel = figure.axes[0]
    drawn = {drawn.get_label(): drawn for drawn in panel.lines if not drawn.get_label().startswith("_")}
    assert list(drawn) == ["a", "b", "published: paper"]
    assert drawn["a"].get_xdata()[:2].tolist() == [1, 0.8]
    assert drawn["a"].get_ydata()[:2].tolist() == [0.1, 0.5]
    assert np.isnan(drawn["a"].get_ydata()[2]), "nothing marked has no PPV"
    assert [[list(one.get_xdata()), list(one.get_ydata())] for one in panel.lines if one.get_marker() == "o"] == [
        [[0.8], [0.5]]]
    mark = drawn["published: paper"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([0.85], [0.65])
    halves = next(one for one in panel.lines if one.get_color() == "#bbbbbb")
    x, y = halves.get_xdata(), halves.get_ydata()
    np.testing.assert_allclose(2 * x * y / (x + y), 0.4, err_msg="lines of equal Dice")
