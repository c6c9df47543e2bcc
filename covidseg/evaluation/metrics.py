"""Dice, IoU, PPV, sensitivity and specificity, per slice (macro) and over pooled pixels (micro); AUC; HD95.

*Macro* averages a figure over slices: a small lesion counts as much as a large one. *Micro* adds up the pixels of
all slices first: large lesions dominate. Slices are always full slices, as in the published table; on crops to the
lungs the same prediction has another specificity.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

NAMES = ("dice", "iou", "ppv", "sensitivity", "specificity")
CLASSES = ("ground glass", "consolidation", "effusion")  # 1, 2 and 3 in the masks that MedSeg publishes
UNNAMED = ("class 1", "class 2", "class 3")  # in masks of others, where these numbers may be two lungs and a lesion


@dataclass(frozen=True)
class Scores:
    """Five figures in [0, 1]; NaN where a figure is not defined (0 divided by 0)."""

    dice: float
    iou: float
    ppv: float
    sensitivity: float
    specificity: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def confusion(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts of true positive, false positive, false negative and true negative pixels of every slice.

    Args:
        prediction: ``(N, H, W)`` bool.
        truth: ``(N, H, W)`` bool.

    Returns:
        ``(N, 4)`` int64.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    axes = tuple(range(1, prediction.ndim))
    hit = (prediction & truth).sum(axis=axes)
    false = (prediction & ~truth).sum(axis=axes)
    miss = (~prediction & truth).sum(axis=axes)
    rest = (~prediction & ~truth).sum(axis=axes)
    return np.stack([hit, false, miss, rest], axis=1).astype(np.int64)


def figures(counts: np.ndarray) -> np.ndarray:
    """Dice, IoU, PPV, sensitivity and specificity from ``(..., 4)`` counts, ``(..., 5)`` float64 with NaN for 0/0."""
    hit, false, miss, rest = np.moveaxis(counts.astype(float), -1, 0)
    pairs = ((2 * hit, 2 * hit + false + miss), (hit, hit + false + miss), (hit, hit + false),
             (hit, hit + miss), (rest, rest + false))
    return np.stack([np.divide(top, bottom, out=np.full_like(bottom, np.nan), where=bottom > 0)
                     for top, bottom in pairs], axis=-1)


def micro(counts: np.ndarray) -> Scores:
    """Figures over the pooled pixels of all slices, ``(N, 4)`` counts."""
    return Scores(*figures(counts.sum(axis=0)).tolist())


def macro(counts: np.ndarray) -> Scores:
    """Mean over the slices that have a lesion; a slice where nothing was predicted has Dice 0 and PPV 0.

    Slices without a lesion have no Dice or sensitivity; their false alarms enter the micro figures and the
    specificity, which is averaged over all slices.
    """
    each = figures(counts)
    with_lesion = counts[:, 0] + counts[:, 2] > 0
    if not with_lesion.any():
        nan = float("nan")
        return Scores(nan, nan, nan, nan, float(each[:, 4].mean()))
    ill = np.nan_to_num(each[with_lesion], nan=0.0)  # PPV of an empty prediction
    dice, iou, ppv, sensitivity = ill[:, :4].mean(axis=0).tolist()
    return Scores(dice, iou, ppv, sensitivity, float(np.nanmean(each[:, 4])))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores higher than a negative, where equal scores count half.

    Scores ``(N,)`` are on any scale, labels bool or 0 and 1. 0.5 is guessing; NaN if one of the classes is missing.
    It is computed from ranks, as the statistic of Mann and Whitney.
    """
    positive = np.asarray(labels) == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


# --- classes of lesions, and distance of outlines -------------------------------------------------------------------

