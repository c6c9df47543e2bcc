"""Measuring the stages: the rows, the counting path with an oracle, and figures computed a second way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lung_quality as lung_figures
import numpy as np
import pytest
import torch
from lung_quality import Finder, evaluate_lungs, lesion_coverage
from skimage.filters import threshold_otsu
from tiny import TINY, quiet, toy

from covidseg.classifier import Classifier
from covidseg.data.folder import Case, Dataset, load_dataset
from covidseg.data.scan import Grid, read_mask, read_scan, write_like
from covidseg.data.splits import Split, apply_split
from covidseg.errors import DatasetError
from covidseg.evaluation import evaluate
from covidseg.evaluation.evaluate import (
    Evaluation,
    Method,
    evaluate_run,
    measure,
    otsu_in_lung,
    otsu_method,
    stage_method,
    training_truth,
    unseen_slices,
)
from covidseg.evaluation.metrics import hd95
from covidseg.evaluation.statistics import reliability_sums
from covidseg.gradcam import CamSettings, activation_maps
from covidseg.lungnet import robust_lungs
from covidseg.lungs import threshold_lungs
from covidseg.patches import PatchNet, patch_probabilities
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, PrepareSettings, crop_masks, make_crops, uncrop
from covidseg.segmenter import lesion_probabilities, make_segmenter

MEASURED = ["phantom_01", "phantom_02"]


@pytest.fixture(scope="module")
def measured(tiny_run: Run) -> Evaluation:
    return evaluate_run(tiny_run, tiny_run.data.subset(MEASURED))


def test_rows_come_in_the_order_of_the_stages_and_count_every_full_slice(measured: Evaluation, tiny_run: Run) -> None:
    assert [(stage.name, stage.supervision, stage.threshold) for stage in measured.stages[1:]] == [
        ("Grad-CAM", "slice labels", TINY.cam.outline), ("Patch MIL", "slice labels", TINY.mil.threshold),
        ("Fine label map", "slice labels", 0.5), ("Segmenter", "slice labels", TINY.segmenter.threshold),
        ("Segmenter, true masks", "pixel masks", 0.5)], "fixed without masks"
    first = measured.stages[0]
    assert (first.name, first.supervision) == ("Otsu in the lung", "none")
    assert np.isnan(first.threshold), "found in each slice"
    without = evaluate_run(tiny_run, tiny_run.data.subset(MEASURED[:1]), upper_bound=False)
    assert [stage.name for stage in without.stages] == [stage.name for stage in measured.stages[:-1]]
    masks = [read_mask(case.mask) for case in tiny_run.data.subset(MEASURED).cases]
    assert measured.slices == 20
    for stage in measured.stages:
        assert (stage.counts.sum(axis=1) == 128 * 128).all()
        np.testing.assert_array_equal(stage.counts[:, 0] + stage.counts[:, 2], np.concatenate(masks).sum((1, 2)))


def test_the_otsu_row_equals_a_direct_computation(measured: Evaluation, tiny_run: Run) -> None:
    counts = []
    for case in tiny_run.data.subset(MEASURED).cases:
        pixels, mask = read_scan(case.image).pixels, read_mask(case.mask)
        for image, lung, truth in zip(pixels, threshold_lungs(pixels), mask, strict=True):
            found = np.zeros(truth.shape, bool)
            if lung.any():
                crop = robust_lungs(tiny_run.lung_net(), make_crops(image[None], lung[None], TINY.prepare),
                                    TINY.lung_net)
                inside = crop.images[0][crop.lungs[0]]
                small = crop.lungs[0] & (crop.images[0] > threshold_otsu(inside))
                found = uncrop(small, crop.boxes[0], truth.shape) >= 0.5
            counts.append([(found & truth).sum(), (found & ~truth).sum(), (~found & truth).sum(),
                           (~found & ~truth).sum()])
    np.testing.assert_array_equal(measured.stages[0].counts, counts)
    assert 0 < measured.stages[0].micro().dice < 1


def test_otsu_in_the_lung_by_hand() -> None:
    images = np.zeros((3, 4, 4), np.float32)
    images[:, :2], images[0, 0, :2] = 0.1, 0.9
    lungs = np.zeros((3, 4, 4), bool)
    lungs[0, :2] = True
    lungs[1, :2] = True           # even brightness: nothing to separate
    found = otsu_in_lung(images, lungs)
    assert found[0, 0].tolist() == [1, 1, 0, 0]
    assert found.sum() == 2


@pytest.fixture
def squares(tmp_path: Path) -> Dataset:
    """Two volumes of 80 x 80 in which a voxel is a lesion where it is bright: an oracle can read the truth off."""
    rng = np.random.default_rng(0)
    cases = []
    for name in ("one", "two"):
        mask = rng.random((4, 80, 80)) < 0.2
        mask[3] = False
        pixels = np.where(mask, 0, -900).astype(np.int16)
        grid = Grid((80, 80, 4), np.diag([-1.0, -1.0, 5.0, 1.0]))
        image = write_like(pixels, grid, tmp_path / "im" / f"{name}.nii.gz")
        drawn = write_like(mask, grid, tmp_path / "mask" / f"{name}.nii.gz")
        cases.append(Case(name, image, {k: int(mask[k].any()) for k in range(4)}, name, None, drawn))
    return Dataset(tmp_path, tuple(cases))


@pytest.fixture
def untrained(squares: Dataset) -> SimpleNamespace:
    """What evaluate_run needs of a run, with nets that know nothing; crops are whole slices, pixel by pixel."""
    torch.manual_seed(0)
    data, _ = toy(4, size=80)
    profile = SimpleNamespace(**{**vars(TINY), "prepare": PrepareSettings(size=80, margin=0.0)})
    classifier, patch_net = Classifier(TINY.classifier).eval(), PatchNet(TINY.mil).eval()
    return SimpleNamespace(
        data=squares, profile=profile, best=lambda: 1,
        ensemble=lambda number: classifier, mil=lambda number: (patch_net, []),
        segmenter=lambda: make_segmenter(TINY.segmenter).eval(), weak=lambda: data, crops=in_lungs(everywhere))


def everywhere(pixels: np.ndarray) -> np.ndarray:
    return np.ones(pixels.shape, bool)


def left_half(pixels: np.ndarray) -> np.ndarray:
    masks = np.zeros(pixels.shape, bool)
    masks[:, :, :40] = True
    return masks


def all_but(number: int) -> Finder:
    """Lung everywhere except in one slice of each volume."""
    def find(pixels: np.ndarray) -> np.ndarray:
        masks = everywhere(pixels)
        masks[number] = False
        return masks
    return find


def in_lungs(find: Finder) -> Callable[..., tuple[np.ndarray, Crops]]:
    """The crops that a run would make whose lungs are found by ``find``."""
    def crops(pixels: np.ndarray, volume: bool | None = None, aspect: float = 1.0) -> tuple[np.ndarray, Crops]:
        lungs = find(pixels)
        found = np.flatnonzero(lungs.any(axis=(1, 2)))
        return found, make_crops(pixels[found], lungs[found], PrepareSettings(size=80, margin=0.0))
    return crops


def oracle(net: object, crops: Crops, **how: object) -> np.ndarray:
    return (crops.images > 0.5).astype(np.float32)


def test_an_oracle_scores_one(untrained: SimpleNamespace, squares: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "lesion_probabilities", oracle)
    result = evaluate_run(untrained, squares, upper_bound=False)  # type: ignore[arg-type]
    assert result.slices == 8
    row = result.stages[-1]
    assert row.micro().as_dict() == dict.fromkeys(("dice", "iou", "ppv", "sensitivity", "specificity"), 1.0)
    assert row.macro().dice == 1
    assert result.stages[-2].micro().dice < 1, "the other stages are no oracles"


def test_slices_and_volumes_without_a_lung_count_as_missed(untrained: SimpleNamespace, squares: Dataset,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    untrained.crops = in_lungs(all_but(1))
    monkeypatch.setattr(evaluate, "lesion_probabilities", oracle)
    row = evaluate_run(untrained, squares, upper_bound=False).stages[-1]  # type: ignore[arg-type]
    lesions = np.concatenate([read_mask(case.mask) for case in squares.cases]).sum(axis=(1, 2))
    for k, lesion in enumerate(lesions):
        expected = [0, 0, lesion, 6400 - lesion] if k % 4 == 1 else [lesion, 0, 0, 6400 - lesion]
        assert row.counts[k].tolist() == expected
    assert row.macro().dice == pytest.approx(2 / 3)  # of three slices with a lesion in each volume, one is missed
    untrained.crops = in_lungs(lambda pixels: ~everywhere(pixels))
    result = evaluate_run(untrained, squares, upper_bound=False)  # type: ignore[arg-type]
    for row in result.stages:
        assert not row.counts[:, :2].any()
        assert row.counts[:, 2].tolist() == lesions.tolist()
    assert np.isnan(result.classifier_auc)


TEST_SIDE = [1, 3]


@pytest.fixture
def one_side(squares: Dataset) -> Dataset:
    """The test side of a stack whose slices are split: slices 1 and 3 of four."""
    stack = Dataset(squares.root, squares.cases[:1])
    sides = {k: "test" if k in TEST_SIDE else "train" for k in range(4)}
    return apply_split(stack, Split("odd", {}, {}, sides), "test")


def test_only_the_side_of_a_split_stack_is_measured(untrained: SimpleNamespace, squares: Dataset, one_side: Dataset,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def oracle_of_slices(net: object, crops: Crops) -> np.ndarray:
        asked.append(len(crops))
        return (crops.images > 0.5).mean((1, 2)).astype(np.float32)
    monkeypatch.setattr(evaluate, "slice_probabilities", oracle_of_slices)
    whole = evaluate_run(untrained, Dataset(squares.root, squares.cases[:1]), upper_bound=False)  # type: ignore[arg-type]
    side = evaluate_run(untrained, one_side, upper_bound=False)  # type: ignore[arg-type]
    assert (whole.slices, side.slices) == (4, 2)
    for a, b in zip(whole.stages, side.stages, strict=True):
        np.testing.assert_array_equal(b.counts, a.counts[TEST_SIDE])
    # One slice of either class is left for the classifier: the last slice has no lesion.
    assert asked == [4, 4], "once a volume, for the maps and for the figure"
    assert side.classifier_auc == 1
    no_lesion = replace(one_side.cases[0], labels={3: 0})
    alone = evaluate_run(untrained, Dataset(squares.root, (no_lesion,)), upper_bound=False)  # type: ignore[arg-type]
    assert alone.slices == 1
    assert np.isnan(alone.classifier_auc), "the other slices would give it a second class"


def test_maps_are_made_with_the_settings_of_the_run(untrained: SimpleNamespace, squares: Dataset,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def record(net: object, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
        used.append(settings)
        return np.ones(crops.images.shape, np.float32)
    monkeypatch.setattr(evaluate, "activation_maps", record)
    monkeypatch.setattr(evaluate, "slice_probabilities", lambda net, crops: np.array([0.5, 0.49, 1, 0], np.float32))
    untrained.profile.cam = CamSettings(top=77.0)
    result = evaluate_run(untrained, squares, upper_bound=False)  # type: ignore[arg-type]
    assert result.stages[1].counts[:, :2].any(axis=1).tolist() == [True, False, True, False] * 2, "from one half on"
    assert len(used) == len(squares.cases), "once a volume: the fused row reuses the map of its own row"
    assert {settings.top for settings in used} == {77.0}


def test_figures_are_those_of_the_last_round(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of map and patches, computed directly from its nets."""
    # A net that was hardly trained calls no slice ill; believed throughout, each round's maps leave their own mark.
    monkeypatch.setattr(evaluate, "slice_probabilities", lambda net, crops: np.ones(len(crops), np.float32))
    run = Run(tiny_run.data, TINY, 0, tiny_run.folder, "cpu", quiet)
    data = run.data.subset(["phantom_01"])
    result = evaluate_run(run, data, upper_bound=False)

    def counts(number: int) -> list[np.ndarray]:
        def maps(crops: Crops, volume: bool) -> tuple[None, list[np.ndarray]]:
            cam = activation_maps(run.ensemble(number), crops, TINY.cam)
            return None, [cam, patch_probabilities(run.mil(number)[0], crops, cam)]
        rows = [("map", "slice labels", TINY.cam.outline), ("patches", "slice labels", TINY.mil.threshold)]
        return [stage.counts for stage in measure(run, data, [Method(rows, maps)])[0].stages]
    mine, other = counts(2), counts(1)
    for row, expected in zip(result.stages[1:3], mine, strict=True):
        np.testing.assert_array_equal(row.counts, expected)
    assert any(not np.array_equal(a, b) for a, b in zip(mine, other, strict=True)), "the rounds differ"


