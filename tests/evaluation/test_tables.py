"""Reports and tables: complete, valid JSON, and free of what does not belong in them."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny import STAGES, TINY, finished_run, quiet, stage_name

from covidseg import DISCLAIMER, pipeline
from covidseg.evaluation.evaluate import Evaluation, StageResult
from covidseg.evaluation.metrics import Scores
from covidseg.evaluation.tables import (
    evaluation_json,
    evaluation_markdown,
    format_figure,
    scores_from,
    scores_json,
    scores_table,
    spread,
)
from covidseg.pipeline import Run, write_run
from covidseg.profiles import profile_from

NAN = float("nan")
# Slices: half found; nothing there and nothing found; missed.
COUNTS = np.array([[10, 10, 10, 70], [0, 0, 0, 100], [0, 0, 20, 80]])
EVALUATION = Evaluation([StageResult("first", "none", NAN, COUNTS),
                         StageResult("second", "slice labels", 0.4321, COUNTS[:1])], NAN, 3)


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tiny_phantom, tmp_path_factory.getbasetemp() / "tiny-run")


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
    assert evaluation_json(replace(EVALUATION, classifier_auc=0.98765))["classifier_auc"] == 0.9877
    assert content["lungs"] == {"lesion_inside": None, "share_of_slice": None}
    lungs = evaluation_json(replace(EVALUATION, lungs=np.array([[2, 1, 1, 3], [0, 1, 0, 0]])))["lungs"]
    assert lungs == {"lesion_inside": 0.6667, "share_of_slice": 0.5}


def test_markdown_table_has_a_row_for_each_stage_and_a_cell_for_each_heading() -> None:
    lines = evaluation_markdown(EVALUATION).splitlines()
    assert len(lines) == 2 + 2
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| first | none | 0.333 | 0.200 | 0.500 | 0.250 | 0.962 | 0.250 |"


def test_terminal_table_shows_names_figures_and_the_disclaimer() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(scores_table("a title", [(s.name, s.micro(), s.macro()) for s in EVALUATION.stages]))
    text = console.export_text()
    assert "a title" in text
    assert text.index("first") < text.index("second")
    for figure in ("0.333", "0.200", "0.962", "0.250"):
        assert figure in text
    assert "not a medical device" in text


def test_format_figure() -> None:
    assert format_figure(0.12345) == "0.123"
    assert format_figure(NAN) == "–"


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread(np.array([0.1, 0.3])) == "0.200 ± 0.141"
    assert spread(np.array([0.1, np.nan])) == "0.100"
    assert spread(np.array([np.nan])) == "–"


def test_figures_come_back_from_their_json() -> None:
    scores = Scores(0.1234, 1.0, NAN, 0.0, 0.9999)
    again = scores_from(strict(json.dumps(scores_json(scores))))
    assert np.isnan(again.ppv)
    assert replace(again, ppv=0.5) == replace(scores, ppv=0.5)


def test_run_report_is_complete(tiny_run: Run) -> None:
    text = (tiny_run.folder / "run.json").read_text(encoding="utf-8")
    content = strict(text)
    assert content["note"] == DISCLAIMER
    assert content["command"] == "a test"
    assert content["seed"] == 0
    assert tuple(content["seconds"]) == tuple(content["stages"]) == STAGES
    for stage, seconds in content["seconds"].items():
        assert math.isfinite(seconds)
        assert 0 <= seconds == tiny_run.store.seconds(stage, tiny_run.key(stage))
    assert content["seconds"]["segmenter"] > 0
    assert all(peak["process"] > 100 for peak in content["peak_memory_mb"].values())
    assert content["warnings"] == list(dict.fromkeys(content["warnings"]))
    assert content["best_round"] == tiny_run.best()
    assert content["labelled_slices"] == 40
    assert profile_from(content["settings"]) == TINY
    assert content["settings"]["method"] == "extended"
    assert content["settings"]["mil"]["curriculum"]["order"] == "easy"
    assert content["settings"]["mutual"]["exchange"] == "both"
    assert len(set(content["stages"].values())) == len(content["stages"]), "each stage has a file of its own"
    for name in content["stages"].values():
        assert (tiny_run.folder / "stages" / name).is_file()
    for case in tiny_run.data.cases:
        assert content["data"][case.id] == hashlib.sha256(case.image.read_bytes()).hexdigest()
    assert str(tiny_run.folder) not in text
    assert str(tiny_run.data.root) not in text
    assert f"/{getpass.getuser()}/" not in text


def test_a_report_is_whole_though_only_the_last_stage_was_read(tiny_run: Run, tmp_path: Path) -> None:
    """A second training in a folder asks for the segmenter, finds it, and reads none of the stages before it."""
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    first = strict((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").unlink()
    lines: list[str] = []
    run = Run(tiny_run.data, TINY, 0, folder, "cpu", lines.append)
    run.segmenter()
    path = write_run(run, "another test")
    assert path == folder / "run.json"
    second = strict(path.read_text(encoding="utf-8"))
    assert lines == [], "nothing was trained for it"
    assert second.pop("command") == "another test"
    for content in (first, second):
        content.pop("command", None)
        content.pop("finished")
    assert second == first


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


@pytest.mark.parametrize("harm", ["deleted", "damaged"])
def test_a_report_does_without_stages_that_are_gone(tiny_run: Run, tmp_path: Path, harm: str) -> None:
    """Whoever needs room deletes the maps of early stages: what they took is unknown then, and nothing is trained."""
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    for stage in ("threshold", "cam1", "mil1"):
        path = folder / "stages" / stage_name(tiny_run, stage)
        if harm == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"no safetensors")
    before = strict((folder / "run.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    run = Run(tiny_run.data, TINY, 0, folder, "cpu", lines.append)
    content = strict(write_run(run, "x").read_text(encoding="utf-8"))
    assert lines == []
    assert [stage for stage, seconds in content["seconds"].items() if seconds is None] == ["threshold", "cam1", "mil1"]
    assert content["stages"] == before["stages"]
