"""Cross-validation with masks: folds keep patients together, and no net is measured on a slice that taught it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, quiet

from covidseg import pipeline
from covidseg.data.folder import Case, Dataset, load_dataset
from covidseg.data.scan import read_mask, read_scan, write_like
from covidseg.errors import DatasetError
from covidseg.evaluation import crossval
from covidseg.evaluation.crossval import cross_validated, split_folds
from covidseg.evaluation.evaluate import Method, measure, unseen_slices
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, WeakSet
from covidseg.segmenter import SegmenterSettings, make_segmenter, supervised_settings

# --- folds ----------------------------------------------------------------------------------------------------------

MIXED = np.array([name for name, count in zip("abcdefgh", (9, 7, 5, 4, 3, 3, 2, 1), strict=True) for _ in range(count)])


def sizes(fold: np.ndarray, folds: int) -> list[int]:
    return np.bincount(fold, minlength=folds).tolist()


@pytest.mark.parametrize("folds", [2, 3, 4, 5, 8])
def test_folds_keep_patients_together_and_are_balanced(folds: int) -> None:
    shuffled = np.random.default_rng(0).permutation(MIXED)
    for patients in (MIXED, shuffled):
        fold = split_folds(patients, folds)
        assert fold.shape == patients.shape
        assert all(len(set(fold[patients == name])) == 1 for name in set(patients))
        assert set(fold.tolist()) == set(range(folds)), "no fold is empty"
        largest = max((patients == name).sum() for name in set(patients))
        assert max(sizes(fold, folds)) - min(sizes(fold, folds)) <= largest


def test_folds_by_hand() -> None:
    # The largest first, each into the emptiest fold: 5, 4 and 3 slices, then 2 more to the 3 and 1 to the 4.
    patients = np.array([*"aaaaa", *"bbbb", *"ccc", *"dd", "e"])
    for order in (slice(None), slice(None, None, -1)):
        by_name = dict(zip(patients[order].tolist(), split_folds(patients[order], 3).tolist(), strict=True))
        assert by_name == {"a": 0, "b": 1, "c": 2, "d": 2, "e": 1}
    assert split_folds(np.array([*"aaabbb"]), 3).tolist() == [0, 0, 1, 1, 2, 2], "fewer patients than folds: a stack"


@pytest.mark.parametrize(("count", "folds"), [(10, 5), (13, 5), (100, 5), (5, 5), (7, 2)])
def test_a_stack_is_cut_into_runs_of_neighbours(count: int, folds: int) -> None:
    fold = split_folds(np.full(count, "stack"), folds)
    assert (np.diff(fold) >= 0).all(), "runs"
    assert set(fold.tolist()) == set(range(folds))
    assert max(sizes(fold, folds)) - min(sizes(fold, folds)) <= 1


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_slices_are_refused(count: int) -> None:
    with pytest.raises(DatasetError, match=rf"{count} slices.*too few for 5 folds.*fewer folds"):
        split_folds(np.full(count, "a"), 5)


# --- the cross-validation -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def phantom(tiny_phantom: Path) -> Dataset:
    return load_dataset(tiny_phantom)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crossval")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def run(phantom: Dataset, folder: Path, lines: list[str]) -> Run:
    """On one patient without and one with lesions: its lung net is trained once for all tests here, no fold was yet."""
    for path in folder.glob("stages/fold-*"):
        path.unlink()
    run = Run(phantom.subset(["phantom_02", "phantom_03"]), TINY, 0, folder, "cpu", quiet)
    run.weak()
    run.log = lines.append
    return run


@pytest.fixture(scope="module")
def measured(phantom: Dataset) -> Dataset:
    """Two patients that the run was not trained on."""
    return phantom.subset(["phantom_00", "phantom_01"])


def trained(lines: list[str]) -> set[str]:
    """Names of the folds that were trained."""
    return {line.split(" step ")[0] for line in lines if " step " in line}


@dataclass
class Fold:
    """What one net was taught with, and what it was then asked about."""

    data: WeakSet
    masks: np.ndarray
    weights: np.ndarray
    settings: SegmenterSettings
    asked: set[bytes]


def pictures(crops: Crops) -> set[bytes]:
    found = {image.tobytes() for image in crops.images}
    assert len(found) == len(crops), "no two slices are alike"
    return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Fold]:
    """Nets are not trained but set up; each fold is noted, in order."""
    seen: list[Fold] = []

    def train(data: WeakSet, masks: np.ndarray, weights: np.ndarray, settings: SegmenterSettings,
              **rest: Any) -> torch.nn.Module:
        seen.append(Fold(data, masks, weights, settings, set()))
        return make_segmenter(settings)

    def ask(net: torch.nn.Module, crops: Crops, **how: Any) -> np.ndarray:
        assert not seen[-1].asked & pictures(crops), "each slice is asked about once"
        seen[-1].asked |= pictures(crops)
        return np.zeros(crops.images.shape, np.float32)
    monkeypatch.setattr(pipeline, "train_segmenter", train)
    monkeypatch.setattr(crossval, "lesion_probabilities", ask)
    return seen


@pytest.mark.parametrize(("ids", "folds"), [(["phantom_00", "phantom_01"], 2), (["phantom_01"], 5), (
    ["phantom_00", "phantom_01", "phantom_02"], 3)], ids=["patients", "one stack", "a patient of the training set"])
def test_nets_are_taught_with_other_masks_and_lesion_free_slices_of_other_patients(
        run: Run, phantom: Dataset, watched: list[Fold], ids: list[str], folds: int) -> None:
    data, weak = phantom.subset(ids), run.weak()
    unseen = unseen_slices(run, data)
    everything = pictures(unseen.crops)
    mask_of = {image.tobytes(): mask for image, mask in zip(unseen.crops.images, unseen.truth, strict=True)}
    owner = dict(zip(mask_of, unseen.patients, strict=True))
    # In a set that is both trained and measured on, lesion-free slices may be the very ones to measure.
    free = pictures(weak.crops.take(np.flatnonzero((weak.labels == 0) & ~np.isin(weak.patients, ids))))
    assert free
    cross_validated(run, data, folds=folds)
    assert len(watched) == folds
    for fold in watched:
        assert fold.asked
        assert pictures(fold.data.crops) == (everything - fold.asked) | free
        for image, mask, label in zip(fold.data.crops.images, fold.masks, fold.data.labels, strict=True):
            expected = mask_of.get(image.tobytes(), np.zeros_like(mask))
            np.testing.assert_array_equal(mask, expected)
            assert label == expected.any()
        assert (fold.weights == 1).all()
        assert fold.settings == supervised_settings(TINY.segmenter)
        assert "phantom_03" in fold.data.patients
        if len(ids) == folds:
            patient, = {owner[image] for image in fold.asked}
            assert patient not in fold.data.patients
    assert set.union(*(fold.asked for fold in watched)) == everything
    assert sum(len(fold.asked) for fold in watched) == len(everything)


def healthy_slices(case: Case) -> list[int]:
    """Numbers of the slices without a drawn lesion."""
    return np.flatnonzero(~read_mask(case.mask).any(axis=(1, 2))).tolist()


def test_a_fold_has_to_leave_both_classes(run: Run, phantom: Dataset, watched: list[Fold]) -> None:
    refused = "no slice with, or none without, a lesion.*fewer folds"
    other, ill = phantom.subset(["phantom_00", "phantom_01"]).cases
    healthy = replace(other, labels={k: 0 for k in healthy_slices(other)[:2]})
    with pytest.raises(DatasetError, match=refused):     # the net measured on the first patient sees no lesion
        cross_validated(run, Dataset(phantom.root, (ill, healthy)), folds=2)
    # Slices with a lesion alone, of the only patients that the run has lesion-free slices of.
    mine = [replace(case, patient="one", labels={k: 1 for k in range(10) if k not in healthy_slices(case)})
            for case in (other, ill)]
    watched.clear()
    own = Run(Dataset(phantom.root, tuple(replace(case, patient="one") for case in run.data.cases)), TINY, 0,
              run.folder, "cpu", quiet)
    own.lung_net = run.lung_net  # type: ignore[method-assign]
    with pytest.raises(DatasetError, match=refused):
        cross_validated(own, Dataset(phantom.root, tuple(mine)), folds=2)
    assert watched == [], "nothing is trained on one class"
    helped = cross_validated(run, Dataset(phantom.root, tuple(mine)), folds=2)
    assert helped.slices > 2, "with lesion-free slices of other patients"


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Crops], np.ndarray]) -> None:
    monkeypatch.setattr(crossval, "lesion_probabilities", lambda net, crops, **how: answer(crops).astype(np.float32))


@pytest.fixture
def with_a_lost_slice(phantom: Dataset, tmp_path: Path) -> Dataset:
    """Two volumes, the first with a last slice that has no lung but a drawn lesion."""
    case = phantom.cases[0]
    scan = read_scan(case.image)
    pixels, mask = scan.pixels.copy(), read_mask(case.mask, like=scan)
    pixels[-1] = 40
    mask[-1, 30:40, 50:70] = True
    image = write_like(pixels, scan.grid, tmp_path / "im" / "a.nii.gz")
    drawn = write_like(mask, scan.grid, tmp_path / "mask" / "a.nii.gz")
    return Dataset(tmp_path, (replace(case, id="a", image=image, mask=drawn, lung=None), phantom.cases[1]))


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("some", [False, True], ids=["volumes", "one side of a stack"])
def test_slices_are_counted_as_those_of_other_methods(run: Run, with_a_lost_slice: Dataset, some: bool,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they can be compared slice by slice: an outline of all of the lung has the same counts in both."""
    data = with_a_lost_slice
    if some:
        data = Dataset(data.root, (replace(data.cases[0], labels={k: 1 for k in (1, 2, 5, 6, 9)}),))
    answers(monkeypatch, lambda crops: crops.lungs)
    crossed = cross_validated(run, data, folds=2)
    method = Method([("all of the lung", "none", 0.5)],
                    lambda crops, volume: (None, [crops.lungs.astype(np.float32)]))
    other, = measure(run, data, [method])
    mine, = crossed.stages
    assert (mine.name, mine.supervision, mine.threshold) == ("Segmenter", "pixel masks", 0.5)
    assert np.isnan(crossed.classifier_auc)
    assert crossed.lungs is None
    assert crossed.slices == len(other.names) == (5 if some else 20)
    assert crossed.names == other.names
    for part in ("counts", "reliability", "levels"):
        np.testing.assert_array_equal(getattr(mine, part), getattr(other.stages[0], part))
    hit, false, missed, _ = mine.counts.T
    assert [k for k in range(crossed.slices) if hit[k] + false[k] == 0] == [other.names.index("a:9")], "no lung"
    assert missed[other.names.index("a:9")] == 200


