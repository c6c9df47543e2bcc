"""Reports and tables: complete, valid JSON, and free of what does not belong in them."""

from __future__ import annotations

import getpass
import hashlib
import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny import STAGES, TINY, quiet, stage_name

from covidseg import DISCLAIMER, pipeline
from covidseg.evaluation.evaluate import Evaluation, StageResult
from covidseg.evaluation.metrics import NAMES, Scores
from covidseg.evaluation.tables import (
    Table,
    ablation_table,
    evaluation_json,
    figure,
    scores_json,
    scores_table,
    spread,
)
from covidseg.pipeline import Run, write_run
from covidseg.profiles import profile_from

NAN = float("nan")
# Slices: half found; nothing there and nothing found; missed.
COUNTS = np.array([[10, 10, 10, 70], [0, 0, 0, 100], [0, 0, 20, 80]])
REST = np.zeros((10, 3)), np.zeros((101, 4)), np.zeros((3, 3, 2), int)
APART = np.array([3.0, NAN, np.inf])  # pixels, as the slices above
EVALUATION = Evaluation([StageResult("first", "none", NAN, COUNTS, *REST, APART, np.full(3, 0.5)),
                         StageResult("second", "slice labels", 0.4321, COUNTS[:1], *REST, APART[:1], np.full(1, 0.5))],
                        NAN, 3)