@pytest.mark.parametrize("wanted", [True, False])
def test_true_lungs_are_used_where_a_profile_asks_for_them(untrained: SimpleNamespace, squares: Dataset,
                                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           wanted: bool) -> None:
    """One volume has a lung mask, its right half; the other has none and keeps the lungs that were found."""
    one, two = squares.cases
    grid = Grid((80, 80, 4), np.diag([-1.0, -1.0, 5.0, 1.0]))
    lung = write_like(~left_half(np.zeros((4, 80, 80))), grid, tmp_path / "lung" / "one.nii.gz")
    data = Dataset(squares.root, (replace(one, lung=lung), two))
    untrained.profile.true_lungs = wanted
    monkeypatch.setattr(evaluate, "lesion_probabilities", lambda net, crops, **how: crops.lungs.astype(np.float32))
    row = evaluate_run(untrained, data, upper_bound=False).stages[-1]  # type: ignore[arg-type]
    truth = read_mask(one.mask)
    assert row.counts[:4, :2].sum(axis=1).tolist() == [80 * 40 if wanted else 80 * 80] * 4
    assert row.counts[:4, 0].tolist() == truth[:, :, 40 if wanted else 0:].sum(axis=(1, 2)).tolist()
    assert row.counts[4:, :2].sum(axis=1).tolist() == [80 * 80] * 4


