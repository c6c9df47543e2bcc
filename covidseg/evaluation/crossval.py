"""Full supervision on the test slices themselves, by cross-validation: what the weak method is compared with.

The same U-Net and the same training loop, taught with radiologists' masks. Each fold's net is measured on slices that
it never saw. Lesion-free slices of the training set take part as well, since they cost no mask.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import nn

from covidseg.data.folder import Dataset
from covidseg.errors import DatasetError
from covidseg.evaluation.evaluate import Evaluation, Tally, join_crops, read_truth
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, WeakSet, crop_masks, uncrop
from covidseg.segmenter import lesion_probabilities, supervised_settings


@dataclass(frozen=True)
class MaskedSlices:
    """The measured slices of a set with their true masks: ``M`` in all, in ``N`` of them a lung was found.

    Attributes:
        crops: ``N`` slices, lungs completed.
        masks: ``(N, S, S)`` bool. The truth in the crops.
        patients: ``(N,)`` str.
        places: ``(N,)`` int. Which of the ``M`` slices each is.
        full: ``M`` masks ``(H, W)`` bool, the truth in full slices. What lies in slices without a lung is missed.
        names: ``volume:slice`` of the ``M`` slices.
    """

    crops: Crops
    masks: np.ndarray
    patients: np.ndarray
    places: np.ndarray
    full: list[np.ndarray]
    names: tuple[str, ...]


def masked_slices(run: Run, data: Dataset) -> MaskedSlices:
    """Reads a set with masks and prepares its slices as the run does."""
    crops, masks, patients = list[Crops](), list[np.ndarray](), list[str]()
    places, full, names = list[int](), list[np.ndarray](), list[str]()
    for case, truth in zip(data.cases, read_truth(data), strict=True):
        found, part = run.crops(truth.scan.pixels)
        measured = np.isin(found, truth.slices)
        found, part = found[measured], part.take(measured)
        crops.append(part)
        masks.append(crop_masks(truth.mask[found], part.boxes, run.profile.prepare.size))
        patients += [case.patient] * len(found)
        places += (len(full) + np.flatnonzero(np.isin(truth.slices, found))).tolist()
        full += list(truth.mask[truth.slices])
        names += [f"{case.id}:{k}" for k in truth.slices]
    return MaskedSlices(join_crops(crops), np.concatenate(masks), np.array(patients), np.array(places), full,
                        tuple(names))


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
    """Full slices, each predicted by a net that was trained on the other folds.

    Args:
        run: gives the lungs, the lesion-free slices, the segmenter's settings and the seed.
        data: a set with lesion masks.
        folds: number of nets.

    Returns:
        One row. Its slices come in the order in which :func:`covidseg.evaluation.evaluate.measure` has them.

    Raises:
        DatasetError: the set has no masks, too few slices, or no lesion outside one of the folds.
    """
    slices = masked_slices(run, data)
    fold = split_folds(slices.patients, folds)
    tally = Tally("Segmenter", "pixel masks", supervised_settings(run.profile.segmenter).threshold)
    order = sorted(set(range(len(slices.full))) - set(slices.places.tolist()))
    for place in order:  # no lung, no prediction
        mask = slices.full[place][None]
        tally.add(np.zeros(mask.shape), mask, np.zeros(mask.shape, bool))
    for k in range(folds):
        net = _train(run, slices, np.flatnonzero(fold != k), f"fold {k + 1} of {folds}")
        unseen = np.flatnonzero(fold == k)
        part = slices.crops.take(unseen)
        for place, small, lung, box in zip(slices.places[unseen].tolist(), lesion_probabilities(net, part), part.lungs,
                                           part.boxes, strict=True):
            mask = slices.full[place]
            tally.add(uncrop(small, box, mask.shape).clip(0, 1)[None], mask[None],
                      (uncrop(lung, box, mask.shape) > 0.5)[None])
            order.append(place)
    return Evaluation([tally.result(order)], float("nan"), len(order), names=slices.names)


def _train(run: Run, slices: MaskedSlices, seen: np.ndarray, name: str) -> nn.Module:
    """A net taught with the masks of some slices and with the lesion-free slices of the run; stored with the run."""
    weak = run.weak()
    # Of other patients only: in a set that is both trained and measured on, they may be the very slices to measure.
    free = np.flatnonzero((weak.labels == 0) & ~np.isin(weak.patients, slices.patients))
    crops = join_crops([slices.crops.take(seen), weak.crops.take(free)])
    masks = np.concatenate([slices.masks[seen], np.zeros((len(free), *slices.masks.shape[1:]), bool)])
    patients = np.concatenate([slices.patients[seen], weak.patients[free]])
    data = WeakSet(crops, masks.any(axis=(1, 2)).astype(int), patients, np.arange(len(masks)).astype(str))
    if set(data.labels.tolist()) != {0, 1}:
        raise DatasetError("a fold leaves no slice with, or none without, a lesion to learn from",
                           remedy="Choose fewer folds or a larger set")
    key = run.masks_key(masks, hashlib.sha256(crops.images.tobytes()).hexdigest(), patients.tolist())
    return run.taught_with_masks("fold", key, data, masks, name)