@pytest.mark.usefixtures("watched")
def test_predictions_are_compared_with_the_mask_of_their_own_slice(run: Run, measured: Dataset,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = unseen_slices(run, measured)
    mask_of = {image.tobytes(): mask for image, mask in zip(unseen.crops.images, unseen.truth, strict=True)}
    for order, least, most in ((1, 0.85, 1), (-1, 0, 0.7)):
        answers(monkeypatch, lambda crops, order=order: np.array([mask_of[image.tobytes()]
                                                                 for image in crops.images])[::order])
        dice = cross_validated(run, measured, folds=2).stages[0].micro().dice
        assert least < dice < most, "an oracle's masks, cropped and put back; those of other slices do not fit"


def test_folds_are_trained_once(run: Run, measured: Dataset, lines: list[str]) -> None:
    first = cross_validated(run, measured, folds=2)
    assert trained(lines) == {"fold 1 of 2", "fold 2 of 2"}
    assert len(list(run.folder.glob("stages/fold-*.safetensors"))) == 2
    lines.clear()
    again = Run(run.data, TINY, 0, run.folder, "cpu", lines.append)
    second = cross_validated(again, measured, folds=2)
    np.testing.assert_array_equal(second.stages[0].counts, first.stages[0].counts)
    assert lines == [], "all of it is stored"
    other = Run(run.data, replace(TINY, segmenter=replace(TINY.segmenter, rate=0.123)), 0, run.folder, "cpu",
                lines.append)
    cross_validated(other, measured, folds=2)
    assert trained(lines) == {"fold 1 of 2", "fold 2 of 2"}


@pytest.mark.parametrize("change", ["mask", "patient"])
def test_another_mask_or_patient_trains_the_nets_that_it_teaches_again(run: Run, measured: Dataset, tmp_path: Path,
                                                                       lines: list[str], change: str) -> None:
    """The patient too: batches are balanced over patients."""
    cross_validated(run, measured, folds=2)
    fold = split_folds(unseen_slices(run, measured).patients, 2)
    lines.clear()
    case = measured.cases[0]
    changed = replace(case, patient="another")
    if change == "mask":
        scan = read_scan(case.image)
        mask = read_mask(case.mask, like=scan)
        mask[4] = np.roll(mask[4], 5, axis=0)
        changed = replace(case, mask=write_like(mask, scan.grid, tmp_path / "mask.nii.gz"))
    cross_validated(run, Dataset(measured.root, (changed, measured.cases[1])), folds=2)
    assert trained(lines) == {f"fold {2 - fold[0]} of 2"}, "the net measured on that patient never saw it"