def test_measuring_needs_masks(tiny_run: Run, squares: Dataset) -> None:
    bare = Dataset(squares.root, tuple(replace(case, mask=None) for case in squares.cases))
    for measuring in (lambda: evaluate_run(tiny_run, bare, upper_bound=False),
                      lambda: lesion_coverage(bare, everywhere)):
        with pytest.raises(DatasetError, match="no lesion mask"):
            measuring()


def test_training_truth_lies_on_the_training_crops(tiny_run: Run) -> None:
    masks, data = training_truth(tiny_run), tiny_run.weak()
    assert masks.shape == data.crops.images.shape
    truth = {case.id: read_mask(case.mask) for case in tiny_run.data.cases}
    for name, box, small in zip(data.names, data.crops.boxes, masks, strict=True):
        volume, number = name.rsplit(":", 1)
        full = truth[volume][int(number)]
        back = uncrop(small, box, full.shape) >= 0.5
        assert full.any() or not back.any()
        if full.sum() > 100:
            assert 2 * (back & full).sum() / (back.sum() + full.sum()) > 0.8


def test_lung_dice_of_a_finder(tiny_phantom: Path, tiny_run: Run, squares: Dataset) -> None:
    data = load_dataset(tiny_phantom).subset(["phantom_00"])
    truth, pixels = read_mask(data.cases[0].lung), read_scan(data.cases[0].image).pixels
    perfect = evaluate_lungs(data, lambda given: truth if np.array_equal(given, pixels) else ~truth)
    assert len(perfect.dice) > 5
    assert (perfect.dice == 1).all()
    assert (evaluate_lungs(data, lambda given: ~truth).dice == 0).all()
    for result, mask in ((evaluate_lungs(data), threshold_lungs(pixels)),
                         (evaluate_lungs(data, tiny_run.lungs), tiny_run.lungs(pixels))):
        for name, value in zip(result.names, result.dice, strict=True):
            a, b = truth[int(name.split(":")[1])], mask[int(name.split(":")[1])]
            assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert len(evaluate_lungs(squares).dice) == 0, "volumes without true lungs are skipped"


