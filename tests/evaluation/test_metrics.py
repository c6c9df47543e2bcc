"""Metrics against hand-made cases and against two other libraries, and the conventions at their edges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import ConfusionMatrixMetric, DiceMetric, MeanIoU
from torchmetrics import classification as tm

from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.scan import Grid, write_like
from covidseg.errors import DatasetError
from covidseg.evaluation.evaluate import read_truth
from covidseg.evaluation.metrics import NAMES, Scores, confusion, figures, macro, micro

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


# --- against other libraries and against themselves -------------------------------------------------------------

@given(pairs())
def test_micro_agrees_with_torchmetrics(pair):
    found, truth = pair
    assume(truth.any() and found.any() and not truth.all())  # where all five are defined
    flat, target = torch.from_numpy(found.ravel().astype(int)), torch.from_numpy(truth.ravel().astype(int))
    others = [tm.BinaryF1Score(), tm.BinaryJaccardIndex(), tm.BinaryPrecision(), tm.BinaryRecall(),
              tm.BinarySpecificity()]
    assert values(micro(confusion(found, truth))) == pytest.approx([float(m(flat, target)) for m in others], abs=1e-6)


@given(pairs())
def test_macro_agrees_with_monai(pair):
    found, truth = pair
    ill = truth.any(axis=(1, 2))
    assume(ill.any() and not truth.all(axis=(1, 2)).any())
    y_pred, y = (torch.from_numpy(a[:, None].astype(np.float32)) for a in (found, truth))  # (N, 1, H, W)
    expected = []
    for metric in (DiceMetric(), MeanIoU()):
        metric(y_pred[ill], y[ill])
        expected.append(float(metric.aggregate()))
    for name, which in (("precision", ill), ("sensitivity", ill), ("specificity", slice(None))):
        metric = ConfusionMatrixMetric(metric_name=name, compute_sample=True)
        metric(y_pred[which], y[which])
        expected.append(float(metric.aggregate()[0]))
    # MONAI leaves slices with an empty prediction out of the mean of the precision; the convention here counts 0.
    expected[2] *= found[ill].any(axis=(1, 2)).mean()
    assert values(macro(confusion(found, truth))) == pytest.approx(expected, abs=1e-6)


EMPTY, FULL = np.zeros((1, 1, 1), bool), np.ones((1, 1, 1), bool)


def disagreements(found: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> list[str]:
    """Figures, pooled and of each slice, that are not those of torchmetrics and of MONAI; any masks, empty ones too."""
    flat, target = (torch.from_numpy(a.reshape(len(a), -1).astype(int)) for a in (found, truth))       # (N, H * W)
    y_pred, y = (torch.from_numpy(a[:, None].astype(np.float32)) for a in (found, truth))              # (N, 1, H, W)
    classes = (tm.BinaryF1Score, tm.BinaryJaccardIndex, tm.BinaryPrecision, tm.BinaryRecall, tm.BinarySpecificity)
    # Where 0 is divided by 0, torchmetrics says 0 and MONAI, of an empty truth, 1 or 0; here that is NaN.
    pooled = dict(zip(NAMES, np.nan_to_num(figures(counts.sum(axis=0))), strict=True))
    wrong = [f"pooled {name}" for name, kind in zip(NAMES, classes, strict=True)
             if abs(float(kind()(flat.ravel(), target.ravel())) - pooled[name]) > 1e-6]
    each = dict(zip(NAMES, figures(counts).T, strict=True))
    for name, kind in zip(NAMES, classes, strict=True):
        if kind is not tm.BinaryJaccardIndex:  # which only pools
            theirs = kind(multidim_average="samplewise")(flat, target).numpy()
            wrong += [f"{name} of slices"] * (not np.allclose(np.nan_to_num(each[name]), theirs, atol=1e-6))
    for name, metric in (("dice", DiceMetric(ignore_empty=False)), ("iou", MeanIoU(ignore_empty=False))):
        theirs = metric(y_pred, y).numpy()[:, 0]
        ours = np.nan_to_num(each[name], nan=1.0)  # nothing to find and nothing found
        wrong += [f"{name} of slices (MONAI)"] * (not np.allclose(ours, theirs, atol=1e-6))
    for name, monai_name in (("ppv", "precision"), ("sensitivity", "sensitivity"), ("specificity", "specificity")):
        metric = ConfusionMatrixMetric(metric_name=monai_name, compute_sample=True)
        matrix = metric(y_pred, y).numpy()[:, 0]  # tp, fp, tn, fn
        wrong += [f"counts for {name} (MONAI)"] * (not np.array_equal(matrix[:, [0, 1, 3, 2]], counts))
    return wrong


@given(pairs())
@example((EMPTY, EMPTY))
@example((EMPTY, FULL))
@example((FULL, EMPTY))
@example((FULL, FULL))
def test_any_masks_get_the_figures_of_torchmetrics_and_monai(pair):
    found, truth = pair
    counts = confusion(found, truth)
    assert disagreements(found, truth, counts) == []
    # Undefined exactly where the denominator is 0.
    hit, false, miss, rest = counts.T
    undefined = np.stack([hit + false + miss == 0, hit + false + miss == 0, hit + false == 0, hit + miss == 0,
                          rest + false == 0], axis=1)
    assert np.array_equal(np.isnan(figures(counts)), undefined)


def test_the_comparison_with_other_libraries_fires():
    found, truth = masks("##.##.....", ".........."), masks("#.##......", "#.........")
    counts = confusion(found, truth)
    assert disagreements(found, truth, counts) == []
    assert set(disagreements(found, truth, counts[:, [0, 2, 1, 3]])) >= {
        "ppv of slices", "sensitivity of slices", "counts for ppv (MONAI)"}
    assert "pooled dice" in disagreements(found, truth, counts + np.array([9, 0, 0, 0]))
    assert "dice of slices (MONAI)" in disagreements(found, truth, counts + np.array([1, 0, 0, 0]))


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


# --- reading the truth ------------------------------------------------------------------------------------------

def test_truth_of_the_phantom(tiny_phantom):
    data = load_dataset(tiny_phantom)
    truths = read_truth(data)
    assert [t.scan.path for t in truths] == [c.image for c in data.cases]
    for truth, case in zip(truths, data.cases, strict=True):
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
    assert read_truth(relabelled(data, {9: 1}))[0].slices.tolist() == [9]
    with pytest.raises(DatasetError, match=r"phantom_00 has 10 slices, slice 10 is labelled.*from 0"):
        read_truth(relabelled(data, {3: 1, 10: 0}))


def test_truth_needs_masks(tmp_path):
    write_like(np.zeros((2, 8, 8), np.int16), Grid((8, 8, 2), np.eye(4)), tmp_path / "im" / "a.nii.gz")
    with pytest.raises(DatasetError, match="no lesion mask for a"):
        read_truth(load_dataset(tmp_path, need_labels=False))
