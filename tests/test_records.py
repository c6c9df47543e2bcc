"""Recorded runs are read, summed up over seeds and shown with the digits that they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from covidseg.ablate import VARIANTS
from covidseg.errors import ArtifactError
from covidseg.records import (
    FIGURES,
    ablation_markdown,
    over_seeds,
    read_records,
    results_root,
    seconds,
    seeds_markdown,
    spread,
)


def row(name: str, dice: float | None, macro: float) -> dict:
    figures = dict.fromkeys(FIGURES, 0.5)
    return {"name": name, "micro": {**figures, "dice": dice}, "macro": {**figures, "dice": macro}}


def record(*dices: float | None) -> dict:
    return {"rows": [row(f"stage {k}", dice, 0.25) for k, dice in enumerate(dices)],
            "run": {"seconds": {"a": 1.5, "b": 2.0}}}


def test_figures_over_seeds_keep_their_rows() -> None:
    found = over_seeds([record(0.1, 0.7), record(0.3, None)])
    np.testing.assert_allclose(found["stage 0"][:, 0], [0.1, 0.3])
    np.testing.assert_allclose(found["stage 1"][:, 0], [0.7, np.nan])
    np.testing.assert_allclose(over_seeds([record(0.1)], "macro")["stage 0"], [[0.25, 0.5, 0.5, 0.5, 0.5]])


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread(np.array([0.1, 0.3])) == "0.200 ± 0.141"
    assert spread(np.array([0.1, np.nan])) == "0.100"
    assert spread(np.array([np.nan])) == "–"


def test_table_over_seeds() -> None:
    lines = seeds_markdown([record(0.1, None), record(0.3, None)]).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| stage 0 | 0.200 ± 0.141 | " + " | ".join(["0.500 ± 0.000"] * 4) + " | 0.250 ± 0.000 |"
    assert lines[3].startswith("| stage 1 | – |")
    assert {line.count("|") for line in lines} == {8}


def test_table_of_an_ablation() -> None:
    variants = [{"name": "whole", "title": "all", "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", 0.7, 0.6)]},
                {"name": "one-way", "title": "one way",
                 "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", None, 0.6)]}]
    lines = ablation_markdown({"variants": variants}).splitlines()
    assert lines[2:] == ["| all: Grad-CAM | 0.400 | 0.500 | 0.500 | 0.300 |",
                         "| all: Segmenter | 0.700 | 0.500 | 0.500 | 0.600 |",
                         "| one way: Segmenter | – | 0.500 | 0.500 | 0.600 |"]


def test_seconds_add_up() -> None:
    assert seconds(record()) == 3.5


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "reproduce-b.json").write_text(json.dumps(record(0.1)))
    (tmp_path / "reproduce-a.json").write_text(json.dumps(record(0.2)))
    (tmp_path / "ablate-a.json").write_text("{}")
    assert list(read_records(folder=tmp_path)) == ["reproduce-a", "reproduce-b"]
    (tmp_path / "reproduce-c.json").write_text("{broken")
    with pytest.raises(ArtifactError, match="reproduce-c"):
        read_records(folder=tmp_path)


def test_the_recorded_runs_of_the_project_are_found() -> None:
    assert results_root().is_dir()
    for found in read_records("ablate-*").values():
        assert {variant["name"] for variant in found["variants"]} <= set(VARIANTS)
    for method in ("extended", "faithful"):
        runs = list(read_records(f"reproduce-medseg9-full-{method}-*").values())
        assert runs
        assert len({run["seed"] for run in runs}) == len(runs), "each seed once"
        assert len({json.dumps(run["run"]["settings"], sort_keys=True) for run in runs}) == 1, "of the same settings"
        assert all(seconds(run) < 1800 for run in runs), "half an hour a seed"