def test_slices_with_hardly_any_lung_are_not_judged(tiny_phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(tiny_phantom).subset(["phantom_00"])
    shares = read_mask(data.cases[0].lung).mean(axis=(1, 2))
    monkeypatch.setattr(lung_figures, "LEAST_LUNG", float(np.median(shares)))
    expected = [f"phantom_00:{k}" for k in np.flatnonzero(shares >= lung_figures.LEAST_LUNG)]
    assert 0 < len(expected) < len(shares)
    assert evaluate_lungs(data, everywhere).names.tolist() == expected


# --- how much of the lesions a lung mask holds --------------------------------------------------------------------

def test_coverage_by_hand(squares: Dataset, one_side: Dataset) -> None:
    lesions = [read_mask(case.mask) for case in squares.cases]
    inside, masked = lesion_coverage(squares, left_half)
    assert (inside, masked) == (pytest.approx(np.concatenate(lesions)[:, :, :40].sum() / np.sum(lesions)), 0.5)
    assert inside != 0.5
    assert lesion_coverage(squares, everywhere) == (1, 1)
    assert lesion_coverage(squares, lambda pixels: ~everywhere(pixels)) == (0, 0)
    first = read_scan(squares.cases[0].image).pixels
    of_side = lesions[0][1, :, :40].sum() / lesions[0][1].sum()
    assert lesion_coverage(one_side, left_half) == (of_side, 0.5)
    assert lesion_coverage(one_side, lambda pixels: ~all_but(0)(pixels)) == (0, 0), "a slice of the other side"
    one_of_two = lesion_coverage(squares, lambda pixels: np.full(pixels.shape, np.array_equal(pixels, first)))
    assert one_of_two == (pytest.approx(lesions[0].sum() / np.sum(lesions)), 0.5), "pixels of all volumes are pooled"
    write_like(np.zeros((4, 80, 80), bool), Grid((80, 80, 4), np.diag([-1.0, -1.0, 5.0, 1.0])), squares.cases[0].mask)
    undefined, masked = lesion_coverage(Dataset(squares.root, squares.cases[:1]), left_half)
    assert (np.isnan(undefined), masked) == (True, 0.5)


def test_the_lungs_are_measured_as_the_lesions_see_them(tiny_run: Run, measured: Evaluation) -> None:
    data = tiny_run.data.subset(MEASURED)
    assert measured.lung_shares() == pytest.approx(lesion_coverage(data, tiny_run.lungs))
    assert all(np.isnan(value) for value in replace(measured, lungs=None).lung_shares())
    nothing = replace(measured, lungs=np.array([[0, 5, 0, 15]])).lung_shares()
    assert np.isnan(nothing[0]), "no lesion to be inside"
    assert nothing[1] == 0.25


# --- several methods at once ------------------------------------------------------------------------------------

def level_method(level: float, threshold: float, verdict: float | None = None,
                   asked: list[bool] | None = None) -> Method:
    """Says ``level`` in all of the crop, and ``verdict`` of every slice."""
    def maps(crops: Crops, volume: bool) -> tuple[np.ndarray | None, list[np.ndarray]]:
        if asked is not None:
            asked.append(volume)
        judged = None if verdict is None else np.full(len(crops), verdict, np.float32)
        return judged, [np.full(crops.images.shape, level, np.float32)]
    return Method([(f"level {level}", "slice labels", threshold)], maps)


def test_methods_are_measured_apart_on_the_same_slices(untrained: SimpleNamespace, squares: Dataset) -> None:
    untrained.crops = in_lungs(all_but(1))
    given = [level_method(0.3, 0.3, 0.7), level_method(0.3, 0.301), otsu_method()]
    exact, above, otsu = measure(untrained, squares, given)  # type: ignore[arg-type]
    for result in (exact, above, otsu):
        assert result.slices == 8
        assert result.names == tuple(f"{volume}:{k}" for volume in ("one", "two") for k in range(4))
        assert result.lungs is not None
        assert result.lungs[:, :2].sum(axis=1).tolist() == [6400, 0, 6400, 6400] * 2
        assert len(result.stages) == 1
    truth = np.concatenate([read_mask(case.mask) for case in squares.cases]).sum(axis=(1, 2))
    nothing = [[0, 0, lesion, 6400 - lesion] for lesion in truth]
    assert exact.stages[0].counts.tolist() == [
        nothing[k] if k % 4 == 1 else [lesion, 6400 - lesion, 0, 0] for k, lesion in enumerate(truth)]
    assert above.stages[0].counts.tolist() == nothing, "a lesion from the threshold on"
    assert exact.classifier_auc == 0.5, "the same verdict of all slices"
    assert np.isnan(above.classifier_auc), "it judges no slice"


@pytest.mark.parametrize("unit", ["mm", "px"])
def test_classes_and_distances_of_the_measured_slices(untrained: SimpleNamespace, squares: Dataset, tmp_path: Path,
                                                      unit: str) -> None:
    """The lungs are marked, against a mask with classes; distances are in mm if the scan is no picture."""
    case = replace(squares.cases[0], labels={0: 1, 2: 1})
    classes = np.zeros((4, 80, 80), np.uint8)
    classes[0, 10, 30:50], classes[2, 10, 39], classes[1] = 1, 2, 3   # slice 1 is not measured
    grid = Grid((80, 80, 4), np.diag([-0.5, -0.5, 5.0, 1.0]))
    pixels = read_scan(case.image).pixels
    pixels = pixels if unit == "mm" else ((pixels + 1000) / 10).astype(np.uint8)
    case = replace(case, image=write_like(pixels, grid, tmp_path / "a.nii.gz"),
                   mask=write_like(classes, grid, tmp_path / "b.nii.gz"))
    untrained.crops = in_lungs(left_half)
    marking = Method([("lungs", "none", 0.5)], lambda crops, volume: (None, [crops.lungs.astype(np.float32)]))
    row = measure(untrained, Dataset(tmp_path, (case,)), [marking])[0].stages[0]  # type: ignore[arg-type]
    assert row.class_sensitivity() == {"class 1": 0.5, "class 2": 1.0}, "no set of MedSeg's"
    marked = np.zeros((2, 80, 80), bool)
    marked[:, :, :40] = True
    expected = hd95(marked, classes[[0, 2]] > 0).mean() * (0.5 if unit == "mm" else 1)
    assert (row.distance().mean, row.distance().unit) == (pytest.approx(expected), unit)


def test_each_method_together_is_as_it_is_alone(tiny_run: Run, measured: Evaluation) -> None:
    alone, = measure(tiny_run, tiny_run.data.subset(MEASURED), [stage_method(tiny_run)])
    assert (alone.classifier_auc, alone.names) == (measured.classifier_auc, measured.names)
    for mine, other in zip(alone.stages, measured.stages[1:-1], strict=True):
        for a, b in zip(vars(mine).values(), vars(other).values(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_calibration_is_that_of_the_map_inside_the_lungs(tiny_run: Run, measured: Evaluation) -> None:
    expected = np.zeros((10, 3))
    for case in tiny_run.data.subset(MEASURED).cases:
        pixels, mask = read_scan(case.image).pixels, read_mask(case.mask)
        found, crops = tiny_run.crops(pixels)
        small = lesion_probabilities(tiny_run.segmenter(), crops)
        for k, each, lung, box in zip(found, small, crops.lungs, crops.boxes, strict=True):
            inside = uncrop(lung, box, mask.shape[1:]) > 0.5
            expected += reliability_sums(uncrop(each, box, mask.shape[1:])[inside], mask[k][inside])
    np.testing.assert_allclose(measured.stages[-2].reliability, expected)
    assert expected[:, 2].sum() == measured.lungs[:, :2].sum(), "pixels of the lungs, and no other"  # type: ignore[index]


def test_counts_at_the_level_of_the_outline_are_those_of_the_table(measured: Evaluation) -> None:
    for stage in measured.stages:
        level = 50 if np.isnan(stage.threshold) else round(100 * stage.threshold)
        np.testing.assert_array_equal(stage.levels[level], stage.counts.sum(axis=0))
        assert (np.diff(stage.levels[:, :2], axis=0) <= 0).all(), "the higher, the fewer"


def test_methods_are_told_what_is_a_volume(untrained: SimpleNamespace, squares: Dataset,
                                             tmp_path: Path) -> None:
    """The volumes here are noise, slice by slice: a stack. One slice over and over again is a volume."""
    asked: list[bool] = []
    measure(untrained, squares, [level_method(0.5, 0.5, asked=asked)])  # type: ignore[arg-type]
    case = squares.cases[0]
    scan = read_scan(case.image)
    same = write_like(np.repeat(scan.pixels[:1], 4, axis=0), scan.grid, tmp_path / "same.nii.gz")
    volume = Dataset(squares.root, (replace(case, image=same),))
    measure(untrained, volume, [level_method(0.5, 0.5, asked=asked)])  # type: ignore[arg-type]
    assert asked == [False, False, True]


def test_answers_slice_by_slice_are_those_that_were_measured(tiny_run: Run, measured: Evaluation) -> None:
    unseen = unseen_slices(tiny_run, tiny_run.data.subset(MEASURED))
    assert set(unseen.names) <= set(measured.names)
    assert len(unseen.names) == len(unseen.crops) == len(unseen.truth) == len(unseen.labels)
    assert unseen.patients.tolist() == [name.split(":")[0] for name in unseen.names]
    masks = {case.id: read_mask(case.mask) for case in tiny_run.data.cases}
    for name, box, small in zip(unseen.names, unseen.crops.boxes, unseen.truth, strict=True):
        full = masks[name.split(":")[0]][int(name.split(":")[1])]
        np.testing.assert_array_equal(small, crop_masks(full[None], box[None], 80)[0])
    method = stage_method(tiny_run)
    probability, maps, masks = unseen.answers(method)
    assert probability is not None
    assert len(probability) == len(maps)
    np.testing.assert_array_equal(masks, maps >= method.rows[-1][2])
    np.testing.assert_array_equal(maps, unseen.maps(lambda crops, volume: method.maps(crops, volume)[1][-1]))
    # Back in the full slice they are the masks that were counted.
    rows = [measured.names.index(name) for name in unseen.names]
    counts = measured.stages[-2].counts[rows]
    for small, box, (hit, false, *_) in zip(maps, unseen.crops.boxes, counts, strict=True):
        full = uncrop(small, box, (128, 128)).clip(0, 1)
        assert (full >= method.rows[-1][2]).sum() == hit + false


def test_slices_that_are_not_measured_are_not_looked_at(tiny_run: Run) -> None:
    """A net still reads the whole volume."""
    one = tiny_run.data.subset(["phantom_01"]).cases[0]
    some = dict(list(one.labels.items())[3:6])
    unseen = unseen_slices(tiny_run, Dataset(tiny_run.data.root, (replace(one, labels=some),)))
    assert set(unseen.names) <= {f"phantom_01:{k}" for k in some}
    assert len(unseen.scans[0][0]) > len(unseen.names)
    assert unseen.answers(otsu_method())[0] is None
    assert unseen.answers(otsu_method())[2].shape == unseen.truth.shape
