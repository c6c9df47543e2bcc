"""Lung masks measured: against true lungs, and by how much of the lesions they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from covidseg.data.folder import Dataset
from covidseg.data.scan import read_mask, read_scan
from covidseg.evaluation.evaluate import read_truth, shares
from covidseg.evaluation.metrics import confusion, figures
from covidseg.lungs import threshold_lungs

Finder = Callable[[np.ndarray], np.ndarray]  # pixels (S, H, W) to lung masks of that shape
LEAST_LUNG = 0.01  # share of a slice, for the Dice of its lungs to be judged


@dataclass(frozen=True)
class LungResult:
    """Dice ``(N,)`` of found lungs against true lungs, and ``volume:slice`` of each slice."""

    dice: np.ndarray
    names: np.ndarray


def evaluate_lungs(data: Dataset, find: Finder = threshold_lungs) -> LungResult:
    """Measures lung masks on every slice with at least ``LEAST_LUNG`` of true lung; skips volumes without truth.

    ``find`` makes the masks: the threshold, or ``run.lungs``.
    """
    dice, names = [np.zeros(0)], list[str]()
    for case in data.cases:
        if case.lung is None:
            continue
        scan = read_scan(case.image)
        truth = read_mask(case.lung, like=scan)
        judged = np.flatnonzero(truth.mean(axis=(1, 2)) >= LEAST_LUNG)
        dice.append(figures(confusion(find(scan.pixels)[judged], truth[judged]))[:, 0])
        names += [f"{case.id}:{k}" for k in judged]
    return LungResult(np.concatenate(dice), np.array(names))


def lesion_coverage(data: Dataset, find: Finder = threshold_lungs) -> tuple[float, float]:
    """How much of all lesions lies inside the lung masks, and how much of the slices they take up: two shares.

    A lesion outside the mask is lost for good, and a mask of everything loses none: the two belong together.
    NaN without any lesion.
    """
    return shares(np.concatenate([confusion(find(truth.scan.pixels)[truth.slices], truth.mask[truth.slices])
                                  for truth in read_truth(data)]))
