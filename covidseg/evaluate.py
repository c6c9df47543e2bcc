"""Every stage measured against lesion masks, as one table: the only module besides ``metrics`` that opens masks.

All stages see the same slices, the same lungs and the same metric code. Each has its threshold fixed in
advance in the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from skimage.filters import threshold_otsu
from tqdm import tqdm

from covidseg.cam import CamSettings, activation_maps
from covidseg.classify import Classifier, auc, slice_probabilities
from covidseg.dataset import Dataset
from covidseg.fine import fuse
from covidseg.io import read_mask, read_scan
from covidseg.lungs import lung_masks
from covidseg.metrics import Scores, confusion, macro, micro, read_truth
from covidseg.mil import patch_probabilities
from covidseg.pipeline import Run
from covidseg.prepare import Crops, crop_masks, uncrop
from covidseg.refine import lesion_probabilities, trusting


@dataclass(frozen=True)
class StageResult:
    """One row of the table.

    Attributes:
        name: what made the masks.
        supervision: what it was taught with.
        threshold: fixed in advance; NaN where it is found in each slice.
        counts: ``(N, 4)`` confusion counts of every measured slice.
    """

    name: str
    supervision: str
    threshold: float
    counts: np.ndarray

    def macro(self) -> Scores:
        """Mean over slices with a lesion."""
        return macro(self.counts)

    def micro(self) -> Scores:
        """Over pooled pixels of all slices."""
        return micro(self.counts)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a test set.

    Attributes:
        stages: the rows of the table.
        classifier_auc: how well the classifier tells slices apart; NaN if the test set has one class only.
        slices: how many were measured.
        lungs: ``(N, 4)`` confusion counts of the lung masks, taken as if they were lesion masks.
    """

    stages: list[StageResult]
    classifier_auc: float
    slices: int
    lungs: np.ndarray | None = None

    def lung_shares(self) -> tuple[float, float]:
        """How much of all lesions lies inside the lungs that were found, and how much of the slices those take up.

        NaN where lungs were not measured or there is no lesion.
        """
        hit, false, missed, rest = (np.zeros(4) if self.lungs is None else self.lungs.sum(axis=0)).tolist()
        lesion, pixels = hit + missed, hit + false + missed + rest
        return hit / lesion if lesion else float("nan"), (hit + false) / pixels if pixels else float("nan")


def believed_maps(net: Classifier, crops: Crops, settings: CamSettings) -> np.ndarray:
    """Activation maps of the slices that the classifier calls ill, 0 in the others, ``(N, S, S)`` in [0, 1].

    Each map is scaled to its own maximum, so that it would be as strong in a slice without a lesion.
    """
    ill = slice_probabilities(net, crops) >= 0.5
    maps = np.zeros(crops.images.shape, np.float32)
    if ill.any():
        maps[ill] = activation_maps(net, crops.take(np.flatnonzero(ill)), settings)
    return maps


