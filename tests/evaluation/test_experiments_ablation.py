"""Ablations: each variant changes what it says and nothing else, rows are measured, and a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY, quiet
from typer.testing import CliRunner

from covidseg.cli import app
from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation import experiments as module
from covidseg.evaluation.crossval import cross_validated
from covidseg.evaluation.evaluate import Evaluation, StageResult, evaluate_run, found_crops, stage_method
from covidseg.evaluation.experiments import VARIANTS, ablate, changed, variant_names
from covidseg.evaluation.metrics import macro, micro
from covidseg.evaluation.tables import ablation_rows, evaluation_json, scores_json
from covidseg.evaluation.verdicts import judge, verdict_table, verdicts_from
from covidseg.pipeline import Run
from covidseg.profiles import PROFILES, profile_named


def test_settings_are_changed_by_name() -> None:
    base = profile_named("quick")
    assert changed(base, "true_lungs", True) == replace(base, true_lungs=True)
    curriculum = replace(base.mil.curriculum, order="random")
    assert VARIANTS["random-order"].change(base) == replace(base, mil=replace(base.mil, curriculum=curriculum))
    bare = VARIANTS["no-paint"].change(base)
    assert [part.paint.vessels for part in (bare.classifier, bare.mil, bare.segmenter)] == [0, 0, 0]
    assert [bare.mil.paint.share, bare.segmenter.paint.share] == [0, 0]
    for profile in PROFILES.values():
        assert VARIANTS["whole"].change(profile) == VARIANTS["pixel-masks"].change(profile) == profile
        curriculum = VARIANTS["no-curriculum"].change(profile).mil.curriculum
        assert curriculum.weights == profile.mil.curriculum.weights[-1:] * len(curriculum.paces), "full weight"
        kept = [variant.change(profile) for variant in VARIANTS.values()]
        assert len(set(kept)) == len(kept) - 1, "each of the others is another profile"
    assert VARIANTS["faithful"].change(profile_named("full")) == profile_named("full", "faithful")


def test_unknown_variants_are_named() -> None:
    with pytest.raises(SettingsError, match="no-sense"):
        variant_names(["whole", "no-sense"])
    assert variant_names(None) == list(VARIANTS)
    assert variant_names(["one-way", "whole", "one-way"]) == ["one-way", "whole"]


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(load_dataset(tiny_phantom), TINY, 0, tmp_path_factory.mktemp("ablation"), "cpu", quiet)


@pytest.fixture(scope="module")
def measured(tiny_run: Run) -> list[dict]:
    test = tiny_run.data.subset(["phantom_01"])
    names = ["whole", "mean-pooling", "true-lungs", "pixel-masks"]
    return [content for _, content in ablate(tiny_run, test, names, log=quiet)]


def test_untouched_stages_are_shared(measured: list[dict], tiny_run: Run) -> None:
    count = {stage: len(list((tiny_run.folder / "stages").glob(f"{stage}-*.safetensors")))
             for stage in ("threshold", "lung_net", "weak", "classifier1", "mil1", "segmenter", "fold")}
    # The pooling concerns the patches and what follows, the true lungs all that looks at lungs; masks teach one net a
    # fold and leave the weak stages alone.
    assert count == {"threshold": 1, "lung_net": 1, "weak": 2, "classifier1": 2, "mil1": 3, "segmenter": 3, "fold": 5}


def test_rows_of_the_table(measured: list[dict]) -> None:
    titles = [title for title, _ in ablation_rows(measured)]
    assert titles == [
        "the whole method: Otsu in the lung", "the whole method: Grad-CAM", "the whole method: Patch MIL",
        "the whole method: Fine label map", "the whole method: Segmenter", "the whole method: Segmenter, true masks",
        "mean pooling in place of attention: Patch MIL", "mean pooling in place of attention: Segmenter",
        "true lungs where the data has them: Patch MIL", "true lungs where the data has them: Segmenter",
        "full supervision on the test set, 5-fold cross-validation: Segmenter"]
    for title, row in ablation_rows(measured):
        assert 0 <= row["micro"]["dice"] <= 1
        assert row["supervision"] == ("none" if "Otsu" in title else
                                      "pixel masks" if "full supervision" in title or "true masks" in title else
                                      "slice labels")


def test_it_is_said_which_round_was_used(measured: list[dict], tiny_run: Run) -> None:
    assert [content.get("round") for content in measured[::3]] == [2, None], "masks know no rounds"
    assert measured[0]["agreements"] == [round(each, 4) for each in tiny_run.agreements()]
    assert {content["seed"] for content in measured[:3]} == {0}


def test_verdicts_of_variants_where_only_labels_are_known(measured: list[dict], tiny_run: Run) -> None:
    """The stages are stored by now."""
    case, = tiny_run.data.subset(["phantom_02"]).cases
    test = replace(tiny_run.data, cases=(replace(case, mask=None),))
    found = dict(ablate(tiny_run, test, ["whole", "mean-pooling"], log=quiet))
    verdicts, = judge(partial(found_crops, tiny_run), test, [stage_method(tiny_run)])
    assert verdicts_from(found["whole"]).marked.tolist() == verdicts.marked.tolist()
    assert [found[name]["round"] for name in found] == [content["round"] for content in measured[:2]]
    assert [row[0] for row in verdict_table(list(found.values())).rows] == [VARIANTS[name].title for name in found]
    with pytest.raises(DatasetError, match="no lesion mask"):
        list(ablate(tiny_run, test, ["pixel-masks"], log=quiet))


def test_pixel_masks_are_one_row_measured_by_cross_validation(measured: list[dict], tiny_run: Run) -> None:
    content = measured[3]
    test = tiny_run.data.subset(["phantom_01"])
    assert (content["name"], content["slices"], content["classifier_auc"]) == ("pixel-masks", 10, None)
    row, = content["rows"]
    assert (row["name"], row["supervision"], row["threshold"]) == ("Segmenter", "pixel masks", 0.5)
    stored = cross_validated(Run(tiny_run.data, TINY, 0, tiny_run.folder, "cpu", quiet), test)
    counts = stored.stages[0].counts
    assert row["micro"] == scores_json(micro(counts))
    assert row["macro"] == scores_json(macro(counts))
    assert row["micro"] != ablation_rows(measured)[4][1]["micro"], "not the weak segmenter's row"


def test_true_lungs_reach_training_and_measurement(measured: list[dict], tiny_run: Run) -> None:
    run = Run(tiny_run.data, replace(TINY, true_lungs=True), 0, tiny_run.folder, "cpu", quiet)
    test = tiny_run.data.subset(["phantom_01"])
    result = evaluation_json(evaluate_run(run, test, upper_bound=False))  # of stored nets
    assert measured[2]["rows"] == result["rows"]
    whole, mine = ({row["name"]: row["micro"] for row in measured[k]["rows"]} for k in (0, 2))
    # No net has a say in this row: that it changed shows that the lungs of the measured slices did.
    assert whole["Otsu in the lung"] != mine["Otsu in the lung"]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two variants and no training: notes the profiles that were measured."""
    seen: list[str] = []

    def evaluate(run: Run, test: Dataset, **rest: object) -> Evaluation:
        seen.append("true lungs" if run.profile.true_lungs else "found lungs")
        counted = (np.array([[1, 2, 3, 4]]), np.zeros((10, 3)), np.zeros((101, 4)), np.zeros((1, 3, 2)), np.ones(1),
                   np.ones(1))
        return Evaluation([StageResult("Segmenter", "slice labels", 0.5, *counted)], float("nan"), 1)
    monkeypatch.setattr(module, "VARIANTS", {name: VARIANTS[name] for name in ("whole", "true-lungs")})
    monkeypatch.setattr(module, "evaluate_run", evaluate)
    monkeypatch.setattr(Run, "agreements", lambda run: [0.25, 0.5 - run.seed])
    return seen


