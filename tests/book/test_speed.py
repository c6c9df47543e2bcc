"""Pictures of benchmarks draw what the record holds."""

from __future__ import annotations

import numpy as np

from covidseg.book.results import growth_curves, ratio_bars, roofline_bars, scaling_curves

ROWS = [{"task": "reading", "other_name": "a library", "ratio": 4.0, "goal": 3},
        {"task": "training", "other_name": "a plain loop", "ratio": 0.9, "goal": None}]


def test_ratios_are_bars_with_their_goal() -> None:
    panel = ratio_bars(ROWS).axes[0]
    assert [patch.get_width() for patch in panel.patches] == [4.0, 0.9]
    assert [text.get_text() for text in panel.texts] == ["4.0", "0.9"]
    goals = [line for line in panel.lines if line.get_label() == "goal"]
    assert [list(line.get_xdata()) for line in goals] == [[3, 3]]
    assert panel.get_xscale() == "log"
    assert panel.get_xlim()[0] < 0.9


def test_growth_is_drawn_as_multiples_beside_the_linear_line() -> None:
    def rows(factor: float) -> list[dict]:
        return [{"slices": 12 * k, "side": 256, "seconds": 0.5 * k ** factor, "memory_mb": 7.0 * k} for k in (1, 2, 4)]
    points = {"one": {"slices": rows(1), "pixels": rows(1)}, "two": {"slices": rows(0.5), "pixels": rows(2)}}
    left, right = growth_curves(points).axes
    assert [line.get_label() for line in left.lines] == ["one", "two", "linear growth"]
    np.testing.assert_allclose(left.lines[1].get_ydata(), [1, 2 ** 0.5, 2])
    np.testing.assert_allclose(right.lines[1].get_ydata(), [1, 4, 16])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["12", "24", "48"]
    memory = growth_curves(points, "memory_mb").axes[0]
    np.testing.assert_allclose(memory.lines[0].get_ydata(), [1, 1.4, 2.8])  # 7, 14 and 28 MB, the first drawn as 10
    assert "memory" in memory.get_ylabel()


def test_roofline_bars_add_up_to_the_step() -> None:
    panel = roofline_bars([{"stage": "a", "step_ms": 100.0, "bound_ms": 40.0, "arithmetic_ms": 30.0},
                           {"stage": "b", "step_ms": 50.0, "bound_ms": 20.0, "arithmetic_ms": 5.0}]).axes[0]
    widths = np.array([patch.get_width() for patch in panel.patches]).reshape(3, 2)
    np.testing.assert_allclose(widths.sum(axis=0), [100, 50])
    np.testing.assert_allclose(widths[2], [60, 30])


def test_scaling_is_against_one_process() -> None:
    scaling = {"cores": 2, "prediction": [{"processes": 1, "seconds": 30.0}, {"processes": 4, "seconds": 15.0}]}
    panel = scaling_curves(scaling).axes[0]
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines["prediction (parts)"].get_ydata()) == [1, 2]
    assert "2 cores" in lines