def otsu_in_lung(images: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The floor that needs no learning: Otsu's threshold inside the lung of each slice.

    Args:
        images: ``(N, S, S)`` normalised crops.
        lungs: ``(N, S, S)`` bool.

    Returns:
        ``(N, S, S)`` float32, 0 or 1.
    """
    result = np.zeros(images.shape, np.float32)
    for out, image, lung in zip(result, images, lungs, strict=True):
        values = image[lung]
        if len(values) and values.min() < values.max():
            out[:] = lung & (image > threshold_otsu(values))
    return result


def training_truth(run: Run) -> np.ndarray:
    """True masks of the training crops, ``(N, S, S)`` bool, for the upper bound and for looking only.

    Raises:
        DatasetError: the training set has no masks.
    """
    truths = {case.id: truth.mask for case, truth in zip(run.data.cases, read_truth(run.data), strict=True)}
    data = run.weak()
    masks = []
    for name, box in zip(data.names, data.crops.boxes, strict=True):
        volume, number = name.rsplit(":", 1)
        masks.append(crop_masks(truths[volume][[int(number)]], box[None], run.profile.prepare.size)[0])
    return np.array(masks)


def evaluate_run(run: Run, test: Dataset, *, upper_bound: bool | None = None, progress: bool = False) -> Evaluation:
    """Measures all stages on full slices of a test set.

    Args:
        run: trained stages; missing ones are trained first.
        test: a folder with lesion masks. Slices in which no lung was found count with an empty prediction.
        upper_bound: also train with true masks; default: if the training set has them.
        progress: show a bar over the test volumes.
    """
    if upper_bound is None:
        upper_bound = all(case.mask is not None for case in run.data.cases)
    best = run.best()
    classifier, (patch_net, _), segmenter = run.classifier(best), run.mil(best), run.segmenter()
    p = run.profile
    # A row's maps are made from the crops and from the maps of the rows above it, which the fusion reuses.
    stages: list[tuple[str, str, float, Callable[[Crops, dict[str, np.ndarray]], np.ndarray]]] = [
        ("Otsu in the lung", "none", float("nan"), lambda c, _: otsu_in_lung(c.images, c.lungs)),
        ("Grad-CAM", "slice labels", p.cam.outline, lambda c, _: believed_maps(classifier, c, p.cam)),
        ("Patch MIL", "slice labels", p.mil.threshold, lambda c, above: patch_probabilities(patch_net, c,
                                                                                           above["Grad-CAM"])),
        ("Fine label map", "slice labels", 0.5,
         lambda c, above: fuse(above["Grad-CAM"], above["Patch MIL"], p.fine) * c.lungs),
        ("Segmenter", "slice labels", p.segmenter.threshold, lambda c, _: lesion_probabilities(segmenter, c)),
    ]
    if upper_bound:
        supervised = run.supervised(training_truth(run))
        stages.append(("Segmenter, true masks", "pixel masks", trusting(p.segmenter).threshold,
                       lambda c, _: lesion_probabilities(supervised, c)))

    counts: list[list[np.ndarray]] = [[] for _ in stages]
    lung_counts = []
    probabilities, labels = [], []
    for case in tqdm(test.cases, desc="measuring", unit="volume", disable=not progress):
        truth = read_truth(Dataset(test.root, (case,)))[0]
        pixels, mask = truth.scan.pixels, truth.mask
        found, crops = run.crops(pixels)
        if p.true_lungs and case.lung is not None:
            true_lungs = read_mask(case.lung, like=truth.scan)[found]
            crops = replace(crops, lungs=crop_masks(true_lungs, crops.boxes, p.prepare.size))
        lungs = np.zeros(mask.shape, bool)
        for k, small, box in zip(found, crops.lungs, crops.boxes, strict=True):
            lungs[k] = uncrop(small, box, mask.shape[1:]) > 0.5
        lung_counts.append(confusion(lungs[truth.slices], mask[truth.slices]))
        maps: dict[str, np.ndarray] = {}
        for (name, _, threshold, predict), rows in zip(stages, counts, strict=True):
            predicted = np.zeros(mask.shape, bool)
            if len(found):
                maps[name] = predict(crops, maps)
                for k, small, box in zip(found, maps[name], crops.boxes, strict=True):
                    level = 0.5 if np.isnan(threshold) else threshold
                    predicted[k] = uncrop(small, box, mask.shape[1:]) >= level
            rows.append(confusion(predicted[truth.slices], mask[truth.slices]))
        measured = np.isin(found, truth.slices)
        if measured.any():
            probabilities.append(slice_probabilities(classifier, crops.take(measured)))
            labels.append(mask[found[measured]].any(axis=(1, 2)).astype(int))
    all_labels = np.concatenate(labels) if labels else np.zeros(0, int)
    area = auc(np.concatenate(probabilities), all_labels) if len(set(all_labels)) == 2 else float("nan")
    results = [StageResult(name, supervision, threshold, np.concatenate(rows))
               for (name, supervision, threshold, _), rows in zip(stages, counts, strict=True)]
    return Evaluation(results, area, len(results[0].counts), np.concatenate(lung_counts))


Finder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LungResult:
    """Found lungs against true lungs: Dice of each slice with lung, and the slice it belongs to."""

    dice: np.ndarray
    names: np.ndarray


def evaluate_lungs(data: Dataset, find: Finder = lung_masks, *, least: float = 0.01) -> LungResult:
    """Dice of lung masks on every slice of which at least ``least`` is lung; skips volumes without truth.

    Args:
        find: makes lung masks ``(S, H, W)`` from pixels of that shape; default the threshold, or ``run.lungs``.
    """
    dice, names = [], []
    for case in data.cases:
        if case.lung is None:
            continue
        scan = read_scan(case.image)
        truth, mask = read_mask(case.lung, like=scan), find(scan.pixels)
        for k in np.flatnonzero(truth.mean(axis=(1, 2)) >= least):
            dice.append(2 * (truth[k] & mask[k]).sum() / (truth[k].sum() + mask[k].sum()))
            names.append(f"{case.id}:{k}")
    return LungResult(np.array(dice), np.array(names))


def lesion_coverage(data: Dataset, find: Finder = lung_masks) -> tuple[float, float]:
    """How much of all lesions lies inside the lung masks, and how much of the slices they take up: two shares.

    A lesion outside the mask is lost for good, and a mask of everything loses none: the two belong together.
    """
    inside = lesion = masked = total = 0
    for truth in read_truth(data):
        mask, lesions = find(truth.scan.pixels)[truth.slices], truth.mask[truth.slices]
        inside, lesion = inside + int((mask & lesions).sum()), lesion + int(lesions.sum())
        masked, total = masked + int(mask.sum()), total + mask.size
    return inside / lesion if lesion else float("nan"), masked / total