def without_lungs(data: Dataset) -> Dataset:
    """The first volume has no lung mask, the others have one."""
    return replace(data, cases=(replace(data.cases[0], lung=None), *data.cases[1:]))


def test_true_lungs_are_left_out_by_default_where_there_are_none(tiny_run: Run, tmp_path: Path,
                                                                 faked: list[str]) -> None:
    lines: list[str] = []
    bare = Run(without_lungs(tiny_run.data), TINY, 0, tmp_path / "bare", "cpu", quiet)
    assert [name for name, _ in ablate(bare, tiny_run.data, log=lines.append)] == ["whole"]
    assert faked == ["found lungs"]
    assert any("true-lungs left out" in line for line in lines)
    lines.clear()
    full = Run(tiny_run.data, TINY, 0, tmp_path / "full", "cpu", quiet)
    assert [name for name, _ in ablate(full, tiny_run.data, log=lines.append)] == ["whole", "true-lungs"]
    assert faked == ["found lungs", "found lungs", "true lungs"]
    assert not any("left out" in line for line in lines)


def test_true_lungs_that_are_asked_for_have_to_be_there(tiny_run: Run) -> None:
    bare = Run(without_lungs(tiny_run.data), TINY, 0, tiny_run.folder, "cpu", quiet)
    with pytest.raises(DatasetError, match="phantom_00 has no lung mask"):
        list(ablate(bare, tiny_run.data.subset(["phantom_01"]), ["true-lungs"], log=quiet))