def strict(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are faults."""
    def refuse(name: str) -> None:
        raise ValueError(name)
    return json.loads(text, parse_constant=refuse)


def test_figures_have_four_digits_and_none_for_undefined() -> None:
    assert scores_json(Scores(0.123456, 1.0, NAN, 0.0, 0.99999)) == {
        "dice": 0.1235, "iou": 1.0, "ppv": None, "sensitivity": 0.0, "specificity": 1.0}


def test_evaluation_as_json_by_hand() -> None:
    content = strict(json.dumps(evaluation_json(EVALUATION), allow_nan=False))
    assert content["slices"] == 3
    assert content["classifier_auc"] is None
    first, second = content["rows"]
    assert (first["name"], first["supervision"], first["threshold"]) == ("first", "none", None)
    assert second["threshold"] == 0.432
    # micro: 10 hits, 10 false alarms, 30 missed, 250 rest.
    assert first["micro"] == {"dice": 0.3333, "iou": 0.2, "ppv": 0.5, "sensitivity": 0.25, "specificity": 0.9615}
    # macro: slices 0 and 2 carry a lesion, with Dice 0.5 and 0.
    assert first["macro"]["dice"] == 0.25
    assert first["macro"]["iou"] == 0.1667
    assert first["hd95"] == {"mean": 1.5, "unit": "mm", "slices": 1, "empty": 1}
    assert "sensitivity_by_class" not in first, "masks of one number"
    assert evaluation_json(replace(EVALUATION, classifier_auc=0.98765))["classifier_auc"] == 0.9877
    assert content["lungs"] == {"lesion_inside": None, "share_of_slice": None}
    lungs = evaluation_json(replace(EVALUATION, lungs=np.array([[2, 1, 1, 3], [0, 1, 0, 0]])))["lungs"]
    assert lungs == {"lesion_inside": 0.6667, "share_of_slice": 0.5}


def test_classes_of_lesions_have_an_entry_of_their_own() -> None:
    hits = np.array([[[5, 10], [0, 0], [1, 4]], [[5, 10], [0, 0], [0, 0]], [[0, 0]] * 3])
    told = replace(EVALUATION, stages=[replace(EVALUATION.stages[0], classes=hits)])
    assert evaluation_json(told)["rows"][0]["sensitivity_by_class"] == {"ground glass": 0.5, "effusion": 0.25}


def test_a_terminal_shows_the_same_with_the_disclaimer_breaks_heads_and_dims_emphasis() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    rows = scores_table((s.name, s.micro().as_dict(), scores_json(s.macro())) for s in EVALUATION.stages)
    console.print(rows.rich("a title"))
    text = console.export_text()
    assert "a title" in text
    assert text.index("first") < text.index("second")
    assert all(found in text for found in ("0.333", "0.200", "0.962", "0.250"))
    assert "not a medical device" in " ".join(text.split())
    table = Table(("", "two\nwords"), "lr", [["plain", "1"], ["*quoted*", "2"]])
    assert table.markdown() == "| | two words |\n|---|--:|\n| plain | 1 |\n| *quoted* | 2 |"
    shown = table.rich("a title")
    assert [str(column.header) for column in shown.columns] == ["", "two\nwords"]
    assert list(shown.columns[0].cells) == ["plain", "quoted"]
    assert [row.style for row in shown.rows] == [None, "dim"]


def test_figures_and_their_spread_or_a_dash() -> None:
    assert (figure(0.12345), figure(1234, ",")) == ("0.123", "1,234")
    assert figure(NAN) == figure(None) == figure(np.nan, ".2f") == "–"
    assert spread(np.array([0.1, 0.3])) == "0.200 ± 0.141", "sample deviation"
    assert [spread(np.array(values)) for values in ([0.1, np.nan], [np.nan])] == ["0.100", "–"]


def row(name: str, dice: float | None, macro: float) -> dict:
    figures = dict.fromkeys(NAMES, 0.5)
    return {"name": name, "micro": {**figures, "dice": dice}, "macro": {**figures, "dice": macro}}


def result(*dices: float | None, seed: int = 0) -> dict:
    return {"system": "extended", "seed": seed, "slices": 7,
            "rows": [row(f"stage {k}", dice, 0.25) for k, dice in enumerate(dices)]}


def test_table_of_an_ablation() -> None:
    variants = [{"name": "whole", "title": "all", "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", 0.7, 0.6)]},
                {"name": "one-way", "title": "one way",
                 "rows": [row("Grad-CAM", 0.4, 0.3), row("Segmenter", None, 0.6)]}]
    lines = ablation_table(variants).markdown().splitlines()
    assert lines[2:] == ["| all: Grad-CAM | 0.400 | 0.500 | 0.500 | 0.300 |",
                         "| all: Segmenter | 0.700 | 0.500 | 0.500 | 0.600 |",
                         "| one way: Segmenter | – | 0.500 | 0.500 | 0.600 |"]
    seeds = [{**variants[1], "round": best, "rows": [row("Segmenter", dice, 0.6)]}
             for best, dice in ((2, 0.5), (1, 0.7))]
    assert ablation_table(seeds).markdown().splitlines()[2:] == [
        "| one way: Segmenter | 0.600 ± 0.141 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.600 ± 0.000 | 2, 1 |"]


def test_run_report_is_complete(tiny_run: Run) -> None:
    text = (tiny_run.folder / "run.json").read_text(encoding="utf-8")
    content = strict(text)
    assert (content["note"], content["command"], content["seed"]) == (DISCLAIMER, "a test", 0)
    assert tuple(content["seconds"]) == tuple(content["stages"]) == tuple(content["peak_memory_mb"]) == STAGES
    for stage, seconds in content["seconds"].items():
        assert 0 <= seconds == tiny_run.store.seconds(stage, tiny_run.key(stage))
    assert content["seconds"]["segmenter"] > 0
    assert all(peak["process"] > 100 for peak in content["peak_memory_mb"].values())
    assert content["labelled_slices"] == 40
    assert profile_from(content["settings"]) == TINY
    assert content["stages"] == {stage: stage_name(tiny_run, stage) for stage in STAGES}
    for case in tiny_run.data.cases:
        assert content["data"][case.id] == hashlib.sha256(case.image.read_bytes()).hexdigest()
    for private in (str(tiny_run.folder), str(tiny_run.data.root), f"/{getpass.getuser()}/"):
        assert private not in text


def test_warnings_of_stages_are_reported(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    (folder / "stages" / stage_name(tiny_run, "fine")).unlink()
    make = pipeline.fine_labels

    def warn(*arguments: Any) -> Any:
        warnings.warn("a seldom one", RuntimeWarning, stacklevel=1)
        return make(*arguments)
    monkeypatch.setattr(pipeline, "fine_labels", warn)
    run = Run(tiny_run.data, TINY, 0, folder, "cpu", quiet)
    with pytest.warns(RuntimeWarning, match="a seldom one"):
        run.fine()
    assert "RuntimeWarning: a seldom one" in strict(write_run(run, "a test").read_text())["warnings"]


def test_a_report_does_without_stages_that_are_gone(tiny_run: Run, tmp_path: Path) -> None:
    """Whoever needs room deletes the maps of early stages: what they took is unknown then, and nothing is trained."""
    folder, gone = Path(shutil.copytree(tiny_run.folder, tmp_path / "run")), ("threshold", "cam1", "mil1")
    for stage in gone[:2]:
        (folder / "stages" / stage_name(tiny_run, stage)).unlink()
    (folder / "stages" / stage_name(tiny_run, gone[2])).write_bytes(b"no safetensors")
    before = strict((folder / "run.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    run = Run(tiny_run.data, TINY, 0, folder, "cpu", lines.append)
    after = strict(write_run(run, "another test").read_text(encoding="utf-8"))
    assert lines == []
    for part in ("seconds", "peak_memory_mb"):
        assert after[part] == {stage: None if stage in gone else value for stage, value in before[part].items()}
    assert after["command"] == "another test"
    assert {key for key in after if after[key] != before[key]} <= {"command", "finished", "seconds", "peak_memory_mb"}
