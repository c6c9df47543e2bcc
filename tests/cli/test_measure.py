"""What the commands that measure print, record and refuse: figures, classes, reports, scans that were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from files import save, strict
from typer.testing import CliRunner, Result

from covidseg.cli import app
from covidseg.cli.report import write_report
from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation.verdicts import Verdicts
from covidseg.pipeline import Run


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


# --- evaluate ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Prediction, truth and lung of three slices of 10 x 10, made so that every figure is a simple fraction.

    Slice 0: 20 predicted, 20 true, 10 shared. Slice 1: nothing predicted, nothing true. Slice 2: 10 true, all missed.
    The lung holds the left half of slices 0 and 2.
    """
    prediction, truth, lung = (np.zeros((10, 10, 3), np.uint8) for _ in range(3))
    prediction[0:2, :, 0] = 1
    truth[1:3, :, 0] = 1
    truth[9, :, 2] = 1
    truth[0:5, 0, 2] = 1
    truth[9, 5:, 2] = 0            # 5 + 5 pixels
    lung[:5, :, [0, 2]] = 1
    return (save(prediction, tmp_path / "p.nii.gz"), save(truth, tmp_path / "t.nii.gz"),
            save(lung, tmp_path / "l.nii.gz"))


def test_evaluate_against_figures_by_hand(drawn: tuple[Path, Path, Path], tmp_path: Path) -> None:
    prediction, truth, lung = drawn
    table = invoke("evaluate", prediction, truth)
    assert table.exit_code == 0
    assert "0.400" in table.output
    assert "not a medical device" in " ".join(table.output.split())
    # 10 hits, 10 false alarms, 10 + 10 missed, 70 + 100 + 90 rest.
    assert strict(invoke("evaluate", prediction, truth, "--json", "-").output) == {
        "slices": 3,
        "micro": {"dice": 0.4, "iou": 0.25, "ppv": 0.5, "sensitivity": 0.3333, "specificity": round(260 / 270, 4)},
        "macro": {"dice": 0.25, "iou": 0.1667, "ppv": 0.25, "sensitivity": 0.25,
                  "specificity": round((70 / 80 + 1 + 1) / 3, 4)},
        "hd95": {"mean": 1.0, "unit": "px", "slices": 1, "empty": 1}}
    assert "HD95 1.0 px, mean of 1 slices; left out: 1" in table.output
    assert "by class" not in table.output
    # In the lung: slices 0 and 2, 50 pixels each: 10 hits, 10 false alarms, 10 + 5 missed, 20 + 45 rest.
    assert invoke("evaluate", prediction, truth, "--lungs", lung, "--json", tmp_path / "deep/s.json").exit_code == 0
    assert strict((tmp_path / "deep/s.json").read_text()) == {
        "slices": 2,
        "micro": {"dice": round(20 / 45, 4), "iou": round(10 / 35, 4), "ppv": 0.5, "sensitivity": 0.4,
                  "specificity": round(65 / 75, 4)},
        "macro": {"dice": 0.25, "iou": 0.1667, "ppv": 0.25, "sensitivity": 0.25,
                  "specificity": round((2 / 3 + 1) / 2, 4)},
        "hd95": {"mean": 1.0, "unit": "px", "slices": 1, "empty": 1}}


@pytest.mark.parametrize(("source", "first", "third"), [
    ({"name": "medseg1"}, "ground glass", "effusion"), ({"name": "zenodo20"}, "class 1", "class 3"),
    ([], "class 1", "class 3"), (None, "class 1", "class 3")])