def class_names(mask: Path) -> tuple[str, str, str]:
    """What 1, 2 and 3 stand for in a true mask: :data:`CLASSES` if it lies in a set of MedSeg's, else nobody knows.

    Sets that ``covidseg data get`` laid out say in their ``source.json`` which they are.
    """
    for folder in mask.absolute().parents[:2]:  # stacks lie in the folder of their set, volumes in mask/ below
        with suppress(OSError, ValueError, AttributeError):  # of none, or one that something else wrote
            if str(json.loads((folder / "source.json").read_bytes()).get("name")).startswith("medseg"):
                return CLASSES
    return UNNAMED


def class_counts(prediction: np.ndarray, classes: np.ndarray, numbers: Sequence[int] = (1, 2, 3)) -> np.ndarray:
    """Pixels of some classes that were marked, and all that there are, for every slice.

    Args:
        prediction: ``(N, H, W)`` bool.
        classes: ``(N, H, W)`` uint8, 0 outside, else the number of a class. A mask that holds other ``numbers`` knows
            other classes, and nothing of it is counted.
        numbers: ``C`` of them, those of the classes.

    Returns:
        ``(N, C, 2)`` int64.
    """
    known = bool(np.isin(classes, (0, *numbers)).all())
    each = [(classes == k) & known for k in numbers]
    return np.stack([np.stack([(one & prediction).sum(axis=(1, 2)), one.sum(axis=(1, 2))], axis=1)
                     for one in each], axis=1).astype(np.int64)


def class_sensitivity(counts: np.ndarray, names: Sequence[str] = CLASSES) -> dict[str, float]:
    """Sensitivity over the pooled pixels of each class that is there, from ``(N, C, 2)`` :func:`class_counts`.

    ``names`` are those of :func:`class_names`. Empty for masks of one number: they tell no classes apart.
    """
    there = {name: (hit, size) for name, (hit, size) in zip(names, counts.sum(axis=0).tolist(), strict=True) if size}
    return {name: hit / size for name, (hit, size) in there.items()} if len(there) > 1 else {}


def hd95(prediction: np.ndarray, truth: np.ndarray, sides: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """95th percentile of the distances between the outlines of two masks (HD95), slice by slice, as MONAI has it.

    Of the distances from each outline to the other, the larger percentile counts.

    Args:
        prediction: ``(N, H, W)`` bool.
        truth: ``(N, H, W)`` bool.
        sides: height and width of a pixel.

    Returns:
        ``(N,)`` float64 in the unit of ``sides``: NaN where neither mask holds anything, infinite where only one does.
    """
    marked, lesion = prediction.any(axis=(1, 2)), truth.any(axis=(1, 2))
    result = np.where(marked != lesion, np.inf, np.nan)
    if both := np.flatnonzero(marked & lesion).tolist():
        import torch
        from monai.metrics import compute_hausdorff_distance  # takes seconds to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of how it calls itself
            for k in both:
                one, other = (torch.from_numpy(mask[None, None, k]) for mask in (prediction, truth))
                result[k] = float(compute_hausdorff_distance(one, other, include_background=True, percentile=95,
                                                             spacing=list(sides)))
    return result


@dataclass(frozen=True)
class Distance:
    """How far outlines lie apart on average.

    Attributes:
        mean: Mean :func:`hd95` of the slices in which both masks hold something; NaN if there is none.
        unit: ``mm`` or ``px``.
        slices: How many these are.
        empty: Slices in which only one of the two masks holds anything, so that there is no distance.
    """

    mean: float
    unit: str
    slices: int
    empty: int


def distance(distances: np.ndarray, pixel_mm: np.ndarray) -> Distance:
    """Mean of distances of slices ``(N,)`` in pixels; in mm if the width of a pixel ``(N,)`` is nowhere NaN."""
    known = bool(len(pixel_mm)) and not np.isnan(pixel_mm).any()
    finite = np.isfinite(distances)
    values = (distances * pixel_mm if known else distances)[finite]
    return Distance(float(values.mean()) if len(values) else float("nan"), "mm" if known else "px", len(values),
                    int(np.isinf(distances).sum()))
