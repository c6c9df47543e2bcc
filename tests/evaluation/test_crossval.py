"""Cross-validation with masks: folds keep patients together, and no net is measured on a slice that taught it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, quiet

from covidseg import pipeline
from covidseg.data.folder import Case, Dataset, load_dataset
from covidseg.data.scan import read_mask, read_scan, write_like
from covidseg.data.splits import Split, apply_split
from covidseg.errors import DatasetError
from covidseg.evaluation import crossval
from covidseg.evaluation.crossval import cross_validated, masked_slices, split_folds
from covidseg.evaluation.evaluate import Method, measure
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, WeakSet, crop_masks, uncrop
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
    assert split_folds(np.full(5, "a"), 5).tolist() == [0, 1, 2, 3, 4]


# --- slices with masks ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def phantom(tiny_phantom: Path) -> Dataset:
    return load_dataset(tiny_phantom)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crossval")


@dataclass
class Recorded:
    """A run whose log is kept."""

    run: Run
    lines: list[str] = field(default_factory=list)

    def trained(self) -> set[str]:
        """Names of the folds that were trained."""
        return {line.split(" step ")[0] for line in self.lines if " step " in line}


@pytest.fixture
def recorded(phantom: Dataset, folder: Path) -> Recorded:
    """A run on one patient without and one with lesions; its lung net is trained once for all tests here."""
    lines: list[str] = []
    run = Run(phantom.subset(["phantom_02", "phantom_03"]), TINY, 0, folder, "cpu", quiet)
    run.weak()
    run.log = lines.append
    return Recorded(run, lines)


@pytest.fixture
def fresh(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The same run, in which no fold was trained yet."""
    for path in (recorded.run.folder / "stages").glob("fold-*"):
        path.unlink()
    return recorded


@pytest.fixture(scope="module")
def measured(phantom: Dataset) -> Dataset:
    """Two patients that the run was not trained on."""
    return phantom.subset(["phantom_00", "phantom_01"])


@pytest.fixture
def with_a_lost_slice(phantom: Dataset, tmp_path: Path) -> tuple[Dataset, np.ndarray]:
    """A volume whose last slice has no lung but a drawn lesion, and that slice's mask."""
    case = phantom.cases[0]
    scan = read_scan(case.image)
    pixels, mask = scan.pixels.copy(), read_mask(case.mask, like=scan)
    pixels[-1] = 40
    mask[-1, 30:40, 50:70] = True
    image = write_like(pixels, scan.grid, tmp_path / "im" / "a.nii.gz")
    drawn = write_like(mask, scan.grid, tmp_path / "mask" / "a.nii.gz")
    return Dataset(tmp_path, (replace(case, id="a", image=image, mask=drawn, lung=None), phantom.cases[1])), mask[-1]


def test_masks_lie_on_their_crops(recorded: Recorded, measured: Dataset) -> None:
    slices = masked_slices(recorded.run, measured)
    truth = [read_mask(case.mask) for case in measured.cases]
    assert len(slices.crops) == len(slices.masks) == len(slices.full) == len(slices.patients) == 20
    assert slices.places.tolist() == list(range(20))
    assert slices.names == tuple(f"{case.id}:{k}" for case in measured.cases for k in range(10))
    assert slices.patients.tolist() == ["phantom_00"] * 10 + ["phantom_01"] * 10
    np.testing.assert_array_equal(slices.full, np.concatenate(truth))
    first = recorded.run.crops(read_scan(measured.cases[0].image).pixels)[1]
    for name in ("images", "lungs", "boxes"):
        assert np.array_equal(getattr(slices.crops, name)[:10], getattr(first, name)), "prepared as the run does"
    assert slices.masks.dtype == bool
    large = 0
    for small, full, box in zip(slices.masks, slices.full, slices.crops.boxes, strict=True):
        back = uncrop(small, box, full.shape) >= 0.5
        if full.sum() > 100:
            large += 1
            assert 2 * (back & full).sum() / (back.sum() + full.sum()) > 0.8
        elif not full.any():
            assert not small.any()
    assert large > 5
    cut = crop_masks(np.array(slices.full), slices.crops.boxes, TINY.prepare.size)
    np.testing.assert_array_equal(slices.masks, cut)
    lung = np.concatenate([read_mask(case.lung) for case in measured.cases])
    healthy = crop_masks(lung, slices.crops.boxes, TINY.prepare.size) & ~slices.masks
    assert slices.crops.images[slices.masks].mean() > slices.crops.images[healthy].mean() + 0.1, "lesions are bright"