def test_evaluate_tells_classes_apart_and_measures_in_mm(source: object, first: str, third: str,
                                                         tmp_path: Path) -> None:
    """Only the masks of a set that is known to be MedSeg's have names for theirs: 1 and 2 may be two lungs."""
    truth, lung = np.zeros((10, 10, 1), np.uint8), np.zeros((10, 10, 1), np.uint8)
    truth[4, :5], truth[4, 5:] = 1, 3
    lung[:, 4:] = 1
    (tmp_path / "set" / "mask").mkdir(parents=True)
    if source is not None:
        (tmp_path / "set" / "source.json").write_text(json.dumps(source))
    prediction = save((truth == 1).astype(np.uint8), tmp_path / "p.nii.gz", 0.5, 2.0, 5.0)
    masks = prediction, save(truth, tmp_path / "set" / "mask" / "t.nii.gz", 0.5, 2.0, 5.0)
    whole = strict(invoke("evaluate", *masks, "--json", "-").stdout)
    assert whole["sensitivity_by_class"] == {first: 1, third: 0}
    # Seen from the truth: five pixels of ten are 1 to 5 pixels of 2 mm away; rank 0.95 * 9 is 8.55.
    assert whole["hd95"] == {"mean": pytest.approx(2 * 4.55), "unit": "mm", "slices": 1, "empty": 0}
    printed = invoke("evaluate", *masks)
    assert f"sensitivity by class: {first} 1.000, {third} 0.000" in printed.output
    assert printed.stderr == "warning: t.nii.gz: holds the values 1, 3; every one of them counts as lesion\n"
    inside = strict(invoke("evaluate", *masks, "--lungs", save(lung, tmp_path / "l.nii.gz", 0.5, 2.0, 5.0), "--json",
                           "-").stdout)
    assert inside["sensitivity_by_class"] == whole["sensitivity_by_class"]
    assert inside["hd95"]["mean"] == pytest.approx(2 * 4.75)


def test_evaluate_says_that_all_values_of_either_mask_count(tmp_path: Path) -> None:
    """Many labels, as of vertebrae, are no lesions; the figures cannot tell."""
    labels = save(np.arange(12, dtype=np.uint8).reshape(2, 3, 2), tmp_path / "labels.nii.gz")
    plain = save(np.array([[[255, 0]] * 3] * 2, np.uint8), tmp_path / "plain.nii.gz")
    said = invoke("evaluate", labels, plain).stderr
    assert said == ("warning: labels.nii.gz: holds the values 1, 2, 3, 4, 5, 6, 7, 8 and 3 more; every one of them "
                    "counts as lesion\n")
    assert invoke("evaluate", plain, plain).stderr == ""


def test_undefined_figures_are_null_not_nan(tmp_path: Path) -> None:
    nothing = save(np.zeros((6, 6, 2), np.uint8), tmp_path / "nothing.nii.gz")
    content = strict(invoke("evaluate", nothing, nothing, "--json", "-").output)
    assert content["micro"]["dice"] is None
    assert content["macro"]["ppv"] is None
    assert content["micro"]["specificity"] == 1


