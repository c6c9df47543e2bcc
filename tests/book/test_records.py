"""Recorded runs are read, summed up over seeds and shown with the digits that they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from covidseg.book.records import (
    ablation_markdown,
    faults_markdown,
    origin,
    over_seeds,
    read_records,
    results_root,
    seeds_markdown,
)
from covidseg.errors import ArtifactError
from covidseg.evaluation.experiments import VARIANTS, by_system
from covidseg.evaluation.metrics import NAMES


def row(name: str, dice: float | None, macro: float) -> dict:
    figures = dict.fromkeys(NAMES, 0.5)
    return {"name": name, "micro": {**figures, "dice": dice}, "macro": {**figures, "dice": macro}}


def result(*dices: float | None, seed: int = 0) -> dict:
    return {"system": "extended", "seed": seed, "slices": 7,
            "rows": [row(f"stage {k}", dice, 0.25) for k, dice in enumerate(dices)]}


def record(*results: dict) -> dict:
    return {"command": "covidseg reproduce --data a --seeds 0,1", "results": list(results),
            "environment": {"covidseg": "0.1.0", "python": "3.12.1", "device": "cpu"}}


def test_figures_over_seeds_keep_their_rows() -> None:
    found = over_seeds([result(0.1, 0.7), result(0.3, None)])
    np.testing.assert_allclose(found["stage 0"][:, 0], [0.1, 0.3])
    np.testing.assert_allclose(found["stage 1"][:, 0], [0.7, np.nan])
    np.testing.assert_allclose(over_seeds([result(0.1)], "macro")["stage 0"], [[0.25, 0.5, 0.5, 0.5, 0.5]])


def test_table_over_seeds() -> None:
    lines = seeds_markdown([result(0.1, None), result(0.3, None)]).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| stage 0 | 0.200 ± 0.141 | " + " | ".join(["0.500 ± 0.000"] * 4) + " | 0.250 ± 0.000 |"
    assert lines[3].startswith("| stage 1 | – |")
    assert {line.count("|") for line in lines} == {8}


def test_table_of_an_ablation() -> None:
    variants = [{"name": "whole", "title": "all", "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", 0.7, 0.6)]},
                {"name": "one-way", "title": "one way",
                 "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", None, 0.6)]}]
    lines = ablation_markdown([{"variants": variants[:1]}, {"variants": variants[1:]}]).splitlines()
    assert lines[2:] == ["| all: Grad-CAM | 0.400 | 0.500 | 0.500 | 0.300 |",
                         "| all: Segmenter | 0.700 | 0.500 | 0.500 | 0.600 |",
                         "| one way: Segmenter | – | 0.500 | 0.500 | 0.600 |"]


def test_table_of_faults() -> None:
    def row(**other: object) -> dict:
        return {"group": "a", "fault": "empty", "command": "covidseg lungs x -o out", "said": ["error: x: is <empty>."],
                "exit_code": 3, "error": "InputFileError", "met": True, **other}
    found = faults_markdown({"faults": [row(), row(group="b"), row(met=False, said=["one|two", "im/*.nii"])]}, "a")
    assert found.splitlines()[2:] == [
        "| empty<br>`covidseg lungs x -o out` | 3 | x: is &lt;empty>. |",
        "| empty (**not caught**)<br>`covidseg lungs x -o out` | 3 | one\\|two im/\\*.nii |"]


def test_addresses_and_checksums_in_the_table_of_faults() -> None:
    said = f"error: https://a.example/b.zip: has the md5 {'0123456789abcdef' * 2}, expected {'f' * 64}. Wait."
    row = {"group": "a", "fault": "changed", "command": "x", "said": [said], "exit_code": 5, "met": True}
    assert faults_markdown({"faults": [row]}, "a").endswith(
        "| `https://a.example/b.zip`: has the md5 01234567…, expected ffffffff…. Wait. |")


def test_origin_says_what_was_run_on_what() -> None:
    assert origin(record(result(0.1), result(0.2, seed=1))) == (
        "`covidseg reproduce --data a --seeds 0,1`, measured on 7 full slices; covidseg 0.1.0, Python 3.12.1, cpu")
    assert "on 7 or 9 full slices" in origin(record(result(0.1), {**result(0.2), "slices": 9}))


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "table1-b.json").write_text(json.dumps(record(result(0.1))))
    (tmp_path / "table1-a.json").write_text(json.dumps(record(result(0.2))))
    (tmp_path / "ablate-a.json").write_text("{}")
    found = read_records(folder=tmp_path)
    assert list(found) == ["table1-a", "table1-b"]
    assert found["table1-a"] == record(result(0.2))
    assert read_records("table2-*", tmp_path) == {}
    (tmp_path / "table1-c.json").write_text("{broken")
    with pytest.raises(ArtifactError, match="table1-c"):
        read_records(folder=tmp_path)


def test_the_recorded_runs_of_the_project_are_found() -> None:
    """What they must hold is checked in test_results.py."""
    assert results_root().is_dir()
    for found in read_records().values():
        assert origin(found).startswith("`covidseg reproduce")
        assert set(by_system(found["results"])) == {one["system"] for one in found["results"]}
    for found in read_records("ablate-*").values():
        assert {variant["name"] for variant in found["variants"]} <= {*VARIANTS, "more-labels"}