def test_only_the_side_of_a_split_stack_is_taken(fresh: Recorded, with_a_lost_slice: tuple[Dataset, np.ndarray],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten slices, the last of them without lung, a side holds four or five."""
    case = with_a_lost_slice[0].cases[0]
    stack = Dataset(with_a_lost_slice[0].root, (case,))
    whole, truth = masked_slices(fresh.run, stack), read_mask(case.mask)
    monkeypatch.setattr(pipeline, "train_segmenter", lambda data, masks, weights, settings, **rest: make_segmenter(
        settings))
    for side in ([0, 3, 4, 8], [1, 2, 5, 6, 9]):
        sides = {k: "test" if k in side else "train" for k in range(10)}
        part = apply_split(stack, Split("some", {}, {}, sides), "test")
        slices = masked_slices(fresh.run, part)
        found = [k for k in side if k != 9]
        np.testing.assert_array_equal(slices.full, truth[side])
        np.testing.assert_array_equal(slices.masks, whole.masks[found])
        for name in ("images", "lungs", "boxes"):
            assert np.array_equal(getattr(slices.crops, name), getattr(whole.crops, name)[found])
        assert len(slices.patients) == len(found)
        assert [side[place] for place in slices.places] == found
        result = cross_validated(fresh.run, part, folds=2)
        assert result.names == tuple(f"a:{k}" for k in side)
        counts = result.stages[0].counts
        assert (counts[:, 0] + counts[:, 2]).tolist() == truth[side].sum(axis=(1, 2)).tolist()


def test_masks_are_needed(recorded: Recorded, measured: Dataset) -> None:
    bare = Dataset(measured.root, tuple(replace(case, mask=None) for case in measured.cases))
    with pytest.raises(DatasetError, match="no lesion mask"):
        cross_validated(recorded.run, bare)


# --- the cross-validation -------------------------------------------------------------------------------------------

@dataclass
class Fold:
    """What one net was taught with, and what it was then asked about."""

    data: WeakSet
    masks: np.ndarray
    weights: np.ndarray
    settings: SegmenterSettings
    asked: Crops | None = None

    def taught(self) -> set[bytes]:
        return pictures(self.data.crops)


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
        seen.append(Fold(data, masks, weights, settings))
        return make_segmenter(settings)

    def ask(net: torch.nn.Module, crops: Crops) -> np.ndarray:
        assert seen[-1].asked is None, "one question a fold"
        seen[-1].asked = crops
        return np.zeros(crops.images.shape, np.float32)
    monkeypatch.setattr(pipeline, "train_segmenter", train)
    monkeypatch.setattr(crossval, "lesion_probabilities", ask)
    return seen


@pytest.mark.parametrize(("ids", "folds"), [(["phantom_00", "phantom_01"], 2), (["phantom_01"], 5)],
                         ids=["patients", "one stack"])
def test_no_net_is_measured_on_a_slice_that_it_saw(fresh: Recorded, phantom: Dataset, watched: list[Fold],
                                                   ids: list[str], folds: int) -> None:
    data = phantom.subset(ids)
    everything = pictures(masked_slices(fresh.run, data).crops)
    cross_validated(fresh.run, data, folds=folds)
    assert len(watched) == folds
    weak = fresh.run.weak()
    free = pictures(weak.crops.take(np.flatnonzero(weak.labels == 0)))
    for fold in watched:
        unseen = pictures(fold.asked)  # type: ignore[arg-type]
        assert unseen
        assert not unseen & fold.taught()
        assert fold.taught() == (everything - unseen) | free, "all others, and the lesion-free slices of the run"
    asked = [image.tobytes() for fold in watched for image in fold.asked.images]  # type: ignore[union-attr]
    assert len(asked) == len(everything)
    assert set(asked) == everything, "each slice is asked about once"


def test_nets_are_taught_with_masks_and_with_lesion_free_slices(fresh: Recorded, measured: Dataset,
                                                                watched: list[Fold]) -> None:
    slices, weak = masked_slices(fresh.run, measured), fresh.run.weak()
    mask_of = {image.tobytes(): mask for image, mask in zip(slices.crops.images, slices.masks, strict=True)}
    free = pictures(weak.crops.take(np.flatnonzero(weak.labels == 0)))
    assert len(free) == 15
    ill = pictures(weak.crops.take(np.flatnonzero(weak.labels == 1)))
    cross_validated(fresh.run, measured, folds=2)
    for fold in watched:
        assert len(fold.data) == len(fold.masks) == len(fold.data.patients) == 10 + 15
        assert not ill & fold.taught(), "a slice with a lesion but without its mask is no teacher"
        for image, mask, label in zip(fold.data.crops.images, fold.masks, fold.data.labels, strict=True):
            expected = mask_of.get(image.tobytes(), np.zeros_like(mask))
            np.testing.assert_array_equal(mask, expected)
            assert label == expected.any()
        assert (fold.weights == 1).all()
        assert fold.settings == supervised_settings(TINY.segmenter)
        assert {"phantom_02", "phantom_03"} < set(fold.data.patients)


def test_lesion_free_slices_of_measured_patients_are_no_teachers(fresh: Recorded, phantom: Dataset,
                                                                   watched: list[Fold]) -> None:
    """In a set that is both trained and measured on, they may be the very slices to measure."""
    weak = fresh.run.weak()
    assert (weak.labels[weak.patients == "phantom_02"] == 0).any()
    free = pictures(weak.crops.take(np.flatnonzero((weak.labels == 0) & (weak.patients == "phantom_03"))))
    data = phantom.subset(["phantom_00", "phantom_01", "phantom_02"])
    slices = masked_slices(fresh.run, data)
    everything = pictures(slices.crops)
    owner = {image.tobytes(): name for image, name in zip(slices.crops.images, slices.patients, strict=True)}
    cross_validated(fresh.run, data, folds=3)
    assert len(watched) == 3
    measured_on = []
    for fold in watched:
        assert fold.taught() == (everything - pictures(fold.asked)) | free  # type: ignore[arg-type]
        asked, = {owner[image.tobytes()] for image in fold.asked.images}  # type: ignore[union-attr]
        assert asked not in fold.data.patients
        assert "phantom_03" in fold.data.patients
        measured_on.append(asked)
    assert sorted(measured_on) == ["phantom_00", "phantom_01", "phantom_02"]


def test_a_fold_has_to_leave_both_classes(fresh: Recorded, phantom: Dataset, watched: list[Fold]) -> None:
    refused = "no slice with, or none without, a lesion.*fewer folds"
    ill = next(case for case in phantom.cases if case.id == "phantom_01")
    other = next(case for case in phantom.cases if case.id == "phantom_00")
    healthy = replace(other, labels={k: 0 for k in healthy_slices(other)[:2]})
    with pytest.raises(DatasetError, match=refused):     # the net measured on the first patient sees no lesion
        cross_validated(fresh.run, Dataset(phantom.root, (ill, healthy)), folds=2)
    # Slices with a lesion alone, of the only patients that the run has lesion-free slices of.
    mine = [replace(case, patient="one", labels={k: 1 for k in range(10) if k not in healthy_slices(case)})
            for case in phantom.cases if case.id in ("phantom_00", "phantom_01")]
    watched.clear()
    run = Run(Dataset(phantom.root, tuple(replace(case, patient="one") for case in fresh.run.data.cases)), TINY, 0,
              fresh.run.folder, "cpu", quiet)
    run.lung_net = fresh.run.lung_net  # type: ignore[method-assign]
    with pytest.raises(DatasetError, match=refused):
        cross_validated(run, Dataset(phantom.root, tuple(mine)), folds=2)
    assert watched == [], "nothing is trained on one class"
    helped = cross_validated(fresh.run, Dataset(phantom.root, tuple(mine)), folds=2)
    assert helped.slices > 2, "with lesion-free slices of other patients"


def healthy_slices(case: Case) -> list[int]:
    """Numbers of the slices without a drawn lesion."""
    return np.flatnonzero(~read_mask(case.mask).any(axis=(1, 2))).tolist()


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Crops], np.ndarray]) -> None:
    monkeypatch.setattr(crossval, "lesion_probabilities", lambda net, crops: answer(crops).astype(np.float32))


@pytest.mark.usefixtures("watched")
def test_counts_cover_every_slice(fresh: Recorded, with_a_lost_slice: tuple[Dataset, np.ndarray],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    data, lost = with_a_lost_slice
    answers(monkeypatch, lambda crops: crops.lungs)
    result = cross_validated(fresh.run, data, folds=2)
    row, = result.stages
    assert (row.name, row.supervision, row.threshold) == ("Segmenter", "pixel masks", 0.5)
    assert result.slices == len(result.names) == 20
    counts = row.counts
    assert counts.shape == (20, 4)
    assert (counts.sum(axis=1) == 128 * 128).all()
    truth = np.concatenate([read_mask(case.mask) for case in data.cases])
    assert (counts[:, 0] + counts[:, 2]).tolist() == truth.sum(axis=(1, 2)).tolist(), "in the order of the test set"
    assert counts[9].tolist() == [0, 0, lost.sum(), 128 * 128 - lost.sum()], "nothing is predicted without a lung"
    assert (np.delete(counts, 9, axis=0)[:, :2].sum(axis=1) > 0).all(), "all of the lung in the others"


@pytest.mark.usefixtures("watched")
def test_slices_come_in_the_order_in_which_others_are_measured(
        fresh: Recorded, with_a_lost_slice: tuple[Dataset, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they can be compared slice by slice: an outline of all of the lung has the same counts in both."""
    data, _ = with_a_lost_slice
    answers(monkeypatch, lambda crops: crops.lungs)
    crossed = cross_validated(fresh.run, data, folds=2)
    method = Method([("all of the lung", "none", 0.5)],
                        lambda crops, volume: (None, [crops.lungs.astype(np.float32)]))
    other, = measure(fresh.run, data, [method])
    assert crossed.names == other.names
    np.testing.assert_array_equal(crossed.stages[0].counts, other.stages[0].counts)
    np.testing.assert_allclose(crossed.stages[0].reliability, other.stages[0].reliability)
    assert other.stages[0].reliability[:, 2].sum() > 0  # type: ignore[index]


@pytest.mark.usefixtures("watched")
def test_predictions_are_compared_with_the_mask_of_their_own_slice(fresh: Recorded, measured: Dataset,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    slices = masked_slices(fresh.run, measured)
    mask_of = {image.tobytes(): mask for image, mask in zip(slices.crops.images, slices.masks, strict=True)}
    answers(monkeypatch, lambda crops: np.array([mask_of[image.tobytes()] for image in crops.images]))
    hit, false, miss, _ = cross_validated(fresh.run, measured, folds=2).stages[0].counts.sum(axis=0)
    assert 2 * hit / (2 * hit + false + miss) > 0.85, "an oracle's masks, cropped and put back"
    answers(monkeypatch, lambda crops: np.array([mask_of[image.tobytes()] for image in crops.images])[::-1])
    hit, false, miss, _ = cross_validated(fresh.run, measured, folds=2).stages[0].counts.sum(axis=0)
    assert 2 * hit / (2 * hit + false + miss) < 0.7, "those of other slices do not fit"


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(("level", "found"), [(0.5, True), (0.499, False)])
def test_the_threshold_is_that_of_masks(fresh: Recorded, measured: Dataset, monkeypatch: pytest.MonkeyPatch,
                                        level: float, found: bool) -> None:
    answers(monkeypatch, lambda crops: np.full(crops.images.shape, level))
    counts = cross_validated(fresh.run, measured, folds=2).stages[0].counts
    assert bool(counts[:, :2].sum() > 0) is found


def test_folds_are_trained_once(fresh: Recorded, measured: Dataset) -> None:
    first = cross_validated(fresh.run, measured, folds=2)
    assert fresh.trained() == {"fold 1 of 2", "fold 2 of 2"}
    assert len(list((fresh.run.folder / "stages").glob("fold-*.safetensors"))) == 2
    fresh.lines.clear()
    again = Run(fresh.run.data, TINY, 0, fresh.run.folder, "cpu", fresh.lines.append)
    second = cross_validated(again, measured, folds=2)
    np.testing.assert_array_equal(second.stages[0].counts, first.stages[0].counts)
    np.testing.assert_array_equal(second.stages[0].reliability, first.stages[0].reliability)
    assert fresh.lines == [], "all of it is stored"
    other = Run(fresh.run.data, replace(TINY, segmenter=replace(TINY.segmenter, rate=0.123)), 0, fresh.run.folder,
                "cpu", fresh.lines.append)
    cross_validated(other, measured, folds=2)
    assert fresh.trained() == {"fold 1 of 2", "fold 2 of 2"}


@pytest.mark.parametrize("change", ["mask", "patient"])
def test_another_mask_or_patient_trains_the_nets_that_it_teaches_again(fresh: Recorded, measured: Dataset,
                                                                       tmp_path: Path, change: str) -> None:
    """The patient too: batches are balanced over patients."""
    cross_validated(fresh.run, measured, folds=2)
    fold = split_folds(masked_slices(fresh.run, measured).patients, 2)
    fresh.lines.clear()
    case = measured.cases[0]
    changed = replace(case, patient="another")
    if change == "mask":
        scan = read_scan(case.image)
        mask = read_mask(case.mask, like=scan)
        mask[4] = np.roll(mask[4], 5, axis=0)
        changed = replace(case, mask=write_like(mask, scan.grid, tmp_path / "mask.nii.gz"))
    cross_validated(fresh.run, Dataset(measured.root, (changed, measured.cases[1])), folds=2)
    assert fresh.trained() == {f"fold {2 - fold[0]} of 2"}, "the net measured on that patient never saw it"
