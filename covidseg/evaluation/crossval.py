"""Full supervision on the test slices themselves, by cross-validation: what the weak method is compared with.

The same U-Net and the same training loop, taught with radiologists' masks. Each fold's net answers for slices that
it never saw. Lesion-free slices of the training set take part as well, since they cost no mask.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from torch import nn

from covidseg.data.folder import Dataset
from covidseg.errors import DatasetError
from covidseg.evaluation.evaluate import Evaluation, Method, Unseen, measure, unseen_slices
from covidseg.pipeline import Run
from covidseg.preprocess import WeakSet, join_crops
from covidseg.segmenter import PLAIN, lesion_probabilities, supervised_settings


def split_folds(patients: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each slice, ``(N,)`` int: whole patients if there are enough of them.

    A stack of unrelated slices counts as one patient; it is cut into runs of neighbours, which often show the same
    person.

    Raises:
        DatasetError: there are fewer slices than folds.
    """
    if len(patients) < folds:
        raise DatasetError(f"{len(patients)} slices with lung are too few for {folds} folds",
                           remedy="Choose fewer folds or a larger set")
    names = np.unique(patients)
    if len(names) < folds:
        return np.arange(len(patients)) * folds // len(patients)
    sizes, fold_of = np.zeros(folds), {}
    for name in sorted(names, key=lambda n: -(patients == n).sum()):  # largest first, into the emptiest fold
        fold_of[name] = int(np.argmin(sizes))
        sizes[fold_of[name]] += (patients == name).sum()
    return np.array([fold_of[name] for name in patients])


def cross_validated(run: Run, data: Dataset, *, folds: int = 5) -> Evaluation:
    """Full slices of a set with masks, each predicted by a net trained on the other folds; measured as one row.

    The run gives the lungs, the lesion-free slices, the segmenter's settings and the seed.

    Raises:
        DatasetError: the set has no masks, too few slices, or no lesion outside one of the folds.
    """
    unseen = unseen_slices(run, data)
    fold, maps = split_folds(unseen.patients, folds), np.zeros(unseen.truth.shape, np.float32)
    for k in range(folds):
        net = _train(run, unseen, np.flatnonzero(fold != k), f"fold {k + 1} of {folds}")
        held_back = np.flatnonzero(fold == k)
        maps[held_back] = lesion_probabilities(net, unseen.crops.take(held_back), gains=PLAIN)
    # Scan by scan, with room for slices that are not measured, as a method is asked.
    seen = np.concatenate([each for _, _, each in unseen.scans])
    whole = np.zeros((len(seen), *maps.shape[1:]), np.float32)
    whole[seen] = maps
    answers = iter(np.split(whole, np.cumsum([len(crops) for crops, _, _ in unseen.scans])[:-1]))
    method = Method([("Segmenter", "pixel masks", supervised_settings(run.profile.segmenter).threshold)],
                    lambda crops, volume: (None, [next(answers)]))
    result, = measure(run, data, [method])
    return replace(result, lungs=None)  # not of interest beside the mask's figures


def _train(run: Run, unseen: Unseen, taught: np.ndarray, name: str) -> nn.Module:
    """A net taught with the masks of some slices and with the lesion-free slices of the run; stored with the run."""
    weak = run.weak()
    # Of other patients only: in a set that is both trained and measured on, they may be the very slices to measure.
    free = np.flatnonzero((weak.labels == 0) & ~np.isin(weak.patients, unseen.patients))
    crops = join_crops([unseen.crops.take(taught), weak.crops.take(free)])
    masks = np.concatenate([unseen.truth[taught], np.zeros((len(free), *unseen.truth.shape[1:]), bool)])
    patients = np.concatenate([unseen.patients[taught], weak.patients[free]])
    data = WeakSet(crops, masks.any(axis=(1, 2)).astype(int), patients, np.arange(len(masks)).astype(str))
    if set(data.labels.tolist()) != {0, 1}:
        raise DatasetError("a fold leaves no slice with, or none without, a lesion to learn from",
                           remedy="Choose fewer folds or a larger set")
    key = run.masks_key(masks, hashlib.sha256(crops.images.tobytes()).hexdigest(), patients.tolist())
    return run.taught_with_masks("fold", key, data, masks, name)