def test_an_earlier_report_of_figures_is_replaced_and_nothing_else(drawn: tuple[Path, Path, Path],
                                                                   tmp_path: Path) -> None:
    prediction, truth, _ = drawn
    out = tmp_path / "scores.json"
    for one, other in ((prediction, truth), (truth, truth)):
        assert invoke("evaluate", one, other, "--json", out).exit_code == 0
    assert strict(out.read_text())["micro"]["dice"] == 1
    (tmp_path / "folder.json").mkdir()
    for name, content in (("labels.csv", b"volume,slice,has_lesion\n"), ("list.json", b"[1]"), ("run.json", b"{}"),
                          ("folder.json", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SettingsError, match=f"{name}: the figures would replace this file"):
            invoke("evaluate", prediction, truth, "--json", tmp_path / name)
        assert content is None or (tmp_path / name).read_bytes() == content


# --- reports of trainings ---------------------------------------------------------------------------------------------

def test_a_report_that_says_something_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time that it took is nothing else; another command, seed or figure is."""
    path = tmp_path / "runs" / "table1.json"
    first = {"command": "a", "seconds": 3.5, "results": [{"dice": 0.5}]}
    for content in (first, {**first, "seconds": 0.1}):
        write_report(path, content, indent=1)
        assert [file.name for file in path.parent.iterdir()] == ["table1.json"]
        assert strict(path.read_text()) == content
    assert capsys.readouterr().out == ""
    write_report(path, {**first, "command": "b"}, indent=1)
    write_report(path, {**first, "results": []}, indent=1)
    assert [strict((path.parent / name).read_text()) for name in ("table1-1.json", "table1-2.json", "table1.json")] == [
        {**first, "seconds": 0.1}, {**first, "command": "b"}, {**first, "results": []}]
    assert "kept as table1-2.json" in capsys.readouterr().out
    path.write_bytes(b"no report")
    write_report(path, first, indent=1)
    assert (path.parent / "table1-3.json").read_bytes() == b"no report"


@pytest.fixture
def brighter(tiny_phantom: Path, tmp_path: Path) -> Path:
    """The phantom, of which all scans but one are others."""
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "brighter"))
    for case in load_dataset(folder).cases[1:]:
        scan = read_scan(case.image)
        write_like(scan.pixels + np.int16(1), scan.grid, scan.path)
    return folder


@pytest.mark.parametrize("command", ["reproduce", "ablate"])
def test_a_scan_that_is_trained_on_is_no_test(command: str, tiny_phantom: Path, brighter: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes, whatever it is called; one without a label is not trained on."""
    options = [command, "--test", brighter, "--device", "cpu", "--out", tmp_path / "run"]
    (brighter / "im" / "phantom_00.nii.gz").rename(brighter / "im" / "other.nii.gz")
    table = (brighter / "slice_labels.csv").read_text()
    (brighter / "slice_labels.csv").write_text(table.replace("phantom_00", "other"))
    (brighter / "mask" / "phantom_00.nii.gz").rename(brighter / "mask" / "other.nii.gz")
    with pytest.raises(DatasetError, match=r"brighter: 1 \(other\) of its scans are trained on, too"):
        invoke(*options, "--data", tiny_phantom)
    assert not list((tmp_path / "run").rglob("*.safetensors")), "said before anything is trained"
    few = Path(shutil.copytree(tiny_phantom, tmp_path / "few"))
    lines = (few / "slice_labels.csv").read_text().splitlines(keepends=True)
    (few / "slice_labels.csv").write_text("".join(line for line in lines if not line.startswith("phantom_00")))

    def starts(run: Run) -> None:
        raise InterruptedError("training")
    monkeypatch.setattr(Run, "threshold", starts)
    with pytest.raises(InterruptedError):
        invoke(*options, "--data", few)


# --- verdicts ---------------------------------------------------------------------------------------------------------

def test_verdicts_are_printed_as_json_and_know_training_scans(
        tiny_phantom: Path, brighter: Path, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Verdicts(("a:0", "b:1"), np.array(["a", "b"]), np.array([0, 1]), None, np.array([0.0, 50.0]),
                    np.ones(2, bool))
    monkeypatch.setattr("covidseg.evaluation.verdicts.judge_nets", lambda nets, test, progress: said)
    monkeypatch.chdir(tmp_path)
    options = ["verdicts", brighter, "--run", tiny_run.folder]
    result = invoke(*options, "--json", "-")
    content = strict(result.stdout)
    assert content["results"][0]["slices"] == 2
    assert content["trained_on"] == ["phantom_00"]
    assert result.stderr == "warning: run: trained on 1 (phantom_00) of these scans, so that figures are too good\n"
    assert not (tmp_path / "-").exists()
    assert invoke(*options, "--json", "said.json").exit_code == 0
    assert invoke(*options, "--json", "said.json").exit_code == 0, "the same command once more"
    assert strict((tmp_path / "said.json").read_text()) == content
    labels = brighter / "slice_labels.csv"
    before = labels.read_bytes()
    with pytest.raises(SettingsError, match="the figures would replace this file"):
        invoke(*options, "--json", labels)
    assert labels.read_bytes() == before
    monkeypatch.setattr("covidseg.predict.SHIPPED", tiny_run.folder)
    assert "trained on 4 (phantom_00, phantom_01, phantom_02, ...) of these" in invoke("verdicts", tiny_phantom).stderr