def test_other_masks_of_the_test_slices_are_another_measurement(tiny_run: Run, tiny_phantom: Path, tmp_path: Path,
                                                                faked: list[str]) -> None:
    run = Run(tiny_run.data, TINY, 0, tmp_path / "run", "cpu", quiet)
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    for expected in (1, 1):  # the second time it is read
        list(ablate(run, load_dataset(folder), ["whole"], log=quiet))
        assert len(faked) == expected
    scan = read_scan(folder / "mask" / "phantom_01.nii.gz")
    write_like(np.roll(scan.pixels != 0, 5, axis=1), scan.grid, scan.path)
    list(ablate(run, load_dataset(folder), ["whole"], log=quiet))
    assert len(faked) == 2


def test_command_line(tiny_phantom: Path, tmp_path: Path, faked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "quick", TINY)
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    (folder / "lung" / "phantom_00.nii.gz").unlink()
    test = Path(shutil.copytree(tiny_phantom, tmp_path / "test"))
    for case in load_dataset(test).cases:  # what is trained on is no test
        scan = read_scan(case.image)
        write_like(scan.pixels + np.int16(1), scan.grid, scan.path)
    result = CliRunner().invoke(app, ["ablate", "--data", str(folder), "--test", str(test), "--out",
                                      str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "true-lungs left out" in " ".join(result.output.split())
    assert faked == ["found lungs"]
    content = json.loads((tmp_path / "run/ablation.json").read_text())
    assert [variant["name"] for variant in content["variants"]] == ["whole"]
    assert content["settings"]["mil"]["steps"] == TINY.mil.steps
    assert (content["seeds"], content["variants"][0]["seed"]) == ([0], 0)
    assert len(content["test_data"]) == 2 * len(content["data"]) == 8, "scans and masks"
    assert content["environment"]["device"] == "cpu"
    result = CliRunner().invoke(app, ["ablate", "--data", str(tiny_phantom), "--test", str(test), "--out",
                                      str(tmp_path / "run"), "--device", "cpu", "--seeds", "0,1", "--only", "whole"])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "run/ablation.json").read_text())
    assert content["seeds"] == [0, 1]
    assert content["command"].endswith("--only whole --profile quick --method extended --seeds 0,1")
    assert [(v["seed"], v["round"], v["agreements"]) for v in content["variants"]] == [
        (0, 2, [0.25, 0.5]), (1, 2, [0.25, -0.5])]
    assert "2,2" in result.output
    bad = CliRunner().invoke(app, ["ablate", "--data", str(tiny_phantom), "--only", "nothing"])
    assert isinstance(bad.exception, SettingsError)


def test_a_finished_variant_is_read_and_not_trained_again(measured: list[dict], tiny_run: Run,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")
    monkeypatch.setattr(module, "evaluate_run", never)
    again = dict(ablate(tiny_run, tiny_run.data.subset(["phantom_01"]), ["mean-pooling"], log=quiet))
    assert again["mean-pooling"] == measured[1]
    with pytest.raises(AssertionError, match="measured again"):  # other test slices are another measurement
        list(ablate(tiny_run, tiny_run.data.subset(["phantom_02"]), ["mean-pooling"], log=quiet))
    monkeypatch.setattr(module, "cross_validated", never)
    again = dict(ablate(tiny_run, tiny_run.data.subset(["phantom_01"]), ["pixel-masks"], log=quiet))
    assert again["pixel-masks"] == measured[3]
    with pytest.raises(AssertionError, match="measured again"):
        list(ablate(tiny_run, tiny_run.data.subset(["phantom_00"]), ["pixel-masks"], log=quiet))
