"""Dice, IoU, PPV, sensitivity and specificity, per slice (macro) and over pooled pixels (micro); AUC of a score.

*Macro* averages a figure over slices: a small lesion counts as much as a large one. *Micro* adds up the pixels of
all slices first: large lesions dominate. Slices are always full slices, as in the published table; on crops to the
lungs the same prediction has another specificity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import rankdata

NAMES = ("dice", "iou", "ppv", "sensitivity", "specificity")


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
