"""Metrics against hand-made cases and against another library, and the conventions at their edges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import ConfusionMatrixMetric, DiceMetric, MeanIoU, compute_confusion_matrix_metric

from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.scan import Grid, write_like
from covidseg.errors import DatasetError
from covidseg.evaluation.evaluate import read_truth
from covidseg.evaluation.metrics import (
    CLASSES,
    NAMES,
    Distance,
    Scores,
    auc,
    class_counts,
    class_names,
    class_sensitivity,
    confusion,
    distance,
    figures,
    hd95,
    macro,
    micro,
)

pytestmark = [pytest.mark.filterwarnings(f"error:{what}:RuntimeWarning")
              for what in ("invalid value", "divide by zero")]
SHAPE = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPE)
    return draw(arrays(bool, shape)), draw(arrays(bool, shape))


def masks(*rows: str) -> np.ndarray:
    """``(N, 1, W)`` from one string a slice."""
    return np.array([[[c == "#" for c in row]] for row in rows])


def values(scores: Scores) -> list[float]:
    return [getattr(scores, name) for name in NAMES]


# --- by hand ----------------------------------------------------------------------------------------------------

def test_one_slice_by_hand():
    counts = confusion(masks("##.#......"), masks("#.##......"))
    assert counts.tolist() == [[2, 1, 1, 6]]
    assert counts.dtype == np.int64
    for scores in (macro(counts), micro(counts)):
        assert values(scores) == pytest.approx([4 / 6, 2 / 4, 2 / 3, 2 / 3, 6 / 7])


def test_macro_and_micro_by_hand():
    truth = masks("########..", "#.........")
    found = masks("########..", ".#........")  # the large lesion found, the small one missed
    counts = confusion(found, truth)
    assert counts.tolist() == [[8, 0, 0, 2], [0, 1, 1, 8]]
    assert values(micro(counts)) == pytest.approx([16 / 18, 8 / 10, 8 / 9, 8 / 9, 10 / 11])
    assert values(macro(counts)) == pytest.approx([0.5, 0.5, 0.5, 0.5, (1 + 8 / 9) / 2])


def test_a_lesion_that_is_half_found_is_a_lesion():
    counts = confusion(masks("##...", "#...#"), masks("####.", "....."))
    assert values(macro(counts)) == pytest.approx([4 / 6, 1 / 2, 1, 1 / 2, (1 + 3 / 5) / 2])


def test_an_empty_prediction_of_a_lesion_counts_as_zero_in_macro():
    counts = confusion(masks("..........", "##........"), masks("##........", "##........"))
    assert values(macro(counts)) == pytest.approx([0.5, 0.5, 0.5, 0.5, 1])  # a PPV of 0/0 counts as 0, not as nothing
    assert values(micro(counts)) == pytest.approx([4 / 6, 1 / 2, 1, 1 / 2, 1])


def test_lesion_free_slices_enter_specificity_and_micro_but_not_macro_dice():
    truth, found = masks("##........", ".........."), masks("##........", "#####.....")
    counts = confusion(found, truth)
    assert values(macro(counts)) == pytest.approx([1, 1, 1, 1, (1 + 0.5) / 2])
    assert values(micro(counts)) == pytest.approx([4 / 9, 2 / 7, 2 / 7, 1, 13 / 18])


def test_without_any_lesion_only_specificity_is_defined():
    counts = confusion(masks("..........", "##........"), masks("..........", ".........."))
    assert values(macro(counts)) == pytest.approx([math.nan] * 4 + [0.9], nan_ok=True)
    # Pooled, the false alarms make Dice and PPV 0; sensitivity stays undefined.
    assert values(micro(counts)) == pytest.approx([0, 0, 0, math.nan, 0.9], nan_ok=True)
    nothing = confusion(masks("....."), masks("....."))
    assert values(micro(nothing)) == pytest.approx([math.nan] * 4 + [1], nan_ok=True)


def test_a_slice_that_is_all_lesion_has_no_specificity():
    counts = confusion(masks("####", "#..."), masks("####", "#.##"))
    assert macro(counts).specificity == 1  # of the second slice alone
    assert micro(confusion(masks("##.."), masks("####"))).specificity != micro(counts).specificity  # NaN against 1


def test_shapes_have_to_agree():
    one, other = np.zeros((2, 3, 4), bool), np.zeros((2, 4, 3), bool)
    for pair in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="differ in shape"):
            confusion(*pair)


def test_the_names_are_the_fields_in_order():
    assert tuple(Scores(0.1, 0.2, 0.3, 0.4, 0.5).as_dict().items()) == tuple(zip(NAMES, (0.1, 0.2, 0.3, 0.4, 0.5),
                                                                                strict=True))


# --- against another library and against themselves -------------------------------------------------------------

FIGURES = ("f1 score", "threat score", "precision", "sensitivity", "specificity")  # MONAI's names of the five
EMPTY, FULL = np.zeros((1, 1, 1), bool), np.ones((1, 1, 1), bool)


def disagreements(found: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> list[str]:
    """Figures, pooled, of each slice and of their mean, that are not those of MONAI; any masks, empty ones too."""
    wrong = []
    y_pred, y = (torch.from_numpy(a[:, None].astype(np.float32)) for a in (found, truth))              # (N, 1, H, W)
    for name, theirs, pooled, each in zip(NAMES, FIGURES, figures(counts.sum(axis=0)), figures(counts).T, strict=True):
        metric = ConfusionMatrixMetric(metric_name=theirs, compute_sample=True)
        matrix = metric(y_pred, y).numpy()[:, 0]  # tp, fp, tn, fn of each slice
        wrong += [f"counts for {name}"] * (not np.array_equal(matrix[:, [0, 1, 3, 2]], counts))
        whole, own = (compute_confusion_matrix_metric(theirs, torch.from_numpy(some.astype(float))).numpy()
                      for some in (matrix.sum(axis=0)[None], matrix))
        # Where 0 is divided by 0, MONAI says NaN or, of F1, 0: no figure either way.
        wrong += [f"pooled {name}"] * (not np.allclose(np.nan_to_num(pooled), np.nan_to_num(whole), atol=1e-6))
        wrong += [f"{name} of slices"] * (not np.allclose(np.nan_to_num(each), np.nan_to_num(own), atol=1e-6))
    for name, metric in (("dice", DiceMetric(ignore_empty=False)), ("iou", MeanIoU(ignore_empty=False))):
        direct = metric(y_pred, y).numpy()[:, 0]  # of nothing to find and nothing found it is 1
        ours = np.nan_to_num(figures(counts)[:, NAMES.index(name)], nan=1.0)
        wrong += [f"direct {name} of slices"] * (not np.allclose(ours, direct, atol=1e-6))
    return wrong


@given(pairs())
@example((EMPTY, EMPTY))
@example((EMPTY, FULL))
@example((FULL, EMPTY))
@example((FULL, FULL))
def test_any_masks_get_the_figures_of_monai(pair):
    found, truth = pair
    counts = confusion(found, truth)
    assert disagreements(found, truth, counts) == []
    # Undefined exactly where the denominator is 0.
    hit, false, miss, rest = counts.T
    undefined = np.stack([hit + false + miss == 0, hit + false + miss == 0, hit + false == 0, hit + miss == 0,
                          rest + false == 0], axis=1)
    assert np.array_equal(np.isnan(figures(counts)), undefined)


@given(pairs())
def test_macro_is_the_mean_over_slices_with_a_lesion(pair):
    found, truth = pair
    ill = truth.any(axis=(1, 2))
    assume(ill.any() and not truth.all(axis=(1, 2)).any())
    each = np.nan_to_num(figures(confusion(found, truth)))  # an empty prediction of a lesion counts 0
    assert values(macro(confusion(found, truth))) == pytest.approx([*each[ill, :4].mean(axis=0), each[:, 4].mean()])


def test_the_comparison_with_monai_fires():
    found, truth = masks("##.##.....", ".........."), masks("#.##......", "#.........")
    counts = confusion(found, truth)
    assert disagreements(found, truth, counts) == []
    assert set(disagreements(found, truth, counts[:, [0, 2, 1, 3]])) >= {
        "ppv of slices", "sensitivity of slices", "counts for ppv"}
    assert "pooled dice" in disagreements(found, truth, counts + np.array([9, 0, 0, 0]))
    assert "direct dice of slices" in disagreements(found, truth, counts + np.array([1, 0, 0, 0]))


@given(pairs())
@example((np.zeros((1, 1, 1), bool), np.zeros((1, 1, 1), bool)))
@example((np.ones((2, 1, 1), bool), np.zeros((2, 1, 1), bool)))
def test_counts_add_up_and_figures_stay_in_their_range(pair):
    found, truth = pair
    counts = confusion(found, truth)
    assert (counts.sum(axis=1) == truth[0].size).all()
    assert ((counts[:, 0] + counts[:, 2]) == truth.sum(axis=(1, 2))).all()
    assert ((counts[:, 0] + counts[:, 1]) == found.sum(axis=(1, 2))).all()
    each = figures(counts)
    assert ((each >= 0) & (each <= 1) | np.isnan(each)).all()
    dice, iou = each[:, 0], each[:, 1]
    np.testing.assert_allclose(dice, 2 * iou / (1 + iou))
    # Prediction and truth exchanged: Dice and IoU stay, PPV and sensitivity change places.
    np.testing.assert_array_equal(figures(confusion(truth, found))[:, :4], each[:, [0, 1, 3, 2]])


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # all lesion: no specificity at all
@given(arrays(bool, SHAPE))
def test_the_truth_itself_scores_one(truth):
    for scores in (macro(confusion(truth, truth)), micro(confusion(truth, truth))):
        assert all(v == 1 for v in values(scores) if not math.isnan(v))


def test_counts_of_large_sets_do_not_overflow():
    counts = np.array([[2**40, 0, 0, 2**40]] * 3)
    assert values(micro(counts)) == [1] * 5


# --- AUC --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("scores", "expected"), [
    ([0.1, 0.2, 0.8, 0.9], 1.0), ([0.9, 0.8, 0.2, 0.1], 0.0), ([0.5, 0.5, 0.5, 0.5], 0.5), ([0.1, 0.6, 0.5, 0.9], 0.75),
    ([0.1, 0.5, 0.5, 0.9], 0.875), ([-3, 2, 2, 40], 0.875)])
def test_auc_by_hand(scores, expected):
    assert auc(np.array(scores, np.float32), np.array([0, 0, 1, 1])) == expected
    assert auc(np.array(scores, np.float32), np.array([False, False, True, True])) == expected


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
def test_auc_is_how_often_a_positive_scores_higher(drawn):
    scores, labels = np.array([score for score, _ in drawn], float), np.array([label for _, label in drawn])
    wins = [np.sign(a - b) / 2 + 0.5 for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == (pytest.approx(np.mean(wins)) if wins else pytest.approx(math.nan, nan_ok=True))


# --- reading the truth ------------------------------------------------------------------------------------------

def test_truth_of_the_phantom(tiny_phantom):
    data = load_dataset(tiny_phantom)
    for truth, case in zip(read_truth(data), data.cases, strict=True):
        assert (truth.case, truth.scan.path) == (case, case.image)
        assert truth.mask.shape == truth.scan.pixels.shape
        assert truth.mask.dtype == bool
        assert truth.slices.tolist() == list(range(10))
        assert all(truth.mask[k].any() for k, label in case.labels.items() if label)


def relabelled(data: Dataset, labels: dict[int, int]) -> Dataset:
    """The first volume alone, with other labels."""
    return Dataset(data.root, (replace(data.cases[0], labels=labels),))


def test_labelled_slices_are_measured_or_all_if_there_are_none(tiny_phantom):
    data = load_dataset(tiny_phantom)
    for labels, expected in (({7: 1, 2: 0, 9: 0}, [2, 7, 9]), ({0: 0}, [0]), ({}, list(range(10)))):
        truth, = read_truth(relabelled(data, labels))
        assert truth.slices.tolist() == expected
        assert len(truth.mask) == len(truth.scan.pixels) == 10, "the mask is whole"


def test_a_label_beyond_the_volume_is_refused(tiny_phantom):
    data = load_dataset(tiny_phantom)
    assert next(read_truth(relabelled(data, {9: 1}))).slices.tolist() == [9]
    with pytest.raises(DatasetError, match=r"phantom_00 has 10 slices, slice 10 is labelled.*from 0"):
        next(read_truth(relabelled(data, {3: 1, 10: 0})))


def test_truth_needs_masks(tmp_path):
    write_like(np.zeros((2, 8, 8), np.int16), Grid((8, 8, 2), np.eye(4)), tmp_path / "im" / "a.nii.gz")
    with pytest.raises(DatasetError, match="no lesion mask for a"):
        next(read_truth(load_dataset(tmp_path, labels=False)))


# --- classes and distance ---------------------------------------------------------------------------------------

def test_sensitivity_by_class_by_hand() -> None:
    classes = np.array([[[1, 1, 1, 1, 3]], [[0, 0, 3, 3, 3]]], np.uint8)
    counts = class_counts(masks("##..#", "###.."), classes)
    assert counts.tolist() == [[[2, 4], [0, 0], [1, 1]], [[0, 0], [0, 0], [1, 3]]]
    assert class_sensitivity(counts) == {"ground glass": 0.5, "effusion": 0.5}


@pytest.mark.parametrize(("source", "place", "known"), [
    ('{"name": "medseg1"}', "tr_mask.nii.gz", True), ('{"name": "medseg2"}', "mask/1.nii.gz", True),
    ('{"name": "medseg2"}', "some/where/1.nii.gz", False), ('{"name": "zenodo20"}', "mask/1.nii.gz", False),
    ("{}", "mask/1.nii.gz", False), ("[]", "mask/1.nii.gz", False), ("{", "mask/1.nii.gz", False),
    (None, "mask/1.nii.gz", False)])
def test_classes_have_names_in_sets_of_medseg(source: str | None, place: str, known: bool, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    if source is not None:
        (tmp_path / "source.json").write_text(source)
    names = class_names(tmp_path / place)
    assert names == (CLASSES if known else ("class 1", "class 2", "class 3"))
    monkeypatch.chdir(tmp_path)
    assert class_names(Path(place)) == names
    assert list(class_sensitivity(np.array([[[1, 2], [1, 1], [0, 4]]]), names).items()) == [
        (names[0], 0.5), (names[1], 1.0), (names[2], 0.0)]


@pytest.mark.parametrize("value", [1, 3, 255])
def test_a_mask_of_one_number_tells_no_classes_apart(value: int) -> None:
    classes = masks("##...").astype(np.uint8) * np.uint8(value)
    assert class_sensitivity(class_counts(masks("#...."), classes)) == {}


def test_numbers_of_other_classes_are_not_counted() -> None:
    classes = np.array([[[0, 1, 2, 4, 4]]], np.uint8)
    assert not class_counts(masks("#####"), classes).any()
    counts = class_counts(masks("###.#"), classes, (1, 2, 4))
    assert class_sensitivity(counts, ("a", "b", "c")) == {"a": 1, "b": 1, "c": 0.5}


def test_hd95_by_hand() -> None:
    one, other = np.zeros((4, 30, 30), bool), np.zeros((4, 30, 30), bool)
    one[0, 3, 4] = other[0, 6, 8] = True
    for k, length in ((1, 20), (2, 10)):
        one[k, 5, :length] = other[k, 5, :length] = True
        one[k, 15, 0] = True            # one pixel more, ten away
    other[3, 0, 0] = True
    # Of 21 distances one is 10: the 95th percentile is the 20th of them, 0. Of 11, it lies halfway from 0 to 10.
    np.testing.assert_allclose(hd95(one, other), [5, 0, 5, np.inf])
    np.testing.assert_allclose(hd95(other, one), [5, 0, 5, np.inf], err_msg="the same both ways")
    np.testing.assert_allclose(hd95(one, other, (0.5, 2.0))[0], np.hypot(1.5, 8))
    assert hd95(one, one).tolist() == [0, 0, 0, pytest.approx(np.nan, nan_ok=True)]


def test_mean_distance_is_in_mm_where_all_pixels_have_a_size() -> None:
    apart = np.array([4.0, np.nan, np.inf, 2.0])
    assert distance(apart, np.array([0.5, 1, 1, 2])) == Distance(3, "mm", 2, 1)
    assert distance(apart, np.array([0.5, 1, 1, np.nan])) == Distance(3, "px", 2, 1)
    nothing = distance(apart[1:3], np.ones(2))
    assert math.isnan(nothing.mean)
    assert (nothing.slices, nothing.empty) == (0, 1)
