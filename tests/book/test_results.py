"""Recorded runs are read, and pictures of results hold the numbers that they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from covidseg.book import results
from covidseg.errors import ArtifactError
from covidseg.evaluation.experiments import VARIANTS, Line, by_system


def line(title: str, *dice: float, interval: tuple[float, float] = (0.1, 0.3)) -> Line:
    micro = np.array([[value, 0.1, 0.1, 0.1, 0.9] for value in dice])
    seeds, auc = tuple(range(len(dice))), np.full(len(dice), np.nan)
    return Line(title, title, seeds, micro, np.array(dice), interval, True, None, auc, None, None)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_drawing_does_not_load_the_training_code() -> None:
    code = "import sys; import covidseg.book.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- recorded runs ----------------------------------------------------------------------------------------------

def record(*slices: int) -> dict:
    return {"command": "covidseg reproduce --data a --seeds 0,1", "results": [{"slices": count} for count in slices],
            "environment": {"covidseg": "0.1.0", "python": "3.12.1", "device": "cpu"}}


def test_origin_says_what_was_run_on_what() -> None:
    assert results.origin(record(7, 7)) == (
        "`covidseg reproduce --data a --seeds 0,1`, measured on 7 full slices; covidseg 0.1.0, Python 3.12.1, cpu")
    assert "on 7 or 9 full slices" in results.origin(record(7, 9))


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "table1-b.json").write_text(json.dumps(record(1)))
    (tmp_path / "table1-a.json").write_text(json.dumps(record(2)))
    (tmp_path / "ablate-a.json").write_text("{}")
    found = results.read_records(folder=tmp_path)
    assert list(found) == ["table1-a", "table1-b"]
    assert found["table1-a"] == record(2)
    assert results.read_records("table2-*", tmp_path) == {}
    (tmp_path / "table1-c.json").write_text("{broken")
    with pytest.raises(ArtifactError, match="table1-c"):
        results.read_records(folder=tmp_path)


def test_the_recorded_runs_of_the_project_are_found() -> None:
    """What they must hold is checked in test_results.py."""
    assert results.results_root().is_dir()
    for found in results.read_records().values():
        assert results.origin(found).startswith("`covidseg reproduce")
        assert set(by_system(found["results"])) == {one["system"] for one in found["results"]}
    for found in results.read_records("ablate-*").values():
        assert {variant["name"] for variant in found["variants"]} <= {*VARIANTS, "more-labels"}


def test_table_of_faults() -> None:
    def row(**other: object) -> dict:
        return {"group": "a", "fault": "empty", "command": "covidseg lungs x -o out", "said": ["error: x: is <empty>."],
                "exit_code": 3, "error": "InputFileError", "met": True, **other}
    faults = [row(), row(group="b"), row(met=False, said=["one|two", "im/*.nii"])]
    found = results.faults_markdown({"faults": faults}, "a")
    assert found.splitlines()[2:] == [
        "| empty<br>`covidseg lungs x -o out` | 3 | x: is &lt;empty>. |",
        "| empty (**not caught**)<br>`covidseg lungs x -o out` | 3 | one\\|two im/\\*.nii |"]
    said = f"error: https://a.example/b.zip: has the md5 {'0123456789abcdef' * 2}, expected {'f' * 64}. Wait."
    assert results.faults_markdown({"faults": [row(said=[said])]}, "a").endswith(
        "| `https://a.example/b.zip`: has the md5 01234567…, expected ffffffff…. Wait. |")



# --- systems ----------------------------------------------------------------------------------------------------

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
    for patients in (True, False):
        legend = results.interval_plot([replace(line("first", 0.2), patients=patients)]).legends[0].get_texts()
        assert ("too narrow" in legend[0].get_text()) is not patients


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


def test_what_gains_say() -> None:
    def record(whole: list[float], other: list[float]) -> dict:
        return {"variants": [{"name": name, "seed": seed, "rows": [
            {"name": "Patch MIL", "micro": {"dice": 0.1}}, {"name": "Segmenter", "micro": {"dice": value}}]}
            for name, values in (("whole", whole), ("without", other)) for seed, value in enumerate(values)]}

    for whole, other, said in (
            ([0.7, 0.8, 0.9], [0.6, 0.7, 0.8], "helps with every seed"),
            ([0.6, 0.7, 0.8], [0.7, 0.8, 0.9], "harms with every seed"),
            ([0.7, 0.8, 0.9], [0.7, 0.7, 0.8], "helps on average: clearly with 2 of 3 seeds, hardly with the rest"),
            ([0.7, 0.7, 0.8], [0.7, 0.8, 0.9], "harms on average: clearly with 2 of 3 seeds, hardly with the rest"),
            ([0.7, 0.8, 0.9], [0.75, 0.7, 0.8], "helps on average: clearly with 2 of 3 seeds, but not with 1"),
            ([0.7, 0.8, 0.9], [0.71, 0.79, 0.9], "makes no clear difference")):
        gained = results.gains(record(whole, other), "without")
        np.testing.assert_allclose(gained, np.subtract(whole, other))
        assert results.gain_in_words(gained) == said
    assert results.gains(record([0.7, 0.8], [0.6]), "without").size == 1, "a seed that only one has is left out"
    assert results.dice_by_seed(record([0.7], [0.6]), "whole", "Patch MIL") == {0: 0.1}
