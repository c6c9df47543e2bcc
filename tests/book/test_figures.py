"""Figures: what they show, that they leave nothing behind, and that the browser works without a kernel."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from book.conftest import SIDE, edge_colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from covidseg.book import figures


@pytest.fixture
def image() -> np.ndarray:
    """A slice in HU with values that say where they are, ``(SIDE, SIDE)``."""
    return np.linspace(-1000, 100, SIDE * SIDE).reshape(SIDE, SIDE)


def outline_colors(figure: Figure) -> set[str]:
    """Colours of all contours in a figure."""
    return set.union(*map(edge_colors, figure.axes))


def luminance(color: str) -> float:
    red, green, blue = mpl.colors.to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_import_changes_no_settings_and_opens_no_figure() -> None:
    code = ("import matplotlib; before = dict(matplotlib.rcParams); import covidseg.book.figures; "
            "from matplotlib import pyplot as plt; "
            "assert {k: v for k, v in matplotlib.rcParams.items() if before[k] != v and k != 'backend'} == {}; "
            "assert plt.get_fignums() == []")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_style_sets_colours_that_differ() -> None:
    with mpl.rc_context():
        figures.use_style()
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(figures.CYCLE)
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)
    # Prediction and truth meet in most figures: they differ in lightness too, not in hue alone.
    assert abs(luminance(figures.COLORS["truth"]) - luminance(figures.COLORS["prediction"])) > 0.3


def test_window_maps_centre_and_ends() -> None:
    values = np.array([-2000, -1350, -600, 150, 500])
    assert figures.window(values, -600, 1500).tolist() == [0, 0, 0.5, 1, 1]


def test_slice_is_upright_with_a_scale_bar_of_the_right_length(image: np.ndarray) -> None:
    _, axes = figures.new_figure()
    figures.draw_slice(axes[0, 0], image, (2.0, 2.0), bar_mm=20)
    picture, bar = axes[0, 0].images[0], axes[0, 0].lines[0]
    bottom, top = axes[0, 0].get_ylim()
    assert bottom > top  # row 0 on top
    assert np.array_equal(picture.get_array(), image)
    assert np.ptp(bar.get_xdata()) == pytest.approx(10)  # 20 mm of 2 mm pixels
    assert axes[0, 0].texts[0].get_text() == "20 mm"
    assert picture.get_clim() == (-1350, 150)


def test_normalised_slice_gets_its_own_range_and_pixels_their_shape(image: np.ndarray) -> None:
    _, axes = figures.new_figure()
    figures.draw_slice(axes[0, 0], image / 1000, (2.0, 1.0))
    assert axes[0, 0].images[0].get_clim() == figures.NORMAL_RANGE
    assert axes[0, 0].get_aspect() == 2.0
    _, axes = figures.new_figure()
    figures.draw_slice(axes[0, 0], image)
    assert len(axes[0, 0].lines) == 0  # no spacing, no scale bar


def test_show_slices_draws_masks_in_their_colours(image: np.ndarray, lung: np.ndarray, lesion: np.ndarray) -> None:
    figure = figures.show_slices([image] * 5, ["a", "b"], [{"lung": lung, "truth": lesion}], columns=3, fill=0.2)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["a", "b", ""]
    assert sum(axes.get_visible() for axes in figure.axes) == 5
    assert outline_colors(figure) == {figures.COLORS["lung"], figures.COLORS["truth"]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lung", "truth"]
    assert plt.get_fignums() == []


def test_empty_mask_draws_nothing(image: np.ndarray, lesion: np.ndarray) -> None:
    figure = figures.show_slices([image], masks=[{"truth": lesion & False}])
    assert outline_colors(figure) == set()


def test_stages_show_maps_in_the_lung_only_and_masks_as_prediction(image: np.ndarray, lung: np.ndarray,
                                                                  lesion: np.ndarray) -> None:
    figure = figures.show_stages(image / 1000, lung, {"map": lesion.astype(float), "mask": lesion}, lesion)
    opacity = figure.axes[1].images[1].get_alpha()
    assert (opacity[~lung] == 0).all()
    assert (opacity[lung] > 0).all()
    assert figures.COLORS["prediction"] in outline_colors(figure)
    without = figures.show_stages(image / 1000, lung, {"map": lesion.astype(float)}, lesion)
    assert "prediction" not in [text.get_text() for text in without.legends[0].get_texts()]


def test_loss_curves_name_their_losses_and_say_when_there_are_none() -> None:
    history = [{"step": 40, "loss": 0.5, "flip": 0.1}, {"step": 80, "loss": 0.4, "flip": 0.1, "lesson": 0.3}]
    panel = figures.loss_curves(history, "classifier").axes[0]
    assert panel.get_title() == "classifier"
    assert {line.get_label(): [line.get_xdata().tolist(), line.get_ydata().tolist()] for line in panel.lines} == {
        "loss": [[40, 80], [0.5, 0.4]], "flip": [[40, 80], [0.1, 0.1]], "lesson": [[80], [0.3]]}
    of_two = [{"member": k, "step": s, "loss": k / s} for k in (1, 2) for s in (1, 2)]
    lines = figures.loss_curves(of_two).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1, 0.5], [2, 1]], "a line for each member"
    assert len({line.get_color() for line in lines}) == 1
    assert "no losses" in figures.loss_curves([]).axes[0].texts[0].get_text()
